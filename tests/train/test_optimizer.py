"""Optimizers against hand computations.

Why not torch.optim.Muon: 40 matrices of widths 128 / 256 (qkv, out, MLP in and out, ten layers), one CPU thread
without bfloat16 instructions: torch.optim.Muon 2,130 / 22,400 ms a step, float32 84 / 870 ms.
"""

import math

import pytest
import torch
from torch import nn

from opencola.kernels.choice import Precision, products_in
from opencola.train.optimizer import (
    EMA,
    Muon,
    OptimizerConfig,
    build,
    hidden_matrices,
    learning_rate_factor,
    orthogonalise,
    set_learning_rates,
)


class Small(nn.Module):
    """An embedding, two blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(2))
        self.head = nn.Linear(4, 7)


def test_muon_is_for_the_matrices_of_blocks() -> None:
    model = Small()
    muon, adamw = build(model, {}, OptimizerConfig(weight_decay=0.1))
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    in_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    assert in_muon == {id(block[1].weight) for block in model.blocks}  # type: ignore[index]
    in_adamw = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert in_muon | in_adamw == {id(p) for p in model.parameters()} and not in_muon & in_adamw
    for group in adamw.param_groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] == 0.1}
    (only,) = build(model, {}, OptimizerConfig(optimizer="adamw"))
    assert sum(len(group["params"]) for group in only.param_groups) == len(list(model.parameters()))


def test_embeddings_inside_blocks_are_not_for_muon() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Embedding(5, 4), nn.Linear(4, 4)])})
    assert len(hidden_matrices(model)) == 1


def test_ratios_frozen_parameters_and_unknown_prefixes() -> None:
    model = Small()
    model.embedding.weight.requires_grad_(False)
    ratios = {"blocks": 0.5, "blocks.1": 0.25}
    optimizers = build(model, ratios, OptimizerConfig(learning_rate=1.0, muon_learning_rate=2.0))
    rates = {id(p): group["lr"] for o in optimizers for group in o.param_groups for p in group["params"]}
    assert id(model.embedding.weight) not in rates
    assert rates[id(model.head.weight)] == 1.0
    assert rates[id(model.blocks[0][1].weight)] == 1.0  # type: ignore[index]
    assert rates[id(model.blocks[0][1].bias)] == 0.5  # type: ignore[index]
    assert rates[id(model.blocks[1][1].weight)] == 0.5  # type: ignore[index]
    assert set_learning_rates(optimizers, 0.1) == {"muon": pytest.approx(0.1), "adamw": pytest.approx(0.1)}
    assert optimizers[1].param_groups[0]["lr"] == pytest.approx(optimizers[1].param_groups[0]["peak"] * 0.1)
    with pytest.raises(ValueError, match="'bloks'"):
        build(model, {"bloks": 1.0}, OptimizerConfig())
    with pytest.raises(ValueError, match="nothing to train"):
        build(model.requires_grad_(False), {}, OptimizerConfig())


def test_building_leaves_the_weights_and_no_gradients() -> None:
    model, config = Small(), OptimizerConfig(weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = build(model, {}, config)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None
    assert all(len(o.state) == sum(len(g["params"]) for g in o.param_groups) for o in optimizers)


def test_adamw_takes_the_step_of_its_formula() -> None:
    model = nn.Linear(2, 1, bias=False)
    config = OptimizerConfig(optimizer="adamw", learning_rate=0.1, weight_decay=0.01, betas=(0.8, 0.9))
    (optimizer,) = build(model, {}, config)
    weight = model.weight.detach().double().clone()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for n, gradient in enumerate([[0.5, -2.0], [1.0, 1.0]], start=1):
        model.weight.grad = torch.tensor([gradient])
        optimizer.step()
        g = model.weight.grad.double()
        first, second = 0.8 * first + 0.2 * g, 0.9 * second + 0.1 * g * g
        weight -= 0.1 * 0.01 * weight
        weight -= 0.1 * (first / (1 - 0.8**n)) / ((second / (1 - 0.9**n)).sqrt() + 1e-8)
        torch.testing.assert_close(model.weight.double(), weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 8), (2, 24, 8), (2, 8, 24)])
def test_orthogonalised_matrices_keep_their_directions_at_singular_values_near_one(
    shape: tuple[int, ...], kind: Precision
) -> None:
    matrices = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    assert s.min() / s.max() < 0.6
    with products_in(kind):
        done = orthogonalise(matrices).double()
    in_basis = u.mT @ done @ vh.mT  # (M, K, K): diagonal, with the new singular values
    values = in_basis.diagonal(dim1=-2, dim2=-1)
    assert (in_basis - torch.diag_embed(values)).abs().max() < (1e-5 if kind == "float32" else 0.05)
    large = s / matrices.flatten(1).norm(dim=1, keepdim=True) > 0.02
    assert values[large].min() > 0.6 and values.max() < 1.25


def test_muon_steps_by_hand_and_alike_in_a_batch() -> None:
    weights = [nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(8, 4))]
    start = [w.detach().clone() for w in weights]
    optimizer = Muon(weights[:2], lr=0.1, weight_decay=0.5)
    optimizer.add_param_group({"params": weights[2:], "weight_decay": 0.0})
    momenta = [torch.zeros_like(w) for w in weights]
    for _ in range(2):
        for w in weights:
            w.grad = torch.randn_like(w)
        optimizer.step()
        for i, w in enumerate(weights):
            assert w.grad is not None
            momenta[i] = 0.95 * momenta[i] + 0.05 * w.grad
            update = orthogonalise((0.05 * w.grad + 0.95 * momenta[i])[None])[0]
            start[i] = start[i] * (1 - 0.1 * (0.5 if i < 2 else 0.0))
            start[i] = start[i] - 0.1 * update * (math.sqrt(2) if w.shape == (8, 4) else 1)
            torch.testing.assert_close(w.detach(), start[i], rtol=1e-5, atol=1e-6)


def test_muon_leaves_parameters_without_gradient_and_refuses_vectors() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    Muon([weight], weight_decay=0.5).step()
    assert torch.equal(weight, torch.ones(3, 3))
    with pytest.raises(ValueError, match="AdamW"):
        Muon([nn.Parameter(torch.ones(3))])


def test_schedules() -> None:
    def at(step: int, progress: float, **fields: object) -> float:
        return learning_rate_factor(OptimizerConfig(**fields), step, progress)  # type: ignore[arg-type]

    assert at(0, 0, warmup=4, schedule="constant") == 0.25
    assert at(3, 0, warmup=4, schedule="constant") == at(99, 1, warmup=4, schedule="constant") == 1
    assert at(0, 0, warmup=0, schedule="constant") == 1
    cosine = [at(99, p, schedule="cosine", final=0.2) for p in (0, 0.25, 0.5, 1)]
    assert cosine == pytest.approx([1, 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2, 0.6, 0.2])
    stable = [at(99, p, schedule="linear", decay=0.2, final=0.1) for p in (0, 0.8, 0.9, 1)]
    assert stable == pytest.approx([1, 1, 0.55, 0.1])
    assert at(0, 0.5, warmup=2, schedule="linear", final=0) == pytest.approx(0.25)


def test_ema_is_the_weighted_mean_and_swaps_in_and_out() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema = EMA(model, decay=0.5)
    expected, weights = 1.0, [3.0, 5.0, 2.0]
    for n, weight in enumerate(weights):
        nn.init.constant_(model.weight, weight)
        ema.update(n)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
    with pytest.raises(KeyError), ema.averaged():
        assert model.weight.item() == pytest.approx(expected)
        raise KeyError
    assert model.weight.item() == 2.0
    with ema.averaged():
        assert model.weight.item() == pytest.approx(expected)
    for n in range(1000, 1002):
        ema.update(n)
    assert ema.average["weight"].item() == pytest.approx(2 + (expected - 2) / 4)
