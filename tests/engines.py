"""Tiny models of every family with an engine each, and requests to them."""

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tiny import randomise, tiny_cola

from opencola.layers.llama import LlamaConfig
from opencola.models import build
from opencola.models.ar.model import AR
from opencola.models.ar.network import ARConfig
from opencola.models.llada.model import LLaDA
from opencola.models.llada.network import LLaDAConfig
from opencola.models.plaid.model import Plaid
from opencola.models.plaid.network import PlaidConfig
from opencola.serve.engine import Engine
from opencola.serve.requests import Limits, Piece, Request, Stream
from opencola.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["the fox sat down. the fox ran off. she said stop it now."] * 9, 280)
SIZE = TOKENIZER.vocab_size
TRUNK = LlamaConfig(width=84, num_layers=2, num_heads=6, num_kv_heads=2, ffn_dim=75)
VAE = {"vocab_size": SIZE, "latent_dim": 5, "width": 66, "ffn_dim": 90, "num_heads": 3}
DIT = {"latent_dim": 5, "width": 45, "num_heads": 3, "head_dim": 22, "expansion": 3}
PREDICTS = {"num_layers": 3, "trunk_layers": 2, "vocab_size": SIZE}
MODELS: dict[str, tuple[Callable[[], Any], list[dict[str, Any]]]] = {
    # each with the settings of its own that requests differ in
    "cola": (
        lambda: tiny_cola(VAE, DIT),
        [
            {"guidance": 3.0},
            {"steps": 5, "solver": "stochastic"},
            {"candidates": 2},
            {"first_block": "partial"},
            {"compatibility": "release", "stop": (), "ignore_eos": True},
        ],
    ),
    "cola, checked": (
        lambda: tiny_cola(VAE, DIT | PREDICTS),
        [{"verify": "lossless"}, {"verify": "typical"}, {"verify": "greedy"}, {"candidates": 2, "rank": "trunk"}],
    ),
    "ar": (lambda: randomise(AR(ARConfig(SIZE, TRUNK))), [{}]),
    "llada": (lambda: randomise(LLaDA(LLaDAConfig(SIZE, TRUNK))), [{"block_length": 4}, {"remasking": "random"}]),
    "plaid": (lambda: Plaid(PlaidConfig(SIZE, 7, TRUNK)), [{"steps": 3, "guidance": 1.5}, {"steps": 4}]),
}
WORDS = ["the", " fox", " sat", " down", " she said", " stop", ".", " é", " now"]
COMMON = {"cola": {"steps": 3}}


def requests_for(name: str, number: int, seed: int = 0) -> list[Request]:
    """Of mixed prompts, seeds, lengths and settings."""
    rng, family = random.Random(seed), name.partition(",")[0]
    made = []
    for _ in range(number):
        prompt = TOKENIZER.encode("".join(rng.choices(WORDS, k=rng.choice([0, 1, 2, 5, 9, 30]))))
        fields = {
            "max_new_tokens": rng.choice([1, 3, 8, 17]),
            "temperature": rng.choice([0.0, 0.7, 1.0]),
            "top_k": rng.choice([0, 0, 20]),
            "top_p": rng.choice([1.0, 0.9]),
            "stop": rng.choice([(), (), (" s", "t")]),
            "seed": rng.randrange(3),
        }
        fields |= COMMON.get(family, {}) | rng.choice(MODELS[name][1])
        if fields.get("verify", "off") == "off" and fields.get("candidates", 1) == 1:
            fields["repetition_penalty"] = rng.choice([1.0, 1.3])
        sampling = build.sampling_class(family)(**fields)
        made.append(Request(prompt, sampling, (TOKENIZER.eos_id,), rng.randrange(3)))
    return made


@contextmanager
def engine_of(model: Any, **limits: int) -> Iterator[Engine]:
    """An engine that is closed at the end."""
    engine = Engine(model, TOKENIZER, Limits(**limits))
    try:
        yield engine
    finally:
        engine.abort()


async def read(stream: Stream) -> list[Piece]:
    return [piece async for piece in stream]


async def texts_of(engine: Engine, requests: Sequence[Request]) -> list[tuple[str, list[int], str]]:
    """What each is given when all are asked for at once: text, tokens and why it ended."""
    pieces = await asyncio.gather(*(read(stream) for stream in engine.submit(*requests)))
    return [whole(found) for found in pieces]


def whole(pieces: Sequence[Piece]) -> tuple[str, list[int], str]:
    text, tokens = "".join(piece.text for piece in pieces), [token for piece in pieces for token in piece.tokens]
    return text, tokens, pieces[-1].finished


def model_of(name: str) -> Any:
    torch.manual_seed(3)
    return MODELS[name][0]().float().requires_grad_(False)


def sampling_of(family: str, **fields: Any) -> Any:
    return build.sampling_class(family)(**fields)
