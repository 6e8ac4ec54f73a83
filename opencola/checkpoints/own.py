"""Load and save models that have no public format, LLaDA and Plaid: config.json of our own fields, and safetensors."""

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch

from opencola.checkpoints.configs import Values, build
from opencola.checkpoints.files import CONFIG, StoredTensors, checked, read_json, write_json, write_tensors
from opencola.checkpoints.official import MAX_SHARD_BYTES
from opencola.errors import UserError
from opencola.models.llada.model import LLaDA
from opencola.models.llada.network import LLaDAConfig
from opencola.models.plaid.model import Plaid
from opencola.models.plaid.network import PlaidConfig

Config = TypeVar("Config")
LLADA, PLAID = "opencola_llada", "opencola_plaid"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LLaDA | Plaid:
    """Load a model from its folder; parameters get `dtype`.

    Raises FileNotFoundError for what is missing, UserError for damaged files, naming file and key or tensor.
    """
    config = read_config(folder)
    with torch.device("meta"):
        model = LLaDA(config) if isinstance(config, LLaDAConfig) else Plaid(config)
    stored = StoredTensors(folder)
    shapes: dict[str, torch.Size] = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.load_state_dict({name: stored.read(name, shape).to(dtype) for name, shape in shapes.items()}, assign=True)
    stored.refuse_others({*shapes})
    return model


def save(
    model: LLaDA | Plaid,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model's folder, replacing the model in it.

    dtype: of the stored weights; max_shard_bytes: size above which weights are split over several files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_tensors(folder, tensors, dict.fromkeys(tensors, dtype), max_shard_bytes)
    kind = LLADA if isinstance(model, LLaDA) else PLAID
    write_json(folder / CONFIG, {"model_type": kind, **asdict(model.config)})


def read_config(folder: Path) -> LLaDAConfig | PlaidConfig:
    """A configuration, its fields nested as ours are. Raises UserError naming file, key and value for any other."""
    file = folder / CONFIG
    values = read_json(file)
    kinds: dict[str, type[LLaDAConfig] | type[PlaidConfig]] = {LLADA: LLaDAConfig, PLAID: PlaidConfig}
    if values.get("model_type") not in kinds:
        raise UserError(f"{file}: model_type is {values.get('model_type')!r}, but must be one of {', '.join(kinds)}")
    return _read(file, kinds[values.pop("model_type")], values, "")


def _read(file: Path, config: type[Config], values: Mapping[str, Any], prefix: str) -> Config:
    hints = get_type_hints(config, include_extras=True)
    if odd := sorted(hints.keys() ^ values.keys()):
        what = "is missing" if odd[0] in hints else f"is unknown; there are: {', '.join(hints)}"
        raise UserError(f"{file}: {prefix}{odd[0]} {what}")
    fields: Values = {}
    for key, hint in hints.items():
        if isinstance(hint, type) and is_dataclass(hint):
            if not isinstance(values[key], dict):
                raise UserError(f"{file}: {prefix}{key} is {values[key]!r}, but must be an object")
            fields[key] = _read(file, hint, values[key], f"{prefix}{key}.")
        else:
            fields[key] = checked(file, f"{prefix}{key}", values[key], hint)
    return build(file, config, fields)
