"""What a model's folder is made of: the parts of each family, and the whole models that they make."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from opencola.checkpoints import llama, official, own
from opencola.errors import UserError
from opencola.flow.dit import BlockCausalDiT, DiTConfig
from opencola.models import build
from opencola.models.ar.model import AR
from opencola.models.ar.network import ARConfig
from opencola.models.build import ModelConfig, WholeModel
from opencola.models.llada.model import LLaDA
from opencola.models.plaid.model import Plaid
from opencola.vae.text_vae import TextVAE, TextVAEConfig


@dataclass(frozen=True)
class Part:
    """A part of a model that is stored in a folder of its own."""

    title: str
    folder: Path
    read_config: Callable[[Path], Any]
    """Its configuration, from its folder."""
    build: Callable[[Any], nn.Module]
    """It with random weights, from its configuration."""
    load: Callable[..., Any]
    save: Callable[..., None]
    field: str = ""
    """Its place in the model's configuration; "": it is the whole model."""
    has_vocabulary: bool = True
    essence: Callable[[Any], Any] = lambda config: config
    """A configuration without what may change while the weights stay the same."""
    is_itself: Callable[[Path], bool] = lambda folder: False
    """Whether a folder, which has no parts, is the part: as others than us give such models away."""
    about: str = ""
    """What it is, where it is the whole model."""

    @property
    def setting(self) -> str:
        """What the names of its settings begin with in a recipe."""
        return f"model.{self.field}." if self.field else "model."

    def find(self, root: Path) -> Path | None:
        """Its folder in a model's, or that itself; None where it has no such part."""
        places = (root / place for place in (self.folder, self.folder.name))
        return next((place for place in places if place.is_dir()), root if self.is_itself(root) else None)

    def is_in(self, root: Path) -> bool:
        """Whether a model's folder has this part."""
        return self.find(root) is not None

    def config(self, model: Any) -> Any:
        """Its configuration, of the whole model's."""
        return getattr(model, self.field) if self.field else model

    def module(self, model: nn.Module) -> nn.Module:
        """It in the whole model."""
        return model.get_submodule(self.field)

    def check_same(self, config: Any, stored: Any, where: str) -> None:
        """Raise UserError where a configuration is another one than that of the weights to start from."""
        there = dict(_flat(asdict(self.essence(stored))))
        for name, value in _flat(asdict(self.essence(config))):
            if there[name] != value:
                raise UserError(
                    f"{self.setting}{name} is {value}, but {there[name]} in {where}, where its weights are from"
                )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by their names with dots."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def vae_essence(config: TextVAEConfig) -> TextVAEConfig:
    """Without the treatment of latents, and without a block size that has no effect."""
    return replace(config, block_size=config.visible_block, latent_shift=0.0, latent_scale=1.0, fixed_logsnr=None)


def dit_essence(config: DiTConfig) -> DiTConfig:
    """Without the block size, which may grow from stage to stage."""
    return replace(config, block_size=1)


def ar_essence(config: ARConfig) -> ARConfig:
    """With the number of heads of keys and values in full, as a file has it."""
    return replace(config, trunk=replace(config.trunk, num_kv_heads=config.trunk.kv_heads))


PARTS = {
    "vae": Part(
        "Text VAE",
        official.VAE_FOLDER,
        official.read_vae_config,
        TextVAE,
        official.load_vae,
        official.save_vae,
        field="vae",
        essence=vae_essence,
    ),
    "dit": Part(
        "prior",
        official.DIT_FOLDER,
        official.read_dit_config,
        BlockCausalDiT,
        official.load_dit,
        official.save_dit,
        field="dit",
        has_vocabulary=False,
        essence=dit_essence,
    ),
    "ar": Part(
        "AR model",
        Path("ar_model"),
        llama.read_config,
        AR,
        llama.load,
        llama.save,
        essence=ar_essence,
        is_itself=llama.is_folder,
        about="An autoregressive language model built as a LLaMA: it predicts each token from those before it.",
    ),
    "llada": Part(
        "LLaDA",
        Path("llada_model"),
        own.read_config,
        LLaDA,
        own.load,
        own.save,
        about="A masked diffusion language model in the manner of [LLaDA](https://arxiv.org/abs/2502.09992): it writes "
        "by unmasking, as a bidirectional transformer predicts masked tokens.",
    ),
    "plaid": Part(
        "Plaid",
        Path("plaid_model"),
        own.read_config,
        Plaid,
        own.load,
        own.save,
        about="A continuous diffusion language model in the manner of [Plaid](https://arxiv.org/abs/2305.18619): noise "
        "becomes the embeddings of tokens, all of a text at once.",
    ),
}
FOLDERS = tuple(dict.fromkeys(part.folder.parts[0] for part in PARTS.values()))
"""All that parts lie in."""


def has_model(root: Path) -> bool:
    """Whether a folder has a part of a model, or is one."""
    return any(part.is_in(root) for part in PARTS.values())


def starting(config: ModelConfig, root: Path) -> dict[str, Path | None]:
    """The folder in `root` of each part that training can start from; None where it has no such part.

    Raises UserError, naming what there is and what is wanted, where it has none of them, and FileNotFoundError where
    one that training must start from is missing.
    """
    wanted = build.starting_parts(config)
    places = {name: PARTS[name].find(root) for name in wanted}
    if not any(places.values()):
        raise UserError(other_family(config, root, [part.title for part in PARTS.values() if part.is_in(root)]))
    for name, needed in wanted.items():
        if needed and places[name] is None:
            raise FileNotFoundError(f"{root} holds no {PARTS[name].title} ({PARTS[name].folder}): name another init")
    return places


def other_family(config: ModelConfig, root: Path, titles: Sequence[str]) -> str:
    """What to say where `root`, to start from, has parts of these titles, of which training can start from none."""
    wanted = " or ".join(PARTS[name].title for name in build.starting_parts(config))
    return (
        f"init {root} holds {' and '.join(titles)}, but the family {build.family(config)!r} starts from {wanted}: name "
        "a folder with that, or leave init out to start from random weights (with tokenizer.path for a tokenizer alone)"
    )


def has_whole_model(root: Path) -> bool:
    """Whether a folder has a model that writes: more than a Text VAE."""
    return has_model(root) and (family_in(root) != "cola" or PARTS["dit"].is_in(root))


def family_in(root: Path) -> str:
    """Family of the whole model in a folder; "cola" where there is none, whose loader then says what is missing."""
    whole = (name for name, part in PARTS.items() if not part.field and part.find(root))
    return next(whole, "cola")


def load(root: Path, dtype: torch.dtype = torch.float32) -> WholeModel:
    """Load a whole model of whatever family; parameters get `dtype`.

    Raises FileNotFoundError for what is missing, UserError for damaged files and for models that our classes cannot
    be, naming the file.
    """
    family = family_in(root)
    if family == "cola":
        return official.load(root, dtype)
    return cast(WholeModel, PARTS[family].load(PARTS[family].find(root), dtype))


def num_bytes(source: Path, dtype: torch.dtype) -> int:
    """What the weights of the parts in a folder take on disk as this type. Errors as `load`."""
    with torch.device("meta"):
        modules = [part.build(part.read_config(place)) for part in PARTS.values() if (place := part.find(source))]
    return dtype.itemsize * sum(parameter.numel() for module in modules for parameter in module.parameters())


def copy(source: Path, to: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the parts in a folder to another one, with weights of this type. Errors as `load`."""
    for part in PARTS.values():
        if place := part.find(source):
            part.save(part.load(place), to / part.folder, dtype=dtype)
