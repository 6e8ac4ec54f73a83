"""Replacing what exists, all or nothing, and keeping other processes out meanwhile.

New entries of a folder are written into `.next` inside it. When they are whole, a list of what is to happen is written
beside them, and then it happens: whoever is interrupted in between, the next to lock the folder ends it.
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

from filelock import FileLock, Timeout

from opencola.errors import UserError

LOCK, OWNER, NEXT, PLAN = ".lock", ".owner", ".next", "plan.json"
OURS = (LOCK, OWNER, NEXT)
"""Entries of a folder that are this module's."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only process that writes into a folder, which is made if it is not there, and goes if it stays empty.

    The lock dies with the process, which may lock a folder twice. Raises UserError, naming the other process, where
    there is one.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock((folder / LOCK).resolve(), is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with contextlib.suppress(OSError):
            owner = (folder / OWNER).read_text(encoding="utf-8")
            raise UserError(f"{folder} is in use by {owner}: wait until it ends, or choose another folder") from None
        raise UserError(f"{folder} is in use by another process: choose another folder") from None
    try:
        if lock.lock_counter == 1:
            (folder / OWNER).write_text(f"process {os.getpid()} on {platform.node()} ({_command()})", encoding="utf-8")
            recover(folder)
        yield
    finally:
        if lock.lock_counter == 1:
            for name in (OWNER, LOCK):  # the lock's file last, while it is still ours
                (folder / name).unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):  # of a folder that holds something
            for place in made:
                place.rmdir()


def _command() -> str:
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *sys.argv[1:]])


@contextlib.contextmanager
def replacing(folder: Path, *obsolete: str) -> Iterator[Path]:
    """A folder to write new entries of `folder` into, which take the place of the old ones when the block ends well.

    obsolete: further entries, which the new ones make invalid; they go at the same moment. Where the block fails,
    nothing has changed.
    """
    draft = folder / NEXT
    recover(folder)
    draft.mkdir(parents=True)
    try:
        yield draft
        for place in draft.rglob("*"):
            if place.is_file():
                with place.open("r+b") as written:
                    os.fsync(written.fileno())
        plan = {"new": [entry.name for entry in draft.iterdir()], "obsolete": obsolete}
        unfinished = draft / f"{PLAN}.draft"
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump(plan, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
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


def write_text(path: Path, text: str) -> None:
    """Write a file whole, or leave the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise OSError where the disk below a folder, which need not exist, has no room for so many bytes."""
    if lacking := shortage(folder, num_bytes):
        raise OSError(f"no room in {folder}: {lacking}")


def shortage(folder: Path, num_bytes: int) -> str | None:
    """What there is and what it takes, in words, where the disk below a folder has no room for so many bytes."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    return f"{free / 1e6:,.1f} MB are free, and it takes {num_bytes / 1e6:,.1f} MB" if free < num_bytes else None
