"""Every command that help texts, README, guide and recipes' headers show is understood; the quick ones are run."""

import argparse
import contextlib
import functools
import importlib
import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import pytest
from command_line import ROOT, TINY, Main
from documented import RECIPES, after, commands, header, spans

from opencola.commands import main as cli
from opencola.evaluation.benchmarks.tasks import TASKS
from opencola.models import build
from opencola.run import dry_run, flags, recipe, run
from opencola.worlds import story_tasks

COMMANDS = [(place, *after(words)) for place, words in commands()]
SPANS = [(place, *after(words)) for place, words in spans()]
TOOLS = ("pytest",)
# What makes a command quick, on the tiny model; a later flag holds.
GENERATION = ("--model", "runs/tiny", "--steps", "2", "--max-new-tokens", "4")
SMALL: dict[str, tuple[str, ...]] = {
    "generate": GENERATION,
    "chat": GENERATION,
    "score": ("--model", "runs/tiny", "--steps", "2", "--samples", "1"),
    "evaluate": (*GENERATION, "--limit", "1", "--processes", "1", "--scoring.steps", "1", "--scoring.samples", "1"),
    "latents": ("--model", "runs/tiny", "--sequences", "2", "--length", "16"),
    "inspect": (*GENERATION[:-2], "--samples", "2"),
    "quality": (*GENERATION, "--num-samples", "2"),
    "report": (),
    "export": ("--model", "runs/tiny"),
    "tokenize": ("--vocab-size", "300", "--workers", "1"),
}
NETWORK = re.compile(r"hf:|openai-community|OWNER|--push")


class Understood(BaseException):
    """A command line has been read, and work would begin."""


def stop(*_: Any, **__: Any) -> NoReturn:
    raise Understood


def is_form(words: list[str]) -> bool:
    """Whether parts of a command are left to the reader."""
    return any(re.search(r"^\[|\.\.\.|^[A-Z_]{2,}\]?$", word) for word in words)


def named(program: str, words: list[str]) -> str:
    return " ".join([program, *words])


WHOLE = {named(program, words): (program, words) for _, program, words in COMMANDS if not is_form(words)}
FORMS = {named(program, words): (program, words) for _, program, words in [*COMMANDS, *SPANS]}
RUN = [
    words
    for program, words in WHOLE.values()
    if program == "opencola" and words[0] in SMALL and not NETWORK.search(" ".join(words))
]


