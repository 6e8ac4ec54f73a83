"""`opencola.json`, the settings of generation that a model's folder brings along: {"sampling": {...}}."""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opencola.checkpoints import parts
from opencola.checkpoints.files import checked, read_json, write_json
from opencola.errors import UserError
from opencola.models import build
from opencola.models.sampling import Sampling

EXTRAS = "opencola.json"


def load_sampling(root: str | Path) -> Any:
    """The settings in a model's folder, of its family's class; defaults where it is silent or has no such file.

    Raises UserError for keys that are not settings and values that they cannot have, naming the file.
    """
    file, settings = Path(root) / EXTRAS, build.sampling_class(parts.family_in(Path(root)))
    if not file.is_file():
        return settings()
    extras = read_json(file)
    if unknown := sorted(extras.keys() - {"sampling"}):
        raise UserError(f"{file}: unknown key {unknown[0]!r}; only 'sampling' is known")
    values, hints = extras.get("sampling", {}), settings.hints()
    if not isinstance(values, dict):
        raise UserError(f"{file}: sampling must be an object, not {values!r}")
    values = without_others(values, hints)
    if unknown := sorted(values.keys() - hints.keys()):
        raise UserError(f"{file}: sampling.{unknown[0]} is not a setting; there are: {', '.join(hints)}")
    checked_values = {key: checked(file, f"sampling.{key}", value, hints[key]) for key, value in values.items()}
    try:
        return settings(**checked_values)
    except ValueError as error:
        raise UserError(f"{file}: sampling: {error}") from error


def save_sampling(sampling: Sampling, root: str | Path) -> None:
    """Write `opencola.json` into a model's folder."""
    write_json(Path(root) / EXTRAS, {"sampling": asdict(sampling)})


def without_others(values: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
    """Settings by name without those that other families alone have: files of all families once had them all."""
    return {name: value for name, value in values.items() if name in own or name not in build.SETTINGS}
