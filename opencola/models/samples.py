"""What a model shows of itself in training: it continues the beginnings of texts, and gives texts back."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from opencola.models.language_model import LanguageModel, Sample
from opencola.models.sampling import Sampling
from opencola.models.text_stream import whole_texts
from opencola.text.conversations import ChatML
from opencola.text.tokenizer import Tokenizer
from opencola.vae.text_vae import TextVAE

NUM_SAMPLES = 4
PROMPT_WORDS = 8
MAX_NEW_TOKENS = 64


def continuations(model: LanguageModel, tokenizer: Tokenizer, tokens: Tensor, sampling: Sampling) -> list[Sample]:
    """The first words of sequences (B, L), each of its longest document, and how the model goes on (not for long).

    With sampling.chat, of conversations: what the first user says, and the model's answer.
    """
    rows = tokens[:NUM_SAMPLES].tolist()
    if sampling.chat:
        prompts = list(map(ChatML(tokenizer).question, rows))
    else:
        prompts = [first_words(longest_document(tokenizer, row)) for row in rows]
    settings = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, MAX_NEW_TOKENS))
    texts = whole_texts(model, tokenizer, prompts, settings)
    return [Sample("continuation", prompt, text, {}) for prompt, text in zip(prompts, texts, strict=True)]


@torch.inference_mode()
def reconstructions(vae: TextVAE, tokenizer: Tokenizer, tokens: Tensor) -> list[Sample]:
    """Sequences (B, L) as their posteriors' means decode, with the share of tokens that come back right."""
    tokens = tokens[:NUM_SAMPLES].to(next(vae.parameters()).device)
    decoded = vae.decode(vae.encode(tokens).mean).argmax(-1)
    right = (decoded == tokens).float().mean(-1)
    return [
        Sample("reconstruction", tokenizer.decode(row), tokenizer.decode(back), {"token_accuracy": share})
        for row, back, share in zip(tokens.tolist(), decoded.tolist(), right.tolist(), strict=True)
    ]


def longest_document(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of the longest run of tokens without an end of text."""
    ends = [-1, *(place for place, token in enumerate(tokens) if token == tokenizer.eos_id), len(tokens)]
    start, end = max(itertools.pairwise(ends), key=lambda pair: pair[1] - pair[0])
    return tokenizer.decode(tokens[start + 1 : end])


def first_words(text: str) -> str:
    """The text up to the end of its PROMPT_WORDS-th word."""
    beginning = re.match(rf"\s*(\S+\s+){{0,{PROMPT_WORDS - 1}}}\S+", text)
    return beginning[0] if beginning else ""
