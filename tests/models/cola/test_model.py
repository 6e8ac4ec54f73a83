"""The stage-2 loss: every term against a formula written out here, and which parameters each of them moves."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, dit_config, one_block, tiny_batch, tiny_cola, vae_config
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from opencola.data.batch import Batch
from opencola.flow.path import TimestepLaw
from opencola.layers import randomness
from opencola.models.cola.model import Cola, masked_mean_square
from opencola.models.cola.parts import ColaConfig, PriorObjective
from opencola.train import optimizer
from opencola.train.optimizer import OptimizerConfig

WEIGHTS = {"lambda_vae": 0.7, "lambda_fm": 1.3, "lambda_ref": 0.4, "history_dropout": 0.5, "prompt_in_block": 0.5}
LATENTS = {"latent_shift": 0.2, "latent_scale": 1.5}


def started(**fields: Any) -> Cola:
    """A model whose reference is what it was before its encoder moved."""
    model = tiny_cola(**fields)
    model.freeze_parts()
    if model.reference is not None:
        with torch.no_grad():
            for parameter in model.vae.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def draws(batch: Batch, row: int, patch: int, copies: int = 2, groups: int = 1) -> dict[str, Tensor]:
    """All that is random in one sequence's loss, from (seed, purpose, id)."""
    one, latents = batch.ids[[row]], 12 // patch
    shapes = {"posterior": (latents, 4), "noise": (copies, latents, 4), "time": (copies, groups)}
    found = {name: randomness.normal(shape, batch.seed, name, one)[0] for name, shape in shapes.items()}
    blocks = (copies, latents // 2)
    shapes = {"mask": (12,), "history": (), "prompt": blocks, "prompt length": blocks}
    return found | {name: randomness.uniform(shape, batch.seed, name, one)[0] for name, shape in shapes.items()}


@pytest.mark.parametrize("per", ["sequence", "block"])
@pytest.mark.parametrize("patch", [1, 2])
@torch.no_grad()
def test_terms(patch: int, per: str) -> None:
    """Three sequences, blocks of two latents, two noisy copies, everything one sequence, copy and block at a time."""
    objective = {"beta": 0.3, "lambda_mask": 0.6, "mask_ratio": 0.4}
    law = TimestepLaw(loc=0.5, scale=1.5, per=per)  # type: ignore[arg-type]
    model = started(
        vae={"patch_size": patch} | LATENTS, dit={"block_size": 2}, objective=objective, time=law, **WEIGHTS
    )
    vae, batch = model.vae, tiny_batch()
    latents = 12 // patch
    groups = latents // 2 if per == "block" else 1
    ce, masked_ce, log_q, to_reference, errors = [], [], [], [], []
    for row, tokens in enumerate(batch.tokens):
        draw = draws(batch, row, patch, groups=groups)
        hidden = draw["mask"] < 0.4
        for inputs, losses in ((tokens, ce), (torch.where(hidden, VOCABULARY, tokens), masked_ce)):
            q = vae.encode(inputs[None])
            z = q.mean + torch.exp(q.logvar / 2) * draw["posterior"]
            surprise = -torch.log_softmax(vae.decode(z)[0], -1)[torch.arange(12), tokens]
            losses += surprise.tolist() if inputs is tokens else surprise[hidden].tolist()
            if inputs is tokens:
                z_0 = (z[0] - 0.2) * 1.5
                posterior = Normal(q.mean[0], torch.exp(q.logvar[0] / 2))
                log_q += (-posterior.entropy().sum(-1)).tolist()
                q_ref = model.reference.encode(tokens[None])
                reference = Normal(q_ref.mean[0], torch.exp(q_ref.logvar[0] / 2))
                to_reference += kl_divergence(posterior, reference).sum(-1).tolist()
        for copy in range(2):
            for block in range(latents // 2):
                rows = slice(2 * block, 2 * block + 2)
                history = z_0[: 2 * block] if draw["history"] >= 0.5 else z_0[:0]
                normal = draw["time"][copy, block if per == "block" else 0]
                t = (1 / (1 + torch.exp(-(0.5 + 1.5 * normal)))).double()
                noise = draw["noise"][copy, rows]
                times, z_t = t.expand(2).clone(), (1 - t) * z_0[rows] + t * noise
                prompt = draw["prompt"][copy, block] < 0.5  # of a block of two only the first can be given
                if prompt:
                    times[0], z_t[0] = 0, z_0[2 * block]
                error = (one_block(model.dit, history, z_t, times) - (noise - z_0[rows])).square().mean(-1)
                errors += error[1:].tolist() if prompt else error.tolist()
    expected = {
        "cross_entropy": 0.7 * sum(ce) / len(ce),
        "entropy": 0.7 * 0.3 * sum(log_q) / len(log_q) / patch,
        "mask": 0.7 * 0.6 * sum(masked_ce) / len(masked_ce),
        "reference": 0.4 * sum(to_reference) / len(to_reference) / patch,
        "flow_matching": 1.3 * sum(errors) / len(errors),
    }
    loss = model.loss(batch)
    assert {name: term.item() for name, term in loss.terms.items()} == pytest.approx(expected, rel=1e-6)
    assert loss.total.item() == pytest.approx(sum(term.item() for term in loss.terms.values()), rel=1e-12)
    assert len(errors) < 3 * 2 * latents  # some rows were given
    assert {bool(draws(batch, row, patch)["history"] >= 0.5) for row in range(3)} == {True, False}


def test_the_mean_is_over_scored_rows() -> None:
    velocity, target = torch.randn(2, 2, 3, 4, 5).double()
    scored = torch.rand(2, 3, 4) < 0.5
    rows = [(velocity[i] - target[i]).square().mean() for i in map(tuple, scored.nonzero().tolist())]
    torch.testing.assert_close(masked_mean_square(velocity, target, scored), torch.stack(rows).mean())
    assert masked_mean_square(velocity, target, torch.zeros_like(scored)) == 0


def gradient_norms(model: Cola, batch: Batch) -> dict[str, float]:
    """Norm of the gradient of each part, NaN where there is none."""
    model.zero_grad()
    model.loss(batch).total.backward()
    parts = {"encoder": model.vae.encoder, "decoder": model.vae.decoder, "dit": model.dit}
    found = {}
    for name, part in parts.items():
        grads = [p.grad for p in part.parameters()]
        assert all(g is None for g in grads) or all(g is not None for g in grads)
        found[name] = math.nan if grads[0] is None else math.sqrt(sum(g.square().sum().item() for g in grads))
    return found


def test_fixed_trains_the_prior_alone() -> None:
    model = started(strategy="fixed")
    assert not any(p.requires_grad for p in model.vae.parameters()) and model.reference is None
    assert model.loss(tiny_batch()).terms.keys() == {"flow_matching"}
    norms = gradient_norms(model, tiny_batch())
    assert math.isnan(norms["encoder"]) and math.isnan(norms["decoder"]) and norms["dit"] > 0


def test_frozen_and_joint_steps_see_the_same_latents() -> None:
    fixed, joint = started(strategy="fixed"), tiny_cola(lambda_ref=0.0)
    a, b = fixed.loss(tiny_batch()), joint.loss(tiny_batch())
    torch.testing.assert_close(a.terms["flow_matching"], b.terms["flow_matching"], rtol=1e-10, atol=0)
    torch.testing.assert_close(a.metrics["latent_scale"], b.metrics["latent_scale"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("strategy", ["joint", "scratch"])
def test_joint_and_scratch_train_everything(strategy: str) -> None:
    model = started(strategy=strategy, lambda_ref=0.0 if strategy == "scratch" else 0.1)
    assert all(norm > 0 for norm in gradient_norms(model, tiny_batch()).values())
    assert (model.reference is None) == (strategy == "scratch")
    metrics = model.loss(tiny_batch()).metrics
    assert metrics.keys() == {"reconstruction_accuracy", "vae_logsnr", "latent_scale"}
    assert not any(value.requires_grad for value in metrics.values()) and metrics["latent_scale"].shape == (4,)


def test_interval_freezes_the_vae_in_turns() -> None:
    model = started(strategy="interval", joint_steps=2, frozen_steps=3)
    learns = []
    for step in range(11):
        norms = gradient_norms(model, replace(tiny_batch(), step=step))
        learns.append(not math.isnan(norms["encoder"]) and not math.isnan(norms["decoder"]))
        assert norms["dit"] > 0
    assert learns == [True, True, False, False, False] * 2 + [True]


def test_impossible_combinations_are_refused() -> None:
    with pytest.raises(ValueError, match="strategy scratch has no stage-1 encoder .* set prior.lambda_ref to 0"):
        ColaConfig(prior=PriorObjective(strategy="scratch"))
    with pytest.raises(ValueError, match="vae.latent_dim 4 differs from dit.latent_dim 5"):
        ColaConfig(vae_config(), dit_config(latent_dim=5))
    for kind in ({"attention": "block_causal", "block_size": 3}, {"attention": "full"}):
        with pytest.raises(ValueError, match="cannot be decoded one by one"):
            ColaConfig(vae_config(**kind), dit_config(block_size=4))
    ColaConfig(vae_config(attention="block_causal", block_size=2), dit_config(block_size=4))


def test_the_reference_starts_at_the_encoder_and_never_moves() -> None:
    model, batch = tiny_cola(lambda_ref=0.4), tiny_batch()
    assert "reference" not in model.loss(batch).terms
    model.freeze_parts()
    assert model.loss(batch).terms["reference"].item() == pytest.approx(0, abs=1e-12)
    reference = model.reference
    before = {name: p.clone() for name, p in reference.named_parameters()}
    wanted = {name for name, _ in model.vae.named_parameters() if name.split(".")[0] in ("embedding", "encoder")}
    assert wanted <= before.keys()
    own = {p.data_ptr() for p in model.vae.parameters()}
    assert not any(p.data_ptr() in own or p.requires_grad for p in reference.parameters())
    optimizers = optimizer.build(model, model.learning_rate_ratios(), OptimizerConfig(learning_rate=0.01))
    for step in range(3):
        model.loss(replace(batch, step=step)).total.backward()
        assert all(p.grad is None for p in reference.parameters())
        for o in optimizers:
            o.step()
            o.zero_grad()
    assert all(torch.equal(p, before[name]) for name, p in reference.named_parameters())
    q, ref = model.vae.encode(batch.tokens), reference.encode(batch.tokens)
    p, r = (Normal(x.mean, torch.exp(x.logvar / 2)) for x in (q, ref))
    expected = 0.4 * kl_divergence(p, r).sum(-1).mean()
    assert expected > 1e-4
    torch.testing.assert_close(model.loss(batch).terms["reference"], expected)


@pytest.mark.parametrize("weight", ["lambda_vae", "lambda_fm", "lambda_ref", "lambda_mask", "beta"])
def test_weights_act_linearly_and_on_their_own_terms(weight: str) -> None:
    def terms(value: float) -> dict[str, float]:
        objective = {"beta": 0.2, "lambda_mask": 0.3}
        if weight in objective:
            model = started(objective=objective | {weight: value}, **WEIGHTS)
        else:
            model = started(objective=objective, **WEIGHTS | {weight: value})
        return {name: term.item() for name, term in model.loss(tiny_batch()).terms.items()}

    once, thrice = terms(0.5), terms(1.5)
    vae = ["cross_entropy", "entropy", "mask"]
    own = {"lambda_vae": vae, "lambda_fm": ["flow_matching"], "lambda_ref": ["reference"]}
    own |= {"lambda_mask": ["mask"], "beta": ["entropy"]}
    assert thrice == pytest.approx({name: once[name] * (3 if name in own[weight] else 1) for name in once}, rel=1e-10)


def test_learning_rate_ratios_name_the_vae() -> None:
    model = started(vae_learning_rate_ratio=0.01)
    assert model.learning_rate_ratios() == {"vae.": 0.01}
    for o in optimizer.build(model, model.learning_rate_ratios(), OptimizerConfig(optimizer="adamw")):
        peaks = {id(p): group["peak"] for group in o.param_groups for p in group["params"]}
    assert {peaks[id(p)] for p in model.vae.parameters()} == {0.01 * 2e-3}
    assert {peaks[id(p)] for p in model.dit.parameters()} == {2e-3}


def test_the_loss_depends_on_seed_and_ids_and_not_on_batch_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, order = started(**WEIGHTS), tiny_batch(6), torch.tensor([3, 0, 5, 1, 4, 2])
    calls: list[tuple[Tensor, ...]] = []
    packed = model.dit.packed

    def recorded(z_0: Tensor, *rest: Tensor, **options: bool) -> Tensor:
        calls.append(rest)
        return packed(z_0, *rest, **options)

    monkeypatch.setattr(model.dit, "packed", recorded)
    total = model.loss(batch).total
    same = model.loss(Batch(batch.tokens[order], batch.ids[order], batch.seed, step=17)).total
    half = model.loss(Batch(batch.tokens[:2], batch.ids[:2], batch.seed, 0)).total
    torch.testing.assert_close(same, total, rtol=1e-12, atol=0)
    assert half != total
    for whole, other, part in zip(*calls, strict=True):  # z_t, t, pinned, history
        torch.testing.assert_close(other, whole[order], rtol=0, atol=1e-12)
        torch.testing.assert_close(part, whole[:2], rtol=0, atol=1e-12)
    t = calls[0][1].flatten()
    assert t.unique().numel() == t.numel()  # every sequence and copy has its own
    for changed in (replace(batch, seed=6), replace(batch, ids=batch.ids + 1)):
        assert (model.loss(changed).total - total).abs() > 1e-6


def numbered(size: int) -> Batch:
    """Nothing but ids."""
    return Batch(torch.zeros(0), torch.arange(size), 0, 0)


def scored_batch(patch: int = 1) -> Batch:
    """Six rows of 12 latents; an answer begins inside a block, ends inside one, and one row has none."""
    scored = torch.zeros(6, 12, dtype=torch.bool)
    for row, (first, end) in enumerate([(0, 12), (2, 12), (5, 7), (6, 11), (11, 12), (0, 0)]):
        scored[row, first:end] = True
    batch = tiny_batch(6, 12 * patch)
    documents = torch.arange(12 * patch).div(5 * patch, rounding_mode="floor").repeat(6, 1)
    return replace(batch, scored=scored.repeat_interleave(patch, 1), documents=documents)


def test_what_is_not_scored_is_given_before_an_answer_and_never_counts() -> None:
    model, batch = tiny_cola(prompt_in_block=0.3), scored_batch()
    pinned, scored = model._prompt_rows(batch, range(12))
    drawn, _ = model._prompt_rows(replace(batch, scored=None), range(12))
    assert batch.scored is not None
    for row, copy, place in itertools.product(range(6), range(2), range(12)):
        before = not batch.scored[row, place // 4 * 4 : place + 1].any()
        assert pinned[row, copy, place] == (before or bool(drawn[row, copy, place]))
        assert scored[row, copy, place] == (bool(batch.scored[row, place]) and not pinned[row, copy, place])


@pytest.mark.parametrize("strategy", ["joint", "fixed"])
@pytest.mark.parametrize("with_bounds", [False, True])
@pytest.mark.parametrize("trunk", [False, True])
def test_parts_with_the_whole_counts_have_the_gradient_of_the_whole(
    strategy: Any, with_bounds: bool, trunk: bool
) -> None:
    patch, dit = (1, {"trunk_layers": 1, "vocab_size": VOCABULARY}) if trunk else (2, {})
    weights = WEIGHTS | ({"lambda_ar": 0.9} if trunk else {})
    model = tiny_cola({"patch_size": patch}, dit, {"lambda_mask": 0.7}, strategy=strategy, **weights)
    model.freeze_parts()
    batch = scored_batch(patch) if with_bounds else tiny_batch(6, 12 * patch)
    parts = [batch.shard(number, 3) for number in range(3)]
    counts = {name: sum(model.counts(part)[name].double() for part in parts) / 3 for name in model.counts(batch)}
    losses = [model.loss(replace(part, counts=counts)).total / 3 for part in parts]
    parameters = [p for p in model.parameters() if p.requires_grad]
    whole = model.loss(batch).total
    torch.testing.assert_close(sum(losses), whole, rtol=1e-12, atol=0)
    for one, other in zip(
        torch.autograd.grad(sum(losses), parameters, allow_unused=True),  # type: ignore[arg-type]
        torch.autograd.grad(whole, parameters, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)
    assert any(len({int(model.counts(part)[name]) for part in parts}) > 1 for name in counts)


@pytest.mark.parametrize("trunk_layers", [0, 1])
def test_documents_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch, trunk_layers: int) -> None:
    """Of another document before it, neither the latents of the VAE nor the velocities know anything."""
    model = tiny_cola(dit={"trunk_layers": trunk_layers}, **WEIGHTS)
    batch = replace(scored_batch(), scored=None)
    velocities: list[Tensor] = []
    packed = model.dit.packed

    def recorded(z_0: Tensor, z_t: Tensor, *rest: Any, **options: Any) -> Tensor:
        fixed = randomness.normal(z_t.shape[1:], 0, "test", batch.ids).double()
        velocities.append(packed(z_0, fixed, *rest, **options))
        return velocities[-1]

    monkeypatch.setattr(model.dit, "packed", recorded)
    changed = batch.tokens.clone()
    changed[:, :5] = (changed[:, :5] + 1) % 30
    posteriors = [model.vae.encode(tokens, documents=batch.documents) for tokens in (batch.tokens, changed)]
    assert torch.equal(posteriors[0].mean[:, 5:], posteriors[1].mean[:, 5:])
    assert not torch.equal(model.vae.encode(changed).mean[:, 5:], model.vae.encode(batch.tokens).mean[:, 5:])
    decoded = [model.vae.decode(q.mean, documents=batch.documents) for q in posteriors]
    assert torch.equal(decoded[0][:, 5:], decoded[1][:, 5:])
    for tokens in (batch.tokens, changed):
        model.loss(replace(batch, tokens=tokens))
    before, after = velocities
    torch.testing.assert_close(before[:, :, 5:], after[:, :, 5:], rtol=0, atol=1e-12)
    assert (before[:, :, :5] - after[:, :, :5]).abs().max() > 1e-3


def test_prompt_rows_are_short_prefixes_of_some_blocks() -> None:
    model = tiny_cola(prompt_in_block=0.3)
    rows, scored = (rows.unflatten(-1, (3, 4)) for rows in model._prompt_rows(numbered(400), range(12)))
    assert torch.equal(scored, ~rows)
    length = rows.sum(-1)
    assert torch.equal(rows, torch.arange(4) < length[..., None])
    share = [(length == n).double().mean().item() for n in range(5)]
    assert share == pytest.approx([0.7, 0.1, 0.1, 0.1, 0.0], abs=0.02)
    assert not torch.equal(length[:, 0], length[:, 1])
    single = tiny_cola(dit={"block_size": 1}, prompt_in_block=1.0)._prompt_rows(numbered(4), range(12))
    assert not single[0].any()  # a block of one latent has nothing to be given


def test_history_is_dropped_as_often_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    for share in (0.0, 0.25):
        model = tiny_cola(history_dropout=share, dit={"num_layers": 1})
        packed = model.dit.packed

        def record(*args: Any, packed: Any = packed, **options: bool) -> Tensor:
            seen.append(args[-1])
            return packed(*args, **options)

        monkeypatch.setattr(model.dit, "packed", record)
        model.flow_matching(torch.randn(600, 8, 4).double(), numbered(600))
    assert seen[0] is None and 0.70 < seen[1].double().mean() < 0.80


@pytest.mark.parametrize("per", ["sequence", "block"])
def test_flow_matching_reaches_the_latents_through_z_t_alone(per: str) -> None:
    """d loss / d z_0 = sum over copies of (1 - t) d loss / d z_t: nothing by way of history, target or given rows."""
    model, batch = tiny_cola(time=TimestepLaw(per=per), **WEIGHTS), tiny_batch()  # type: ignore[arg-type]
    z_0 = torch.randn(3, 12, 4).double().requires_grad_()
    gradient = torch.autograd.grad(model.flow_matching(z_0, batch), z_0)[0]
    z_1 = randomness.normal((2, 12, 4), batch.seed, "noise", batch.ids).double()
    t = torch.sigmoid(1 + randomness.normal((2, 3 if per == "block" else 1), batch.seed, "time", batch.ids)).double()
    rows = t.repeat_interleave(12 // t.shape[-1], -1)[..., None]
    given = model._prompt_rows(batch, range(12))[0]
    history = randomness.uniform((), batch.seed, "history", batch.ids) >= 0.5
    constant = z_0.detach()[:, None]
    z_t = torch.where(given[..., None], constant, (1 - rows) * constant + rows * z_1).requires_grad_()
    velocity = model.dit.packed(constant[:, 0], z_t, t, given, history)
    loss = ((velocity - (z_1 - constant)).square().mean(-1) * ~given).sum() / (~given).sum()
    torch.testing.assert_close(model.flow_matching(z_0, batch), loss)
    by_noisy = torch.autograd.grad(loss, z_t)[0]
    expected = (by_noisy * (1 - rows) * ~given[..., None]).sum(1)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)
    assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("encoder_gradient", [True, False])
def test_whether_flow_matching_moves_the_encoder_is_a_choice(encoder_gradient: bool) -> None:
    model = tiny_cola(encoder_gradient=encoder_gradient)
    parameters = [*model.vae.encoder.parameters(), *model.vae.decoder.parameters()]
    found = torch.autograd.grad(model.loss(tiny_batch()).terms["flow_matching"], parameters, allow_unused=True)
    moves = [gradient is not None and gradient.abs().max().item() > 0 for gradient in found]
    assert moves == [encoder_gradient] * (len(moves) // 2) + [False] * (len(moves) // 2)  # never the decoder


def test_conversations_in_a_row_do_not_leak_and_only_answers_pull() -> None:
    """Of two packed documents of 8 tokens, each padded: the loss of one knows nothing of the other's tokens."""
    model = tiny_cola(objective={"lambda_mask": 0.5}, **{**WEIGHTS, "prompt_in_block": 0.0})
    model.freeze_parts()
    scored = torch.zeros(3, 16, dtype=torch.bool)
    scored[:, 3:6] = scored[:, 12:14] = True
    batch = replace(tiny_batch(3, 16), documents=torch.arange(16).div(8, rounding_mode="floor").repeat(3, 1))
    changed = batch.tokens.clone()
    changed[:, :8] = (changed[:, :8] + 1) % 30
    first, second = (scored & (torch.arange(16) // 8 == number) for number in range(2))

    def losses(tokens: Tensor, rows: Tensor) -> Tensor:
        terms = model.loss(replace(batch, tokens=tokens, scored=rows)).terms
        return torch.stack([terms[name] for name in ("cross_entropy", "mask", "flow_matching")])

    torch.testing.assert_close(losses(changed, second), losses(batch.tokens, second), rtol=1e-12, atol=0)
    assert (losses(changed, first) - losses(batch.tokens, first)).abs().min() > 1e-4

    decoded: list[Tensor] = []
    features = model.vae.features
    model.vae.features = lambda *args, **options: decoded.append(features(*args, **options)) or decoded[-1]  # type: ignore[func-returns-value,method-assign]
    terms = model.loss(replace(batch, scored=scored)).terms
    pulls = torch.autograd.grad(terms["cross_entropy"], decoded)[0]
    assert torch.equal(pulls[:3].abs().sum(-1) > 0, scored) and not pulls[3:].any()  # the second view is the mask's
