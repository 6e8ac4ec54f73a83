"""Stage 1: every term against a formula written out here, token by token."""

from typing import Any

import pytest
import torch
from tiny import VOCABULARY, randomise, tiny_batch, tiny_vae, vae_config
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from opencola.data.batch import Batch
from opencola.layers import randomness
from opencola.models.cola.stage_one import StageOne, StageOneConfig
from opencola.vae.objective import VAEObjective, reconstruct
from opencola.vae.text_vae import TextVAE


@torch.no_grad()
def nats(vae: TextVAE, inputs: Tensor, tokens: Tensor, noise: Tensor) -> tuple[list[float], Normal, Tensor]:
    """-log p(token | z) of every token of one sequence, the posterior given `inputs`, and z."""
    q = vae.encode(inputs[None])
    z = q.mean + torch.exp(q.logvar / 2) * noise
    logits = vae.decode(z)[0]
    losses = [float(torch.logsumexp(row, 0) - row[token]) for row, token in zip(logits, tokens, strict=True)]
    return losses, Normal(q.mean[0], torch.exp(q.logvar[0] / 2)), z[0]


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("kind", [{"attention": "causal"}, {"attention": "block_causal"}, {"fixed_logsnr": 1.5}])
def test_terms(patch: int, kind: dict[str, Any]) -> None:
    objective = VAEObjective(beta=0.3, lambda_mask=0.7, mask_ratio=0.4)
    model = randomise(StageOne(StageOneConfig(vae_config(patch_size=patch, **kind), objective)))
    batch = tiny_batch()
    ce, masked_ce, kl, hits = [], [], [], []
    for tokens, number in zip(batch.tokens, batch.ids.tolist(), strict=True):
        one = torch.tensor([number])
        noise = randomness.normal((12 // patch, 4), batch.seed, "posterior", one)[0].double()
        hidden = randomness.uniform((12,), batch.seed, "mask", one)[0] < 0.4
        losses, q, z = nats(model.vae, tokens, tokens, noise)
        ce += losses
        kl += kl_divergence(q, Normal(0.0, 1.0)).sum(-1).tolist()
        hits += (model.vae.decode(z[None])[0].argmax(-1) == tokens).tolist()
        view = torch.where(hidden, VOCABULARY, tokens)
        losses = nats(model.vae, view, tokens, noise)[0]
        masked_ce += [loss for loss, is_hidden in zip(losses, hidden.tolist(), strict=True) if is_hidden]
    assert 5 < len(masked_ce) < 30

    loss = model.loss(batch)
    found = {name: term.item() for name, term in loss.terms.items()}
    assert found == pytest.approx(
        {
            "cross_entropy": sum(ce) / len(ce),
            "kl": 0.3 * sum(kl) / len(kl) / patch,
            "mask": 0.7 * sum(masked_ce) / len(masked_ce),
        },
        rel=1e-5 if "fixed_logsnr" in kind else 1e-10,  # its constant is taken over the whole batch
    )
    assert loss.total.item() == pytest.approx(sum(found.values()), rel=1e-12)
    assert loss.metrics["reconstruction_accuracy"].item() == pytest.approx(sum(hits) / len(hits))
    assert not any(value.requires_grad for value in loss.metrics.values())


def test_without_the_masking_loss_there_is_one_view() -> None:
    vae, batch = tiny_vae(), tiny_batch()
    sizes: list[int] = []
    vae.embedding.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    result = reconstruct(vae, batch, VAEObjective(lambda_mask=0.0))
    both = reconstruct(vae, batch, VAEObjective(lambda_mask=1.0))
    assert sizes == [3, 6]
    assert result.masked_cross_entropy == 0 < both.masked_cross_entropy
    torch.testing.assert_close(result.cross_entropy, both.cross_entropy)
    terms = StageOne(StageOneConfig(vae_config(), VAEObjective(lambda_mask=0.0))).loss(batch).terms
    assert terms.keys() == {"cross_entropy", "kl"}


def test_masked_input_is_never_the_target() -> None:
    vae, batch = tiny_vae(), tiny_batch()
    all_hidden = reconstruct(vae, batch, VAEObjective(mask_ratio=1.0)).masked_cross_entropy
    hidden = torch.full_like(batch.tokens, VOCABULARY)
    noise = randomness.normal((12, 4), batch.seed, "posterior", batch.ids).double()
    losses = [nats(vae, *rows)[0] for rows in zip(hidden, batch.tokens, noise, strict=True)]
    assert all_hidden.item() == pytest.approx(torch.tensor(losses).mean().item(), rel=1e-6)
    assert reconstruct(vae, batch, VAEObjective(mask_ratio=0.0)).masked_cross_entropy == 0


def test_the_loss_depends_on_ids_and_not_on_their_order() -> None:
    model = randomise(StageOne(StageOneConfig(vae_config())))
    batch, order = tiny_batch(6), torch.tensor([3, 0, 5, 1, 4, 2])
    same = Batch(batch.tokens[order], batch.ids[order], batch.seed, step=9)
    torch.testing.assert_close(model.loss(same).total, model.loss(batch).total, rtol=1e-12, atol=0)
    for other in (Batch(batch.tokens, batch.ids + 1, batch.seed, 0), Batch(batch.tokens, batch.ids, batch.seed + 1, 0)):
        assert (model.loss(other).total - model.loss(batch).total).abs() > 1e-6


def test_all_parameters_learn_at_one_rate() -> None:
    model = randomise(StageOne(StageOneConfig(vae_config())))
    assert model.learning_rate_ratios() == {}
    model.loss(tiny_batch()).total.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
