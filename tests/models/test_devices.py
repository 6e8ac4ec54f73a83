"""Every family in float32 on `--device` (the CPU if it is not given) against itself in float64 on the CPU."""

import copy
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, randomise, tiny_batch, tiny_cola

from opencola.layers.llama import LlamaConfig
from opencola.models import build
from opencola.models.ar.network import ARConfig
from opencola.models.llada.network import LLaDAConfig
from opencola.models.plaid.network import PlaidConfig

TRUNK = LlamaConfig(width=32, num_layers=2, num_heads=2, ffn_dim=48)
PROMPTS = [[5, 9, 2, 2, 7], [11], [8, 1, 20, 3, 3, 3, 4, 12, 9]]
FAMILIES = {
    "cola": lambda: tiny_cola(dit={"head_dim": 16}),
    "ar": lambda: randomise(build.build(ARConfig(VOCABULARY, TRUNK))),
    "llada": lambda: randomise(build.build(LLaDAConfig(VOCABULARY, TRUNK))),
    "plaid": lambda: build.build(PlaidConfig(VOCABULARY, 8, TRUNK)).double(),
}


@pytest.fixture(params=FAMILIES)
def both(request: pytest.FixtureRequest, device: torch.device) -> tuple[str, Any, Any]:
    """A family, its model in float64 on the CPU, and the same in float32 on the device."""
    model = FAMILIES[request.param]()
    return request.param, model, copy.deepcopy(model).float().to(device)


def test_losses_and_gradients(both: tuple[str, Any, Any], device: torch.device) -> None:
    _, model, there = both
    batch = tiny_batch()
    expected, found = model.loss(batch), there.loss(batch.to(device))
    torch.testing.assert_close(found.total.cpu().double(), expected.total, rtol=1e-4, atol=1e-5)
    for loss in (expected, found):
        loss.total.backward()
    largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    for (name, here), other in zip(model.named_parameters(), there.parameters(), strict=True):
        assert (here.grad is None) == (other.grad is None), name
        if here.grad is not None:
            torch.testing.assert_close(other.grad.cpu().double(), here.grad, rtol=1e-3, atol=1e-4 * largest.item())


def test_texts(both: tuple[str, Any, Any]) -> None:
    family, *models = both
    fields = {"steps": 4} if family != "ar" else {}
    sampling = build.sampling_class(family)(max_new_tokens=10, **fields)
    texts = []
    for model in models:
        texts.append([[] for _ in PROMPTS])
        for blocks in model.eval().generate(PROMPTS, sampling):
            for block in blocks:
                texts[-1][block.sample] += block.tokens
    assert texts[0] == texts[1] and all(len(text) == 10 for text in texts[0])


def test_scores(both: tuple[str, Any, Any]) -> None:
    family, *models = both
    if family == "cola":
        pytest.importorskip("scipy", reason="torchdiffeq, which solves for log-densities, needs it")
    settings: Any = build.scoring_class(family)
    settings = settings() if family == "ar" else settings.quick()
    expected, found = (model.eval().score(PROMPTS, [[1, 2, 3]] * 3, settings).total for model in models)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
