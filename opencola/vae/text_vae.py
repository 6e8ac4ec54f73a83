"""The Text VAE: tokens to a sequence of latents and back (model.md §2, official-format §4)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencola.errors import UserError
from opencola.layers.attention import Attend, rotary
from opencola.layers.cache import KVCache
from opencola.layers.operations import LayerNorm, Linear
from opencola.layers.packed import block_causal
from opencola.layers.transformer import Activation, Block, BlockConfig, initialise
from opencola.ranges import Count, Finite, Positive, Size, check
from opencola.vae.gaussian import DiagonalGaussian


@dataclass(frozen=True)
class ReleaseConventions:
    """Only for files of the public release: what else their config.json can say of a Text VAE (official-format §1.2).

    No recipe sets them. The defaults are the release's own.
    """

    multi_query: bool = False
    """Share one key and value head among all query heads."""
    activation: Activation = "swiglu"
    """Activation of the MLP."""
    post_norm: bool = True
    """Put norms behind attention and MLP, as the release does; false: in front of them (pre-norm)."""
    qk_norm: bool = True
    """Normalise queries and keys over their whole width."""
    qk_norm_affine: bool = True
    """Give the norms of queries and keys a learned gain and bias."""
    qkv_bias: bool = False
    """Give the fused query, key, value projection a bias."""
    bias: bool = True
    """Give the other linear layers biases."""
    norm_affine: bool = True
    """Give the attention norm a learned gain and bias."""
    norm_eps: Positive = 1e-6
    """Number added to the variance in every norm."""
    clip_qkv: Positive | None = None
    """Clamp queries, keys and values to [-c, c]."""
    rope_theta: Positive = 500000.0
    """Base of the rotary angles."""
    normalise_mean: bool = True
    """Apply a LayerNorm without parameters to the posterior mean."""
    variational: bool = True
    """Predict a variance; false gives a deterministic, normalised latent."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class TextVAEConfig:
    """Architecture of the Text VAE. Defaults are small; the release's values stand in its config.json."""

    vocab_size: Count = 1024
    """Number of tokens in the vocabulary; set from the tokenizer when training. The embedding has one row more,
    [MASK]."""
    latent_dim: Count = 16
    """Number of channels d of a latent."""
    patch_size: Count = 1
    """Number of tokens in a latent, P."""
    attention: Literal["causal", "block_causal", "full"] = "causal"
    """What a latent sees: itself and before, its own block and before, or everything (no generation)."""
    block_size: Count = 4
    """Number of latents in a block of the block-causal attention."""
    width: Count = 128
    """Width of the residual streams of encoder and decoder."""
    ffn_dim: Count = 512
    """Width of the MLP's input projection (with swiglu, half of it reaches the output projection)."""
    num_heads: Count = 4
    """Number of attention heads."""
    encoder_layers: Size = 2
    """Number of transformer blocks of the encoder."""
    decoder_layers: Size = 2
    """Number of transformer blocks of the decoder."""
    fixed_logsnr: Finite | None = None
    """Replace the predicted variance by the constant of this log signal-to-noise ratio."""
    latent_shift: Finite = 0.0
    """Number that is subtracted from every channel of a latent before the prior sees it."""
    latent_scale: Positive = 1.0
    """Factor of a shifted latent before the prior sees it."""
    release: ReleaseConventions = field(default_factory=ReleaseConventions)

    def __post_init__(self) -> None:
        check(self)
        if self.width % self.num_heads or self.width // self.num_heads % 2:
            raise UserError(f"vae.width {self.width} must be an even multiple of vae.num_heads {self.num_heads}")
        if self.release.activation == "swiglu" and self.ffn_dim % 2:
            raise UserError(f"vae.ffn_dim {self.ffn_dim} must be even with swiglu")

    @property
    def visible_block(self) -> int:
        """Latents that see each other in both directions: 1 when strictly causal."""
        return 1 if self.attention == "causal" else self.block_size

    @property
    def block(self) -> BlockConfig:
        """The transformer block's part of the configuration."""
        release = self.release
        return BlockConfig(
            width=self.width,
            num_heads=self.num_heads,
            ffn_dim=self.ffn_dim,
            multi_query=release.multi_query,
            activation=release.activation,
            post_norm=release.post_norm,
            qk_norm=release.qk_norm,
            qk_norm_affine=release.qk_norm_affine,
            qkv_bias=release.qkv_bias,
            bias=release.bias,
            norm_affine=release.norm_affine,
            norm_eps=release.norm_eps,
            clip_qkv=release.clip_qkv,
        )


