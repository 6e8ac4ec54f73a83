"""From prompts of any length to latents: what is history, what is pinned, what is generated (model.md §5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opencola.layers.cache import whole_steps
from opencola.models.cola.sampling import ColaSampling
from opencola.models.inputs import checked_prompts
from opencola.vae.text_vae import TextVAE


@dataclass(frozen=True)
class Prompts:
    """A batch of B prompts, encoded. Latents are normalised for the prior; S of them a block, P tokens a latent."""

    tokens: Tensor  # (B, N * P) padded at the end
    latents: Tensor  # (B, N, d)
    history: Tensor  # (B,) latents in whole blocks: they go into the caches
    pinned: Tensor  # (B,) latents known of the first generated block
    known: list[list[int]]  # prompt tokens inside the first generated block, which it gives again

    def select(self, rows: Tensor) -> "Prompts":
        """The prompts of the samples `rows`."""
        known = [self.known[row] for row in rows.tolist()]
        return Prompts(self.tokens[rows], self.latents[rows], self.history[rows], self.pinned[rows], known)


def encode_prompts(
    vae: TextVAE, prompts: Sequence[Sequence[int]], sampling: ColaSampling, block_size: int, pad_id: int
) -> Prompts:
    """Encode prompts (token ids, maybe none) by the posterior mean. Raises ValueError for ids beyond the vocabulary."""
    patch = vae.config.patch_size
    chunk = block_size * patch
    texts = checked_prompts(prompts, vae.config.vocab_size)
    if sampling.first_block in ("left_pad", "right_pad"):
        fill = [[pad_id] * (-len(prompt) % chunk) for prompt in texts]
        left = sampling.first_block == "left_pad"
        texts = [pad + prompt if left else prompt + pad for pad, prompt in zip(fill, texts, strict=True)]
    # a patch that the prompt fills in part is left to the prior; the release pads it, and pads leak into it (Q7)
    latents = [-(-len(prompt) // patch) if sampling.release else len(prompt) // patch for prompt in texts]
    visible = [-(-len(prompt) // chunk) * block_size for prompt in texts] if sampling.release else latents
    history = [count - count % block_size for count in latents]
    longest = max(1, *(-(-len(prompt) // chunk) for prompt in texts)) * block_size
    width = whole_steps(longest) * patch
    tokens = torch.tensor([prompt + [pad_id] * (width - len(prompt)) for prompt in texts])
    tokens = tokens.to(vae.head.weight.device)
    counts = torch.tensor(latents, device=tokens.device)
    start = torch.tensor(history, device=tokens.device)
    posterior = vae.encode(tokens, torch.tensor(visible, device=tokens.device))
    known = [prompt[first * patch :] for prompt, first in zip(texts, history, strict=True)]
    if sampling.release:  # a prompt whose last patch closes a block is not trimmed there
        known = [tail if count % block_size else [] for tail, count in zip(known, latents, strict=True)]
    return Prompts(tokens, vae.normalise(posterior.mean), start, counts - start, known)
