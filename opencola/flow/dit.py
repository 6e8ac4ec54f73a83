"""The block-causal diffusion transformer: the velocity of the latent prior (model.md §3, official-format §3)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opencola.errors import UserError
from opencola.flow.next_token import NextToken
from opencola.kernels.choice import precision, products_in
from opencola.layers.attention import Attend, rotary, turns
from opencola.layers.cache import KVCache
from opencola.layers.operations import LayerNorm, Linear, layer_norm, modulated_norm, silu
from opencola.layers.packed import Past, block_causal, packed
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
    trunk_layers: Size = 0
    """Number of these, the first ones, that read clean latents only, one after another: the trunk. The others, the
    denoiser, move noisy ones. 0: all blocks do both, as in the paper."""
    vocab_size: Size = 0
    """Number of tokens that the trunk's head tells apart when it predicts the next one; set from the tokenizer when
    training with prior.lambda_ar. 0: no head."""
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
        if self.trunk_layers >= self.num_layers:
            raise UserError(
                f"dit.trunk_layers {self.trunk_layers} leaves no layer of dit.num_layers {self.num_layers} to denoise"
            )
        if self.vocab_size and not self.trunk_layers:
            raise UserError(f"dit.vocab_size {self.vocab_size} is that of a trunk's head: set dit.trunk_layers above 0")

    @property
    def grid(self) -> int:
        """Latents after a multiple of which a block may begin: with a trunk anywhere."""
        return 1 if self.trunk_layers else self.block_size


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
        self.context_in = Linear(width, width, bias=False) if config.trunk_layers else None
        self.next_token = NextToken(width, config.vocab_size, eps) if config.vocab_size else None
        initialise(self, lambda linear: linear.in_features**-0.5)
        if self.next_token is not None:
            nn.init.normal_(self.next_token.out.weight, std=0.02)
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
        read: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, R - skip, d) of rows z (B, R, d), without the first `skip` rows.

        modulation: of the distinct times; index: int64 broadcastable to (B, R), each row's time among them; turn: the
        rows' `turns`; recompute: keep only what passes between blocks for the backward pass, and
        compute the rest again there; read (B, skip, D): the trunk's features of the first rows, which are then not in
        z: every layer of the denoiser sees them; context (B, R, D): with a trunk, the rows' `context`.
        """
        config = self.config
        h = self.latent_in(z)
        if context is not None:
            h = h + context.to(h.dtype)
        for layer in range(config.trunk_layers, config.num_layers):
            if read is not None:
                h = torch.cat((read.to(h.dtype), h), dim=1)
            ignored = skip if read is not None or layer == config.num_layers - 1 else 0
            h = self._block(layer, h, modulation, index, turn, attend, ignored, recompute)
        shift, scale = modulation[-1].chunk(2, dim=-1)
        norm = self.final_norm
        return self.velocity_out(modulated_norm(h, shift, scale, index[:, skip:], norm.eps, norm.weight, norm.bias))

    def _block(
        self,
        layer: int,
        h: Tensor,
        modulation: Modulation,
        index: Tensor,
        turn: Tensor,
        attend: Attend,
        skip: int,
        recompute: bool,
    ) -> Tensor:
        block, kind = self.blocks[layer], precision()

        def through(h: Tensor) -> Tensor:
            with products_in(kind):  # what is computed again is computed alike
                return block(h, layer, modulation[layer], index, turn, attend, skip)

        return checkpoint(through, h, use_reentrant=False) if recompute else through(h)

    def read(
        self, z_0: Tensor, modulation: Modulation, turn: Tensor, attend: Attend, recompute: bool = False
    ) -> Tensor:
        """The trunk's features (B, R, D) of clean latents z_0 (B, R, d); of `modulation` the first time, which is 0."""
        h, index = self.latent_in(z_0), torch.zeros(1, 1, dtype=torch.long, device=z_0.device)
        still = [rows[:1] for rows in modulation]
        for layer in range(self.config.trunk_layers):
            h = self._block(layer, h, still, index, turn, attend, 0, recompute)
        return h

    def read_text(self, z_0: Tensor, documents: Tensor | None = None, recompute: bool = False) -> Tensor:
        """`read` of whole texts z_0 (B, N, d), to which no gradient goes; documents (B, N) int64: beyond its own a
        latent sees nothing."""
        place = torch.arange(z_0.shape[1], device=z_0.device)
        attend = block_causal(len(place), 1, documents)
        return self.read(z_0.detach(), self.modulation(z_0.new_zeros(1)), self.turns(place), attend, recompute)

    def keys_values(self, read: Tensor, modulation: Modulation, turn: Tensor) -> Iterable[tuple[int, Tensor, Tensor]]:
        """By layer of the denoiser, keys and values (B, R, H, Dh) of the trunk's features (B, R, D) of clean rows."""
        for layer in range(self.config.trunk_layers, self.config.num_layers):
            block = cast(AdaptiveBlock, self.blocks[layer])
            yield layer, *block.keys_values(read, modulation[layer][:1], turn)

    def packed(
        self,
        z_0: Tensor,
        z_t: Tensor,
        t: Tensor,
        pinned: Tensor | None = None,
        history: Tensor | None = None,
        documents: Tensor | None = None,
        recompute: bool = False,
        first: int = 0,
        read: Tensor | None = None,
    ) -> Tensor:
        """Velocities of all blocks of several noisy copies in one pass (model.md §3): like z_t.

        z_0 (B, N, d): clean latents, the history; z_t (B, copies, M, d), those from `first` on, N = first + M; t (B,
        copies, G) with G dividing M: a time for each of G equal parts of a copy; pinned (B, copies, M) bool: rows that
        are clean, at time 0; history (B,) bool: samples that see their history, all when not given; documents (B, N)
        int64: the document of each latent, beyond which it sees nothing; recompute: as in `forward`; first: a multiple
        of `config.grid`; read (B, N - S or more, D): `read_text` of z_0, where that is at hand.
        """
        config, (batch, copies, num_noisy, _) = self.config, z_t.shape
        block_size, num_latents = config.block_size, z_0.shape[1]
        if num_noisy % block_size or first % config.grid or first + num_noisy != num_latents:
            raise ValueError(
                f"{num_noisy} of {num_latents} latents from {first} on are not whole blocks of block_size {block_size}"
            )
        num_clean = num_latents - block_size
        index = 1 + torch.arange(t.numel(), device=t.device).view(t.shape)
        index = index.repeat_interleave(num_noisy // t.shape[-1], dim=-1)
        if pinned is not None:
            index = index.masked_fill(pinned, 0)
        index = torch.cat((index.new_zeros(batch, num_clean), index.flatten(1)), dim=1)
        place = torch.arange(num_latents, device=z_t.device)
        turn = self.turns(torch.cat((place[:num_clean], place[first:].repeat(copies))))
        modulation = self.modulation(torch.cat((t.new_zeros(1), t.flatten())))
        attend = packed(num_clean, num_latents, block_size, copies, history, documents, first=first)
        rows, clean, context = z_t.flatten(1, 2), z_0[:, :num_clean].detach(), None
        if config.trunk_layers:
            if read is None:
                read = self.read_text(clean, None if documents is None else documents[:, :num_clean], recompute)
            context = self._contexts(read, range(first, num_latents), history, documents).repeat(1, copies, 1)
            read = read[:, :num_clean]
        else:
            rows = torch.cat((clean, rows), dim=1)
        velocity = self(rows, modulation, index, turn, attend, num_clean, recompute, read, context)
        return velocity.unflatten(1, (copies, num_noisy))

    def context(self, read: Tensor) -> Tensor:
        """What noisy rows are told of the text before their block, by the trunk's features (B, R, D) of the last clean
        latent there; 0 of features that are 0, as where there is none."""
        assert self.context_in is not None
        told: Tensor = self.context_in(layer_norm(read, self.config.norm_eps))
        return told

    def _contexts(
        self, read: Tensor, rows: range, history: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """Of noisy latents `rows`, whole blocks, the `context` (B, R, D); the rest as in `packed`."""
        place, size = torch.arange(len(rows), device=read.device), self.config.block_size
        start = rows.start + place - place % size
        context = F.pad(self.context(read), (0, 0, 1, 0))[:, start]
        if documents is not None:
            same = documents[:, rows.start : rows.stop] == documents[:, (start - 1).clamp(min=0)]
            context = context * same[..., None]
        return context if history is None else context * history[:, None, None]

    def given(self, z_0: Tensor, pinned: Tensor, first: int = 0) -> Callable[[Tensor, float], Tensor]:
        """Velocity (B, N - first, d) of latents z_t like it at time t: `packed` of one copy, for many z_t and one z_0.

        z_0 (B, N, d) is read once, and carries no gradient; pinned (B, N) bool: rows that are clean, at time 0; first:
        the latent, the first of a block, with which z_t begins, a multiple of `config.grid`.
        """
        config, num_latents = self.config, z_0.shape[1]
        block_size = config.block_size
        if (num_latents - first) % block_size or first % config.grid:
            raise ValueError(f"{num_latents} latents from {first} on are not whole blocks of block_size {block_size}")
        place = torch.arange(num_latents, device=z_0.device)
        num_clean, past = num_latents - block_size, Past()
        with torch.no_grad():
            modulation, turn = self.modulation(z_0.new_zeros(1)), self.turns(place)
            context = None
            if config.trunk_layers:
                read = self.read_text(z_0)
                context = self._contexts(read, range(first, num_latents))
                for layer, k, v in self.keys_values(read, modulation, turn):
                    past[layer] = k[:, :num_clean], v[:, :num_clean]
            else:
                clean = packed(num_latents, num_latents, block_size, 0)

                def record(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                    past[layer] = k[:, :num_clean], v[:, :num_clean]
                    return clean(layer, q, k, v)

                self(z_0, modulation, place.new_zeros(1, 1), turn, record)
        attend = packed(num_clean, num_latents, block_size, 1, past=past, first=first)
        turn, free = self.turns(place[first:]), ~pinned[:, first:]
        # without pinned rows there is one time for all, which need not be gathered row by row
        still, index = ([], torch.zeros_like(free).long()) if free.all() else ([0.0], free.long())
        return lambda z_t, t: self(
            z_t, self.modulation(z_t.new_tensor([*still, t])), index, turn, attend, context=context
        )

    def freeze_trunk(self) -> None:
        """Stop learning all that the trunk's features and predictions depend on, if there is one."""
        if self.config.trunk_layers:
            trunk = (self.latent_in, self.time_embedding, *self.blocks[: self.config.trunk_layers])
            for module in trunk if self.next_token is None else (*trunk, self.next_token):
                module.requires_grad_(False)

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """Cache for `capacity` latents a sample."""
        config = self.config
        like = self.velocity_out.weight
        return KVCache.empty(like, batch, config.num_layers, config.num_heads, config.head_dim, capacity)
