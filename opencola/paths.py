"""Paths as users write them: `~` is the home folder, in flags, recipes, sources and the environment; some are pipes."""

from pathlib import Path

from opencola.errors import UserError


def home(path: str | Path) -> Path:
    """A path with the home folder in place of a `~` at its beginning. Raises UserError where nobody knows it."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: no home folder is known here, neither by HOME nor by the user's name") from None


def is_stream(path: Path) -> bool:
    """Whether what a path names is no file in a folder: a named pipe, a device, or /dev/stdin and its like."""
    of_process = path.parts[:2] == ("/", "dev") and path.parts[2:3] in (("stdin",), ("stdout",), ("stderr",), ("fd",))
    return of_process or path.is_fifo() or path.is_char_device()
