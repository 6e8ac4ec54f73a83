"""How much noise the latents of a text survive: the tokens that are decoded from them, against its amount.

B sequences of L tokens, N = L / P latents of d channels, P tokens a latent. Latents are normalised, as the prior sees
them; decoding undoes that. All draws come from (seed, purpose, number of the sequence), so that the batch size does not
matter; the noise of a sequence is the same at all amounts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from opencola.evaluation.latents.reconstruction import Decode, Documents, Encode
from opencola.evaluation.latents.space import Posteriors

Draw = Callable[[Sequence[int], str, Tensor], Tensor]
"""Shape of a row, purpose, numbers of the rows (B,) -> standard normal draws (B, *shape)."""
Kind = Literal["path", "rescaled", "mean"]

TIMES = tuple(i / 10 for i in range(11))
DEVIATIONS = (0.0, 0.3, 0.6, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Amount:
    """What is decoded, z_0 being a sample of the posterior and e standard normal noise.

    `path`: (1 - t) z_0 + t e, a point on the prior's path; `rescaled`: the same over 1 - t, z_0 + t / (1 - t) e, which
    exists for t < 1; `mean`: the posterior's mean + s e. `at` is t, or s.
    """

    kind: Kind
    at: float

    def apply(self, mean: Tensor, z_0: Tensor, noise: Tensor) -> Tensor:
        """The latent to decode."""
        match self.kind:
            case "path":
                return (1 - self.at) * z_0 + self.at * noise
            case "rescaled":
                return z_0 + self.at / (1 - self.at) * noise
            case "mean":
                return mean + self.at * noise


AMOUNTS = (
    *(Amount("path", t) for t in TIMES),
    *(Amount("rescaled", t) for t in TIMES[:-1]),
    *(Amount("mean", s) for s in DEVIATIONS),
)


@dataclass(frozen=True)
class VAE:
    """What is measured: encoder and decoder of latents that are not normalised, and how the prior sees these."""

    encode: Encode
    decode: Decode
    shift: float
    scale: float


@dataclass(frozen=True)
class Robustness:
    """Of some sequences. `posteriors`: not normalised, of the latents that hold a scored token; `tokens` (B,): scored
    tokens of each sequence; `distortion` (B,): their cross-entropy from a posterior sample, summed, in nats; `right`:
    those that are the decoder's first choice, by amount of noise."""

    posteriors: Posteriors
    tokens: Tensor
    distortion: Tensor
    right: dict[Amount, int]


@torch.inference_mode()
def measure(
    documents: Documents, vae: VAE, draw: Draw, amounts: Sequence[Amount] = AMOUNTS, batch_size: int = 50
) -> Iterator[Robustness]:
    """Encode, add noise, decode and count: yields the result of each batch of sequences (to be joined by `join`)."""
    numbers = torch.arange(len(documents.tokens)).split(batch_size)
    batches = zip(documents.tokens.split(batch_size), documents.scored.split(batch_size), numbers, strict=True)
    for tokens, scored, ids in batches:
        mean, variance = vae.encode(tokens)
        shape = mean.shape[1:]
        sampled, noise = (draw(shape, purpose, ids).to(mean) for purpose in ("posterior", "noise"))
        seen = (mean - vae.shift) * vae.scale
        z_0 = seen + variance.sqrt() * vae.scale * sampled

        def decode(z: Tensor) -> Tensor:
            return vae.decode(z / vae.scale + vae.shift)

        losses = F.cross_entropy(decode(z_0).float().transpose(1, 2), tokens, reduction="none").double()
        right = {
            amount: int(((decode(amount.apply(seen, z_0, noise)).argmax(-1) == tokens) & scored).sum())
            for amount in amounts
        }
        kept = scored.unflatten(1, (shape[0], -1)).any(-1).cpu()
        whose = ids[:, None].expand(kept.shape)[kept]
        posteriors = Posteriors(mean.double().cpu()[kept], variance.double().cpu()[kept], whose)
        yield Robustness(posteriors, scored.sum(1).cpu(), (losses * scored).sum(1).cpu(), right)


def join(parts: Sequence[Robustness]) -> Robustness:
    """The result of all batches together."""
    names = ("mean", "variance", "sequence")
    together = {name: torch.cat([getattr(part.posteriors, name) for part in parts]) for name in names}
    return replace(
        parts[0],
        posteriors=Posteriors(**together),
        tokens=torch.cat([part.tokens for part in parts]),
        distortion=torch.cat([part.distortion for part in parts]),
        right={amount: sum(part.right[amount] for part in parts) for amount in parts[0].right},
    )


def most_frequent(documents: Documents) -> int:
    """How often the most frequent of the scored tokens occurs: what is right without knowing anything."""
    return int(documents.tokens[documents.scored].bincount().max())
