"""Replacing folders' entries, whoever is cut off, and locks that die with their owners."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment

from opencola import storage
from opencola.errors import UserError
from opencola.storage import growing, locked, recover, replacing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a file, a folder and something that is nobody's business."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    (tmp_path / "card").write_text("old")
    (tmp_path / "figures").write_text("old")
    (tmp_path / "notes").write_text("mine")
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in sorted(folder.rglob("*")) if file.is_file()}


NEW = {"card": "new", "model/weights": "new", "notes": "mine"}


def write_new(folder: Path) -> None:
    with replacing(folder, "figures") as draft:
        (draft / "model").mkdir()
        (draft / "model" / "weights").write_text("new")
        (draft / "card").write_text("new")


def test_new_entries_take_the_place_of_the_old(folder: Path) -> None:
    write_new(folder)
    assert contents(folder) == NEW


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_failure_changes_nothing(folder: Path, error: type[BaseException]) -> None:
    before = contents(folder)
    with pytest.raises(error), replacing(folder, "figures") as draft:
        (draft / "card").write_text("half")
        raise error
    assert contents(folder) == before


@pytest.mark.parametrize("after", range(18))
def test_cut_off_at_any_moment(folder: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the n-th change of the disk, the folder is as it was or, after recovery, as it should become."""
    before, left = contents(folder), [after]

    class Killed(BaseException):
        pass

    def counted(function):  # type: ignore[no-untyped-def]
        def call(*arguments, **options):  # type: ignore[no-untyped-def]
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for place, name in ((Path, "replace"), (Path, "unlink"), (Path, "mkdir"), (Path, "write_text"), (os, "fsync")):
            patch.setattr(place, name, counted(getattr(place, name)))
        patch.setattr(storage.shutil, "rmtree", counted(storage.shutil.rmtree))
        killed = False
        try:
            write_new(folder)
        except Killed:
            killed = True
    recover(folder)
    assert contents(folder) in (before, NEW)
    assert killed or contents(folder) == NEW


def test_what_is_left_of_one_that_was_killed_is_cleared(folder: Path) -> None:
    before = contents(folder)
    (folder / storage.NEXT).mkdir()
    (folder / storage.NEXT / "card").write_text("half")
    with locked(folder):
        assert contents(folder / "model") == {"weights": "old"}
    assert contents(folder) == before


HOLD = """
import sys
from pathlib import Path
from opencola.storage import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_lock_names_its_owner_and_dies_with_it(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert owner.stdout is not None and owner.stdout.readline() == "locked\n"
    with (
        pytest.raises(UserError, match=f"is in use by process {owner.pid} on .* choose another folder"),
        locked(tmp_path),
    ):
        pass
    owner.kill()
    owner.wait()
    with locked(tmp_path), locked(tmp_path):  # twice by one process
        pass
    assert not any(tmp_path.iterdir())


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    storage.write_text(tmp_path / "new" / "a.json", "one")
    with pytest.raises(UnicodeEncodeError):
        storage.write_text(tmp_path / "new" / "a.json", "\ud800")
    assert contents(tmp_path) == {"new/a.json": "one"}


def test_room_is_asked_for_before(tmp_path: Path) -> None:
    storage.check_space(tmp_path / "not" / "there", 1)
    with pytest.raises(OSError, match="no room in .* MB are free, and it takes 1,000,000,000,000.0 MB"):
        storage.check_space(tmp_path / "not" / "there", 10**18)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_file_that_grows_takes_its_place_when_it_is_whole(tmp_path: Path, error: type[BaseException]) -> None:
    file, draft = tmp_path / "new" / "x.jsonl", tmp_path / "new" / "x.draft.jsonl"
    with pytest.raises(error), growing(file):
        raise error
    assert not any(tmp_path.iterdir())
    with growing(file) as out:
        out.write("old\n")
        assert not file.exists()
    with pytest.raises(error) as caught, growing(file) as out:
        out.write("ne")
        raise error("stopped")
    assert caught.value.__notes__ == [f"what is done is in {draft}"]
    assert contents(tmp_path) == {"new/x.jsonl": "old\n", "new/x.draft.jsonl": "ne"}
    with growing(file) as out:
        out.write("new\n")
    assert contents(tmp_path) == {"new/x.jsonl": "new\n"}


def test_where_a_file_that_grows_can_be(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to("there")
    with growing(tmp_path / "link") as out:
        out.write("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_text() == "new"
    with pytest.raises(IsADirectoryError), growing(tmp_path):
        pass
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE, text=True)
    with growing(tmp_path / "pipe") as out:
        out.write("through")
    assert reader.communicate()[0] == "through" and (tmp_path / "pipe").is_fifo()
    assert sorted(place.name for place in tmp_path.iterdir()) == ["link", "pipe", "there"]


def test_a_file_grows_by_one_process(tmp_path: Path) -> None:
    lock = storage.FileLock(tmp_path / ".x.jsonl.lock")
    said = r"x\.jsonl is in use by another process: choose another file"
    with lock, pytest.raises(UserError, match=said), growing(tmp_path / "x.jsonl"):
        pass
    assert not (tmp_path / "x.jsonl").exists()


def test_after_ctrl_c_one_entry_is_kept_beside(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(KeyboardInterrupt) as caught, replacing(folder, kept="card") as draft:
        (draft / "card").write_text("half")
        raise KeyboardInterrupt
    assert caught.value.__notes__ == [f"what is done is in {folder / 'card.draft'}"]
    assert contents(folder) == before | {"card.draft": "half"}
