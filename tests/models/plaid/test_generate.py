"""Ancestral sampling of a Plaid: batches do not matter, guidance is the gradient that it says."""

from typing import Any

import pytest
import torch

from opencola.layers.attention import masked
from opencola.layers.llama import LlamaConfig
from opencola.models.plaid.generate import clamp, guided
from opencola.models.plaid.model import Plaid
from opencola.models.plaid.network import PlaidConfig
from opencola.models.plaid.sampling import PlaidSampling

TRUNK = LlamaConfig(width=16, num_layers=1, num_heads=2, ffn_dim=24)


@pytest.fixture
def model() -> Plaid:
    torch.manual_seed(3)
    return Plaid(PlaidConfig(11, 4, TRUNK, 0.5)).double()


def sampling(**fields: Any) -> PlaidSampling:
    return PlaidSampling(**{"steps": 6, "max_new_tokens": 5, "guidance": 2.0, "temperature": 1.0, "seed": 4} | fields)


def texts(model: Plaid, prompts: list[list[int]], ids: list[int], **fields: Any) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    for blocks in model.generate(prompts, sampling(**fields), ids=ids):
        for block in blocks:
            found[block.sample] = block.tokens
            assert block.finished == "length"
    return found


def test_the_text_is_the_same_at_any_batch_size(model: Plaid) -> None:
    prompts = [[1, 2, 3], [4, 5, 6], [7], []]
    together = texts(model, prompts, [0, 1, 2, 3])
    alone = [texts(model, [prompt], [i])[0] for i, prompt in enumerate(prompts)]
    assert together == alone
    assert [len(text) for text in together] == [5, 5, 5, 5]
    assert texts(model, prompts, [9, 1, 2, 3])[0] != together[0]


def test_clamped_rows_are_draws_of_what_is_known() -> None:
    z, noise, x = (torch.randn(2, n, 4).double() for n in (5, 5, 3))
    gamma = torch.tensor(0.5).double()
    out = clamp(z, noise, x, gamma)
    torch.testing.assert_close(out[:, 3:], z[:, 3:])
    torch.testing.assert_close(
        (out[:, :3] - torch.sigmoid(-gamma).sqrt() * x) / torch.sigmoid(gamma).sqrt(), noise[:, :3]
    )


def test_a_sure_model_writes_its_word(model: Plaid) -> None:
    """Whose trunk says 7 everywhere, and whose decoder has little noise left."""
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
        model.head.bias[7] = 200
        model.schedule.start.fill_(-8)
    assert texts(model, [[1, 2]], [0], guidance=1.0) == [[7] * 5]


def test_guidance_is_the_gradient_of_the_prompts_log_probability(model: Plaid) -> None:
    z, first = torch.randn(1, 4, 4).double(), torch.zeros(1, 4, 4).double()
    shape, known = torch.tensor(0.6).double(), torch.tensor([[2, 5]])

    def log_p(at: torch.Tensor) -> float:
        with torch.no_grad():
            logs = model.logits(at, shape.expand(1), first, masked(None)).log_softmax(-1)
        return float(logs[0, 0, 2] + logs[0, 1, 5])

    moved = guided(model, z, shape, first, known, 1.5) - guided(model, z, shape, first, known, 0)
    gamma = model.schedule.gamma(shape)
    for row, channel in ((0, 1), (3, 2)):
        step = torch.zeros_like(z)
        step[0, row, channel] = 1e-5
        slope = (log_p(z + step) - log_p(z - step)) / 2e-5
        expected = 1.5 * float(torch.sigmoid(gamma) / torch.sigmoid(-gamma).sqrt()) * slope
        assert float(moved[0, row, channel].detach()) == pytest.approx(expected, rel=1e-5)


def test_bad_prompts_are_refused(model: Plaid) -> None:
    with pytest.raises(ValueError, match=r"prompt 1 has a token id outside 0\.\.10"):
        list(model.generate([[1], [11]], sampling()))
