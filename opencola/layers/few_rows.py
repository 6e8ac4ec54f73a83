"""A DiT's blocks for the few rows of generation: weights in another order, and no gradients."""

import copy
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from opencola.kernels import rows as kernels
from opencola.kernels.choice import implemented_by
from opencola.kernels.matmul import packed
from opencola.layers.attention import Attend
from opencola.layers.operations import Linear, split_heads
from opencola.layers.transformer import AdaptiveBlock

PACKED_BYTES = 1 << 30
Model = TypeVar("Model", bound=nn.Module)


def prepacked(model: Model, blocks: str, rows: int) -> Model:
    """A copy of a model that shares its parameters, its module list `blocks` of AdaptiveBlocks made `for_few_rows`.

    rows: about how many a call will have. The model itself where that does not pay or cannot be: other weights than
    float32 on a CPU, or PACKED_BYTES of them.
    """
    weights = [w for block in model.get_submodule(blocks).children() for w in _weights(block)]
    fit = all(weight.is_cpu and weight.dtype == torch.float32 for weight in weights)
    if not fit or sum(w.nbytes for w in weights) >= PACKED_BYTES:
        return model
    copied, old = _shell(model), model.get_submodule(blocks).children()
    ordered = (for_few_rows(cast(AdaptiveBlock, _shell(block)), _weights(block), rows) for block in old)
    copied.set_submodule(blocks, nn.ModuleList(ordered))
    return copied


def _shell(module: Model) -> Model:
    """The module itself anew, of the same parts, which may then be exchanged. (A deep copy takes as long as a text.)"""
    shell = copy.copy(module)
    shell._modules = dict(module._modules)
    return shell


def _layers(block: nn.Module) -> dict[str, Linear]:
    """Those to pack; modulations are computed once for all times: not worth it."""
    return {name: layer for name, layer in block.named_children() if isinstance(layer, Linear) and name != "modulation"}


def _weights(block: nn.Module) -> tuple[Tensor, ...]:
    return tuple(layer.weight for layer in _layers(block).values())


def _by_onednn(block: AdaptiveBlock, weights: tuple[Tensor, ...], rows: int) -> nn.Module:
    for name, layer in _layers(block).items():
        block.set_submodule(name, PackedLinear(layer, rows))
    return block


@implemented_by(lambda block, weights, rows: FewRowsBlock(block))
@implemented_by(_by_onednn, takes=lambda *weights: torch.backends.mkldnn.is_available())  # half as good
def for_few_rows(block: AdaptiveBlock, weights: tuple[Tensor, ...], rows: int) -> nn.Module:
    """The block, which the caller gives away, for calls of about as many rows; weights: float32 on a CPU."""
    return block


class PackedLinear(nn.Module):
    """A linear layer with a copy of its weight in oneDNN's order, for use without gradients.

    Products of a few rows (about `rows`) are half as fast again: plain ones spend their time on ordering the weights.
    """

    def __init__(self, layer: Linear, rows: int) -> None:
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows), layer.bias

    def forward(self, x: Tensor, activation: Literal["none", "gelu"] = "none") -> Tensor:
        """As `Linear`."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], "tanh")

    def product(self, x: Tensor) -> Tensor:
        """Without the bias."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "tanh")


class FewRowsBlock(nn.Module):
    """An AdaptiveBlock by kernels: norms, modulations, GELU and residuals are done beside the products."""

    def __init__(self, block: AdaptiveBlock) -> None:
        super().__init__()
        self.block, self.modulation = block, block.modulation
        layers = (block.qkv, block.attention_out, block.mlp_in, block.mlp_out)
        self.weights = [packed(layer.weight) for layer in layers]

    def forward(
        self, h: Tensor, layer: int, modulation: Tensor, index: Tensor, turn: Tensor, attend: Attend, skip: int = 0
    ) -> Tensor:
        """As AdaptiveBlock's, all rows wanted."""
        block, (qkv, attention_out, mlp_in, mlp_out) = self.block, self.weights
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.chunk(6, dim=-1)
        width, hidden, eps = h.shape[-1], block.mlp_in.out_features, block.eps
        index = index.expand(h.shape[:2])
        heads = kernels.product(h, qkv, block.qkv.bias, block.qkv.out_features, index, norm=(shift_1, scale_1, eps))
        attended = attend(layer, *split_heads(heads, block.num_heads, block.head_norms, turn, eps)).flatten(-2)
        h = kernels.product(attended, attention_out, block.attention_out.bias, width, index, residual=(h, gate_1))
        u = kernels.product(h, mlp_in, block.mlp_in.bias, hidden, index, norm=(shift_2, scale_2, eps), gelu=True)
        return kernels.product(u, mlp_out, block.mlp_out.bias, width, index, residual=(h, gate_2))

    def keys_values(self, h: Tensor, modulation: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """As AdaptiveBlock's."""
        block, (shift, scale) = self.block, modulation.chunk(6, dim=-1)[:2]
        index = torch.zeros(h.shape[:2], dtype=torch.long, device=h.device)
        norm, width = (shift, scale, block.eps), block.qkv.out_features
        heads = kernels.product(h, self.weights[0], block.qkv.bias, width, index, norm=norm)
        return split_heads(heads, block.num_heads, block.head_norms, turn, block.eps)[1:]
