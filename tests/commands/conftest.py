"""A run of a tiny recipe, and the command line inside the tests' own process."""

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import TINY, Main
from forked import FORKS

from opencola.commands import main as cli
from opencola.evaluation import pool
from opencola.run import stage


@pytest.fixture(scope="session", autouse=True)
def few_batches_are_validated() -> Iterator[None]:
    """What a run costs is little then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "VALID_BATCHES", 5)
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts and a recipe that has run there; left as it is by all tests."""
    folder = tmp_path_factory.mktemp("trained")
    sentences = [f"The fox number {i} ran to the hill and sat there with a friend." for i in range(60)]
    (folder / "words.txt").write_text("\n".join(sentences))
    (folder / "tiny.yaml").write_text(TINY)
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as said:
        assert cli.main(["train", "tiny.yaml"]) == 0
    assert "opencola generate --model runs/tiny" in said.getvalue()
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, to work in."""
    shutil.copytree(trained, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def main(place: Path, capsys: pytest.CaptureFixture[str]) -> Main:
    """The command in this process, which has loaded everything already: exit code, output, errors."""

    def run(*argv: str) -> tuple[int, str, str]:
        code = cli.main(argv)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def workers_start_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of `--processes`, which begin with seconds of imports where they are spawned."""
    monkeypatch.setattr(pool.multiprocessing, "get_context", lambda way: FORKS)
