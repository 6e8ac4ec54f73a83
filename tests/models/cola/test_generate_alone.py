"""A sample's latents and tokens are the same alone and in any batch, bit for bit in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, tiny_cola
from torch import Tensor

LENGTHS = (0, 2, 4, 11, 21, 60, 3)
IDS = (5, 0, 9, 3, 70, 4, 8)
Generate = Callable[..., Any]

SETTINGS: dict[str, dict[str, Any]] = {
    "euler": {},
    "no guidance": {"guidance": 1.0},
    "heun": {"solver": "heun"},
    "midpoint": {"solver": "midpoint"},
    "stochastic": {"solver": "stochastic", "eta": 0.7},
    "adaptive": {"solver": "adaptive", "tolerance": 0.3, "steps": 1, "max_new_tokens": 5},
    "candidates": {"candidates": 3, "temperature": 0.8, "solver": "stochastic"},
    "sampled": {"temperature": 1.0, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.3},
    "partial": {"first_block": "partial", "repaint_repeats": 2, "solver": "stochastic"},
    "left pad": {"first_block": "left_pad"},
    "right pad": {"first_block": "right_pad"},
}
MODELS: dict[str, dict[str, Any]] = {
    "blocks of 4": {},
    "blocks of 16": {"dit": {"block_size": 16}},
    "blocks of 8, patches of 2": {"vae": {"patch_size": 2}, "dit": {"block_size": 8}},
    "blocks of 4 behind a trunk": {"dit": {"trunk_layers": 1}},
    "blocks of 8, block-causal": {
        "vae": {"attention": "block_causal", "block_size": 8, "multi_query": True},
        "dit": {"block_size": 8},
    },
}
CASES = [
    (model, settings) for model in MODELS for settings in SETTINGS if model == "blocks of 4" or settings == "euler"
]


@pytest.mark.parametrize(("model_name", "settings_name"), CASES)
def test_alone_and_in_any_batch(generate: Generate, exact_blas: bool, model_name: str, settings_name: str) -> None:
    model, settings = tiny_cola(**MODELS[model_name]), SETTINGS[settings_name]
    prompts = [[(7 * i + length) % VOCABULARY for i in range(length)] for length in LENGTHS]

    def same(a: Tensor, b: Tensor) -> None:
        if exact_blas:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)

    together = generate(model, prompts, ids=IDS, **settings)
    assert len({tuple(tokens) for tokens in together.tokens}) == len(LENGTHS)
    batches = [[place] for place in range(len(LENGTHS))] + [[6, 4, 1], [0, 3]]
    for places in batches:
        run = generate(model, [prompts[p] for p in places], ids=[IDS[p] for p in places], **settings)
        assert run.tokens == [together.tokens[p] for p in places]
        assert len(run.latents) >= len(places)
        for key, z in run.latents.items():
            same(z, together.latents[key])
