"""What a Text VAE's latents keep of the text: reconstruction of held-out documents, and where words lie.

B documents, L tokens, N = L / P latents of d channels, P tokens a latent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Tokens (B, L) -> posterior mean and variance, both (B, N, d)."""
Decode = Callable[[Tensor], Tensor]
"""Latents (B, N, d) -> logits (B, L, V)."""


@dataclass(frozen=True)
class Documents:
    """Rows as training packs them: each a document, and behind it the beginning of the next one.

    `tokens` (B, L) int64; `scored` (B, L) bool: the row's own document, its end-of-text token included.
    """

    tokens: Tensor
    scored: Tensor


@dataclass(frozen=True)
class Reconstruction:
    """How well latents give the tokens back. Of `count` scored tokens, `from_mean` come back right from the posterior
    mean and `from_sample` from a posterior sample; `logsnr` is log(mean of mu² / mean of sigma²) over their latents."""

    from_mean: int
    from_sample: int
    count: int
    logsnr: float


def pack_documents(documents: Sequence[Sequence[int]], multiple: int) -> Documents:
    """One row per document (token ids with the end-of-text id last), all as long as the longest one needs.

    The length is a multiple of `multiple`: tokens a latent times latents that see each other. Raises ValueError when
    there are no documents.
    """
    if not documents:
        raise ValueError("there are no documents to pack")
    length = -(-max(map(len, documents)) // multiple) * multiple
    rows = []
    for i, document in enumerate(documents):
        row = list(document)
        while len(row) < length:
            i = (i + 1) % len(documents)
            row += documents[i]
        rows.append(row[:length])
    lengths = torch.tensor([len(document) for document in documents])
    return Documents(torch.tensor(rows), torch.arange(length) < lengths[:, None])


@torch.inference_mode()
def reconstruct(
    documents: Documents, encode: Encode, decode: Decode, seed: int, batch_size: int = 50
) -> Reconstruction:
    """Encode, decode and count; the posterior samples depend on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    from_mean = from_sample = 0
    signal = noise = 0.0
    batches = zip(documents.tokens.split(batch_size), documents.scored.split(batch_size), strict=True)
    for tokens, scored in batches:
        mean, variance = encode(tokens)
        # drawn on the CPU, so that every device sees the same samples
        drawn = torch.randn(mean.shape, generator=generator).to(mean)
        from_mean += int(((decode(mean).argmax(-1) == tokens) & scored).sum())
        from_sample += int(((decode(mean + variance.sqrt() * drawn).argmax(-1) == tokens) & scored).sum())
        kept = scored.unflatten(1, (mean.shape[1], -1)).any(-1)[..., None]
        signal += float((mean.double().square() * kept).sum())
        noise += float((variance.double() * kept).sum())
    return Reconstruction(from_mean, from_sample, int(documents.scored.sum()), float(np.log(signal / noise)))


@dataclass(frozen=True)
class LatentMap:
    """Latents of words that tell a variable, on their principal plane: `points` (n, 2), the `values` they tell (n),
    and the share of their variance that the plane keeps."""

    variable: str
    points: np.ndarray
    values: list[str]
    explained: float


def principal_plane(variable: str, latents: np.ndarray, values: Sequence[str]) -> LatentMap:
    """The projection of latents (n, d) onto their first two principal axes. Raises ValueError for fewer than three."""
    if len(latents) < 3:
        raise ValueError(f"a map of {variable} needs at least 3 latents, not {len(latents)}")
    centred = latents - latents.mean(0)
    axes, scales = principal_axes(centred)
    total = np.square(scales).sum()
    explained = float(np.square(scales[:2]).sum() / total) if total > 0 else 1.0
    return LatentMap(variable, centred @ axes.T, list(values), explained)


def principal_axes(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two axes (2, d) along which points (n, d) spread most about 0, and the spreads along all axes.

    There are fewer axes where there are fewer points or channels.
    """
    _, scales, axes = np.linalg.svd(points, full_matrices=False)
    axes = axes[:2]
    # an axis has no sign of its own: the largest weight shall be positive
    return axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None], scales