class TextVAE(nn.Module):
    """Encoder q(z0 | x) and decoder p(x | z0). Shapes: tokens (B, L), latents (B, N, d) with L = N * patch_size."""

    def __init__(self, config: TextVAEConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        self.embedding = nn.Embedding(config.vocab_size + 1, width)
        self.patch = Linear(width * patch, width)
        self.encoder = nn.ModuleList(Block(config.block) for _ in range(config.encoder_layers))
        heads = 2 if config.release.variational else 1
        self.posterior = Linear(width, heads * config.latent_dim, bias=config.release.bias)
        self.decoder_in = Linear(config.latent_dim, width, bias=config.release.bias)
        self.decoder = nn.ModuleList(Block(config.block) for _ in range(config.decoder_layers))
        self.unpatch = Linear(width, width * patch)
        self.final_norm = LayerNorm(width, config.release.norm_eps)
        self.head = Linear(width, config.vocab_size, bias=config.release.bias)
        initialise(self, lambda linear: linear.in_features**-0.5)
        nn.init.normal_(self.embedding.weight)
        nn.init.normal_(self.head.weight, std=0.02)

    @property
    def mask_id(self) -> int:
        """Input id of [MASK], the embedding's extra row."""
        return self.config.vocab_size

    def encode(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
    ) -> DiagonalGaussian:
        """Posterior of the latents, not yet normalised for the prior.

        tokens (B, L) int64; lengths (B,): latents that exist, those behind are invisible padding; cache: the encoder's,
        holding what was encoded before; documents (B, L) int64: each token's, beyond which it sees nothing (a patch
        belongs to its first token's). Raises UserError when patch_size does not divide L.
        """
        config = self.config
        if tokens.shape[1] % config.patch_size:
            raise UserError(f"{tokens.shape[1]} tokens are not a multiple of patch_size {config.patch_size}")
        x = self.embedding(tokens).unflatten(1, (-1, config.patch_size)).transpose(2, 3).flatten(2)
        x = self._transform(self.encoder, self.patch(x), lengths, cache, documents)
        out = self.posterior(x)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        mean, logvar = out.chunk(2, dim=-1) if config.release.variational else (out, torch.full_like(out, -30.0))
        if config.release.normalise_mean or not config.release.variational:
            mean = F.layer_norm(mean, mean.shape[-1:], eps=config.release.norm_eps)
            logvar = logvar.clamp(-30.0, 20.0)
        if config.fixed_logsnr is not None:
            logvar = torch.ones_like(mean) * (mean.detach().square().mean().log() - config.fixed_logsnr)
        return DiagonalGaussian(mean, logvar)

    def decode(self, z: Tensor, cache: KVCache | None = None, documents: Tensor | None = None) -> Tensor:
        """Logits (B, N * patch_size, V) of un-normalised latents z (B, N, d); cache: the decoder's.

        documents: as in `encode`.
        """
        return self.head(self.features(z, cache, documents))

    def features(self, z: Tensor, cache: KVCache | None = None, documents: Tensor | None = None) -> Tensor:
        """What the head makes logits of: (B, N * patch_size, width); arguments as of `decode`."""
        x = self._transform(self.decoder, self.decoder_in(z), None, cache, documents)
        x = self.unpatch(x).unflatten(-1, (-1, self.config.patch_size)).transpose(2, 3).flatten(1, 2)
        return self.final_norm(x)

    def normalise(self, z: Tensor) -> Tensor:
        """Latent as the prior sees it: (z - shift) * scale."""
        return (z - self.config.latent_shift) * self.config.latent_scale

    def denormalise(self, z: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        return z / self.config.latent_scale + self.config.latent_shift

    def empty_cache(self, batch: int, capacity: int, part: Literal["encoder", "decoder"]) -> KVCache:
        """Cache for `capacity` latents a sample."""
        config = self.config
        layers = config.encoder_layers if part == "encoder" else config.decoder_layers
        heads = 1 if config.release.multi_query else config.num_heads
        return KVCache.empty(self.head.weight, batch, layers, heads, config.width // config.num_heads, capacity)

    def _transform(
        self,
        blocks: nn.ModuleList,
        x: Tensor,
        lengths: Tensor | None,
        cache: KVCache | None,
        documents: Tensor | None,
    ) -> Tensor:
        config, rows = self.config, x.shape[1]
        positions = torch.arange(rows, device=x.device) if cache is None else cache.positions(rows)
        dtype = torch.promote_types(x.dtype, torch.float32)
        table = rotary(positions, config.width // config.num_heads, config.release.rope_theta, dtype)
        attend = (
            self._pattern(rows, lengths, documents, x.device)
            if cache is None
            else cache.attend(rows, config.visible_block)
        )
        for layer, block in enumerate(blocks):
            x = block(x, layer, table, attend)
        return x

    def _pattern(self, rows: int, lengths: Tensor | None, documents: Tensor | None, device: torch.device) -> Attend:
        config = self.config
        if documents is not None:
            documents = documents[:, :: config.patch_size]
        if lengths is not None:  # what is behind a text is another document
            behind = (torch.arange(rows, device=device) >= lengths[:, None]).long()
            documents = behind if documents is None else 2 * documents + behind
        return block_causal(rows, rows if config.attention == "full" else config.visible_block, documents)
