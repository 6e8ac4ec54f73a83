"""When samples end, against a loop that takes one token at a time."""

import random
from collections.abc import Sequence

import pytest
import torch

from opencola.models.cola.prompts import Prompts
from opencola.models.cola.release import ReleaseStop
from opencola.models.sampling import Sampling
from opencola.models.stopping import Text, TokenBlock

EOS, STOP = 0, 1  # the stop rule below ends a sample at token 1, keeping what stands before it


def stop(sample: int, tokens: list[int]) -> int | None:
    return tokens.index(STOP) if STOP in tokens else None


def prompts(known: Sequence[int], pinned: Sequence[int] | None = None) -> Prompts:
    """Prompts that give so many tokens, or pin so many latents, of the first block."""
    zeros = torch.zeros(len(known))
    pins = zeros if pinned is None else torch.tensor(pinned)
    return Prompts(zeros, zeros, zeros, pins, [[9] * count for count in known])


def token_by_token(new: list[int], budget: int, eos: bool) -> tuple[list[int], str]:
    """All tokens that one sample gives out, and why it ends."""
    out: list[int] = []
    for token in new:
        if token == EOS and eos:
            return out, "eos"
        if token == STOP:
            return out, "stop"
        out.append(token)
        if len(out) == budget:
            return out, "length"
    return out, ""


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4, 8])
def test_own_rule(size: int, ignore_eos: bool) -> None:
    rng = random.Random(size)
    reasons = set()
    for _ in range(60):
        batch, budget = 4, rng.randint(1, 20)
        known = [rng.randrange(size) for _ in range(batch)]
        texts = [[rng.choice([EOS, STOP, *range(2, 14)]) for _ in range(size * 24)] for _ in range(batch)]
        sampling = Sampling(max_new_tokens=budget, ignore_eos=ignore_eos)
        growing = [Text([9], sampling, i, eos_ids=[EOS], stop=stop) for i in range(batch)]
        found: list[list[TokenBlock]] = [[] for _ in range(batch)]
        active, number = list(range(batch)), 0
        while active:
            start = {i: number * size + (known[i] if number == 0 else 0) for i in active}
            out = [growing[i].take(texts[i][start[i] : (number + 1) * size]) for i in active]
            assert [block.sample for block in out] == active
            for block in out:
                found[block.sample].append(block)
            active, number = [block.sample for block in out if not block.finished], number + 1
        for i in range(batch):
            tokens, reason = token_by_token(texts[i][known[i] :], budget, not ignore_eos)
            assert [token for block in found[i] for token in block.tokens] == tokens
            assert [block.finished for block in found[i]] == [""] * (len(found[i]) - 1) + [reason]
            given = [min(size - known[i], len(tokens))]  # every block but the last is given out whole, at once
            while sum(given) < len(tokens):
                given.append(min(size, len(tokens) - sum(given)))
            assert [len(block.tokens) for block in found[i]][: len(given)] == given
            reasons.add(reason)
    assert reasons == ({"stop", "length"} if ignore_eos else {"stop", "length", "eos"})


def test_a_stop_rule_may_reach_back_over_blocks_given_out() -> None:
    text = Text([], Sampling(), stop=lambda sample, tokens: 2 if len(tokens) > 4 else None)
    assert text.take([2, 3, 4, 5]) == TokenBlock(0, [2, 3, 4, 5], "")
    assert text.take([6, 7, 8, 9]) == TokenBlock(0, [], "stop")
    assert text.blocks == 2


def test_the_stop_rule_sees_what_stands_before_the_end_of_text_only() -> None:
    seen: list[list[int]] = []
    stop = lambda sample, tokens: seen.append(list(tokens))  # noqa: E731
    text = Text([9], Sampling(max_new_tokens=3), eos_ids=[EOS], stop=stop)
    assert text.take([2, EOS, STOP]) == TokenBlock(0, [2], "eos")
    assert seen == [[2]]


@pytest.mark.parametrize(
    ("budget", "pinned", "texts", "expected"),
    [
        (8, [0, 0], [[[2, 3, 4, 5]] * 2, [[6, 7, 8, 9]] * 2], ["", "length"]),  # whole blocks, until budget is reached
        (5, [0, 0], [[[2, 3, 4, 5]] * 2, [[6, 7, 8, 9]] * 2], ["", "length"]),
        (99, [0, 0], [[[2, EOS, 4, 5], [2, 3, 4, 5]], [[2, 3, 4, 5], [2, 3, 4, EOS]]], ["", "eos"]),  # all have to end
        (2, [1, 0], [[[9, 3, 4, 5], [2, 3, 4, 5]]], ["length"]),
        (99, [1, 0], [[[EOS, 3, 4, 5], [2, EOS, 4, 5]]], ["eos"]),  # one in the prompt's part counts
    ],
)
def test_release_rule(budget: int, pinned: list[int], texts: list[list[list[int]]], expected: list[str]) -> None:
    sampling = Sampling(max_new_tokens=budget)
    growing = [Text([], sampling, i, eos_ids=[EOS]) for i in range(2)]
    rule = ReleaseStop(prompts(pinned, pinned), growing, chunk=4)
    for number, (blocks, reason) in enumerate(zip(texts, expected, strict=True)):
        start = pinned if number == 0 else [0, 0]
        out = [TokenBlock(i, blocks[i][start[i] :], reason) for i in range(2)]  # type: ignore[arg-type]
        assert rule.take(growing, blocks) == out
