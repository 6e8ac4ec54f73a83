"""Texts held to a grammar, against brute force: a grammar here is the list of its texts."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from opencola.errors import UserError
from opencola.models.constraint import agreed, best, check_room, fits, held, kept, masked, next_token

VOCABULARY, END = 4, 3
TEXTS = [(0, END), (0, 1, 1, END), (0, 1, 2, 0, END), (1, 0, 1, 0, 1, END), (2, 2, 2, 2, 2, 2, END), (1, END)]


class Listed:
    """What may be written is one of the texts, and nothing else."""

    def __init__(self, texts: Sequence[tuple[int, ...]] = TEXTS) -> None:
        self.texts = texts

    def rests(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        return [text[len(tokens) :] for text in self.texts if text[: len(tokens)] == tuple(tokens)]

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        following = {rest[0] for rest in self.rests(tokens) if rest}
        return torch.tensor([token in (following or {END}) for token in range(VOCABULARY)])

    def accepted(self, tokens: Sequence[int], new: Sequence[int]) -> int:
        for count, token in enumerate(new):
            if END not in tokens and not self.allowed(tokens)[token]:
                return count
            tokens = [*tokens, token]
        return len(new)

    def closing(self, tokens: Sequence[int]) -> list[int] | None:
        if END in tokens:
            return []
        return [*min(self.rests(tokens), key=len)] if self.rests(tokens) else None


class Branch(Exception):
    """A draw that the script does not have."""


def outcomes(run: Callable[[Callable[..., int]], Any]) -> dict[Any, float]:
    """Probability of each result of `run(choose)`, where choose(..., logits) draws from their softmax: all draws are
    gone through."""
    found: dict[Any, float] = Counter()

    def explore(script: list[int], weight: float) -> None:
        left = list(script)
        at: list[Tensor] = []

        def choose(*arguments: Any) -> int:
            if left:
                return left.pop(0)
            at.append(arguments[-1])
            raise Branch

        try:
            found[run(choose)] += weight
        except Branch:
            for token, p in enumerate(at[0].double().softmax(-1).tolist()):
                if p > 0:
                    explore([*script, token], weight * p)

    explore([], 1.0)
    return found


def written_whole(logits: Callable[[tuple[int, ...]], Tensor], room: int) -> dict[tuple[int, ...], float]:
    """Brute force: the texts that fit, a token at a time, each drawn among those behind which one of them goes on."""
    texts = [text for text in TEXTS if len(text) <= room]
    chances = {}
    for text in texts:
        chances[text] = 1.0
        for place in range(len(text)):
            p = logits(text[:place]).softmax(-1)
            open_ = {other[place] for other in texts if other[:place] == text[:place]}
            chances[text] *= float(p[text[place]] / sum(p[token] for token in open_))
    return chances


def random_logits(seed: int) -> Callable[[tuple[int, ...]], Tensor]:
    def logits(tokens: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(seed + sum((token + 1) * 7**at for at, token in enumerate(tokens)))
        return torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)

    return logits


def same(found: dict[Any, float], wanted: dict[Any, float]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("room", [2, 3, 4, 5, 6, 7])
def test_a_text_is_one_that_fits_with_the_chance_that_it_has(room: int) -> None:
    logits = random_logits(room)

    def write(choose: Callable[..., int]) -> tuple[int, ...]:
        tokens: tuple[int, ...] = ()
        while END not in tokens:
            tokens += (next_token(Listed(), tokens, logits(tokens), room - len(tokens), choose),)
        return tokens

    same(outcomes(write), written_whole(logits, room))


@pytest.mark.parametrize("room", [3, 4, 5, 6, 9])
def test_a_block_drawn_freely_and_held_is_distributed_as_one_written_token_by_token(room: int) -> None:
    """The logits of a block are those of its places, whatever its tokens; behind the end nothing counts."""
    rows = torch.stack([random_logits(room)((place,)) for place in range(7)])

    def block(choose: Callable[..., int]) -> tuple[int, ...]:
        free = [choose(row) for row in rows[:3]]
        tokens = held(Listed(), [], rows[:3], free, room, choose).tokens
        return tuple(tokens[: tokens.index(END) + 1] if END in tokens else tokens)

    wanted: dict[tuple[int, ...], float] = Counter()
    for text, p in written_whole(lambda tokens: rows[len(tokens)], room).items():
        wanted[text[:3]] += p
    same(outcomes(block), wanted)


def all_blocks(length: int) -> Iterator[tuple[int, ...]]:
    return itertools.product(range(VOCABULARY), repeat=length)


@pytest.mark.parametrize("room", [2, 4, 5, 8])
def test_what_is_kept_of_a_block_is_the_longest_beginning_that_can_be_ended(room: int) -> None:
    texts = [text for text in TEXTS if len(text) <= room]
    for block in all_blocks(5):
        beginnings = [count for count in range(6) if any(text[:count] == block[:count] for text in texts)]
        whole = any(block[: len(text)] == text for text in texts)
        assert kept(Listed(), [], block, room) == (5 if whole else max(beginnings))


def test_what_was_forced_is_counted() -> None:
    rows = torch.full((5, VOCABULARY), -5.0)
    rows[:, 0] = 1  # the model's own choice is 0 everywhere
    assert held(Listed(), [], rows, [0, 1, 1, END, 2], 9, lambda at, row: 1 / 0) == held(
        Listed(), [], rows, [0, 1, 1, END, 2], 4, lambda at, row: 1 / 0
    )

    def greedy(at: int, row: Tensor) -> int:
        return int(row.argmax())

    block = held(Listed(), [], rows, [0, 1, 1, 0, 0], 9, greedy)
    assert (block.tokens, block.forced) == ([0, 1, 1, END, 0], 1)
    block = held(Listed(), [0], rows, [2, 2, 2, 2, 2], 9, greedy)  # 1 or the end, then 1 or 2, ...
    assert (block.tokens[:4], block.forced) == ([1, 2, 0, END], 3)
    block = held(Listed(), [0], rows, [2, 2, 2, 2, 2], 3, greedy)  # 1 2 0 end is too long
    assert (block.tokens[:3], block.forced) == ([1, 1, END], 3)


def test_a_block_that_is_nowhere_right_is_what_is_written_token_by_token() -> None:
    rng = random.Random(0)
    for _ in range(50):
        room = rng.randint(2, 8)
        rows = torch.stack([random_logits(rng.randrange(999))((place,)) for place in range(8)])
        one: list[int] = []
        while END not in one:
            row = rows[len(one)]
            one.append(next_token(Listed(), one, row, room - len(one), lambda row: int(row.argmax())))
        wrong = [next(t for t in range(VOCABULARY) if not Listed().allowed(one[:at])[t]) for at in range(len(one))]
        block = held(Listed(), [], rows, wrong, room, lambda at, row: int(row.argmax()))
        assert (block.tokens, block.forced) == (one, len(one))


@pytest.mark.parametrize("room", [4, 5, 9])
def test_a_checked_draft_is_distributed_as_the_models_own_text(room: int) -> None:
    """Whatever is drafted: what stands, and the token behind it, are the model's own."""
    logits = random_logits(3)
    for drafted in ([0, 1, 2], [0, 1, 1], [0, 2, 2], [0, END, 1]):
        rows = torch.stack([logits(tuple(drafted[: place + 1])) for place in range(3)])

        def check(choose: Callable[..., int], rows: Tensor = rows, drafted: list[int] = drafted) -> tuple[int, ...]:
            count, own = agreed(Listed(), [], rows, drafted, room, choose)
            tokens = [*drafted[:count], own]
            return tuple(tokens[: tokens.index(END) + 1] if END in tokens else tokens)

        begun = {t: p for t, p in written_whole(logits, room).items() if t[0] == 0}
        for tokens, p in outcomes(check).items():
            chance = sum(q for text, q in begun.items() if text[: len(tokens)] == tokens) / sum(begun.values())
            assert p == pytest.approx(chance, abs=1e-12)


