"""The block-causal diffusion transformer: the velocity of the latent prior (model.md §3, official-format §3)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opencola.errors import UserError
from opencola.kernels.choice import precision, products_in
from opencola.layers.attention import Attend, rotary, turns
from opencola.layers.cache import KVCache
from opencola.layers.operations import LayerNorm, Linear, modulated_norm, silu
from opencola.layers.packed import Past, packed
from opencola.layers.transformer import AdaptiveBlock, TimeEmbedding, initialise
from opencola.ranges import Count, Positive, Size, check

Modulation = list[Tensor]


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the DiT. Defaults are small; the release's values stand in its config.json."""

    latent_dim: Count = 16
    """Number of channels d of a latent; must be the Text VAE's."""
    width: Count = 128
    """Width of the residual stream and of the time embedding."""
    num_layers: Count = 4
    """Number of transformer blocks."""
    num_heads: Count = 4
    """Number of attention heads."""
    head_dim: Count = 32
    """Width of a head; num_heads * head_dim may differ from width."""
    expansion: Count = 4
    """Inner width of the MLP as a multiple of width."""
    rope_dim: Size = 24
    """Number of channels of every head that are rotated by position, the first ones; even, at most head_dim."""
    block_size: Count = 4
    """Number of latents that are generated together, S."""
    norm_eps: Positive = 1e-5
    """Number added to the variance in every norm."""
    attention_bias: bool = False
    """Give the attention's projections biases."""

    def __post_init__(self) -> None:
        check(self)
        if self.rope_dim % 2 or self.rope_dim > self.head_dim:
            raise UserError(f"dit.rope_dim {self.rope_dim} must be even and at most dit.head_dim {self.head_dim}")


