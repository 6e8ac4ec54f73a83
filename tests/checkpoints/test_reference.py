"""The slow reference agrees with every fixture, so that what it says elsewhere can be trusted."""

from typing import Any

import pytest
import reference
import reference_generation
import torch
from reference import Model
from torch import Tensor
from torch.testing import assert_close

TOLERANCE: dict[str, Any] = {"atol": 2e-5, "rtol": 0}
SAMPLES = (0, 1)


@pytest.fixture(scope="module")
def slow_dit(folder) -> Model:
    return reference.read_model(folder / "cola_dit")


@pytest.fixture(scope="module")
def slow_vae(folder) -> Model:
    return reference.read_model(folder / "cola_vae")


def test_vae(slow_vae, stored) -> None:
    encoded, decoded = stored("vae_encode"), stored("vae_decode")
    for i in SAMPLES:
        mean, logvar = reference.encode(slow_vae, encoded[f"input_ids_{i}"])
        assert logvar is not None
        assert_close(mean.float(), encoded[f"mean_{i}"], **TOLERANCE)
        assert_close(logvar.float(), encoded[f"logvar_{i}"], **TOLERANCE)
        assert_close(reference.decode(slow_vae, decoded[f"z_{i}"]).float(), decoded[f"logits_{i}"], **TOLERANCE)


def test_dit(slow_dit, stored) -> None:
    prefix, block = stored("dit_prefix"), stored("dit_block")
    for i in SAMPLES:
        x, history = prefix[f"x_{i}"], block[f"prefix_{i}"]
        v = reference.dit_after(slow_dit, x[:0], x, prefix[f"t_{i}"])
        assert_close(v.float(), prefix[f"v_tok_{i}"], **TOLERANCE)
        v = reference.dit_after(slow_dit, history, block[f"block_{i}"], block[f"t_block_{i}"])
        assert_close(v.float(), block[f"v_cond_{i}"], **TOLERANCE)
        history, times = torch.cat((history, block[f"block_{i}"])), torch.full((len(block[f"block2_{i}"]),), 500.0)
        v = reference.dit_after(slow_dit, history, block[f"block2_{i}"], times)
        assert_close(v.float(), block[f"v_cond2_{i}"], **TOLERANCE)


def test_training(slow_dit, stored, meta) -> None:
    config, weights = slow_dit
    expected, gradients = stored("train_2l"), stored("train_2l_grads")
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    error, count = torch.zeros(()).double(), 0.0
    for i, sample in enumerate(meta["train_2l"]["samples"]):
        rows = (expected[f"{name}_{i}"] for name in ("z0", "z_noisy", "ts_noisy"))
        clean, noisy = reference.packed((config, leaves), *rows, sample["block_size"])
        assert_close(clean.float(), expected[f"v_clean_{i}"], **TOLERANCE)
        assert_close(noisy.float(), expected[f"v_noisy_{i}"], **TOLERANCE)
        mask = expected[f"loss_mask_{i}"]
        error = error + (mask * (noisy - expected[f"target_{i}"]).square().mean(-1)).sum()
        count += mask.sum().item()
    loss = error / max(1.0, count)
    assert loss.item() == pytest.approx(expected["loss"].item(), abs=1e-5)
    loss.backward()
    for name, gradient in gradients.items():
        found: Tensor | None = leaves[name].grad
        assert found is not None
        assert_close(found.float(), gradient, atol=2e-4 * gradient.abs().max().item(), rtol=0)


def test_probabilities(stored, meta) -> None:
    expected = stored("sampling")
    for case, settings in meta["sampling"].items():
        for sample, ids in enumerate(expected["generated_ids"].tolist()):
            logits = reference_generation.penalise(expected["logits"][sample], ids, settings["repetition_penalty"])
            for row, wanted in zip(logits, expected[f"probs_{case}"][sample], strict=True):
                arguments = (settings["temperature"], settings["top_k"], settings["top_p"])
                assert_close(reference_generation.probabilities(row, *arguments).float(), wanted, atol=1e-6, rtol=0)


def test_generation(slow_dit, slow_vae, stored, meta) -> None:
    expected = stored("generate")
    prompts = [expected[f"prompt_ids_{row}"].tolist() for row in range(3)]
    arguments = meta["generate"] | {"pad_id": meta["pad_token_id"], "stop_ids": [], "bf16_times": False}
    arguments["max_new_tokens"] = 2 * meta["block_size"] * meta["patch_size"]  # two blocks, to save time
    found = reference_generation.generate(
        slow_dit, slow_vae, prompts, lambda step, row: expected["noise"][step, row], arguments
    )
    for ids, all_ids in zip(found["output_ids"], meta["generate"]["output_ids"], strict=True):
        assert ids == all_ids[: len(ids)]
    assert torch.equal(found["block_ids"], expected["block_ids"][:2])
    for name in ("final_latents", "logits_raw", "logits_penalised"):
        assert_close(found[name].float(), expected[name][:2], atol=1e-4, rtol=0)
