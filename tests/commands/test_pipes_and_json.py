"""What programs read and write: pipes, byte-order marks, whole figures, and results as JSON lines."""

import io
import json
import sys
from pathlib import Path

import pytest
from command_line import Main

from opencola.checkpoints.files import read_json
from opencola.evaluation import screen
from opencola.models import build
from opencola.run import recipe
from opencola.text.lines import read_lines

TINY = ("--model", "runs/tiny", "--steps", "2")


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


@pytest.mark.usefixtures("place")
def test_pipes_are_read(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, 'The fox\n{"prompt": "The bear"}\n')
    code, said, error = main("generate", *TINY, "--prompts-file", "-", "--max-new-tokens", "2")
    assert code == 0 and "[0] The fox" in said and "[1] The bear" in said, error
    pipe(monkeypatch, 'The fox ran.\n{"prompt": "The", "continuation": " fox"}\n')
    code, said, error = main("score", "-", *TINY, "--solver", "euler", "--samples", "1", "--json")
    first, second = map(json.loads, said.splitlines())
    assert code == 0 and first["text"] == "The fox ran." and second["continuation"] == " fox", error


def test_a_device_is_a_pipe() -> None:
    assert list(read_lines(Path("/dev/null"), "texts")) == []


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    "argv",
    [
        ("latents", "--model", "runs/tiny", "--sequences", "2"),
        ("evaluate", *TINY, "--limit", "1", "--max-new-tokens", "2"),
        ("train", "tiny.yaml", "--dry-run"),
    ],
    ids=lambda argv: argv[0],
)
def test_json_is_all_that_is_printed(argv: tuple[str, ...], main: Main) -> None:
    code, said, error = main(*argv, "--json")
    assert code == 0, error
    assert said and all(isinstance(json.loads(line), dict) for line in said.splitlines())


def test_figures_are_whole_at_any_width(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        grid = screen.table("name", *"abcdef")
        grid.add_row("words that may be broken", *["-24,774.125"] * 6)
        screen.put(grid)
        assert capsys.readouterr().out.count("-24,774.125") == 6


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    mark = "\N{ZERO WIDTH NO-BREAK SPACE}"
    (tmp_path / "config.json").write_text(mark + '{"a": 1}', encoding="utf-8")
    assert read_json(tmp_path / "config.json") == {"a": 1}
    text = mark + "out: runs/x\nfamily: ar\ndata: {source: stories, length: 8, batch_size: 2}\n"
    (tmp_path / "ar.yaml").write_text(text, encoding="utf-8")
    ((_, stage),) = recipe.read(str(tmp_path / "ar.yaml"), [], build.config_class, build.sampling_class)
    assert stage.family == "ar"


@pytest.mark.usefixtures("place")
def test_a_message_may_begin_with_a_slash(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["//usr", "/usr"])
    monkeypatch.setattr("builtins.input", lambda _: next(said, "/quit"))
    code, out, error = main("chat", *TINY, "--max-new-tokens", "2")
    assert code == 0, error
    assert "\n/usr" in out and "there is no command /usr" in out and "//TEXT" in out
