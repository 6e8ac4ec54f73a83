"""The Text VAE gives the numbers of the official implementation."""

import json
from pathlib import Path
from typing import Any

import golden_models
import pytest
import reference
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from opencola.checkpoints import official

TOLERANCE: dict[str, Any] = {"atol": 5e-5, "rtol": 0}
SAMPLES = (0, 1)


def test_encoder(vae, stored) -> None:
    expected = stored("vae_encode")
    for i in SAMPLES:
        posterior = vae.encode(expected[f"input_ids_{i}"][None])
        assert_close(posterior.mean[0], expected[f"mean_{i}"], **TOLERANCE)
        assert_close(posterior.logvar[0], expected[f"logvar_{i}"], **TOLERANCE)


def test_encoder_in_a_batch(vae, stored) -> None:
    """Padding behind the shorter sample changes nothing."""
    expected = stored("vae_encode")
    short, long = (expected[f"input_ids_{i}"] for i in SAMPLES)
    tokens = torch.stack((torch.cat((short, long[len(short) :])), long))
    lengths = torch.tensor([len(expected[f"mean_{i}"]) for i in SAMPLES], device=tokens.device)
    posterior = vae.encode(tokens, lengths)
    for i in SAMPLES:
        assert_close(posterior.mean[i, : lengths[i]], expected[f"mean_{i}"], **TOLERANCE)


def test_encoder_with_cache(vae, stored, meta) -> None:
    expected, size, patch = stored("vae_encode"), meta["block_size"], meta["patch_size"]
    for i in SAMPLES:
        tokens, cache = expected[f"input_ids_{i}"][None], vae.empty_cache(1, 16, "encoder")
        means = []
        for part in tokens.split(size * patch, dim=1):
            means.append(vae.encode(part, cache=cache).mean[0])
            cache = cache.append(size)
        assert_close(torch.cat(means), expected[f"mean_{i}"], **TOLERANCE)


def test_decoder(vae, stored) -> None:
    expected = stored("vae_decode")
    for i in SAMPLES:
        assert_close(vae.decode(expected[f"z_{i}"][None])[0], expected[f"logits_{i}"], **TOLERANCE)


def test_decoder_with_cache(vae, stored, meta) -> None:
    expected = stored("vae_decode_cached")
    for i in SAMPLES:
        calls = meta["vae_decode_cached"][f"sample_{i}"]
        z, cache = expected[f"z_{i}"][None], vae.empty_cache(1, 16, "decoder")
        logits = []
        for part in z.split([calls["prefix_latents"], *calls["then_blocks"]], dim=1):
            logits.append(vae.decode(part, cache)[0])
            cache = cache.append(part.shape[1])
        assert_close(torch.cat(logits), expected[f"logits_{i}"], **TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [
        {"act": "silu", "block_size": 3},
        {"act": "swiglu", "ffn_dim": 10, "bias": False, "qk_bias": True},
        {"encoder_last_ln": True, "qk_norm": False, "qk_norm_affine": False, "clip_qkv": None},
        {"use_variation": False, "encoder_last_ln": False},
        {"block_causal": False, "layer_norm_affine": True, "post_norm": True, "qk_norm_affine": True},
        {"post_norm": True, "act": "gelu", "bias": True, "shared_heads_kv": 1, "patch_size": 3},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_option(changes: dict[str, Any], tmp_path: Path, generator) -> None:
    """Options that no fixture sets, against the slow reference."""
    config = golden_models.VAE | golden_models.MODELS["configA"][1] | changes
    weights = golden_models.random_weights(golden_models.vae_shapes(config), generator(1))
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors")
    vae, slow = official.load_vae(tmp_path), reference.read_model(tmp_path)
    tokens = torch.randint(config["vocab_size"], (6 * config["patch_size"],), generator=generator(2))
    posterior = vae.encode(tokens[None])
    mean, logvar = reference.encode(slow, tokens)
    assert_close(posterior.mean[0], mean.float(), **TOLERANCE)
    if logvar is None:
        assert bool((posterior.logvar == -30).all())
    else:
        assert_close(posterior.logvar[0], logvar.float(), **TOLERANCE)
    assert_close(vae.decode(mean.float()[None])[0], reference.decode(slow, mean).float(), **TOLERANCE)


def test_log_variance_is_clamped(tmp_path: Path, generator) -> None:
    config = golden_models.VAE | golden_models.MODELS["configB"][1]
    weights = golden_models.random_weights(golden_models.vae_shapes(config), generator(1))
    weights["encoder.final_layer.bias"][-config["latent_dim"] :] = torch.tensor([-60.0, -27.0, 17.0, 60.0])
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors")
    tokens = torch.randint(config["vocab_size"], (8,), generator=generator(2))
    logvar = official.load_vae(tmp_path).encode(tokens[None]).logvar[0]
    expected = reference.encode(reference.read_model(tmp_path), tokens)[1]
    assert expected is not None
    assert_close(logvar, expected.float(), **TOLERANCE)
    assert logvar[:, 0].tolist() == [-30.0] * 4
    assert logvar[:, 3].tolist() == [20.0] * 4
