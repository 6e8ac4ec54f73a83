"""Model folders: a config.json, and safetensors in one file or several. Every error is one line that names the file."""

import json
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opencola.errors import NotFiniteError, UserError
from opencola.layers.finite import is_finite
from opencola.ranges import Range
from opencola.storage import write_text

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError, or UserError with the line when it is not one."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}: not valid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}, byte {error.start}: not UTF-8 text") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file whole, or leave the old one."""
    write_text(file, json.dumps(values, indent=2, sort_keys=True) + "\n")


def checked(file: Path | str, key: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint` of a configuration field asks for it. Raises UserError naming file, key and value.

    file: where the value stands, be it a file or not. A number must be in the hint's range, if it has one.
    """
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
    allowed = Range()
    if get_origin(hint) is Annotated:
        hint, allowed = get_args(hint)
    if get_origin(hint) is Literal:
        fits, wanted = value in get_args(hint), "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    elif get_origin(hint) is tuple:
        fits, wanted = isinstance(value, list) and all(isinstance(item, str) for item in value), "a list of strings"
    elif hint is float:
        fits, wanted = type(value) in (int, float) and value in Range(), "a number"
    else:
        fits, wanted = type(value) is hint, {int: "a whole number", bool: "true or false", str: "a string"}[hint]
    if not fits:
        raise UserError(f"{file}: {key} is {value!r}, but must be {wanted}")
    if hint in (int, float) and value not in allowed:
        raise UserError(f"{file}: {key} is {value!r}, but must be {allowed.to_be(value)}")
    return tuple(value) if isinstance(value, list) else value


class StoredTensors:
    """The tensors of a model folder, read from disk one at a time.

    A file is mapped into memory, and counts as ours page by page as it is read: so it is opened anew for every tensor.
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder's files. Raises FileNotFoundError for a missing one, UserError for a damaged one."""
        single, index = folder / WEIGHTS, folder / INDEX
        if single.is_file():
            self.files = dict.fromkeys(_names(single), single)
            self._somewhere = single
            return
        if not index.is_file():
            raise FileNotFoundError(f"{folder} holds neither {WEIGHTS} nor {INDEX}")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or {str} != {type(v) for v in weight_map.values()}:
            raise UserError(f"{index}: weight_map must say which file each tensor is in")
        self.files = {name: folder / shard for name, shard in weight_map.items()}
        for name, shard in self.files.items():
            if shard.parent != folder:
                raise UserError(f"{index}: tensor {name} is said to be outside the folder, in {weight_map[name]}")
            if not shard.is_file():
                raise FileNotFoundError(f"{shard} is missing, but {index.name} says that it holds tensor {name}")
        shards = sorted(set(self.files.values()))
        self._somewhere = shards[0] if len(shards) == 1 else index
        held = {shard: _names(shard) for shard in shards}
        for name, shard in self.files.items():
            if name not in held[shard]:
                raise UserError(
                    f"{shard} holds no tensor {name}, though {index.name} says so: the download is incomplete"
                )

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """A tensor of the given shape. Raises UserError when it is missing or of another shape or kind, NotFiniteError
        where it holds NaN or infinities."""
        if name not in self.files:
            raise UserError(f"{self._somewhere}: tensor {name} is missing; {CONFIG} asks for it")
        file = self.files[name]
        try:
            with safe_open(file, framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise UserError(f"{file}: tensor {name} cannot be read: {_one_line(error)}") from error
        if tensor.shape != shape:
            raise UserError(
                f"{file}: tensor {name} has shape {list(tensor.shape)}, but {CONFIG} gives it {list(shape)}"
            )
        if not tensor.is_floating_point():
            raise UserError(f"{file}: tensor {name} has dtype {tensor.dtype}; quantised weights are not supported")
        if not is_finite(tensor):
            raise NotFiniteError(f"{file}: tensor {name} is not finite: its file is damaged, or the model diverged")
        return tensor

    def refuse_others(self, expected: set[str]) -> None:
        """Raise UserError when there are tensors that are not expected."""
        if others := sorted(self.files.keys() - expected):
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise UserError(
                f"{self.files[others[0]]}: unexpected tensor {others[0]}{more}; {CONFIG} describes a model without"
            )


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], max_bytes: int
) -> None:
    """Write tensors, each as its dtype, into one file of at most `max_bytes`, or into several with an index.

    Everything is written under temporary names first; files of an older model in the folder go when the new ones stand.
    Raises NotFiniteError, naming the tensor, for NaN and infinities, and for numbers too large for the dtype.
    """
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * dtypes[name].itemsize
        if shards[-1] and size + num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + num_bytes, total + num_bytes
    files = [folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [folder / WEIGHTS]
    try:
        for file, names in zip(files, shards, strict=True):
            values = {name: tensors[name].detach().to("cpu", dtypes[name]).contiguous() for name in names}
            if bad := [name for name, value in values.items() if not is_finite(value)]:
                why = f"too large for {dtypes[bad[0]]}" if is_finite(tensors[bad[0]]) else "not finite"
                raise NotFiniteError(f"{file}: tensor {bad[0]} is {why}; it is not written")
            _draft(file).touch()
            mode = _draft(file).stat().st_mode
            try:
                save_file(values, _draft(file), metadata={"format": "pt"})
            except SafetensorError as error:  # its word for a full disk
                raise OSError(f"could not write {file}: {_one_line(error)}") from error
            _draft(file).chmod(mode)  # safetensors makes files that only their owner may read
        old = {folder / WEIGHTS, folder / INDEX, *folder.glob("model-?????-of-?????.safetensors")}
        for file in files:
            _draft(file).replace(file)
    finally:
        for file in files:
            _draft(file).unlink(missing_ok=True)
    if len(shards) > 1:
        weight_map = {name: file.name for file, names in zip(files, shards, strict=True) for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file in old - {*files, *([folder / INDEX] if len(shards) > 1 else [])}:
        file.unlink(missing_ok=True)


def _names(file: Path) -> set[str]:
    try:
        with safe_open(file, framework="pt") as handle:
            return set(handle.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or not a safetensors file: {_one_line(error)}") from error


def _draft(file: Path) -> Path:
    return file.with_name(f".{file.name}.{os.getpid()}")


def _one_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
