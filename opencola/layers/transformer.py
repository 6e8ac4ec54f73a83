"""Transformer blocks of the Text VAE (`Block`) and of the DiT (`AdaptiveBlock`), and the time embedding.

Norms are computed in float32 (or wider) under autocast, too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencola.kernels import elementwise
from opencola.kernels.library import usable
from opencola.layers.attention import Attend, Rotary, rotate_halves, rotate_pairs

Activation = Literal["swiglu", "gelu", "silu"]


class Linear(nn.Linear):
    """Linear layer that takes wider inputs than its weights: norms give float32, and weights may be bfloat16."""

    def forward(self, x: Tensor, activation: Literal["none", "gelu"] = "none") -> Tensor:
        """x (..., in) -> (..., out); gelu is the tanh form."""
        wider = torch.promote_types(x.dtype, self.weight.dtype) != self.weight.dtype
        x = x.to(self.weight.dtype) if wider else x
        if activation == "gelu" and usable(x, self.weight):  # the kernel adds the bias on its way
            return elementwise.gelu(self.product(x), self.bias)
        x = super().forward(x)
        return x if activation == "none" else gelu_tanh(x)

    def product(self, x: Tensor) -> Tensor:
        """Without the bias."""
        return F.linear(x, self.weight)


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in at least float32, also with parameters of less."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of x."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(wide) for p in (self.weight, self.bias))
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps)


@dataclass(frozen=True)
class BlockConfig:
    """Sizes and conventions of a Text VAE block (official-format §1.2, §4.2)."""

    width: int
    num_heads: int
    ffn_dim: int
    multi_query: bool
    activation: Activation
    post_norm: bool
    qk_norm: bool
    qk_norm_affine: bool
    qkv_bias: bool
    bias: bool
    norm_affine: bool
    norm_eps: float
    clip_qkv: float | None


class Block(nn.Module):
    """Attention and MLP block of the Text VAE, with the release's norm placement (official-format §4.2)."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        width, eps = config.width, config.norm_eps
        kv_width = width // config.num_heads if config.multi_query else width
        self.config = config
        self.splits = [width, kv_width, kv_width]
        self.norm_attention = LayerNorm(width, eps, elementwise_affine=config.norm_affine)
        self.qkv = Linear(width, sum(self.splits), bias=config.qkv_bias)
        qk_norm = config.qk_norm
        self.norm_q = LayerNorm(width, eps, config.qk_norm_affine) if qk_norm else nn.Identity()
        self.norm_k = LayerNorm(kv_width, eps, config.qk_norm_affine) if qk_norm else nn.Identity()
        self.attention_out = Linear(width, width, bias=config.bias)
        self.norm_mlp = LayerNorm(width, eps)
        self.mlp_in = Linear(width, config.ffn_dim, bias=config.bias)
        gated = config.activation == "swiglu"
        self.mlp_out = Linear(config.ffn_dim // 2 if gated else config.ffn_dim, width, bias=config.bias)

    def forward(self, x: Tensor, layer: int, table: Rotary, attend: Attend) -> Tensor:
        """x (B, R, D) -> (B, R, D); `layer` is this block's number for `attend`."""
        config = self.config
        qkv = self.qkv(x if config.post_norm else self.norm_attention(x))
        if config.clip_qkv is not None:
            qkv = qkv.clamp(-config.clip_qkv, config.clip_qkv)
        q, k, v = qkv.split(self.splits, dim=-1)
        q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = (part.unflatten(-1, (-1, config.width // config.num_heads)) for part in (q, k, v))
        q, k = rotate_halves(q, table).to(v.dtype), rotate_halves(k, table).to(v.dtype)
        attended = self.attention_out(attend(layer, q, k, v).flatten(-2))
        if config.post_norm:
            # the release normalises the residual stream here, not the attention output; its weights depend on it (Q1)
            x = self.norm_attention(x) + attended
            return x + self.norm_mlp(self.mlp_out(self.activation(self.mlp_in(x))))
        x = x + attended
        return x + self.mlp_out(self.activation(self.mlp_in(self.norm_mlp(x))))

    def activation(self, x: Tensor) -> Tensor:
        """SwiGLU (value half first, gate half second), exact GELU or SiLU."""
        if self.config.activation == "swiglu":
            value, gate = x.chunk(2, dim=-1)
            return value * F.silu(gate)
        return F.gelu(x) if self.config.activation == "gelu" else F.silu(x)


class AdaptiveBlock(nn.Module):
    """Attention and MLP block of the DiT, modulated by the time (official-format §3.2)."""

    def __init__(
        self, width: int, num_heads: int, head_dim: int, expansion: int, eps: float, attention_bias: bool
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * num_heads * head_dim, bias=attention_bias)
        self.norm_q, self.norm_k = LayerNorm(head_dim, eps), LayerNorm(head_dim, eps)
        self.attention_out = Linear(num_heads * head_dim, width, bias=attention_bias)
        self.norm = LayerNorm(width, eps, elementwise_affine=False)
        self.mlp_in = Linear(width, expansion * width)
        self.mlp_out = Linear(expansion * width, width)
        self.modulation = Linear(width, 6 * width)  # shift, scale, gate of the attention, then of the MLP

    def forward(
        self, h: Tensor, layer: int, modulation: Tensor, index: Tensor, turn: Tensor, attend: Attend, skip: int = 0
    ) -> Tensor:
        """h (B, R, D) -> (B, R - skip, D); modulation (M, 6 D) of distinct times, turn from `attention.turns`.

        index: int64 (B, R), each row's time among the distinct ones; not read where there is only one.

        The first `skip` rows only give keys and values: nothing else of them is wanted after the last block.
        """
        # gathered for the rows one by one: all six at once would be the largest tensor of a block
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.chunk(6, dim=-1)
        u = modulated_norm(self.norm, h, shift_1, scale_1, index)
        q, k, v = self.split_heads(self.qkv(u), turn, skip)
        if skip:
            h, index = h[:, skip:], index[:, skip:]
        attended = attend(layer, q, k, v).flatten(-2)
        h, u = self.gated_norm(h, gate_1, attended, shift_2, scale_2, index)
        u = self.mlp_in(u, "gelu")
        if usable(h, gate_2, u):  # the kernel adds the bias on its way
            return elementwise.gated(h, gate_2, self.mlp_out.product(u), index, self.mlp_out.bias)
        return torch.addcmul(h, take(gate_2, index), self.mlp_out(u).to(h.dtype))

    def gated_norm(
        self, h: Tensor, gate: Tensor, attended: Tensor, shift: Tensor, scale: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """h with what was attended to (B, R, H Dh) added through the gate (M, D), and `modulated_norm` of that."""
        update = self.attention_out(attended)
        if usable(h, gate, update, shift, scale):
            return elementwise.gated_norm(h, gate, update, shift, scale, index, self.norm.eps)
        h = torch.addcmul(h, take(gate, index), update.to(h.dtype))
        return h, modulated_norm(self.norm, h, shift, scale, index)

    def split_heads(self, qkv: Tensor, turn: Tensor, skip: int) -> tuple[Tensor, Tensor, Tensor]:
        """qkv (B, R, 3 H Dh) -> normalised and turned q, without the first `skip` rows, and k; v: (B, R, H, Dh).

        In memory heads come before rows, the order of attention's products.
        """
        norms = self.norm_q.weight, self.norm_q.bias, self.norm_k.weight, self.norm_k.bias
        if turn.dtype == torch.complex64 and usable(qkv, *norms):
            return elementwise.split_heads(qkv, self.num_heads, norms, turn, self.norm_q.eps, skip)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        turn = turn.transpose(-3, -2)
        q, k = rotate_pairs(self.norm_q(q), turn).to(v.dtype), rotate_pairs(self.norm_k(k), turn).to(v.dtype)
        return q.transpose(1, 2)[:, skip:], k.transpose(1, 2), v.transpose(1, 2)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form, 0.5 x (1 + tanh(u)) = x sigmoid(2 u).

    Without gradients on a CPU by the latter: 2.5 times as fast as torch's, which calls a slow tanh.
    """
    if x.requires_grad or not x.is_cpu:
        return F.gelu(x, approximate="tanh")
    c = math.sqrt(8 / math.pi)
    return (x * x).mul_(0.044715 * c).add_(c).mul_(x).sigmoid_().mul_(x)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """x * (1 + scale) + shift: x (B, R, D); shift, scale (M, D), of which a row takes the one at its index."""
    return torch.addcmul(take(shift, index), x, take(1 + scale, index))


def modulated_norm(norm: LayerNorm, h: Tensor, shift: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """`modulate` of the normalised h."""
    if not usable(h, shift, scale):
        return modulate(norm(h), shift, scale, index)
    if norm.weight is not None:  # for the few times rather than the many rows
        factor = norm.weight * (1 + scale)
        shift, scale = torch.addcmul(shift, norm.bias, 1 + scale), factor - 1
    return elementwise.modulated_norm(h, shift, scale, index, norm.eps)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows (B, R, D) of values (M, D) at index (B, R); a single one as it is, to be broadcast."""
    return values if len(values) == 1 else F.embedding(index, values)


class TimeEmbedding(nn.Module):
    """Sinusoid of 1000 t (256 values, sine half first) -> two-layer SiLU MLP -> width (official-format §3.1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp_in = Linear(256, width)
        self.mlp_hidden = Linear(width, width)
        self.mlp_out = Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """t (M,) in [0, 1] -> (M, D)."""
        wide = torch.promote_types(t.dtype, torch.float32)
        frequencies = torch.exp(torch.arange(128, device=t.device, dtype=wide) * (-math.log(10000.0) / 128))
        phases = (1000 * t.to(wide))[:, None] * frequencies
        x = torch.cat((phases.sin(), phases.cos()), dim=-1).to(self.mlp_in.weight.dtype)
        return self.mlp_out(F.silu(self.mlp_hidden(F.silu(self.mlp_in(x)))))


def initialise(module: nn.Module, std: Callable[[nn.Linear], float]) -> None:
    """Normal weights of the given deviation and zero biases for every linear layer below `module`."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=std(child))
            if child.bias is not None:
                nn.init.zeros_(child.bias)
