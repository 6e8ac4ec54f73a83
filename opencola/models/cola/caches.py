"""What generation remembers of the text so far (model.md §5)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opencola.flow.dit import BlockCausalDiT, Modulation
from opencola.layers.cache import FEW, KVCache
from opencola.models.cola.prompts import Prompts
from opencola.models.cola.sampling import ColaSampling
from opencola.vae.text_vae import TextVAE


@dataclass(frozen=True)
class Caches:
    """What has been committed, for each of the three transformers (the encoder's only where tokens are read again)."""

    dit: KVCache
    decoder: KVCache
    encoder: KVCache | None
    last: Tensor | None = None
    """(B, D): with a trunk, its features of the last committed latents; zero where there are none."""

    def select(self, rows: Tensor) -> "Caches":
        """The caches of the samples `rows`, copied."""
        encoder = None if self.encoder is None else self.encoder.select(rows)
        last = None if self.last is None else self.last[rows]
        return Caches(self.dit.select(rows), self.decoder.select(rows), encoder, last)

    @property
    def whole(self) -> bool:
        """Whether the DiT's cache holds all that the decoder's does."""
        return bool((self.dit.lengths == self.decoder.lengths).all())

    def next_token(self, dit: BlockCausalDiT) -> Tensor:
        """The trunk's logits (B, V) of the token after what is committed."""
        assert dit.next_token is not None and self.last is not None
        logits = dit.next_token(self.last[:, None])
        return torch.where(self.dit.lengths[:, None] > 0, logits[:, 1], logits[:, 0])

    def commit(
        self, dit: BlockCausalDiT, z: Tensor, counts: Tensor | int, modulation: Modulation
    ) -> tuple["Caches", Tensor | None]:
        """As `commit`, with what it finds."""
        cache, read = commit(dit, self.dit, z, counts, modulation)
        return replace(self, dit=cache) if read is None else self.count(read, counts), read

    def count(self, read: Tensor, counts: Tensor | int) -> "Caches":
        """With the first `counts` of the rows just read, of which the trunk's features are read (B, R, D)."""
        number = torch.as_tensor(counts, device=read.device).expand(len(read))
        last = read[torch.arange(len(read), device=read.device), (number - 1).clamp(min=0)]
        before = torch.zeros_like(last) if self.last is None else self.last
        return replace(self, dit=self.dit.append(counts), last=torch.where(number[:, None] > 0, last, before))


def commit(
    dit: BlockCausalDiT, cache: KVCache, z: Tensor, counts: Tensor | int, modulation: Modulation
) -> tuple[KVCache, Tensor | None]:
    """The DiT's cache with the first `counts` clean latents of z (B, R, d), and the trunk's features (B, R, D) of all.

    modulation: of time 0.
    """
    rows = z.shape[1]
    turn, attend = dit.turns(cache.positions(rows)), cache.attend(rows, dit.config.grid)
    if not dit.config.trunk_layers:
        dit(z, modulation, torch.zeros(1, 1, dtype=torch.long, device=z.device), turn, attend)
        return cache.append(counts), None
    read, write = dit.read(z, modulation, turn, attend), cache.writer(rows)
    for layer, k, v in dit.keys_values(read, modulation, turn):
        write(layer, k, v)
    return cache.append(counts), read


def prefill(
    vae: TextVAE, dit: BlockCausalDiT, prompts: Prompts, sampling: ColaSampling, modulation: Modulation
) -> Caches:
    """Caches that hold the whole prompt blocks, with room for what will be written; modulation: of time 0."""
    size, patch, batch = dit.config.block_size, vae.config.patch_size, len(prompts.latents)
    longest = -(-int(prompts.history.max()) // FEW) * FEW  # so that no sum depends on the batch
    room = longest + size * (2 + (sampling.max_new_tokens + size * patch - 1) // (size * patch))
    dit_cache, decoder = dit.empty_cache(batch, room), vae.empty_cache(batch, room, "decoder")
    reads = (sampling.candidates > 1 and sampling.rank == "round_trip") or sampling.verify != "off"
    encoder = vae.empty_cache(batch, room, "encoder") if reads else None
    last = prompts.latents.new_zeros(batch, dit.config.width) if dit.config.trunk_layers else None
    caches = Caches(dit_cache, decoder, encoder, last)
    if longest:
        z = prompts.latents[:, :longest].contiguous()  # a slice takes other kernels than a single sample's does
        caches, _ = caches.commit(dit, z, prompts.history, modulation)
        # the release decodes latents as the prior sees them (Q8)
        vae.decode(z if sampling.release else vae.denormalise(z), decoder)
        caches = replace(caches, decoder=decoder.append(prompts.history))
        if encoder is not None:
            vae.encode(prompts.tokens[:, : longest * patch], cache=encoder)
            caches = replace(caches, encoder=encoder.append(prompts.history))
    return caches
