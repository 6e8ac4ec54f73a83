"""A DiT's blocks for the few rows of generation: weights in another order, and no gradients."""

import copy
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from opencola.kernels import library
from opencola.kernels import rows as generation
from opencola.layers.attention import Attend
from opencola.layers.transformer import AdaptiveBlock, Linear

PACKED_BYTES = 1 << 30
Model = TypeVar("Model", bound=nn.Module)


def prepacked(model: Model, blocks: str, rows: int) -> Model:
    """A copy of a model that shares its parameters, with packed weights in its module list `blocks` of AdaptiveBlocks.

    rows: about how many a call will have. The model itself where that does not pay or cannot be: other weights than
    float32 on a CPU, or PACKED_BYTES of them. Without kernels oneDNN packs them, which is half as good.
    """
    named = model.get_submodule(blocks).named_modules()  # modulations are computed once for all times: not worth it
    chosen = {name: m for name, m in named if isinstance(m, Linear) and not name.endswith("modulation")}
    weights = [layer.weight for layer in chosen.values()]
    fit = all(weight.is_cpu and weight.dtype == torch.float32 for weight in weights)
    if not fit or sum(w.nbytes for w in weights) >= PACKED_BYTES:
        return model
    copied = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    if library.usable(*weights):
        for name, block in model.get_submodule(blocks).named_children():
            copied.set_submodule(f"{blocks}.{name}", FewRowsBlock(cast(AdaptiveBlock, block)))
    elif torch.backends.mkldnn.is_available():
        for name, layer in chosen.items():
            copied.set_submodule(f"{blocks}.{name}", PackedLinear(layer, rows))
    return copied


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
        self.weights = [generation.pack(layer.weight) for layer in layers]

    def forward(
        self, h: Tensor, layer: int, modulation: Tensor, index: Tensor, turn: Tensor, attend: Attend, skip: int = 0
    ) -> Tensor:
        """As AdaptiveBlock's, all rows wanted."""
        block, (qkv, attention_out, mlp_in, mlp_out) = self.block, self.weights
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.chunk(6, dim=-1)
        width, hidden, eps = h.shape[-1], block.mlp_in.out_features, block.norm.eps
        index = index.expand(h.shape[:2])
        heads = generation.product(h, qkv, block.qkv.bias, block.qkv.out_features, index, norm=(shift_1, scale_1, eps))
        attended = attend(layer, *block.split_heads(heads, turn, 0)).flatten(-2)
        h = generation.product(attended, attention_out, block.attention_out.bias, width, index, residual=(h, gate_1))
        u = generation.product(h, mlp_in, block.mlp_in.bias, hidden, index, norm=(shift_2, scale_2, eps), gelu=True)
        return generation.product(u, mlp_out, block.mlp_out.bias, width, index, residual=(h, gate_2))
