"""What every family asks of the token ids that it is given."""

from collections.abc import Sequence

from opencola.errors import UserError
from opencola.models.constraint import check_room
from opencola.models.stopping import Text


def sample_ids(prompts: Sequence[object], ids: Sequence[int] | None) -> list[int]:
    """The samples' ids, which decide their draws: their places in the list when not given."""
    return list(range(len(prompts))) if ids is None else list(ids)


def checked_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> list[list[int]]:
    """The prompts (token ids, maybe none) as lists. Raises UserError, naming the prompt, for other ids."""
    texts = [list(prompt) for prompt in prompts]
    for number, text in enumerate(texts):
        _check(text, f"prompt {number}", vocab_size)
    return texts


def checked_texts(
    prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], vocab_size: int
) -> list[list[int]]:
    """Each prompt with its continuation behind it. Raises UserError, naming it, for an empty continuation and for
    ids beyond the vocabulary."""
    texts = [[*prompt, *continuation] for prompt, continuation in zip(prompts, continuations, strict=True)]
    for number, (text, continuation) in enumerate(zip(texts, continuations, strict=True)):
        if not continuation:
            raise UserError(f"continuation {number} is empty")
        _check(text, f"text {number}", vocab_size)
    return texts


def _check(tokens: list[int], name: str, vocab_size: int) -> None:
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise UserError(f"{name} has a token id outside 0..{vocab_size - 1}")


def check_held(text: Text) -> None:
    """Raise UserError where a text is to be held to a constraint, and cannot be, or cannot be in its budget."""
    if text.constraint is None:
        return
    if not text.sampling.left_to_right:
        raise UserError(f"{text.sampling.owner} cannot be held to a grammar: it does not write from left to right")
    if text.sampling.ignore_eos or text.sampling.ends_together:
        raise UserError("a text that is held to a grammar ends by itself: leave out ignore_eos and compatibility")
    check_room(text.constraint, text.sampling.max_new_tokens)
