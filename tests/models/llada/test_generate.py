"""Unmasking against exact conditionals and by hand, and generation with a model."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from any_order import LENGTH, MASK, TEXTS, Arbitrary, Exact, by_order, language
from tiny import VOCABULARY, tiny_llada
from torch import Tensor

from opencola.models.llada.generate import guided, proposer, unmask
from opencola.models.llada.model import LLaDA
from opencola.models.llada.sampling import LLaDASampling
from opencola.models.stopping import Text

PROMPTS = [[1, 2, 3], [], [7, 8, 9, 10, 11, 12], [4]]


def written(predict: Exact | Arbitrary, samples: int, steps: int = LENGTH, **fields: Any) -> Tensor:
    """Number of each of TEXTS among so many samples, (27,)."""
    sampling = LLaDASampling(**{"temperature": 1.0, "remasking": "random", "max_new_tokens": LENGTH} | fields)
    tokens, block = torch.full((samples, LENGTH), MASK), torch.arange(LENGTH).expand(samples, -1)
    unmask(predict, tokens, block, steps, proposer([Text([], sampling, id=i) for i in range(samples)], MASK))
    return (tokens[:, None] == TEXTS).all(-1).sum(0)


def chi_squared(counts: Tensor, joint: Tensor) -> float:
    expected = counts.sum() * joint
    return ((counts - expected) ** 2 / expected).sum().item()


def test_one_token_at_a_time_samples_the_joint_distribution() -> None:
    """54.05 is the 0.1 % point of chi-squared with 26 degrees of freedom; all at once is far above it."""
    joint = language(3)
    assert (8000 * joint).min() > 5
    assert chi_squared(written(Exact(joint), 8000), joint) < 54.05
    assert chi_squared(written(Exact(joint), 8000, steps=1), joint) > 200


def test_temperature_is_that_of_every_conditional() -> None:
    """A sharper conditional in every step, in random order."""
    predict = Arbitrary(4)
    orders = torch.stack(list(by_order(_Normalised(predict, 0.6))))
    joint = orders.logsumexp(0).exp() / len(orders)
    counts = written(predict, 8000, temperature=0.6)
    rare = 8000 * joint < 5
    together = torch.cat((counts[~rare], counts[rare].sum()[None])), torch.cat((joint[~rare], joint[rare].sum()[None]))
    assert chi_squared(*together) < 54.05


class _Normalised(Arbitrary):
    """The conditionals of another predictor at a temperature."""

    def __init__(self, predict: Arbitrary, temperature: float) -> None:
        self.table = (predict.table / temperature).log_softmax(-1)


def fixed(tokens: Tensor) -> Tensor:
    """Places 0..4; the surest are 3, 0, 4, 1, 2; once place 3 is written, place 1 comes before 0."""
    sure = torch.tensor([3.0, 1.0, 0.5, 4.0, 2.0]).expand(len(tokens), -1).clone()
    sure[tokens[:, 3] != MASK, 1] = 3.5
    return torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 1, 0]), 3) * sure[..., None]


@pytest.mark.parametrize(
    ("steps", "orders"),
    [
        (5, [[3], [1], [0], [4], [2]]),
        (2, [[0, 3, 4], [1, 2]]),
        (3, [[0, 3], [1, 4], [2]]),
        (9, [[3], [1], [0], [4], [2]]),
    ],
)
def test_the_surest_tokens_are_kept_first(steps: int, orders: list[list[int]]) -> None:
    seen: list[Tensor] = []

    def predict(tokens: Tensor) -> Tensor:
        seen.append(tokens.clone())
        return fixed(tokens)

    tokens, block = torch.full((1, 5), MASK), torch.arange(5)[None]
    unmask(predict, tokens, block, steps, proposer([Text([], LLaDASampling(max_new_tokens=5))], MASK))
    states = [*seen, tokens]
    kept = [
        ((before == MASK) & (after != MASK)).nonzero()[:, 1].tolist() for before, after in itertools.pairwise(states)
    ]
    assert kept == orders
    assert tokens.tolist() == [[0, 1, 2, 1, 0]]


def test_guidance_is_an_extrapolation_and_one_is_none() -> None:
    predict, prompt = Arbitrary(0), torch.tensor([[True, False, False]])
    tokens = torch.tensor([[2, MASK, 1]])
    conditional, free = predict(tokens), predict(torch.tensor([[MASK, MASK, 1]]))
    torch.testing.assert_close(guided(predict, prompt, 3.0, MASK)(tokens), free + 3 * (conditional - free))
    assert guided(predict, prompt, 1.0, MASK) is predict


def run(model: LLaDA, prompts: Sequence[Sequence[int]], **fields: Any) -> list[tuple[list[int], str]]:
    """New tokens of every sample, and why it ended."""
    rest = {name: fields.pop(name) for name in ("ids", "eos_ids", "stop") if name in fields}
    sampling = LLaDASampling(**{"max_new_tokens": 10, "block_length": 4, "guidance": 1.0} | fields)
    out = [([], "") for _ in prompts]
    for blocks in model.generate(prompts, sampling, **rest):
        for block in blocks:
            assert not out[block.sample][1]
            out[block.sample] = (out[block.sample][0] + block.tokens, block.finished)
    return out


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "remasking": "random", "steps": 2},
    {"guidance": 2.5, "temperature": 1.0, "top_k": 5, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_samples_do_not_depend_on_each_other(settings: dict[str, Any]) -> None:
    """Nor on when others end."""
    model, ids = tiny_llada(), [5, 3, 8, 1]
    eos = [0, 5, 9, 13, 17]
    together = run(model, PROMPTS, ids=ids, eos_ids=eos, **settings)
    alone = [run(model, [p], ids=[i], eos_ids=eos, **settings)[0] for p, i in zip(PROMPTS, ids, strict=True)]
    assert together == alone
    backwards = run(model, PROMPTS[::-1], ids=ids[::-1], eos_ids=eos, **settings)
    assert backwards[::-1] == together


def test_every_sample_has_its_budget_and_own_draws() -> None:
    model = tiny_llada()
    out = run(model, [[1], [1], [1]], temperature=1.0)
    assert all(len(tokens) == 10 and why == "length" for tokens, why in out)
    assert all(0 <= t < VOCABULARY for tokens, _ in out for t in tokens)
    assert out[0] != out[1] != out[2]
    assert run(model, [[1]], temperature=1.0, seed=1)[0] != out[0]
    assert run(model, []) == []


def test_samples_end() -> None:
    model = tiny_llada()
    ((tokens, _),) = run(model, [[1, 2]], temperature=1.0)
    first = tokens.index(tokens[5])
    assert run(model, [[1, 2]], temperature=1.0, eos_ids=[tokens[5]]) == [(tokens[:first], "eos")]
    found = run(model, [[1, 2]], temperature=1.0, stop=lambda sample, new: 3 if len(new) > 5 else None)
    assert found[0][1] == "stop"


def test_greedy_generation_by_hand() -> None:
    """Blocks from left to right, all masks there from the start, with guidance; sample by sample, without padding."""
    model = tiny_llada()
    for prompt in ([1, 2, 3], [7, 8, 9, 10, 11]):
        tokens = prompt + [VOCABULARY] * 6
        for begin in (len(prompt), len(prompt) + 4):
            block = range(begin, min(begin + 4, len(tokens)))
            while any(tokens[i] == VOCABULARY for i in block):
                blind = [VOCABULARY] * len(prompt) + tokens[len(prompt) :]
                conditional, free = model(torch.tensor([tokens]))[0], model(torch.tensor([blind]))[0]
                chance = (free + 2 * (conditional - free)).softmax(-1)
                place = max((i for i in block if tokens[i] == VOCABULARY), key=lambda i: chance[i].max().item())
                tokens[place] = int(chance[place].argmax())
        ours = run(model, [prompt], max_new_tokens=6, guidance=2.0)
        assert ours == [(tokens[len(prompt) :], "length")]


def test_prompts_beyond_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="prompt 1 has a token id outside"):
        run(tiny_llada(), [[1], [VOCABULARY]])
