"""Paths as users write them: `~` is the home folder, in flags, recipes, sources of data and the environment."""

from pathlib import Path

from opencola.errors import UserError


def home(path: str | Path) -> Path:
    """A path with the home folder in place of a `~` at its beginning. Raises UserError where nobody knows it."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: no home folder is known here, neither by HOME nor by the user's name") from None
