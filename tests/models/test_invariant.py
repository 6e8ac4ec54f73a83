"""In float32 on a CPU a sample is the same to the bit, alone and in any batch, in any order, on one thread and two."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import randomise, tiny_cola
from torch import Tensor

from opencola.layers.llama import LlamaConfig
from opencola.models import build
from opencola.models.ar.model import AR
from opencola.models.ar.network import ARConfig
from opencola.models.llada.model import LLaDA
from opencola.models.llada.network import LLaDAConfig
from opencola.models.plaid.model import Plaid
from opencola.models.plaid.network import PlaidConfig

VOCABULARY = 37
LENGTHS = (0, 2, 5, 11, 21, 60, 3, 11, 11)
IDS = (5, 0, 9, 3, 70, 4, 8, 2, 6)
BATCHES = [*([place] for place in range(9)), [6, 2, 4], [3, 1, 7], [5, 8, 0], [3, 6, 8, 0, 5, 2, 7, 1, 4]]
TRUNK = LlamaConfig(width=84, num_layers=2, num_heads=6, num_kv_heads=2, ffn_dim=75)
VAE = {"vocab_size": VOCABULARY, "latent_dim": 5, "width": 66, "ffn_dim": 90, "num_heads": 3}
DIT = {"latent_dim": 5, "width": 45, "num_heads": 3, "head_dim": 22, "expansion": 3}
PREDICTS = {"num_layers": 3, "trunk_layers": 2, "vocab_size": VOCABULARY}
MODELS: dict[str, Callable[[], Any]] = {
    "cola": lambda: tiny_cola(VAE, DIT),
    "cola, blocks of 1, gelu": lambda: tiny_cola(
        VAE | {"patch_size": 3, "multi_query": True, "activation": "gelu", "ffn_dim": 91}, DIT | {"block_size": 1}
    ),
    "cola, blocks of 8, silu": lambda: tiny_cola(
        VAE | {"attention": "block_causal", "block_size": 8, "activation": "silu", "ffn_dim": 91, "post_norm": False},
        DIT | {"block_size": 8},
    ),
    "cola, two speeds": lambda: tiny_cola(VAE, DIT | {"num_layers": 3, "trunk_layers": 2}),
    "cola, checked": lambda: tiny_cola(VAE, DIT | PREDICTS | {"block_size": 3}),
    "cola, ranked": lambda: tiny_cola(VAE, DIT | PREDICTS | {"block_size": 2}),
    "ar": lambda: randomise(AR(ARConfig(VOCABULARY, TRUNK))),
    "ar, tied": lambda: randomise(AR(ARConfig(VOCABULARY, TRUNK, tied=True))),
    "llada": lambda: randomise(LLaDA(LLaDAConfig(VOCABULARY, TRUNK))),
    "plaid": lambda: Plaid(PlaidConfig(VOCABULARY, 7, TRUNK)),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "cola": {"steps": 3, "guidance": 3.0, "max_new_tokens": 9},
    "ar": {"max_new_tokens": 6},
    "llada": {"max_new_tokens": 9, "block_length": 3, "guidance": 2.0},
    "plaid": {"steps": 3, "max_new_tokens": 6, "guidance": 1.5},
}
SETTINGS["cola, checked"] = SETTINGS["cola"] | {"verify": "lossless", "temperature": 1.0}
SETTINGS["cola, ranked"] = SETTINGS["cola"] | {"candidates": 3, "rank": "trunk"}
SCORING: dict[str, dict[str, Any]] = {"cola": {"steps": 2}, "cola, checked": {"estimator": "trunk"}}
Found = dict[int, tuple[list[int], Tensor, dict[str, Tensor]]]


def results(model: Any, name: str, places: Sequence[int], patch: pytest.MonkeyPatch) -> Found:
    """Of each id its tokens, all logits that these were chosen by, and what its score is made of."""
    family = name.partition(",")[0]
    logits: dict[int, list[Tensor]] = {}

    def record(values: Tensor, ids: Sequence[int], *where: str) -> None:
        for i, value in zip(ids, values, strict=True):
            logits.setdefault(i, []).append(value.flatten())

    patch.setattr(f"opencola.models.{family}.generate.check_logits", record)
    patch.setattr("opencola.models.cola.verify.check_logits", record)
    ids = [IDS[place] for place in places]
    texts: dict[int, list[int]] = {i: [] for i in ids}
    prompts = [[(7 * i + 5 * place) % VOCABULARY for i in range(LENGTHS[place])] for place in places]
    for blocks in model.generate(
        prompts, build.sampling_class(family)(**SETTINGS.get(name, SETTINGS[family])), ids=ids
    ):
        for block in blocks:
            texts[ids[block.sample]] += block.tokens
    continuations = [[(3 * i + place) % VOCABULARY for i in range(1 + place % 3)] for place in places]
    scoring = replace(build.scoring_class(family).quick(), **SCORING.get(name, SCORING.get(family, {})))
    score = model.score(prompts, continuations, scoring, ids=ids)
    figures = score.parts | {"total": score.total, "standard_error": score.standard_error.nan_to_num()}
    of_row = [{name: values[row] for name, values in figures.items()} for row in range(len(ids))]
    return {i: (texts[i], torch.cat(logits[i]), row) for i, row in zip(ids, of_row, strict=True)}


@pytest.mark.usefixtures("need_kernels")
@pytest.mark.parametrize("name", MODELS)
def test_alone_and_in_any_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    model = MODELS[name]().float()
    together = results(model, name, range(len(LENGTHS)), monkeypatch)
    assert len({tuple(tokens) for tokens, *_ in together.values()}) > len(LENGTHS) // 2
    try:
        for threads, places in [(1, places) for places in BATCHES] + [(2, places) for places in BATCHES[8:]]:
            torch.set_num_threads(threads)
            for i, (tokens, logits, score) in results(model, name, places, monkeypatch).items():
                expected_tokens, expected_logits, expected_score = together[i]
                assert tokens == expected_tokens and torch.equal(logits, expected_logits)
                assert all(torch.equal(value, expected_score[part]) for part, value in score.items())
    finally:
        torch.set_num_threads(1)
