"""The operations of blocks, defined in torch; `kernels/choice.py` puts a kernel in the place of one where it can.

Times: shift, scale and gate (M, D) belong to distinct times, of which a row takes the one at its index, int64
broadcastable to (B, R); it is not read where M is 1. Norms are computed in float32 (or wider) under autocast, too.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencola.kernels import elementwise, matmul, plain, vocabulary
from opencola.kernels.choice import implemented_by, on_cpu, packs
from opencola.layers.attention import Rotary, rotate_halves, rotate_pairs


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows (B, R, D) of values (M, D) at index (B, R); a single one as it is, to be broadcast."""
    return values if len(values) == 1 else F.embedding(index, values)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """x * (1 + scale) + shift of rows x (B, R, D)."""
    return torch.addcmul(take(shift, index), x, take(1 + scale, index))


def layer_norm(x: Tensor, eps: float, gain: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """LayerNorm of the last axis, in at least float32, also with gain and bias (D) of less."""
    wide = torch.promote_types(x.dtype, torch.float32)
    gain, bias = (None if p is None else p.to(wide) for p in (gain, bias))
    return F.layer_norm(x.to(wide), x.shape[-1:], gain, bias, eps)


@implemented_by(elementwise.modulated_norm)
def modulated_norm(
    h: Tensor,
    shift: Tensor,
    scale: Tensor,
    index: Tensor,
    eps: float,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`modulate` of the `layer_norm` of rows h (B, R, D)."""
    return modulate(layer_norm(h, eps, gain, bias), shift, scale, index)


@implemented_by(elementwise.gated_norm)
def gated_norm(
    h: Tensor, gate: Tensor, update: Tensor, shift: Tensor, scale: Tensor, index: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """h + gate * update, rows (B, R, D), and the `modulated_norm` of that."""
    h = torch.addcmul(h, take(gate, index), update.to(h.dtype))
    return h, modulate(layer_norm(h, eps), shift, scale, index)


@implemented_by(lambda x: 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5))), worthwhile=lambda x: packs() is not None)
def exact_gelu(x: Tensor) -> Tensor:
    """GELU itself. In `invariant` functions of parts: torch's differs with the place of a number among others."""
    return F.gelu(x)


@implemented_by(lambda x: x / (1 + torch.exp(-x)), worthwhile=lambda x: packs() is not None)
def silu(x: Tensor) -> Tensor:
    """x sigmoid(x); the rest as of `exact_gelu`."""
    return F.silu(x)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, 0.5 x (1 + tanh(u)) = x sigmoid(2 u).

    Without gradients on a CPU by the latter: 2.5 times as fast as torch's, which calls a slow tanh.
    """
    if x.requires_grad or not x.is_cpu:
        return F.gelu(x, approximate="tanh")
    c = math.sqrt(8 / math.pi)
    return (x * x).mul_(0.044715 * c).add_(c).mul_(x).sigmoid_().mul_(x)


@implemented_by(matmul.linear, takes=on_cpu, worthwhile=matmul.worthwhile)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in), plus bias (out)."""
    return F.linear(x, weight, bias)


@implemented_by(matmul.product_of_stacks, takes=on_cpu, worthwhile=matmul.stacks_worthwhile)
def product_of_stacks(a: Tensor, b: Tensor) -> Tensor:
    """a (S, M, K) times the transposes of b (S, N, K): (S, M, N). By kernels without gradients."""
    return a @ b.mT


@implemented_by(lambda x, weight, bias: elementwise.gelu(linear(x, weight), bias))
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`gelu` of the linear layer of x (..., in) with weight (out, in)."""
    return gelu(linear(x, weight, bias))


def swiglu(x: Tensor, gate_first: bool) -> Tensor:
    """value * silu(gate), the halves of x (..., 2 D)."""
    gate, value = x.chunk(2, dim=-1) if gate_first else x.chunk(2, dim=-1)[::-1]
    return value * F.silu(gate)


@implemented_by(lambda x, weight, bias, gate_first: plain.swiglu(linear(x, weight), bias, gate_first))
def linear_swiglu(x: Tensor, weight: Tensor, bias: Tensor | None, gate_first: bool) -> Tensor:
    """`swiglu` of the linear layer of x (..., in) with weight (2 D, in)."""
    return swiglu(linear(x, weight, bias), gate_first)


class Linear(nn.Linear):
    """Linear layer that takes wider inputs than its weights: norms give float32, and weights may be bfloat16."""

    def forward(
        self, x: Tensor, activation: Literal["none", "gelu", "swiglu gate first", "swiglu value first"] = "none"
    ) -> Tensor:
        """x (..., in) -> (..., out), or half of that with swiglu; gelu is the tanh form."""
        wider = torch.promote_types(x.dtype, self.weight.dtype) != self.weight.dtype
        x = x.to(self.weight.dtype) if wider else x
        if activation == "none":
            return linear(x, self.weight, self.bias)
        if activation == "gelu":
            return linear_gelu(x, self.weight, self.bias)
        return linear_swiglu(x, self.weight, self.bias, activation == "swiglu gate first")

    def product(self, x: Tensor) -> Tensor:
        """Without the bias."""
        return linear(x, self.weight)

    def cross_entropy(self, h: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As a vocabulary's head: `linear_cross_entropy` of features h (..., D) and targets (...)."""
        return linear_cross_entropy(h, self.weight, self.bias, targets)


@implemented_by(vocabulary.linear_cross_entropy)
def linear_cross_entropy(h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of targets (...) int64 under the logits of h (..., D), in nats, and the likeliest tokens (...).

    weight (V, D), bias (V): of the logits' linear layer. Losses are in at least float32.
    """
    logits = linear(h.to(weight.dtype), weight, bias).flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return losses.view_as(targets), logits.detach().argmax(-1).view_as(targets)


@implemented_by(plain.layer_norm)
def plain_norm(
    x: Tensor, eps: float, gain: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """`layer_norm` of x (..., D), plus residual (..., D)."""
    normal = layer_norm(x, eps, gain, bias)
    return normal if residual is None else normal + residual


@implemented_by(plain.residual_rms_norm)
def residual_rms_norm(h: Tensor, y: Tensor | None, eps: float, gain: Tensor) -> tuple[Tensor, Tensor]:
    """h + y, or h where y is None, and its RMSNorm over the last axis with gain (D), in at least float32."""
    h = h if y is None else h + y
    wide = torch.promote_types(h.dtype, torch.float32)
    return h, F.rms_norm(h.to(wide), h.shape[-1:], gain.to(wide), eps)


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in at least float32, also with parameters of less."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise the last axis of x, and add the residual."""
        return plain_norm(x, self.eps, self.weight, self.bias, residual)


class RMSNorm(nn.Module):
    """RMSNorm, of a sum, computed in at least float32, also with a gain of less."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, h: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """h + y, or h where y is None, and that normalised over its last axis."""
        return residual_rms_norm(h, y, self.eps, self.weight)


@implemented_by(
    lambda h, gate, linear, x, index: elementwise.gated(h, gate, linear.product(x), index, linear.bias),
)
def gated(h: Tensor, gate: Tensor, linear: Linear, x: Tensor, index: Tensor) -> Tensor:
    """h + gate * linear(x): rows h (B, R, D) and x (B, R, in)."""
    return torch.addcmul(h, take(gate, index), linear(x).to(h.dtype))


@implemented_by(elementwise.split_heads)
def split_heads(
    qkv: Tensor, heads: int, norms: tuple[Tensor, Tensor, Tensor, Tensor], turn: Tensor, eps: float, skip: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, R, 3 H Dh) -> normalised and turned q, without the first `skip` rows, and k; v: (B, R, H, Dh).

    norms: gain and bias (Dh) of q's norm, and of k's; turn: `attention.turns` of the rows. In memory heads come before
    rows, the order of attention's products.
    """
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    turn = turn.transpose(-3, -2)
    q, k = (layer_norm(x, eps, gain, bias) for x, gain, bias in ((q, *norms[:2]), (k, *norms[2:])))
    q, k = rotate_pairs(q, turn).to(v.dtype), rotate_pairs(k, turn).to(v.dtype)
    return q.transpose(1, 2)[:, skip:], k.transpose(1, 2), v.transpose(1, 2)


@implemented_by(plain.rotated_heads)
def rotated_heads(
    qkv: Tensor, heads: int, kv_heads: int, table: Rotary, norms: tuple[Tensor | None, ...] | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, R, (H + 2 Hkv) Dh) -> turned q (B, R, H, Dh) and k, and v, both (B, R, Hkv, Dh).

    norms: gain and bias of the norm of a row's q, all heads together, and of its k; None: they are not normalised.
    """
    width = qkv.shape[-1] // (heads + 2 * kv_heads)
    q, k, v = qkv.split([n * width for n in (heads, kv_heads, kv_heads)], dim=-1)
    if norms is not None:
        q, k = layer_norm(q, eps, *norms[:2]), layer_norm(k, eps, *norms[2:])
    q, k, v = (x.unflatten(-1, (-1, width)) for x in (q, k, v))
    return rotate_halves(q, table).to(v.dtype), rotate_halves(k, table).to(v.dtype), v
