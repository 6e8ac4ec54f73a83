"""Replacing what exists, all or nothing, and keeping other processes out meanwhile.

A file is written beside its place, and renamed when it is whole. New entries of a folder are written into `.next`
inside it. When they are whole, a list of what is to happen is written beside them, and then it happens: whoever is
interrupted in between, the next to lock the folder ends it.
"""

import contextlib
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TextIO

from filelock import FileLock, Timeout

from opencola.errors import UserError
from opencola.paths import is_stream

LOCK, OWNER, NEXT, PLAN = ".lock", ".owner", ".next", "plan.json"
OURS = (LOCK, OWNER, NEXT)
"""Entries of a folder that are this module's."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only process that writes into a folder, which is made if it is not there, and goes if it stays empty.

    The lock dies with the process, which may lock a folder twice. Raises UserError, naming the other process, where
    there is one.
    """
    with _made(folder), _owned(folder / LOCK, folder / OWNER, folder, "folder") as first:
        if first:
            recover(folder)
        yield


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder, and take it away if it stays empty."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # of a folder that holds something
            for place in made:
                place.rmdir()


@contextlib.contextmanager
def _owned(file: Path, owner: Path, what: Path, kind: str) -> Iterator[bool]:
    """Hold the lock that is a file, the owner being told in another; whether this process did not hold it before."""
    lock = FileLock(file.resolve(), is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with contextlib.suppress(OSError):
            by = owner.read_text(encoding="utf-8")
            raise UserError(f"{what} is in use by {by}: wait until it ends, or choose another {kind}") from None
        raise UserError(f"{what} is in use by another process: choose another {kind}") from None
    first = lock.lock_counter == 1
    try:
        if first:
            owner.write_text(f"process {os.getpid()} on {platform.node()} ({_command()})", encoding="utf-8")
        yield first
    finally:
        if first:
            for ours in (owner, file):  # the lock's file last, while it is still ours
                ours.unlink(missing_ok=True)
        lock.release()


def _command() -> str:
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *sys.argv[1:]])


@contextlib.contextmanager
def replacing(folder: Path, *obsolete: str, kept: str | None = None) -> Iterator[Path]:
    """A folder to write new entries of `folder` into, which take the place of the old ones when the block ends well.

    obsolete: further entries, which the new ones make invalid; they go at the same moment. Where the block fails,
    nothing has changed, but that after Ctrl-C the new file of the name `kept` is kept as `draft_of` says.
    """
    draft = folder / NEXT
    recover(folder)
    draft.mkdir(parents=True)
    try:
        yield draft
        for place in draft.rglob("*"):
            if place.is_file():
                with place.open("r+b") as file:
                    to_disk(file)
        plan = {"new": [entry.name for entry in draft.iterdir()], "obsolete": obsolete}
        unfinished = draft / f"{PLAN}.draft"
        with unfinished.open("w", encoding="utf-8") as text:
            json.dump(plan, text)
            to_disk(text)
    except BaseException as error:
        if kept is not None and isinstance(error, KeyboardInterrupt) and (draft / kept).is_file():
            (draft / kept).replace(draft_of(folder / kept))
            _keep(draft_of(folder / kept), error)
        shutil.rmtree(draft, ignore_errors=True)
        raise
    unfinished.replace(draft / PLAN)
    recover(folder)


def recover(folder: Path) -> None:
    """End a replacement that was cut off: forwards where its new entries were whole, else backwards."""
    draft = folder / NEXT
    if (draft / PLAN).is_file():
        plan = json.loads((draft / PLAN).read_text(encoding="utf-8"))
        for name in {*plan["obsolete"]} - {*plan["new"]}:
            delete(folder / name)
        for name in plan["new"]:
            if (draft / name).exists():  # else it is in its place already
                delete(folder / name)
                (draft / name).replace(folder / name)
    if draft.exists():
        shutil.rmtree(draft)


def delete(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def written(file: Path) -> Iterator[TextIO]:
    """A text file to write into, which takes a file's place when the block ends well; else that stays as it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.draft")
    try:
        with _draft(draft, file) as out:
            yield out
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def growing(file: Path) -> Iterator[TextIO]:
    """The same of what takes long, with a lock: where the block fails, what there is so far is kept as `draft_of` says,
    and a note on the error names it. A pipe, which holds nothing, is written to at once."""
    if is_stream(file):
        with file.open("w", encoding="utf-8") as out:
            yield out
        return
    place = file.resolve() if file.is_symlink() else file
    draft = draft_of(place)
    lock, owner = (place.with_name(f".{place.name}{name}") for name in (LOCK, OWNER))
    with _made(place.parent), _owned(lock, owner, file, "file"):
        if place.exists():
            place.open("r+b").close()  # raises where it could not be written to
        try:
            with _draft(draft, place) as out:
                yield out
        except BaseException as error:
            _keep(draft, error)
            raise


@contextlib.contextmanager
def _draft(draft: Path, file: Path) -> Iterator[TextIO]:
    with draft.open("w", encoding="utf-8", newline="\n") as out:
        yield out
        to_disk(out)
    draft.replace(file)


def draft_of(file: Path) -> Path:
    """Where a file is while it comes about, if what there is of it is worth keeping: x.jsonl is x.draft.jsonl."""
    return file.with_name(f"{file.stem}.draft{file.suffix}")


def _keep(draft: Path, error: BaseException) -> None:
    """Say on an error that a draft is kept, if anything is in it."""
    if draft.exists() and draft.stat().st_size:
        error.add_note(f"what is done is in {draft}")
    else:
        draft.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a file whole, or leave the old one."""
    with written(file) as out:
        out.write(text)


def to_disk(file: IO[Any]) -> None:
    """Have what was written to an open file reach the disk."""
    file.flush()
    os.fsync(file.fileno())


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise OSError where the disk below a folder, which need not exist, has no room for so many bytes."""
    if lacking := shortage(folder, num_bytes):
        raise OSError(f"no room in {folder}: {lacking}")


def shortage(folder: Path, num_bytes: int) -> str | None:
    """What there is and what it takes, in words, where the disk below a folder has no room for so many bytes."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    return f"{free / 1e6:,.1f} MB are free, and it takes {num_bytes / 1e6:,.1f} MB" if free < num_bytes else None
