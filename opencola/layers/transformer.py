"""Transformer blocks of the Text VAE (`Block`) and of the DiT (`AdaptiveBlock`), and the time embedding."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from opencola.layers.attention import Attend, Rotary
from opencola.layers.operations import (
    LayerNorm,
    Linear,
    exact_gelu,
    gated,
    gated_norm,
    modulated_norm,
    rotated_heads,
    silu,
    split_heads,
)
from opencola.ranges import Count, Positive, check

Activation = Literal["swiglu", "gelu", "silu"]


@dataclass(frozen=True)
class BlockConfig:
    """Sizes and conventions of a Text VAE block (official-format §1.2, §4.2)."""

    width: Count
    num_heads: Count
    ffn_dim: Count
    multi_query: bool
    activation: Activation
    post_norm: bool
    qk_norm: bool
    qk_norm_affine: bool
    qkv_bias: bool
    bias: bool
    norm_affine: bool
    norm_eps: Positive
    clip_qkv: Positive | None

    def __post_init__(self) -> None:
        check(self)


class Block(nn.Module):
    """Attention and MLP block of the Text VAE, with the release's norm placement (official-format §4.2)."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        width, eps = config.width, config.norm_eps
        self.kv_heads = 1 if config.multi_query else config.num_heads
        kv_width = self.kv_heads * width // config.num_heads
        self.config = config
        self.norm_attention = LayerNorm(width, eps, elementwise_affine=config.norm_affine)
        self.qkv = Linear(width, width + 2 * kv_width, bias=config.qkv_bias)
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
        q, k, v = rotated_heads(qkv, config.num_heads, self.kv_heads, table, self.head_norms, config.norm_eps)
        attended = self.attention_out(attend(layer, q, k, v).flatten(-2))
        if config.post_norm:
            # the release normalises the residual stream here, not the attention output; its weights depend on it (Q1)
            x = self.norm_attention(x, attended)
            return self.norm_mlp(self.mlp_out(self.hidden(x)), x)
        x = x + attended
        return x + self.mlp_out(self.hidden(self.norm_mlp(x)))

    def hidden(self, x: Tensor) -> Tensor:
        """SwiGLU (value half first, gate half second), exact GELU or SiLU of the first layer of the MLP."""
        if self.config.activation == "swiglu":
            return self.mlp_in(x, "swiglu value first")
        x = self.mlp_in(x)
        return exact_gelu(x) if self.config.activation == "gelu" else silu(x)

    @property
    def head_norms(self) -> tuple[Tensor | None, ...] | None:
        """Gain and bias of the queries' norm, and of the keys', each none where not learned; None without norms."""
        norms = [norm for norm in (self.norm_q, self.norm_k) if isinstance(norm, LayerNorm)]
        return tuple(p for norm in norms for p in (norm.weight, norm.bias)) or None


class AdaptiveBlock(nn.Module):
    """Attention and MLP block of the DiT, modulated by the time (official-format §3.2)."""

    def __init__(
        self, width: int, num_heads: int, head_dim: int, expansion: int, eps: float, attention_bias: bool
    ) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.qkv = Linear(width, 3 * num_heads * head_dim, bias=attention_bias)
        self.norm_q, self.norm_k = LayerNorm(head_dim, eps), LayerNorm(head_dim, eps)
        self.attention_out = Linear(num_heads * head_dim, width, bias=attention_bias)
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
        u = modulated_norm(h, shift_1, scale_1, index, self.eps)
        q, k, v = split_heads(self.qkv(u), self.num_heads, self.head_norms, turn, self.eps, skip)
        if skip:
            h, index = h[:, skip:], index[:, skip:]
        attended = self.attention_out(attend(layer, q, k, v).flatten(-2))
        h, u = gated_norm(h, gate_1, attended, shift_2, scale_2, index, self.eps)
        return gated(h, gate_2, self.mlp_out, self.mlp_in(u, "gelu"), index)

    def keys_values(self, h: Tensor, modulation: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, R, H, Dh) of rows h (B, R, D) that all have the one time of modulation (1, 6 D)."""
        shift, scale = modulation.chunk(6, dim=-1)[:2]
        u = modulated_norm(h, shift, scale, torch.zeros(1, 1, dtype=torch.long, device=h.device), self.eps)
        return split_heads(self.qkv(u), self.num_heads, self.head_norms, turn, self.eps)[1:]

    @property
    def head_norms(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gain and bias of the queries' norm, and of the keys'."""
        return self.norm_q.weight, self.norm_q.bias, self.norm_k.weight, self.norm_k.bias


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
        return self.mlp_out(silu(self.mlp_hidden(silu(self.mlp_in(x)))))


def initialise(module: nn.Module, std: Callable[[nn.Linear], float]) -> None:
    """Normal weights of the given deviation and zero biases for every linear layer below `module`."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=std(child))
            if child.bias is not None:
                nn.init.zeros_(child.bias)
