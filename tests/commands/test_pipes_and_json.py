"""What programs read and write: pipes, byte-order marks, whole figures, and results as JSON lines."""

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Main

from opencola.checkpoints.files import read_json
from opencola.evaluation import screen
from opencola.models import build
from opencola.run import recipe
from opencola.text.lines import is_pipe, read_lines
from opencola.worlds import story_tasks

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
    first, second, whole = map(json.loads, said.splitlines())
    assert code == 0 and first["text"] == "The fox ran." and second["continuation"] == " fox", error
    assert whole["id"] == "all"


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_shards_of_a_pipe_are_those_of_its_text(
    main: Main, place: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["\nThe {fox}\n", "ö\u2028 {", " \t\n", *(f"number {i}\n" for i in range(50))]
    if name == "t.txt":
        content = "<|endoftext|>\n".join(texts)
    else:
        content = "".join(f"{json.dumps({'body': text})}\n" for text in texts)
    (place / name).write_text(content, encoding="utf-8")
    flags = ("--vocab-size", "280", "--workers", "1", "--shard-tokens", "99", "--text-field", "body", "--limit", "40")

    def written(folder: str, source: str) -> tuple[dict[str, bytes], dict[str, object]]:
        code, said, error = main("tokenize", source, *flags, "--to", folder)
        assert code == 0 and "tokens of 40 documents" in said, error
        files = {file.name: file.read_bytes() for file in (place / folder).iterdir()}
        return files, json.loads(files.pop("manifest.json")) | {"source": ""}

    whole = written("a", name)
    pipe(monkeypatch, content)
    assert written("b", "-") == whole
    (place / "b" / "shard-00001.bin").write_bytes(b"damaged")
    pipe(monkeypatch, content)
    assert written("b", "-") == whole
    (place / "b" / "shard-00001.bin").write_bytes(b"damaged")
    pipe(monkeypatch, content.replace("number", "other"))
    code, _, error = main("tokenize", "-", *flags, "--to", "b")
    assert code == 2 and "and - has changed since" in error and not list((place / "b").glob(".*"))


@pytest.mark.usefixtures("place")
def test_a_pipe_that_holds_nothing_or_what_it_should_not(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("tokenize", "-", "--vocab-size", "280", "--workers", "1", "--to", "b")
    for text, message in ((" \n", "no documents in -"), ('{"a": 1}\n', "-, line 1: no field 'text'"),
                          ('\n{"text": "a"}\n{', "-, line 3: not JSON")):  # fmt: skip
        pipe(monkeypatch, text)
        code, _, error = main(*flags)
        assert code == 2 and message in error and not Path("b").exists(), error
    for source in ("-", "/dev/stdin"):
        code, _, error = main("train", "tiny.yaml", "--data.source", source, "--out", "new")
        assert code == 2 and f"{source} is a pipe, and data is read more than once" in error and "tokenize" in error


def test_a_device_is_a_pipe() -> None:
    assert list(read_lines(Path("/dev/null"), "texts")) == []
    assert not is_pipe(Path("/dev/shm/texts.txt")) and is_pipe(Path("/dev/fd/63"))


@pytest.mark.usefixtures("place")
def test_documents_of_white_space_are_counted(main: Main) -> None:
    texts = ["The fox sat.\n" * 9, " \n", "The bear ran.\n" * 9, "\t\n", ""]
    Path("t.txt").write_text("<|endoftext|>\n".join(texts))
    said = "2 documents of t.txt hold only white space, and are passed over\n"
    code, out, error = main("tokenize", "t.txt", "--vocab-size", "280", "--workers", "1", "--to", "b")
    assert code == 0 and error == said and "of 2 documents" in out, error
    code, out, error = main("train", "tiny.yaml", "--data.source", "t.txt", "--out", "new", "--train.steps", "1")
    assert code == 0 and out.count(said) == 2, error  # a stage each


SHORT = (*TINY, "--max-new-tokens", "2")
PRINTS = {
    "latents": (("--model", "runs/tiny", "--sequences", "2"), "latents.jsonl"),
    "inspect": (("The fox", *TINY, "--samples", "2"), "inspect.jsonl"),
    "diagnose": ((*SHORT, "--num-stories", "4", "--places", "2"), "diagnose.jsonl"),
    "quality": ((*SHORT, "--num-samples", "4", "--temperatures", "0", "1"), "quality.jsonl"),
    "report": (("results.jsonl",), "summary.jsonl"),
    "evaluate": ((*SHORT, "--limit", "2", "--tasks", "last_word", "lambada", "--data", "."), None),
    "score": (("pairs.jsonl", *TINY, "--solver", "euler"), None),
    "train": (("tiny.yaml", "--dry-run"), None),
}


def said_by(main: Main, command: str, place: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The objects on standard output of a command with --json, of which every line is one, and those in its file."""
    lines = [json.dumps(record) + "\n" for record in story_tasks.records("lambada", 3, 0)]
    (place / "lambada.jsonl").write_text("".join(lines))
    (place / "pairs.jsonl").write_text('{"text": "The fox"}\n{"prompt": "The", "continuation": " hill ran."}\n')
    argv, file = PRINTS[command]
    if command == "report":
        assert main("evaluate", *PRINTS["evaluate"][0], "--out", ".")[0] == 0
    code, said, error = main(command, *argv, *(() if command in ("score", "train") else ("--out", "o")), "--json")
    assert code == 0, error
    assert said.endswith("\n") and said.count("\n") == len(said.splitlines())
    objects = [json.loads(line, parse_constant=pytest.fail) for line in said.splitlines()]
    assert objects and all(isinstance(value, dict) for value in objects)
    kept = [json.loads(line) for line in (place / "o" / file).read_text().splitlines()] if file else []
    return objects, kept


@pytest.mark.parametrize("command", PRINTS)
def test_json_is_all_that_is_printed_and_is_what_the_file_holds(command: str, main: Main, place: Path) -> None:
    objects, kept = said_by(main, command, place)
    if command == "inspect":
        *objects, whole = objects
        assert whole["number"] is None and whole["text"] == "The fox" and whole["elbo"] < 0
        assert whole["perplexity"] == pytest.approx(math.exp(-whole["elbo"] / len(objects)))
    if kept:
        assert objects == kept
    if command == "evaluate":
        *shares, average = objects
        assert [line["task"] for line in shares] == ["last_word", "lambada"] and average["task"] is None
        assert average["value"] == shares[1]["value"] and average["tasks"] == ["lambada"]
    if command == "score":
        first, second, whole = objects
        assert whole["log_probability"] == first["log_probability"] + second["log_probability"]
        assert whole["num_tokens"] == first["num_tokens"] + second["num_tokens"]
        assert (whole["id"], whole["num_texts"], whole["asked"]) == ("all", 2, 2) and whole["perplexity"] > 1


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    "argv",
    [
        ("train", "tiny.yaml", "--out", "new"),
        ("tokenize", "words.txt", "--to", "t", "--vocab-size", "300"),
        ("evaluate", *SHORT, "--limit", "2"),
        ("export", "--model", "runs/tiny", "--to", "x"),
        ("quality", *SHORT, "--num-samples", "4", "--temperatures", "1"),
        ("latents", "--model", "runs/tiny", "--sequences", "2"),
        ("inspect", "The fox", *TINY, "--samples", "2"),
        ("diagnose", *SHORT, "--num-stories", "4", "--places", "2"),
        ("generate", *SHORT, "--prompt", "The"),
    ],
    ids=lambda argv: argv[0],
)
def test_progress_goes_to_standard_error(argv: tuple[str, ...], main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a terminal, where bars are drawn."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("TERM", "xterm")
    code, said, error = main(*argv)
    assert code == 0, error
    assert "\u2501" not in said and "0:00:0" not in said and "\033[?25l" not in said
    assert "\u2501" in error or argv[0] in ("export", "generate", "inspect")


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
