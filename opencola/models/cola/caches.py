"""What generation remembers of the text so far (model.md §5)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opencola.flow.dit import BlockCausalDiT, Modulation
from opencola.layers.cache import FEW, KVCache
from opencola.models.cola.prompts import Prompts
from opencola.models.cola.sampling import ColaSampling
from opencola.models.stopping import Text
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

    def join(self, other: "Caches") -> "Caches":
        """The caches of these samples and of another's, copied."""
        encoder = None if self.encoder is None or other.encoder is None else self.encoder.join(other.encoder)
        last = None if self.last is None or other.last is None else torch.cat((self.last, other.last))
        return Caches(self.dit.join(other.dit), self.decoder.join(other.decoder), encoder, last)

    @property
    def whole(self) -> bool:
        """Whether the DiT's cache holds all that the decoder's does."""
        return bool((self.dit.lengths == self.decoder.lengths).all())

    def next_token(self, dit: BlockCausalDiT) -> Tensor:
        """The trunk's logits (B, V) of the token after what is committed."""
        head = dit.next_token
        assert head is not None and self.last is not None
        logits: Tensor = head(torch.where(self.dit.lengths[:, None] > 0, self.last, head.start.to(self.last.dtype)))
        return logits

    def commit(
        self, dit: BlockCausalDiT, z: Tensor, counts: Tensor | int, modulation: Modulation
    ) -> tuple["Caches", Tensor | None]:
        """With the first `counts` of z (B, R, d) in the DiT's cache, and what `read_latents` gives."""
        read = read_latents(dit, self.dit, z, modulation)
        return self.count_latents(counts, read), read

    def count_latents(self, counts: Tensor | int, read: Tensor | None) -> "Caches":
        """With the first `counts` of the rows that the DiT has just read committed there; read: their features."""
        caches = replace(self, dit=self.dit.append(counts))
        if read is None or self.last is None:
            return caches
        number = torch.as_tensor(counts, device=read.device).expand(len(read))
        last = read[torch.arange(len(read), device=read.device), (number - 1).clamp(min=0)]
        return replace(caches, last=torch.where(number[:, None] > 0, last, self.last))

    def count(self, counts: Tensor, read: Tensor | None) -> "Caches":
        """The same where all three transformers have read the rows."""
        encoder = None if self.encoder is None else self.encoder.append(counts)
        return replace(self.count_latents(counts, read), decoder=self.decoder.append(counts), encoder=encoder)


def read_latents(dit: BlockCausalDiT, cache: KVCache, z: Tensor, modulation: Modulation) -> Tensor | None:
    """Have the DiT read clean latents z (B, R, d), not yet committed; with a trunk, its features (B, R, D) of them.

    modulation: of time 0.
    """
    rows = z.shape[1]
    turn, attend = dit.turns(cache.positions(rows)), cache.attend(rows, dit.config.grid)
    if not dit.config.trunk_layers:
        dit(z, modulation, torch.zeros(1, 1, dtype=torch.long, device=z.device), turn, attend)
        return None
    read, write = dit.read(z, modulation, turn, attend), cache.writer(rows)
    for layer, k, v in dit.keys_values(read, modulation, turn):
        write(layer, k, v)
    return read


def prefill(
    vae: TextVAE, dit: BlockCausalDiT, prompts: Prompts, texts: Sequence[Text], modulation: Modulation
) -> Caches:
    """Caches that hold the whole prompt blocks, with room for what will be written; modulation: of time 0."""
    size, patch, batch = dit.config.block_size, vae.config.patch_size, len(texts)
    sampling: ColaSampling = texts[0].sampling
    longest = -(-int(prompts.history.max()) // FEW) * FEW  # so that no sum depends on the batch
    most = max(text.sampling.max_new_tokens for text in texts)
    room = longest + size * (2 + (most + size * patch - 1) // (size * patch))
    dit_cache, decoder = dit.empty_cache(batch, room), vae.empty_cache(batch, room, "decoder")
    reads = (sampling.candidates > 1 and sampling.rank == "round_trip") or sampling.verify != "off"
    reads |= texts[0].constraint is not None
    encoder = vae.empty_cache(batch, room, "encoder") if reads else None
    last = prompts.latents.new_zeros(batch, dit.config.width) if dit.config.trunk_layers else None
    caches = Caches(dit_cache, decoder, encoder, last)
    if not longest:
        return caches
    z = prompts.latents[:, :longest].contiguous()  # a slice takes other kernels than a single sample's does
    read = read_latents(dit, dit_cache, z, modulation)
    # the release decodes latents as the prior sees them (Q8)
    vae.decode(z if sampling.release else vae.denormalise(z), decoder)
    if encoder is not None:
        vae.encode(prompts.tokens[:, : longest * patch], cache=encoder)
    return caches.count(prompts.history, read)