@pytest.fixture(scope="module")
def made(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files and runs that documented commands name, made up; left as it is by all tests."""
    place = tmp_path_factory.mktemp("made") / "place"
    shutil.copytree(trained, place)
    for name in ("mine", "demo", "ar", "sft", "chat", "shipped"):
        shutil.copytree(place / "runs" / "tiny", place / "runs" / name)
    shutil.rmtree(place / "runs" / "sft" / "vae")
    texts = (place / "words.txt").read_text(encoding="utf-8")
    for folder in ("texts", "my_texts"):
        (place / folder).mkdir()
        (place / folder / "a.txt").write_text(texts, encoding="utf-8")
    for name in ("texts.txt", "my.txt", "valid.txt", "prompts.txt"):
        (place / name).write_text("\n".join(texts.split("\n")[: 20 if name == "valid.txt" else 2]), encoding="utf-8")
    pair = {"prompt": "The fox", "continuation": " ran to the hill."}
    (place / "answers.jsonl").write_text(json.dumps(pair), encoding="utf-8")
    (place / "texts.jsonl").write_text(json.dumps({"text": "The fox ran."}), encoding="utf-8")
    (place / "my-recipe.yaml").write_text(TINY, encoding="utf-8")
    for folder in ("benchmarks", "eval"):
        (place / folder).mkdir()
        for task in TASKS:
            lines = [json.dumps(question) for question in story_tasks.records(task.name, 2, 0)]
            (place / folder / f"{task.name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return place


@pytest.fixture
def files(made: Path, place: Path) -> Path:
    """A copy of that folder, to work in."""
    shutil.copytree(made, place, dirs_exist_ok=True)
    return place


@functools.cache
def helped(*argv: str) -> str:
    """The help of a command."""
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
        cli.main([*argv, "--help"])
    return said.getvalue()


def test_they_are_collected() -> None:
    counted = Counter(place.split("/")[0] for place, *_ in COMMANDS)
    assert counted["README.md"] > 10 and counted["docs"] > 20 and counted["opencola"] > 30 and counted["recipes"] > 15
    shown = {words[0] for _, program, words in COMMANDS if program == "opencola"}
    assert shown >= {*cli.COMMANDS}
    for command in cli.COMMANDS:  # each has examples in its help
        assert any(place == f"opencola/commands/{cli.module_of(command)}.py" for place, *_ in COMMANDS), command


@pytest.mark.parametrize("command", WHOLE)
def test_they_are_understood(command: str, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    program, words = WHOLE[command]
    if program == "make":
        for target in words:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif program.endswith(".py"):
        assert (ROOT / program).is_file()
    elif program == "opencola" and words[0] == "lm_eval":
        harness = pytest.importorskip("opencola.evaluation.harness")
        from lm_eval._cli.harness import HarnessCLI

        monkeypatch.setattr("sys.argv", ["lm_eval", "run", *words[1:]])
        options = HarnessCLI().parse_args()
        harness.OpenCola.create_from_arg_obj(options.model_args | {"pretrained": "runs/tiny"})
    elif program == "opencola":
        parse = flags.parse

        def parse_and_stop(target: Any, argv: Any, **about: Any) -> Any:
            parsed = parse(target, argv, **about)
            return parsed if about.get("return_unknown_args") or "description" not in about else stop()

        monkeypatch.setattr(flags, "parse", parse_and_stop)
        monkeypatch.setattr(run, "run", stop)
        monkeypatch.setattr(dry_run, "dry_run", stop)
        with pytest.raises((Understood, SystemExit)) as end:
            raise SystemExit(cli.main(words))
        assert isinstance(end.value, Understood) or end.value.code == 0
    elif program not in TOOLS:
        module = importlib.import_module(program)
        monkeypatch.setattr("sys.argv", [program, *words])
        parse_known = argparse.ArgumentParser.parse_args
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *given: stop(parse_known(*given)))
        parse_flags = flags.parse
        monkeypatch.setattr(flags, "parse", lambda *given, **about: stop(parse_flags(*given, **about)))
        monkeypatch.setattr(recipe, "read", stop)
        with pytest.raises(Understood):
            module.main()


@pytest.mark.parametrize("command", FORMS)
def test_their_flags_exist(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program, words = FORMS[command]
    given = {word.strip("[]") for word in words if re.match(r"\[?--[a-z]", word)} - {"--help", "--version"}
    if program == "make":
        assert all((ROOT / "Makefile").read_text(encoding="utf-8").count(f"\n{target}:") for target in words)
    if program == "opencola" and words and not words[0].startswith(("-", "COMMAND", "lm_eval")):
        assert words[0] in cli.COMMANDS
        monkeypatch.setenv("COLUMNS", "200")
        shown = helped(words[0])
        if words[0] == "train" and is_recipe(words[1:2]):
            shown += helped(*words[:2])
        for name in given:
            assert re.search(rf"{name}\b", shown), f"{command}: there is no {name}"
    elif program.startswith(("benchmarks", "experiments")) and given:
        monkeypatch.setattr("sys.argv", [program, "--help"])
        with pytest.raises(SystemExit):
            module = importlib.import_module(program)
            (module if hasattr(module, "main") else importlib.import_module(f"{program}.__main__")).main()
        shown = capsys.readouterr().out
        for name in given:
            assert name in shown, f"{command}: there is no {name}"


def is_recipe(words: list[str]) -> bool:
    return any((ROOT / "recipes" / f"{name}.yaml").is_file() for name in words)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_flags_in_a_recipes_header_are_its_own(file: Path) -> None:
    given: dict[str, list[str]] = {}
    for name, value in re.findall(r"(--(?:[a-z_]+\.[a-z_.]+|valid))[ =]([^\s()]+)", "\n".join(header(file))):
        given.setdefault(name, []).append("1" if value == "..." else value)
    while given:  # each with the first of its values, then those with a second, ...
        words = [word for name, values in given.items() for word in (name, values.pop(0))]
        recipe.read(str(file), words, build.config_class, build.sampling_class)
        given = {name: values for name, values in given.items() if values}


@pytest.mark.parametrize("words", RUN, ids=" ".join)
def test_quick_ones_run(words: list[str], main: Main, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["The fox", "/set steps 1", "The bear"])
    monkeypatch.setattr("builtins.input", lambda _: next(said, "/quit"))
    if words[0] == "report":
        assert main("evaluate", *SMALL["evaluate"], "--tasks", "last_word", "--out", "runs/mine")[0] == 0
        line, *rest = (files / "runs/mine/results.jsonl").read_text(encoding="utf-8").split("\n")
        for name in ("cola", "ar", "llada"):
            head = json.loads(line) | {"model": name, "model_hash": name}
            (files / f"{name}.jsonl").write_text("\n".join([json.dumps(head), *rest]), encoding="utf-8")
        words = [word.replace("*", "mine") for word in words]
    code, out, error = main(*words, *SMALL[words[0]])
    assert code == 0, error
    assert out.strip() and "Traceback" not in error
