"""A Cola DLM at work, made visible: stories given back, blocks being denoised, variables on a map of latents."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from opencola.evaluation.latents.reconstruction import (
    LatentMap,
    Reconstruction,
    pack_documents,
    principal_plane,
    reconstruct,
)
from opencola.evaluation.writing import held_out
from opencola.models.cola.model import Cola
from opencola.models.cola.sampling import ColaSampling
from opencola.text.tokenizer import Tokenizer
from opencola.worlds.stories import Story

BATCH_SIZE = 50
BLOCKS_SHOWN = 8
MAP_STORIES = 300
MAPPED = ("animal", "place")


@dataclass(frozen=True)
class Trace:
    """How a continuation came out of noise: after every solver step of every block, what its state would decode to.

    `times`: of the states, ending at 0; `blocks[b][s]`: the texts of block b's tokens in state s; the first `given`
    tokens of block 0 belong to the prompt.
    """

    prompt: str
    times: Sequence[float]
    blocks: Sequence[Sequence[Sequence[str]]]
    given: int


def reconstruct_stories(model: Cola, tokenizer: Tokenizer, stories: Sequence[Story], seed: int) -> Reconstruction:
    """Reconstruction of stories with their end-of-text tokens, in rows as training packs them."""
    vae = model.vae
    tokens = [[*tokenizer.encode(tale.text), tokenizer.eos_id] for tale in stories]
    documents = pack_documents(tokens, vae.config.patch_size * vae.config.visible_block)

    def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
        posterior = vae.encode(rows)
        return posterior.mean, posterior.logvar.exp()

    return reconstruct(documents, encode, vae.decode, seed)


def trace_blocks(model: Cola, tokenizer: Tokenizer, sampling: ColaSampling, prompt: str, sample_id: int) -> Trace:
    """Write the first blocks after a prompt and note what every state of the flow would decode to."""
    # of several candidates only one would be shown, perhaps not the one that was kept; of a checked draft not all stays
    settings = replace(sampling, candidates=1, verify="off")
    ids = tokenizer.encode(prompt)
    blocks = model.generate([ids], settings, eos_ids=[tokenizer.eos_id], ids=[sample_id], watch=True)
    seen = [block.states for (block,) in itertools.islice(blocks, BLOCKS_SHOWN)]
    states = [[[_token_text(tokenizer, token) for token in state.tokens] for state in path] for path in seen]
    times = [state.time for state in seen[0]]
    return Trace(prompt, times, states, len(ids) % (model.dit.config.grid * model.vae.config.patch_size))


def map_variables(model: Cola, tokenizer: Tokenizer) -> list[LatentMap]:
    """For each mapped variable, where the latents of the words that tell it first lie in held-out stories."""
    vae = model.vae
    stories = held_out(MAP_STORIES)
    encoded = [tokenizer.encode(tale.text) for tale in stories]
    documents = pack_documents(encoded, vae.config.patch_size * vae.config.visible_block)
    with torch.inference_mode():
        latents = torch.cat([vae.encode(rows).mean for rows in documents.tokens.split(BATCH_SIZE)]).numpy()
    maps = []
    for variable in MAPPED:
        rows, values = [], []
        for tale, tokens, latent in zip(stories, encoded, latents, strict=True):
            value = tale.variables[variable]
            match = re.search(rf"\b{value}\b", tale.text)
            if match is not None:
                last = next(n for n in range(len(tokens)) if len(tokenizer.decode(tokens[: n + 1])) >= match.end())
                rows.append(latent[last // vae.config.patch_size])
                values.append(value)
        maps.append(principal_plane(variable, np.stack(rows), values))
    return maps


def _token_text(tokenizer: Tokenizer, token: int) -> str:
    return "⟨end⟩" if token == tokenizer.eos_id else tokenizer.decode([token])
