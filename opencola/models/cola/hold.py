"""Blocks held to a grammar: the candidates that break it are passed over, and if all do, tokens are forced.

A token that is forced is not what its latent was read as, so the latents of such a block become the posterior means of
its tokens, and the decoder reads those in place of what the denoiser wrote.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opencola.models.cola.caches import Caches
from opencola.models.cola.denoise import Block
from opencola.models.constraint import best, held
from opencola.models.stopping import Text
from opencola.vae.text_vae import TextVAE


@dataclass(frozen=True)
class HeldBlock:
    """The candidates of a block, of which some are as their texts' grammars want them."""

    z: Tensor
    """(B * K, S, d)"""
    tokens: Tensor
    """(B * K, S * P)"""
    good: Tensor
    """(B, K): whether a candidate may be the block."""
    forced: list[list[int]]
    """B of K: number of each candidate's tokens that were forced."""


def hold(
    vae: TextVAE,
    caches: Caches,
    block: Block,
    z: Tensor,
    logits: Tensor,
    tokens: Tensor,
    texts: Sequence[Text],
    choose: Callable[[int, int, Tensor], int],
) -> HeldBlock:
    """Hold B texts to their grammars, where they have one, each with K candidates for its block, side by side.

    z (B * K, S, d), logits (B * K, S * P, V) and tokens (B * K, S * P): what was drawn and read; caches: of the B * K,
    the encoder's among them, with the block not counted; choose(row, place, logits (V,)) -> token. Where tokens are
    forced, the rows behind what is counted are those of the new latents.
    """
    count = len(tokens) // len(texts)
    rows, good, forced = tokens.tolist(), torch.ones(len(texts), count, dtype=torch.bool), []
    for number, text in enumerate(texts):
        forced.append([0] * count)
        if text.constraint is None:
            continue
        first = number * count
        given = block.given[first]
        drafts = [row[given:] for row in rows[first : first + count]]
        places = best(text.constraint, text.new, drafts, text.room)
        good[number] = torch.tensor([place in places for place in range(count)])
        for place in places:
            row = first + place

            def at(offset: int, scores: Tensor, row: int = row, given: int = given) -> int:
                return choose(row, given + offset, scores)

            made = held(text.constraint, text.new, logits[row, given:], drafts[place], text.room, at)
            rows[row][given:] = made.tokens
            forced[number][place] = made.forced
    changed = torch.tensor(forced, device=z.device).flatten() > 0
    if changed.any():
        tokens = torch.tensor(rows, device=tokens.device)
        assert caches.encoder is not None
        mean = vae.normalise(vae.encode(tokens, cache=caches.encoder).mean)
        z = torch.where((changed[:, None] & ~block.pinned)[..., None], mean, z)
        vae.features(vae.denormalise(z), caches.decoder)
    return HeldBlock(z, tokens, good.to(z.device), forced)
