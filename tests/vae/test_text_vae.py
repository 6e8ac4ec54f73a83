"""The Text VAE: who sees whom, caches, padding, and the scales of its latents."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, tiny_vae, vae_config
from torch import Tensor

from opencola.vae.text_vae import TextVAE

CAUSAL = {"attention": "causal", "block_size": 4}
BLOCKS = {"attention": "block_causal", "block_size": 4}
NUM_LATENTS = 12


def tokens(patch: int = 1, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (batch, NUM_LATENTS * patch), generator=torch.Generator().manual_seed(seed))


def encoded(vae: TextVAE, ids: Tensor, **rest: Any) -> Tensor:
    """Mean and log-variance side by side (B, N, 2 d)."""
    q = vae.encode(ids, **rest)
    return torch.cat((q.mean, q.logvar), dim=-1)


def changed(before: Tensor, after: Tensor) -> list[bool]:
    """For each latent or token position, whether any bit of its row changed."""
    return (before != after).flatten(2).any(-1).any(0).tolist()


def expected_changes(kind: dict[str, Any], latent: int) -> list[bool]:
    """Its own block and everything behind."""
    size = 4 if kind is BLOCKS else 1
    return [place // size >= latent // size for place in range(NUM_LATENTS)]


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("kind", [CAUSAL, BLOCKS], ids=["causal", "block_causal"])
@torch.no_grad()
def test_encoder_does_not_see_the_future(kind: dict[str, Any], patch: int) -> None:
    vae, ids = tiny_vae(patch_size=patch, **kind), tokens(patch)
    before = encoded(vae, ids)
    for place in range(ids.shape[1]):
        other = ids.clone()
        other[:, place] = (other[:, place] + 1) % VOCABULARY
        assert changed(before, encoded(vae, other)) == expected_changes(kind, place // patch)


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("kind", [CAUSAL, BLOCKS], ids=["causal", "block_causal"])
@torch.no_grad()
def test_decoder_does_not_see_the_future(kind: dict[str, Any], patch: int) -> None:
    vae, z = tiny_vae(patch_size=patch, **kind), torch.randn(2, NUM_LATENTS, 4).double()
    before = vae.decode(z)
    assert before.shape == (2, NUM_LATENTS * patch, VOCABULARY)
    for latent in range(NUM_LATENTS):
        other = z.clone()
        other[:, latent] += 0.1
        expected = [change for change in expected_changes(kind, latent) for _ in range(patch)]
        assert changed(before, vae.decode(other)) == expected


@torch.no_grad()
def test_full_attention_sees_everything() -> None:
    vae, ids = tiny_vae(attention="full"), tokens()
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % VOCABULARY
    assert all(changed(encoded(vae, ids), encoded(vae, other)))


@pytest.mark.parametrize("multi_query", [False, True])
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("kind", [CAUSAL, BLOCKS], ids=["causal", "block_causal"])
@torch.no_grad()
def test_cached_passes_equal_uncached_ones_for_mixed_lengths(
    kind: dict[str, Any], patch: int, multi_query: bool
) -> None:
    vae, ids = tiny_vae(patch_size=patch, multi_query=multi_query, **kind), tokens(patch, batch=3)
    z, lengths = torch.randn(3, NUM_LATENTS, 4).double(), torch.tensor([0, 8, 4])
    e, d = vae.empty_cache(3, NUM_LATENTS, "encoder"), vae.empty_cache(3, NUM_LATENTS, "decoder")
    encoded(vae, ids[:, : 8 * patch], cache=e)
    vae.decode(z[:, :8], d)
    e, d = e.append(lengths), d.append(lengths)
    blocks = lengths[:, None] + torch.arange(4)  # the next block of each sample
    rows = (blocks[..., None] * patch + torch.arange(patch)).flatten(1)
    means, logits = encoded(vae, ids.gather(1, rows), cache=e), vae.decode(z[torch.arange(3)[:, None], blocks], d)
    for i, length in enumerate(lengths.tolist()):
        whole, all_logits = encoded(vae, ids[i : i + 1]), vae.decode(z[i : i + 1])
        torch.testing.assert_close(means[i], whole[0, length : length + 4], rtol=0, atol=1e-11)
        torch.testing.assert_close(logits[i], all_logits[0, length * patch : (length + 4) * patch], rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", [CAUSAL, BLOCKS, {"attention": "full"}], ids=["causal", "block_causal", "full"])
@pytest.mark.parametrize("patch", [1, 2])
@torch.no_grad()
def test_padding_is_invisible(kind: dict[str, Any], patch: int) -> None:
    vae, ids, lengths = tiny_vae(patch_size=patch, **kind), tokens(patch, batch=4), torch.tensor([0, 3, 5, 12])
    out = encoded(vae, ids, lengths=lengths)
    assert out.isfinite().all()
    for i, length in enumerate(lengths.tolist()):
        other = ids.clone()
        other[i, length * patch :] = 7
        assert torch.equal(encoded(vae, other, lengths=lengths)[i, :length], out[i, :length])
        if length:
            alone = encoded(vae, ids[i : i + 1, : length * patch])[0]
            torch.testing.assert_close(out[i, :length], alone, rtol=0, atol=1e-11)


@pytest.mark.parametrize("normalise_mean", [True, False])
@pytest.mark.parametrize("logsnr", [1.0, 1.5, 2.0])
def test_fixed_logsnr_is_exactly_the_metric(logsnr: float, normalise_mean: bool) -> None:
    q = tiny_vae(fixed_logsnr=logsnr, normalise_mean=normalise_mean).encode(tokens())
    assert q.logsnr().item() == pytest.approx(logsnr, abs=1e-12)
    assert q.logvar.unique().numel() == 1 and q.logvar.shape == q.mean.shape


def test_the_mean_is_standardised_over_its_channels() -> None:
    vae = tiny_vae(latent_dim=16)
    mean = vae.encode(tokens()).mean
    torch.testing.assert_close(mean.mean(-1), torch.zeros(2, NUM_LATENTS).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(mean.var(-1, correction=0), torch.ones(2, NUM_LATENTS).double(), rtol=0, atol=1e-4)
    free = tiny_vae(latent_dim=16, normalise_mean=False).encode(tokens()).mean
    assert (free.var(-1, correction=0) - 1).abs().max() > 0.1
    torch.testing.assert_close(torch.nn.functional.layer_norm(free, (16,), eps=1e-6), mean)


def test_the_log_variance_is_clamped() -> None:
    vae = tiny_vae()
    with torch.no_grad():
        vae.posterior.bias[4:] = torch.tensor([-100.0, 100.0, 0.0, 0.0])
    logvar = vae.encode(tokens()).logvar
    assert (logvar[..., 0] == -30).all() and (logvar[..., 1] == 20).all() and (logvar[..., 2].abs() < 19).all()


def test_a_deterministic_encoder_has_next_to_no_variance() -> None:
    q = tiny_vae(variational=False).encode(tokens())
    assert (q.logvar == -30).all()
    torch.testing.assert_close(q.mean.square().mean(-1), torch.ones(2, NUM_LATENTS).double(), rtol=0, atol=1e-3)


def test_normalising_shifts_then_scales_and_can_be_undone() -> None:
    vae, z = tiny_vae(latent_shift=0.7, latent_scale=3.0), torch.randn(2, 3, 4).double()
    torch.testing.assert_close(vae.normalise(z), (z - 0.7) * 3)
    torch.testing.assert_close(vae.denormalise(vae.normalise(z)), z)


def test_mask_id_is_an_input_but_not_an_output() -> None:
    vae = tiny_vae()
    assert vae.mask_id == VOCABULARY
    assert vae.encode(torch.full((1, 4), vae.mask_id)).mean.isfinite().all()
    assert vae.decode(torch.zeros(1, 4, 4).double()).shape[-1] == VOCABULARY


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="3 tokens are not a multiple of patch_size 2"):
        tiny_vae(patch_size=2).encode(torch.zeros(1, 3, dtype=torch.long))
    good = vae_config()
    for fields, message in (
        ({"width": 18, "num_heads": 4}, "vae.width 18 must be an even multiple of vae.num_heads 4"),
        ({"width": 6, "num_heads": 2}, "vae.width 6 must be an even multiple"),
        ({"ffn_dim": 7}, "vae.ffn_dim 7 must be even"),
        ({"block_size": 0}, "block_size must be at least 1, but is 0"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, but is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(good, **fields)
