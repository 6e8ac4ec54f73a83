"""Blocks with packed weights give what plain ones do."""

import math

import pytest
import torch
from tiny import tiny_dit
from torch import Tensor, nn

from opencola.flow.dit import BlockCausalDiT
from opencola.layers.few_rows import FewRowsBlock, PackedLinear, prepacked
from opencola.layers.operations import Linear
from opencola.layers.transformer import AdaptiveBlock
from opencola.models.cola.caches import read_latents


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("bias", [True, False])
def test_prepacked_products_are_the_plain_ones(rows: int, bias: bool) -> None:
    layer, x = Linear(24, 40, bias=bias), torch.randn(2, rows, 24)
    plain = layer(x), layer(x, "gelu")
    layer_packed = PackedLinear(layer, 32)
    packed = layer_packed(x), layer_packed(x, "gelu")
    for one, other in zip(packed, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    exact = 0.5 * exact * (1 + torch.tanh(math.sqrt(2 / math.pi) * (exact + 0.044715 * exact**3)))
    torch.testing.assert_close(packed[1].double(), exact, rtol=0, atol=1e-5)


def kinds(model: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in model.modules()} & {AdaptiveBlock, FewRowsBlock, PackedLinear}


def guided(dit: BlockCausalDiT, clean: Tensor, z: Tensor, times: Tensor, index: Tensor) -> Tensor:
    """Velocities of z after what was committed, and without it."""
    cache = dit.empty_cache(len(clean), 64)
    read_latents(dit, cache, clean, dit.modulation(times.new_zeros(1)))
    cache = cache.append(torch.tensor([16, 8]))
    turn = dit.turns(cache.positions(z.shape[1]).repeat(2, 1))
    attend = cache.attend(z.shape[1], 4, alone=len(z))
    return dit(z.repeat(2, 1, 1), dit.modulation(times), index.repeat(2, 1), turn, attend)


@torch.inference_mode()
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(("rows", "head_dim"), [(4, 16), (12, 8), (12, 16)])
def test_packed_blocks_are_the_plain_ones(rows: int, head_dim: int, times: int, with_kernels: bool) -> None:
    dit = tiny_dit(attention_bias=True, head_dim=head_dim)
    clean, z, t = torch.randn(2, 16, 4), torch.randn(2, rows, 4), torch.rand(times)
    index = torch.randint(times, (2, rows))
    expected = guided(dit, clean.double(), z.double(), t.double(), index)
    packed = prepacked(dit.float(), "blocks", rows)
    assert kinds(packed) == {AdaptiveBlock, FewRowsBlock if with_kernels else PackedLinear}
    found = guided(packed, clean, z, t, index)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=5e-5)


def test_packing_makes_a_copy_that_shares_parameters_and_leaves_wide_and_large_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dit = tiny_dit().float()
    copied = prepacked(dit, "blocks", 4)
    assert kinds(dit) == {AdaptiveBlock} != kinds(copied)
    ours = {parameter.data_ptr() for parameter in dit.parameters()}
    assert {parameter.data_ptr() for parameter in copied.parameters()} <= ours
    monkeypatch.setattr("opencola.layers.few_rows.PACKED_BYTES", 16 * 16 * 4)
    assert prepacked(dit, "blocks", 4) is dit
    monkeypatch.undo()
    assert prepacked(dit.double(), "blocks", 4) is dit
