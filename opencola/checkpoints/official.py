"""Load and save models in the public Cola DLM release's layout, the only format on disk (official-format §§1-2).

    root/tokenizer.json  root/cola_dlm/cola_dit/  root/cola_dlm/cola_vae/

A model's folder holds config.json and safetensors.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from opencola.checkpoints import configs, names
from opencola.checkpoints.files import CONFIG, StoredTensors, read_json, write_json, write_tensors
from opencola.errors import UserError
from opencola.flow.dit import BlockCausalDiT, DiTConfig
from opencola.models.cola.model import Cola
from opencola.models.cola.parts import ColaConfig
from opencola.text.tokenizer import Tokenizer
from opencola.vae.text_vae import TextVAE, TextVAEConfig

DIT_FOLDER = Path("cola_dlm", "cola_dit")
VAE_FOLDER = Path("cola_dlm", "cola_vae")
MAX_SHARD_BYTES = 5_000_000_000

Model = TypeVar("Model", bound=nn.Module)


def load(root: str | Path, dtype: torch.dtype = torch.float32) -> Cola:
    """Load a whole model; the training settings, which a release does not hold, are `ColaConfig`'s defaults.

    root: a release folder, with the models in cola_dlm/ or directly in it. Raises FileNotFoundError for what is
    missing, UserError for damaged files and for models that our classes cannot be, naming the file.
    """
    vae_folder, dit_folder = _find(Path(root), VAE_FOLDER), _find(Path(root), DIT_FOLDER)
    vae, dit = load_vae(vae_folder, dtype), load_dit(dit_folder, dtype)
    try:
        config = ColaConfig(vae=vae.config, dit=dit.config)
    except ValueError as error:
        raise UserError(f"{root}: {error}") from error
    with torch.device("meta"):
        cola = Cola(config)
    cola.vae, cola.dit = vae, dit
    return cola


def load_vae(folder: str | Path, dtype: torch.dtype = torch.float32) -> TextVAE:
    """Load a Text VAE from its folder or a release folder around it; parameters get `dtype`. Errors as `load`."""
    folder = _find(Path(folder), VAE_FOLDER)
    config = read_vae_config(folder)
    with torch.device("meta"):
        model = TextVAE(config)
    return _fill(model, names.VAE, {}, folder, dtype)


def load_dit(folder: str | Path, dtype: torch.dtype = torch.float32) -> BlockCausalDiT:
    """Load a DiT from its folder or a release folder around it; parameters get `dtype`. Errors as `load`."""
    folder = _find(Path(folder), DIT_FOLDER)
    config = read_dit_config(folder)
    with torch.device("meta"):
        model = BlockCausalDiT(config)
    return _fill(model, names.DIT, names.rotary_frequencies(config.num_layers, config.rope_dim), folder, dtype)


def read_vae_config(folder: Path) -> TextVAEConfig:
    """The configuration of the Text VAE in a folder. Errors as `load`."""
    return configs.vae_from_release(folder / CONFIG, read_json(folder / CONFIG))


def read_dit_config(folder: Path) -> DiTConfig:
    """The configuration of the DiT in a folder. Errors as `load`."""
    return configs.dit_from_release(folder / CONFIG, read_json(folder / CONFIG))


def save(
    cola: Cola,
    root: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a whole model that `load` and the public package read, and its tokenizer if given.

    dtype: of the stored weights; max_shard_bytes: size above which weights are split over several files.
    """
    root = Path(root)
    save_vae(cola.vae, root / VAE_FOLDER, dtype=dtype, max_shard_bytes=max_shard_bytes)
    save_dit(cola.dit, root / DIT_FOLDER, dtype=dtype, max_shard_bytes=max_shard_bytes)
    if tokenizer is not None:
        tokenizer.save(root)


def save_vae(
    model: TextVAE, folder: str | Path, *, dtype: torch.dtype = torch.float32, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a Text VAE's folder, replacing the model in it; arguments as `save`."""
    _write(model, names.VAE, {}, configs.vae_to_release(model.config), Path(folder), dtype, max_shard_bytes)


def save_dit(
    model: BlockCausalDiT,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a DiT's folder, replacing the model in it; arguments as `save`."""
    config = model.config
    constants = names.rotary_frequencies(config.num_layers, config.rope_dim)
    _write(model, names.DIT, constants, configs.dit_to_release(config), Path(folder), dtype, max_shard_bytes)


def _find(folder: Path, place: Path) -> Path:
    """The model's folder: `folder` itself, or inside it."""
    for candidate in (folder, folder / place, folder / place.name):
        if (candidate / CONFIG).is_file():
            return candidate
    raise FileNotFoundError(f"{folder} holds no {CONFIG}, {place / CONFIG} or {Path(place.name, CONFIG)}")


def _fill(model: Model, table: names.Table, constants: Mapping[str, Tensor], folder: Path, dtype: torch.dtype) -> Model:
    """Give a model on the meta device its stored parameters."""
    stored = StoredTensors(folder)
    for name, value in constants.items():
        buffer = stored.read(name, value.shape)
        if not torch.allclose(buffer.float(), value, rtol=1e-2):  # they may be stored in half precision
            raise UserError(
                f"{stored.files[name]}: tensor {name} is not 10000^(-2j / rope_dim), the only supported values"
            )
    stored.refuse_others({*constants, *names.fill(model, table, stored, dtype)})
    return model


def _write(
    model: nn.Module,
    table: names.Table,
    constants: Mapping[str, Tensor],
    config: configs.Values,
    folder: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors |= names.release_views(table, name, parameter.detach())
    dtypes = dict.fromkeys(tensors, dtype) | dict.fromkeys(constants, torch.float32)
    write_tensors(folder, {**tensors, **constants}, dtypes, max_shard_bytes)
    write_json(folder / CONFIG, config)
