"""From a configuration to a model: the only place that tells the model families apart."""

from dataclasses import replace
from typing import assert_never

import torch
from torch import Tensor

from opencola.models.cola import Cola, ColaConfig, PriorObjective
from opencola.models.language_model import Sample
from opencola.models.samples import continuations, reconstructions
from opencola.models.sampling import Sampling
from opencola.models.stage_one import StageOne, StageOneConfig
from opencola.text.tokenizer import Tokenizer

ModelConfig = StageOneConfig | ColaConfig
Model = StageOne | Cola
FAMILIES = ("vae", "cola")


def config_class(family: str) -> type[ModelConfig]:
    """The configuration class of a family. Raises ValueError, with the names there are, for any other name."""
    match family:
        case "vae":
            return StageOneConfig
        case "cola":
            return ColaConfig
        case _:
            raise ValueError(f"there is no model family {family!r}; the families are: {', '.join(FAMILIES)}")


def build(config: ModelConfig) -> Model:
    """A model with random weights, drawn from torch's global generator."""
    match config:
        case StageOneConfig():
            return StageOne(config)
        case ColaConfig():
            return Cola(config)
        case _:
            assert_never(config)


def starting_parts(config: ModelConfig) -> dict[str, bool]:
    """The parts that training can start from, by attribute, and whether it must: a prior needs a trained Text VAE."""
    match config:
        case StageOneConfig():
            return {"vae": False}
        case ColaConfig(prior=PriorObjective(strategy="scratch")):
            return {"dit": False}
        case ColaConfig():
            return {"vae": True, "dit": False}
        case _:
            assert_never(config)


def length_factors(config: ModelConfig) -> dict[str, int]:
    """The fields whose product must divide a sequence's tokens: a whole number of latents and of blocks."""
    patch = {"model.vae.patch_size": config.vae.patch_size}
    match config:
        case StageOneConfig():
            return patch
        case ColaConfig():
            return patch | {"model.dit.block_size": config.dit.block_size}
        case _:
            assert_never(config)


def tokens_per_block(config: ModelConfig) -> int:
    """Tokens that are written at once: of the prior's blocks or, for a Text VAE alone, of what its latents see."""
    match config:
        case StageOneConfig(vae=vae):
            return vae.patch_size * vae.visible_block
        case ColaConfig(vae=vae, dit=dit):
            return vae.patch_size * dit.block_size
        case _:
            assert_never(config)


def recomputing(config: ModelConfig, recompute: bool) -> ModelConfig:
    """The same model with or without activation checkpointing, where its family has it."""
    match config:
        case StageOneConfig():
            return config
        case ColaConfig():
            return replace(config, prior=replace(config.prior, recompute=recompute))
        case _:
            assert_never(config)


def num_core(model: Model) -> int:
    """Core parameters, by which a model's size is named (model.md §7): the prior's; without one, those of the Text VAE
    that are not vocabulary."""
    match model:
        case StageOne(vae=vae):
            vocabulary = (*vae.embedding.parameters(), *vae.head.parameters())
            return sum(p.numel() for p in vae.parameters()) - sum(p.numel() for p in vocabulary)
        case Cola():
            return sum(p.numel() for p in model.dit.parameters())
        case _:
            assert_never(model)


def start(model: Model) -> None:
    """To be called when the starting weights are in, before the optimizer is made: freezes what is not trained."""
    match model:
        case StageOne():
            pass
        case Cola():
            model.freeze_parts()
        case _:
            assert_never(model)


def samples(model: Model, tokenizer: Tokenizer, tokens: Tensor, sampling: Sampling) -> list[Sample]:
    """What a model makes of the first of some sequences (B, L): continuations if it can, and reconstructions."""
    match model:
        case StageOne():
            return reconstructions(model.vae, tokenizer, tokens)
        case Cola():
            return continuations(model, tokenizer, tokens, sampling) + reconstructions(model.vae, tokenizer, tokens)
        case _:
            assert_never(model)


def device() -> torch.device:
    """Where models are put to train and to write: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