class BlockCausalDiT(nn.Module):
    """Velocity of noisy latents given clean ones before them. What a row sees is the caller's `attend`."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, eps = config.width, config.norm_eps
        self.latent_in = Linear(config.latent_dim, width)
        self.time_embedding = TimeEmbedding(width)
        sizes = (width, config.num_heads, config.head_dim, config.expansion, eps, config.attention_bias)
        self.blocks = nn.ModuleList(AdaptiveBlock(*sizes) for _ in range(config.num_layers))
        self.final_norm = LayerNorm(width, eps)
        self.final_modulation = Linear(width, 2 * width)
        self.velocity_out = Linear(width, config.latent_dim)
        initialise(self, lambda linear: linear.in_features**-0.5)
        # every block starts as the identity and the velocity at zero, the usual start of adaptive-norm transformers
        for name, weight in self.named_parameters():
            if name.endswith(("modulation.weight", "velocity_out.weight")):
                nn.init.zeros_(weight)

    def modulation(self, t: Tensor) -> Modulation:
        """Shifts, scales and gates of distinct times t (M,) in [0, 1]: per block (M, 6 D), and last (M, 2 D)."""
        a = silu(self.time_embedding(t))
        blocks = (block.get_submodule("modulation") for block in self.blocks)
        return [layer(a) for layer in (*blocks, self.final_modulation)]

    def turns(self, positions: Tensor) -> Tensor:
        """Rotary factors of rows at positions (R,) or (B, R), for `forward`."""
        config, dtype = self.config, self.velocity_out.weight.dtype
        return turns(rotary(positions, config.rope_dim, 10000.0, dtype), config.head_dim)

    def forward(
        self,
        z: Tensor,
        modulation: Modulation,
        index: Tensor,
        turn: Tensor,
        attend: Attend,
        skip: int = 0,
        recompute: bool = False,
    ) -> Tensor:
        """Velocity (B, R - skip, d) of rows z (B, R, d), without the first `skip` rows.

        modulation: of the distinct times; index: int64 broadcastable to (B, R), each row's time among them; turn: the
        rows' `turns`; recompute: keep only what passes between blocks for the backward pass, and
        compute the rest again there.
        """
        config = self.config
        h, kind = self.latent_in(z), precision()
        for layer, block in enumerate(self.blocks):

            def through(h: Tensor, block: nn.Module = block, layer: int = layer) -> Tensor:
                last = layer == config.num_layers - 1
                with products_in(kind):  # what is computed again is computed alike
                    return block(h, layer, modulation[layer], index, turn, attend, skip if last else 0)

            h = checkpoint(through, h, use_reentrant=False) if recompute else through(h)
        shift, scale = modulation[-1].chunk(2, dim=-1)
        norm = self.final_norm
        return self.velocity_out(modulated_norm(h, shift, scale, index[:, skip:], norm.eps, norm.weight, norm.bias))

    def packed(
        self,
        z_0: Tensor,
        z_t: Tensor,
        t: Tensor,
        pinned: Tensor | None = None,
        history: Tensor | None = None,
        documents: Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Velocities of all blocks of several noisy copies in one pass (model.md §3): like z_t.

        z_0 (B, N, d): clean latents, the history; z_t (B, copies, N, d); t (B, copies, G) with G dividing N: a time for
        each of G equal parts of a copy; pinned (B, copies, N) bool: rows that are clean, at time 0; history (B,) bool:
        samples that see their history, all when not given; documents (B, N) int64: the document of each latent, beyond
        which it sees nothing; recompute: as in `forward`.
        """
        block_size = self.config.block_size
        batch, copies, num_latents, _ = z_t.shape
        if num_latents % block_size:
            raise ValueError(f"{num_latents} latents are not a multiple of block_size {block_size}")
        num_clean = num_latents - block_size
        index = 1 + torch.arange(t.numel(), device=t.device).view(t.shape)
        index = index.repeat_interleave(num_latents // t.shape[-1], dim=-1)
        if pinned is not None:
            index = index.masked_fill(pinned, 0)
        index = torch.cat((index.new_zeros(batch, num_clean), index.flatten(1)), dim=1)
        place = torch.arange(num_latents, device=z_t.device)
        positions = torch.cat((place[:num_clean], place.repeat(copies)))
        rows = torch.cat((z_0[:, :num_clean].detach(), z_t.flatten(1, 2)), dim=1)
        modulation = self.modulation(torch.cat((t.new_zeros(1), t.flatten())))
        attend = packed(num_clean, num_latents, block_size, copies, history, documents)
        velocity = self(rows, modulation, index, self.turns(positions), attend, num_clean, recompute)
        return velocity.unflatten(1, (copies, num_latents))

    def given(self, z_0: Tensor, pinned: Tensor, first: int = 0) -> Callable[[Tensor, float], Tensor]:
        """Velocity (B, N - first, d) of latents z_t like it at time t: `packed` of one copy, for many z_t and one z_0.

        z_0 (B, N, d) is read once, and carries no gradient; pinned (B, N) bool: rows that are clean, at time 0; first:
        the latent, the first of a block, with which z_t begins.
        """
        block_size, num_latents = self.config.block_size, z_0.shape[1]
        if num_latents % block_size or first % block_size:
            raise ValueError(f"{num_latents} latents from {first} on are not whole blocks of block_size {block_size}")
        place = torch.arange(num_latents, device=z_0.device)
        clean = packed(num_latents, num_latents, block_size, 0)
        num_clean, past = num_latents - block_size, Past()

        def record(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            past.append((k[:, :num_clean], v[:, :num_clean]))
            return clean(layer, q, k, v)

        with torch.no_grad():
            self(z_0, self.modulation(z_0.new_zeros(1)), place.new_zeros(1, 1), self.turns(place), record)
        attend = packed(num_clean, num_latents, block_size, 1, past=past, first=first)
        turn, free = self.turns(place[first:]), ~pinned[:, first:]
        # without pinned rows there is one time for all, which need not be gathered row by row
        still, index = ([], torch.zeros_like(free).long()) if free.all() else ([0.0], free.long())
        return lambda z_t, t: self(z_t, self.modulation(z_t.new_tensor([*still, t])), index, turn, attend)

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """Cache for `capacity` latents a sample."""
        config = self.config
        like = self.velocity_out.weight
        return KVCache.empty(like, batch, config.num_layers, config.num_heads, config.head_dim, capacity)
