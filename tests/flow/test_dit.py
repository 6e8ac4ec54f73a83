"""The DiT: packed training equals separate block passes, nothing leaks, the history carries no gradient."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import dit_config, one_block, tiny_dit
from torch import Tensor, nn

from opencola.flow.dit import BlockCausalDiT
from opencola.kernels import matmul
from opencola.kernels.choice import products_in
from opencola.layers.cache import KVCache

B, N, S, D = 2, 12, 4, 4  # three blocks


def inputs(copies: int = 1, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """z_0, z_t, t."""
    torch.manual_seed(3)
    z_0, z_t = torch.randn(B, N, D).double(), torch.randn(B, copies, N, D).double()
    return z_0, z_t, torch.rand(B, copies, groups).double()


def separately(
    dit: BlockCausalDiT,
    z_0: Tensor,
    z_t: Tensor,
    t: Tensor,
    pinned: Tensor | None = None,
    history: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """One pass for every sample, copy and block, each with its own clean history."""
    size, number, out = dit.config.block_size, z_t.shape[2], torch.empty_like(z_t)
    for b in range(len(z_t)):
        for c in range(z_t.shape[1]):
            for start in range(0, number, size):
                rows = slice(start, start + size)
                before = z_0[b, : first + start if history is None or history[b] else 0].detach()
                times = t[b, c, [row * t.shape[2] // number for row in range(start, start + size)]]
                if pinned is not None:
                    times = times * ~pinned[b, c, rows]
                out[b, c, rows] = one_block(dit, before, z_t[b, c, rows], times)
    return out


def gradients(dit: BlockCausalDiT, out: Tensor, z_t: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, out.numel()).double().view_as(out)
    return list(torch.autograd.grad((out * weight).sum() + out.square().sum(), (z_t, *dit.parameters())))


PINNED = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0]).bool().expand(B, 1, N)
CASES: dict[str, dict[str, Any]] = {
    "time per sequence": {},
    "time per block": {"groups": 3},
    "several copies": {"copies": 3, "groups": 3},
    "pinned rows": {"pinned": PINNED, "groups": 3},
    "history dropout": {"history": torch.tensor([True, False]), "copies": 2},
    "all at once": {"pinned": PINNED.expand(B, 2, N), "history": torch.tensor([False, True]), "copies": 2, "groups": 3},
    "blocks of one": {"block_size": 1, "copies": 2, "groups": 12},
    "one block": {"block_size": 12, "copies": 2},
    "trunk": {"num_layers": 3, "trunk_layers": 2, "copies": 2, "groups": 3, "pinned": PINNED.expand(B, 2, N)},
    "trunk, history dropout": {"num_layers": 3, "trunk_layers": 1, "history": torch.tensor([True, False])},
    "trunk, blocks of one": {"trunk_layers": 1, "block_size": 1, "copies": 2, "groups": 12},
    "trunk, from the second latent on": {"trunk_layers": 1, "first": 1, "copies": 2, "groups": 2},
    "trunk, from the fourth latent on": {"trunk_layers": 1, "first": 3, "block_size": 3, "groups": 3},
    "attention bias": {"attention_bias": True, "num_layers": 1, "rope_dim": 0},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_packed_equals_separate_passes_in_values_and_gradients(case: dict[str, Any]) -> None:
    case = dict(case)
    z_0, z_t, t = inputs(case.pop("copies", 1), case.pop("groups", 1))
    marks = {name: case.pop(name) for name in ("pinned", "history", "first") if name in case}
    dit, first = tiny_dit(**case), marks.get("first", 0)
    z_t = z_t[:, :, : (N - first) // dit.config.block_size * dit.config.block_size].clone().requires_grad_()
    z_0 = z_0[:, : first + z_t.shape[2]]
    packed, separate = dit.packed(z_0, z_t, t, **marks), separately(dit, z_0, z_t, t, **marks)
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-10)
    for a, b in zip(gradients(dit, packed, z_t), gradients(dit, separate, z_t), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_copies_equal_single_copy_passes() -> None:
    dit, (z_0, z_t, t) = tiny_dit(), inputs(copies=3, groups=3)
    singly = torch.cat([dit.packed(z_0, z_t[:, [c]], t[:, [c]]) for c in range(3)], dim=1)
    torch.testing.assert_close(dit.packed(z_0, z_t, t), singly, rtol=0, atol=1e-11)


@torch.no_grad()
def test_one_time_per_sequence_is_the_same_time_for_every_block() -> None:
    dit, (z_0, z_t, t) = tiny_dit(), inputs()
    torch.testing.assert_close(dit.packed(z_0, z_t, t), dit.packed(z_0, z_t, t.expand(B, 1, 3)), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_dropped_history_leaves_the_block_alone() -> None:
    dit, (z_0, z_t, t) = tiny_dit(), inputs()
    out = dit.packed(z_0, z_t, t, history=torch.tensor([False, False]))
    other = dit.packed(z_0 + 1, z_t, t, history=torch.tensor([False, False]))
    assert torch.equal(out, other)
    alone = one_block(dit, z_0[0, :0], z_t[0, 0, S : 2 * S], t[0, 0].expand(S))
    torch.testing.assert_close(out[0, 0, S : 2 * S], alone, rtol=0, atol=1e-11)  # though at positions S to 2 S


@pytest.mark.parametrize("trunk_layers", [0, 1])
@pytest.mark.parametrize("block", [0, 1, 2])
@torch.no_grad()
def test_packed_blocks_do_not_see_the_future(block: int, trunk_layers: int) -> None:
    dit, (z_0, z_t, t) = tiny_dit(trunk_layers=trunk_layers), inputs(copies=2, groups=3)
    before, own = dit.packed(z_0, z_t, t), slice(block * S, (block + 1) * S)

    def changed_blocks(z_0: Tensor, z_t: Tensor, t: Tensor) -> list[list[bool]]:
        after = dit.packed(z_0, z_t, t)
        return (before != after).unflatten(2, (3, S)).any(-1).any(-1).any(0).tolist()

    other = z_0.clone()
    other[:, own] += 0.1
    assert changed_blocks(other, z_t, t) == [[later > block for later in range(3)]] * 2
    for row in range(block * S, (block + 1) * S):  # the own noisy block is seen from all its rows, by its copy alone
        other = z_t.clone()
        other[:, 0, row] += 0.1
        after = (before != dit.packed(z_0, other, t)).any(-1).any(0)
        assert after[0].tolist() == [place // S == block for place in range(N)] and not after[1].any()
    other = t.clone()
    other[:, 1, block] *= 0.5
    assert changed_blocks(z_0, z_t, other) == [[False] * 3, [number == block for number in range(3)]]


@pytest.mark.parametrize("first", range(4))
@torch.no_grad()
def test_behind_a_trunk_documents_do_not_see_each_other_wherever_blocks_begin(first: int) -> None:
    dit, (z_0, _, _) = tiny_dit(trunk_layers=1), inputs()
    number = (N - first) // S * S
    z_0, z_t = z_0[:, : first + number], torch.randn(B, 1, number, D).double()
    documents = (torch.arange(first + number) >= 5).long().expand(B, -1)
    t, later = torch.full((B, 1, 1), 0.4).double(), torch.arange(first, first + number) >= 5
    other = z_0.clone()
    other[:, :5] += 1
    before, after = (dit.packed(z, z_t, t, documents=documents, first=first)[:, 0] for z in (z_0, other))
    assert torch.equal(before[:, later], after[:, later])
    assert (before[:, 4 - first] != after[:, 4 - first]).any()
    if first == 1:  # the second document begins with a block
        alone = dit.packed(z_0[:, 5:], z_t[:, :, 4:], t, documents=documents[:, 5:])[:, 0]
        torch.testing.assert_close(before[:, later], alone, rtol=0, atol=1e-11)


def commit(dit: BlockCausalDiT, cache: KVCache, z: Tensor) -> KVCache:
    read(dit, cache, z, 0.0)
    return cache.append(z.shape[1])


def read(dit: BlockCausalDiT, cache: KVCache, z: Tensor, t: float) -> Tensor:
    rows = z.shape[1]
    modulation, index = dit.modulation(torch.tensor([t], dtype=torch.float64)), torch.zeros(1, 1, dtype=torch.long)
    return dit(z, modulation, index, dit.turns(cache.positions(rows)), cache.attend(rows, dit.config.block_size))


@torch.no_grad()
def test_cached_blocks_equal_the_packed_pass() -> None:
    dit, (z_0, z_t, t) = tiny_dit(), inputs()
    t = torch.full_like(t, 0.6)
    packed, cache = dit.packed(z_0, z_t, t)[:, 0], dit.empty_cache(B, N)
    for start in range(0, N, S):
        out = read(dit, cache, z_t[:, 0, start : start + S], 0.6)
        torch.testing.assert_close(out, packed[:, start : start + S], rtol=0, atol=1e-11)
        cache = commit(dit, cache, z_0[:, start : start + S])


@torch.no_grad()
def test_cached_blocks_do_not_see_the_future() -> None:
    dit, (z_0, z_t, _) = tiny_dit(), inputs()
    cache = commit(dit, dit.empty_cache(B, 2 * N), z_0[:, :S])
    before = read(dit, cache, z_t[:, 0], 0.6)
    for block in range(3):
        other = z_t[:, 0].clone()
        other[:, block * S] += 0.1
        changed = (before != read(dit, cache, other, 0.6)).any(-1).any(0).unflatten(0, (3, S))
        assert changed.all(-1).tolist() == changed.any(-1).tolist() == [later >= block for later in range(3)]
    read(dit, commit(dit, cache, z_0[:, S : 2 * S]), z_t[:, 0, :S], 0.6)  # whatever is done behind it
    assert torch.equal(read(dit, cache, z_t[:, 0], 0.6), before)


@pytest.mark.parametrize("copies", [1, 2])
def test_the_history_carries_no_gradient(copies: int) -> None:
    dit, (z_0, z_t, t) = tiny_dit(), inputs(copies)
    z_0.requires_grad_()
    out = dit.packed(z_0, z_t.requires_grad_(), t)
    by_history, by_noisy = torch.autograd.grad(out.square().sum(), (z_0, z_t), allow_unused=True)
    assert by_history is None and by_noisy.abs().min() > 0
    assert (dit.packed(z_0 + 0.1, z_t, t) - out).abs().max() > 1e-3  # though it is seen


@pytest.mark.parametrize("trunk_layers", [0, 1])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize(
    ("size", "length", "first"), [(4, 12, 0), (4, 12, 8), (4, 4, 0), (1, 12, 5), (4, 144, 4), (1, 140, 0), (1, 140, 70)]
)
def test_given_a_history_is_as_packed_in_values_and_derivatives(
    size: int, length: int, first: int, pinned: bool, trunk_layers: int
) -> None:
    dit, z_0 = tiny_dit(block_size=size, trunk_layers=trunk_layers), torch.randn(B, length, D).double()
    clean = torch.rand(B, length) < 0.3 if pinned else torch.zeros(B, length).bool()
    velocity = dit.given(z_0, clean, first)
    for t in (0.0, 0.4, 1.0):
        z_t = torch.randn(B, length, D).double().requires_grad_()
        weight = torch.randn(B, length - first, D).double()
        packed = dit.packed(z_0, z_t[:, None], z_t.new_full((B, 1, 1), t), pinned=clean[:, None])[:, 0, first:]
        alone = velocity(z_t[:, first:], t)
        torch.testing.assert_close(alone, packed, rtol=1e-12, atol=1e-12)
        products = [torch.autograd.grad((v * weight).sum(), z_t)[0] for v in (alone, packed)]
        torch.testing.assert_close(*products, rtol=1e-12, atol=1e-11)


def test_the_initial_velocity_is_zero() -> None:
    dit, (z_0, z_t, t) = BlockCausalDiT(dit_config()).double(), inputs()
    assert (dit.packed(z_0, z_t, t) == 0).all()
    nn.init.normal_(dit.velocity_out.weight)
    assert dit.packed(z_0, z_t, t).abs().min() > 0
    loss = (dit.packed(z_0, z_t, t) - z_t).square().mean()
    assert torch.autograd.grad(loss, dit.velocity_out.weight)[0].abs().min() > 0


def test_wrong_sizes_are_named() -> None:
    z_0, z_t, t = inputs()
    with pytest.raises(ValueError, match="12 of 12 latents from 0 on are not whole blocks of block_size 5"):
        tiny_dit(block_size=5).packed(z_0, z_t, t)
    with pytest.raises(ValueError, match="12 latents from 2 on are not whole blocks of block_size 4"):
        tiny_dit().given(z_0, torch.zeros(B, N).bool(), 2)
    good = dit_config()
    for fields, message in (
        ({"rope_dim": 5}, "dit.rope_dim 5 must be even"),
        ({"rope_dim": 10}, "dit.rope_dim 10 must be even and at most dit.head_dim 8"),
        ({"trunk_layers": 2}, "dit.trunk_layers 2 leaves no layer of dit.num_layers 2 to denoise"),
        ({"vocab_size": 9}, "dit.vocab_size 9 is that of a trunk's head: set dit.trunk_layers above 0"),
        ({"block_size": 0}, "block_size must be at least 1, but is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(good, **fields)


@pytest.mark.parametrize("trunk_layers", [0, 1])
def test_recomputing_changes_neither_values_nor_gradients(trunk_layers: int) -> None:
    dit, (z_0, z_t, t) = tiny_dit(trunk_layers=trunk_layers), inputs(copies=2, groups=3)
    results = []
    for recompute in (False, True):
        velocity = dit.packed(z_0, z_t, t, recompute=recompute)
        results.append([velocity, *torch.autograd.grad(velocity.square().sum(), list(dit.parameters()))])
    for kept, computed_again in zip(*results, strict=True):
        torch.testing.assert_close(computed_again, kept, rtol=1e-12, atol=1e-12)


def test_recomputed_products_have_the_precision_of_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opencola.kernels.matmul.LEAST", 0)
    monkeypatch.setattr("opencola.layers.operations.linear.worthwhile", None)
    cast = matmul.IMPLEMENTATIONS["bfloat16"]["torch"]
    monkeypatch.setattr(matmul, "chosen", lambda count, way, kind: cast if kind == "bfloat16" else matmul._torch)
    dit, given = tiny_dit().float(), [x.float() for x in inputs(copies=2, groups=3)]
    results = []
    for kind, recompute in (("bfloat16", False), ("bfloat16", True), ("float32", False)):
        with products_in(kind):  # type: ignore[arg-type]
            velocity = dit.packed(*given, recompute=recompute)
        results.append(torch.cat([x.flatten() for x in torch.autograd.grad(velocity.sum(), list(dit.parameters()))]))
    assert torch.equal(results[1], results[0]) and not torch.equal(results[2], results[0])
