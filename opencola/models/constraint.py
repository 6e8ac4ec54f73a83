"""Texts held to a grammar: which tokens may follow, in a block that is written at once and one by one, within a budget.

What may follow is given by a `Constraint`; here is what generation does with it. A token is only ever chosen if the
text can still be brought to its end within the room that is left, so that every text that is begun is a whole one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from opencola.errors import UserError

TRIES = 8
"""Number of tokens to choose, each one behind which no end would fit, before the way to one that is known is taken."""


class Constraint(Protocol):
    """What one text may be. Every answer depends on the tokens asked about alone, new ones of the text, no prompt's."""

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        """Whether each token may follow these (V,): one that ends the text where it may end; behind that, no other."""

    def accepted(self, tokens: Sequence[int], new: Sequence[int]) -> int:
        """How many of the new tokens, from the first on, may follow these. Behind an end all do: nobody reads them."""

    def closing(self, tokens: Sequence[int]) -> list[int] | None:
        """Tokens that bring the text to its end, the last one an end; none behind an end; None: no way is known.

        One that begins with a token x leaves one no longer than the rest of it behind x.
        """


@dataclass(frozen=True)
class Held:
    """A block that the constraint accepts."""

    tokens: list[int]
    forced: int
    """Number of tokens that are not those which were chosen freely."""


def check_room(constraint: Constraint, max_new_tokens: int) -> None:
    """Raise UserError where no text that fits is known, before any is begun."""
    closing = constraint.closing([])
    if closing is None:
        raise UserError("no text was found that this grammar allows")
    if len(closing) > max_new_tokens:
        raise UserError(
            f"max_new_tokens {max_new_tokens} is too few: the shortest text of this grammar that was found takes "
            f"{len(closing)}, with the token that ends it"
        )


def fits(constraint: Constraint, tokens: Sequence[int], room: int) -> bool:
    """Whether a way is known to end the text of these tokens with at most `room` more."""
    closing = constraint.closing(tokens)
    return closing is not None and len(closing) <= room


def masked(constraint: Constraint, tokens: Sequence[int], logits: Tensor) -> Tensor:
    """Logits (V,) with -inf where the token may not follow; ids beyond the constraint's may not."""
    allowed = constraint.allowed(tokens).to(logits.device)
    allowed = torch.nn.functional.pad(allowed, (0, logits.shape[-1] - len(allowed)))
    return logits.masked_fill(~allowed, -torch.inf)


def next_token(
    constraint: Constraint, tokens: Sequence[int], logits: Tensor, room: int, choose: Callable[[Tensor], int]
) -> int:
    """The token to follow, chosen by logits (V,) among those that may.

    tokens: the new ones so far; room: how many more there may be, this one and the end among them; choose(logits (V,))
    -> token. One after which the text could not be ended is left out and chosen again, which is a draw from the
    distribution without such tokens: with fresh noise, or with the same for every token (torch.multinomial's). The text
    so far must fit.
    """
    logits = masked(constraint, tokens, logits)
    for _ in range(TRIES):
        token = choose(logits)
        if fits(constraint, [*tokens, token], room - 1):
            return token
        logits = logits.clone()
        logits[token] = -torch.inf
        if not torch.isfinite(logits).any():
            break
    closing = constraint.closing(tokens)
    if not closing or len(closing) > room:
        raise ValueError(f"with room for {room}, no text of the grammar goes on behind {len(tokens)} tokens")
    return closing[0]


def kept(constraint: Constraint, tokens: Sequence[int], new: Sequence[int], room: int) -> int:
    """How many of the new tokens, from the first on, may follow these and leave room for an end; behind one all do."""
    count = constraint.accepted(tokens, new[:room])
    while count and not fits(constraint, [*tokens, *new[:count]], room - count):
        count -= 1
    return len(new) if constraint.closing([*tokens, *new[:count]]) == [] else count


def held(
    constraint: Constraint,
    tokens: Sequence[int],
    logits: Tensor,
    free: Sequence[int],
    room: int,
    choose: Callable[[int, Tensor], int],
) -> Held:
    """A block that was chosen freely, place by place by logits (R, V), with others where it breaks the grammar.

    tokens: the new ones before the block; free: the block's R; choose(place, logits (V,)) -> token. As a token that was
    drawn is kept where it may follow, and else drawn again among those that may, it is distributed as they are.
    """
    block, forced = list(free), 0
    place = kept(constraint, tokens, block, room)
    while place < len(block):
        before = [*tokens, *block[:place]]
        token = next_token(constraint, before, logits[place], room - place, partial(choose, place))
        forced += token != block[place]
        block[place] = token
        place += 1
        place += kept(constraint, [*before, token], block[place:], room - place)
    return Held(block, forced)


def best(constraint: Constraint, tokens: Sequence[int], candidates: Sequence[Sequence[int]], room: int) -> list[int]:
    """Places of the candidates for a block that need no forcing; if all do, of those that keep the most tokens."""
    counts = [kept(constraint, tokens, candidate, room) for candidate in candidates]
    return [place for place, count in enumerate(counts) if count == max(counts)]


def agreed(
    constraint: Constraint,
    tokens: Sequence[int],
    logits: Tensor,
    drafted: Sequence[int],
    room: int,
    choose: Callable[[int, Tensor], int],
    takes: Callable[[int, Tensor, int], bool] | None = None,
) -> tuple[int, int]:
    """How many of a draft's tokens (S,) stand, the certain first one among them, and the token to follow those.

    tokens: the new ones before the draft; logits (S, V): of what follows each of its tokens; choose(place, logits (V,))
    -> the model's own token at a place. A drafted one stands that is the model's own, so that what is written is
    distributed as what the model writes by itself; with `takes(place, logits (V,), token)` one that this takes.
    """
    for place in range(1, len(drafted) + 1):
        before = [*tokens, *drafted[:place]]
        if constraint.closing(before) == []:
            return len(drafted), drafted[-1]
        left, row, new = room - place, logits[place - 1], drafted[place : place + 1]
        if (
            takes is not None
            and new
            and kept(constraint, before, new, left)
            and takes(place, masked(constraint, before, row), new[0])
        ):
            continue
        own = next_token(constraint, before, row, left, partial(choose, place))
        if takes is not None or [own] != [*new]:
            return place, own
    raise AssertionError("no token is the one behind the last")
