"""From a configuration to a model: the only place that tells the model families apart."""

from dataclasses import replace
from typing import assert_never

from torch import Tensor, nn

from opencola.errors import UserError
from opencola.models.ar.model import AR
from opencola.models.ar.network import ARConfig
from opencola.models.ar.sampling import ARSampling
from opencola.models.ar.score import ARScoring
from opencola.models.bounds import BoundScoring
from opencola.models.cola.model import Cola
from opencola.models.cola.parts import ColaConfig, PriorObjective
from opencola.models.cola.sampling import ColaSampling
from opencola.models.cola.score import Scoring
from opencola.models.cola.stage_one import StageOne, StageOneConfig
from opencola.models.language_model import Sample
from opencola.models.llada.model import LLaDA
from opencola.models.llada.network import LLaDAConfig
from opencola.models.llada.sampling import LLaDASampling
from opencola.models.plaid.model import Plaid
from opencola.models.plaid.network import PlaidConfig
from opencola.models.plaid.sampling import PlaidSampling
from opencola.models.samples import continuations, reconstructions
from opencola.models.sampling import Sampling
from opencola.text.tokenizer import Tokenizer

ModelConfig = StageOneConfig | ColaConfig | ARConfig | LLaDAConfig | PlaidConfig
WholeModel = Cola | AR | LLaDA | Plaid
Model = StageOne | WholeModel
FAMILIES = ("vae", "cola", "ar", "llada", "plaid")


def config_class(family: str) -> type[ModelConfig]:
    """The configuration class of a family. Raises UserError, with the names there are, for any other name."""
    match family:
        case "vae":
            return StageOneConfig
        case "cola":
            return ColaConfig
        case "ar":
            return ARConfig
        case "llada":
            return LLaDAConfig
        case "plaid":
            return PlaidConfig
        case _:
            raise unknown(family)


def unknown(family: str) -> UserError:
    """What to raise for a name that is no family's."""
    return UserError(f"there is no model family {family!r}; the families are: {', '.join(FAMILIES)}")


def sampling_class(family: str) -> type[ColaSampling | ARSampling | LLaDASampling | PlaidSampling]:
    """The class of the settings of `generate`; of a Text VAE, those of the Cola DLM that it is a part of. Errors as
    `config_class`."""
    match family:
        case "vae" | "cola":
            return ColaSampling
        case "ar":
            return ARSampling
        case "llada":
            return LLaDASampling
        case "plaid":
            return PlaidSampling
        case _:
            raise unknown(family)


SETTINGS = frozenset(name for family in FAMILIES for name in sampling_class(family).hints())
"""The settings of generation that any family has."""


def family(config: ModelConfig) -> str:
    """The family of a configuration."""
    return next(name for name in FAMILIES if type(config) is config_class(name))


def scoring_class(family: str) -> type[Scoring] | type[ARScoring] | type[BoundScoring]:
    """The class of the settings of `score`. Raises UserError for what is no family of whole models."""
    match family:
        case "cola":
            return Scoring
        case "ar":
            return ARScoring
        case "llada" | "plaid":
            return BoundScoring
        case _:
            raise UserError(f"models of the family {family!r} score nothing")


def build(config: ModelConfig) -> Model:
    """A model with random weights, drawn from torch's global generator."""
    match config:
        case StageOneConfig():
            return StageOne(config)
        case ColaConfig():
            return Cola(config)
        case ARConfig():
            return AR(config)
        case LLaDAConfig():
            return LLaDA(config)
        case PlaidConfig():
            return Plaid(config)
        case _:
            assert_never(config)