def test_a_draft_may_be_taken_for_what_it_is() -> None:
    rows = torch.zeros(3, VOCABULARY)
    rows[:, 0], rows[:, 2] = 1, 0.5

    def own(at: int, row: Tensor) -> int:
        return int(row.argmax())

    assert agreed(Listed(), [], rows, [0, 1, 1], 9, own, lambda at, row, token: True) == (3, END)
    assert agreed(Listed(), [], rows, [0, 1, 1], 9, own, lambda at, row, token: at < 2) == (2, 2)
    assert agreed(Listed(), [], rows, [0, 1, 1], 4, own, lambda at, row, token: at < 2) == (2, 1)
    assert agreed(Listed(), [], rows, [0, 2, 1], 9, own, lambda at, row, token: True) == (1, 1)
    assert agreed(Listed(), [], rows, [0, END, 1], 9, own, lambda at, row, token: True)[0] == 3


def test_of_candidates_those_that_need_no_forcing_are_the_best() -> None:
    assert best(Listed(), [], [[0, 1, 2], [0, 2, 2], [0, END, 2], [1, 0, 1]], 9) == [0, 2, 3]
    assert best(Listed(), [], [[0, 2, 2], [3, 0, 0], [0, 1, 0], [1, 0, 2]], 9) == [2, 3]


def test_tokens_beyond_the_grammars_vocabulary_are_never_chosen() -> None:
    row = masked(Listed(), [0], torch.zeros(9))
    assert torch.isfinite(row).nonzero().flatten().tolist() == [1, END]


def test_what_cannot_fit_is_said_before_it_is_begun() -> None:
    check_room(Listed(), 2)
    with pytest.raises(
        UserError, match="max_new_tokens 1 is too few: the shortest text .* takes 2, with the token that"
    ):
        check_room(Listed(), 1)
    with pytest.raises(UserError, match="no text was found that this grammar allows"):
        check_room(Listed([]), 9)
    with pytest.raises(ValueError, match="with room for 1, no text of the grammar goes on behind 1 tokens"):
        next_token(Listed([(0, 1, END)]), [0], torch.zeros(VOCABULARY), 1, lambda row: int(row.argmax()))
    assert fits(Listed(), [0], 1) and not fits(Listed(), [], 1) and not fits(Listed(), [2, 1], 9)
