"""The plain transformer of the baselines, as in LLaMA: RMSNorm first, rotary positions, SwiGLU, no biases.

What a row sees is the caller's `attend`: causal for AR, everything for LLaDA and Plaid.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from opencola.errors import UserError
from opencola.layers.attention import Attend, Rotary, rotary
from opencola.layers.cache import KVCache
from opencola.layers.operations import Linear, RMSNorm, rotated_heads
from opencola.layers.transformer import initialise
from opencola.ranges import Count, Positive, check


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a LLaMA transformer without its vocabulary."""

    width: Count = 128
    """Width of the residual stream, D."""
    num_layers: Count = 4
    """Number of transformer blocks."""
    num_heads: Count = 4
    """Number of attention heads; each has width / num_heads channels."""
    num_kv_heads: Count | None = None
    """Number of heads of keys and values, each for several queries; as many as attention heads when not given."""
    ffn_dim: Count = 384
    """Inner width of the MLP (SwiGLU)."""
    rope_base: Positive = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: Positive = 1e-5
    """Number added to the mean square in every norm."""

    def __post_init__(self) -> None:
        check(self)
        if self.width % (2 * self.num_heads):
            raise UserError(f"width {self.width} must be a multiple of twice num_heads {self.num_heads}")
        if self.num_heads % self.kv_heads:
            raise UserError(f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


class LlamaBlock(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, kv_width = config.width, config.kv_heads * config.head_dim
        self.heads, self.kv_heads, self.eps = config.num_heads, config.kv_heads, config.norm_eps
        self.norm_attention = RMSNorm(width, config.norm_eps)
        self.qkv = Linear(width, width + 2 * kv_width, bias=False)
        self.attention_out = Linear(width, width, bias=False)
        self.norm_mlp = RMSNorm(width, config.norm_eps)
        self.mlp_in = Linear(width, 2 * config.ffn_dim, bias=False)  # gate half first, value half second
        self.mlp_out = Linear(config.ffn_dim, width, bias=False)

    def forward(self, h: Tensor, y: Tensor | None, layer: int, table: Rotary, attend: Attend) -> tuple[Tensor, Tensor]:
        """h and what is to be added to it, y (none at first), both (B, R, D) -> the same behind the block.

        `layer` is this block's number for `attend`.
        """
        h, u = self.norm_attention(h, y)
        q, k, v = rotated_heads(self.qkv(u), self.heads, self.kv_heads, table, None, self.eps)
        if self.kv_heads < self.heads:
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=2) for x in (k, v))
        h, u = self.norm_mlp(h, self.attention_out(attend(layer, q, k, v).flatten(-2)))
        return h, self.mlp_out(self.mlp_in(u, "swiglu gate first"))


class Llama(nn.Module):
    """The blocks and the last norm; embedding and head are the caller's."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(LlamaBlock(config) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        initialise(self, lambda linear: linear.in_features**-0.5)

    def forward(self, h: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Normalised features (B, R, D) of rows h (B, R, D) at positions (R,) or (B, R)."""
        config = self.config
        table = rotary(positions, config.head_dim, config.rope_base, h.dtype)
        y = None
        for layer, block in enumerate(self.blocks):
            h, y = block(h, y, layer, table, attend)
        normalised: Tensor = self.final_norm(h, y)[1]
        return normalised

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """Cache for `capacity` rows a sample."""
        config = self.config
        like = self.final_norm.weight
        return KVCache.empty(like, batch, config.num_layers, config.num_heads, config.head_dim, capacity)