def sized(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The configuration for a tokenizer: of its vocabulary and, for an AR model, what begins a text."""
    return with_vocabulary(config, tokenizer.vocab_size, tokenizer.eos_id)


def with_vocabulary(config: ModelConfig, vocab_size: int, eos_id: int = 0) -> ModelConfig:
    """The configuration with another vocabulary; eos_id: its end-of-text token."""
    match config:
        case StageOneConfig():
            return replace(config, vae=replace(config.vae, vocab_size=vocab_size))
        case ColaConfig(vae=vae, dit=dit, prior=prior):
            head = vocab_size if prior.lambda_ar or dit.vocab_size else 0
            return replace(config, vae=replace(vae, vocab_size=vocab_size), dit=replace(dit, vocab_size=head))
        case ARConfig():
            return replace(config, vocab_size=vocab_size, bos_id=eos_id)
        case LLaDAConfig() | PlaidConfig():
            return replace(config, vocab_size=vocab_size)
        case _:
            assert_never(config)


def vocab_size(config: ModelConfig) -> int:
    """Tokens."""
    match config:
        case StageOneConfig(vae=vae) | ColaConfig(vae=vae):
            return vae.vocab_size
        case ARConfig() | LLaDAConfig() | PlaidConfig():
            return config.vocab_size
        case _:
            assert_never(config)


def part_names(config: ModelConfig) -> tuple[str, ...]:
    """The parts that a model is stored in."""
    match config:
        case StageOneConfig():
            return ("vae",)
        case ColaConfig():
            return ("vae", "dit")
        case ARConfig():
            return ("ar",)
        case LLaDAConfig():
            return ("llada",)
        case PlaidConfig():
            return ("plaid",)
        case _:
            assert_never(config)


def starting_parts(config: ModelConfig) -> dict[str, bool]:
    """The parts that training can start from, and whether it must: a prior needs a trained Text VAE."""
    match config:
        case ColaConfig(prior=PriorObjective(strategy="scratch")):
            return {"dit": False}
        case ColaConfig():
            return {"vae": True, "dit": False}
        case StageOneConfig() | ARConfig() | LLaDAConfig() | PlaidConfig():
            return dict.fromkeys(part_names(config), False)
        case _:
            assert_never(config)


def length_factors(config: ModelConfig) -> dict[str, int]:
    """The fields whose product must divide a sequence's tokens: a whole number of latents and of blocks."""
    match config:
        case StageOneConfig():
            return {"model.vae.patch_size": config.vae.patch_size}
        case ColaConfig():
            return {"model.vae.patch_size": config.vae.patch_size, "model.dit.block_size": config.dit.block_size}
        case ARConfig() | LLaDAConfig() | PlaidConfig():
            return {}
        case _:
            assert_never(config)


def tokens_per_block(config: ModelConfig) -> int:
    """Tokens that documents are aligned to: those of the prior's blocks or, for a Text VAE alone, of what its latents
    see."""
    match config:
        case StageOneConfig(vae=vae):
            return vae.patch_size * vae.visible_block
        case ColaConfig(vae=vae, dit=dit):
            return vae.patch_size * dit.block_size
        case ARConfig() | LLaDAConfig() | PlaidConfig():
            return 1
        case _:
            assert_never(config)


def recomputing(config: ModelConfig, recompute: bool) -> ModelConfig:
    """The same model with or without activation checkpointing, where its family has it."""
    match config:
        case ColaConfig():
            return replace(config, prior=replace(config.prior, recompute=recompute))
        case StageOneConfig() | ARConfig() | LLaDAConfig() | PlaidConfig():
            return config
        case _:
            assert_never(config)


def num_core(model: Model) -> int:
    """Core parameters, by which a model's size is named (model.md §7): the prior's; without one, those that are not
    vocabulary: neither embedding nor output matrix."""
    match model:
        case StageOne(vae=vae):
            return _without_vocabulary(vae)
        case Cola(dit=dit):
            return sum(p.numel() for name, p in dit.named_parameters() if name != "next_token.out.weight")
        case AR() | LLaDA() | Plaid():
            return _without_vocabulary(model)
        case _:
            assert_never(model)


def _without_vocabulary(module: nn.Module) -> int:
    named = module.named_parameters()
    return sum(p.numel() for name, p in named if name.partition(".")[0] not in ("embedding", "head"))


def start(model: Model) -> None:
    """To be called when the starting weights are in, before the optimizer is made: freezes what is not trained."""
    match model:
        case Cola():
            model.freeze_parts()
        case StageOne() | AR() | LLaDA() | Plaid():
            pass
        case _:
            assert_never(model)


def samples(model: Model, tokenizer: Tokenizer, tokens: Tensor, sampling: Sampling) -> list[Sample]:
    """What a model makes of the first of some sequences (B, L): continuations if it can, and reconstructions."""
    match model:
        case StageOne():
            return reconstructions(model.vae, tokenizer, tokens)
        case Cola():
            return continuations(model, tokenizer, tokens, sampling) + reconstructions(model.vae, tokenizer, tokens)
        case AR() | LLaDA() | Plaid():
            return continuations(model, tokenizer, tokens, sampling)
        case _:
            assert_never(model)
