"""The command line as a user meets it: help, writing, exporting."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import WEIGHTS, Main, environment, opencola

from opencola.checkpoints import official
from opencola.checkpoints.settings import load_sampling
from opencola.commands import main as cli
from opencola.version import __version__


def test_help_and_version_come_without_torch(tmp_path: Path) -> None:
    code = "import sys; from opencola.commands.main import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    for argv, expected in ([["--help"], "chat "], [["--version"], f"opencola {__version__}"], [[], "usage: opencola"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *argv], cwd=tmp_path, env=environment(), capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "") and expected in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name: str, main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(name, "--help")
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert (
        f"usage: opencola {name}" in said and "examples:" in said and f"opencola {name} " in said.split("examples")[1]
    )
    assert cli.summary(name) in main("--help")[1]


def test_help_of_a_recipe_has_its_values(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main("train", "tiny.yaml", "--help")
    said = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "tiny.yaml, prior" in said and "--model.dit.width" in said and "--sampling.guidance" in said
    assert re.search(r"--train.steps INT [^-]*\(default: 8\)", said)


def test_generate(trained: Path) -> None:
    one = opencola("generate", "--model", "runs/tiny", "--prompt", "The fox", cwd=trained)
    assert one.returncode == 0, one.stderr
    assert one.stdout.startswith("The fox") and one.stdout.endswith("\n") and len(one.stdout) > len("The fox\n") + 5


def test_generate_many(main: Main, place: Path) -> None:
    (place / "p.jsonl").write_text('{"prompt": "A bear\\n"}\n\n{"prompt": "ö", "x": 1}\n', encoding="utf-8")
    (place / "p.txt").write_bytes("\ufeffA bear \r\n\r\nö".encode())
    model = ("generate", "--model", "runs/tiny")
    code, said, _ = main(*model, "--prompt", "The fox", "On", "--prompt", "A", "--prompts-file", "p.jsonl",
                         "--jsonl", "o/x.jsonl", "--steps", "2", "--seed", "3", "--batch-size", "2")  # fmt: skip
    assert code == 0
    records = [json.loads(line) for line in (place / "o" / "x.jsonl").open(encoding="utf-8")]
    assert [record["prompt"] for record in records] == ["The fox", "On", "A", "A bear\n", "ö"]
    assert [record["id"] for record in records] == [0, 1, 2, 3, 4]
    tokenizer = official.Tokenizer.load("runs/tiny")
    for record in records:
        assert f"[{record['id']}] {record['prompt']}{record['continuation']}\n\n" in said
        assert record["continuation"] == tokenizer.decode(record["ids"])
        assert record["finished"] in ("eos", "length") and (record["finished"] == "eos") == (len(record["ids"]) < 12)
        assert (record["seed"], record["settings"]["steps"], record["settings"]["guidance"]) == (3, 2, 2.0)
    alone = main(*model, "--prompt", "The fox", "--steps", "2", "--seed", "3")[1]
    assert alone == f"The fox{records[0]['continuation']}\n"
    assert main(*model, "--prompt", "The fox", "--steps", "2", "--seed", "4")[1] != alone
    assert main(*model, "--prompts-file", "p.txt", "--jsonl", "y.jsonl")[0] == 0
    prompts = [json.loads(line)["prompt"] for line in (place / "y.jsonl").open(encoding="utf-8")]
    assert prompts == ["A bear ", "ö"]


def test_export_and_reload(main: Main, place: Path) -> None:
    assert main("export", "--model", "runs/tiny", "--to", "a/fp32")[0] == 0
    assert main("export", "--model", "runs/tiny", "--to", "a/bf16", "--dtype", "bf16")[0] == 0
    assert main("export", "--model", "runs/tiny/vae", "--to", "a/vae")[0] == 0
    shutil.move(place / "runs", place / "moved")
    texts = [main("generate", "--model", folder, "--prompt", "The fox")[1] for folder in ("moved/tiny", "a/fp32")]
    assert texts[0] == texts[1] and len(texts[0]) > 12
    code, said, _ = main("generate", "--model", "a/bf16", "--prompt", "The fox")
    assert code == 0 and said.startswith("The fox")
    assert (place / "a/bf16" / WEIGHTS).stat().st_size < 0.7 * (place / "a/fp32" / WEIGHTS).stat().st_size
    assert load_sampling("a/bf16") == load_sampling("moved/tiny")
    assert official.load_vae("a/vae").config.vocab_size == 300


def test_chat(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["The fox", "", "/set steps 2", "/set", "/set steps many", "/set guidance", "/hello", "/help", "The fox"]
    typed = iter(lines)

    def answer(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    code, said, errors = main("chat", "--model", "runs/tiny")
    assert (code, errors) == (0, "")
    generated = main("generate", "--model", "runs/tiny", "--prompt", "The fox")[1]
    first, second = re.findall(r"^The fox.*\n", said, re.MULTILINE)
    assert generated.startswith(first) and second != first  # every turn has its own noise
    assert "  steps 2\n" in said and said.count("/set KEY VALUE") == 2
    assert "error: Error parsing --steps: invalid literal" in said
    assert "error: Missing value for argument '--guidance'" in said
    assert "no command /hello" in said
    for leave in ("/quit", KeyboardInterrupt):

        def stop(prompt: str, leave: Any = leave) -> str:
            if leave is KeyboardInterrupt:
                raise KeyboardInterrupt
            return leave

        monkeypatch.setattr("builtins.input", stop)
        assert main("chat", "--model", "runs/tiny")[0] == 0


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ("chat --model runs/tiny <&-", 0),
        ("generate --model runs/tiny --prompt 'The fox' >&-", 0),
        ("train --help >&-", 0),
        ("tarin 2>&-", 2),
    ],
)
def test_streams_that_are_closed_are_no_bug(asked: str, code: int, trained: Path) -> None:
    shell = f"{shlex.join([sys.executable, '-m', 'opencola'])} {asked}"
    done = subprocess.run(shell, shell=True, cwd=trained, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr, "error:" in done.stdout) == (code, "", False)


def test_a_seed_that_is_too_large_and_a_prompt_like_a_flag(main: Main) -> None:
    model = ("generate", "--model", "runs/tiny", "--prompt")
    code, _, error = main(*model, "a", "--seed", "18446744073709551616")
    said = "error: --seed must be at least 0 and at most 9223372036854775807, but is 18446744073709551616\n"
    assert (code, error) == (2, said)
    assert main(*model, "--foo bar")[1].startswith("--foo bar")
    assert main(*model, "--foo")[2] == "error: Unrecognized options: --foo; if --foo is a value: --prompt=--foo\n"
    assert main(*model[:-1], "--prompt=--foo")[1].startswith("--foo")
    code, _, error = main(*model, "a", "--solver", "adaptive", "--tolerance", "0")
    assert (code, error) == (2, "error: --tolerance must be above 0, but is 0.0\n")
    code, _, error = main(*model, "a", "--solver", "adaptive", "--tolerance", "1e-30")
    assert (code, error) == (
        2,
        "error: dopri5 finds no step: the velocity is not finite, or the tolerance 1e-30 is too small\n",
    )


def test_kernels_and_rates_are_shown(main: Main) -> None:
    code, said, error = main("kernels")
    assert code == 0 and "kernels" in said.splitlines()[0], error
    assert "float32 forward large" in said and "bfloat16 weight small" in said
    code, said, error = main("kernels", "--json")
    lines = [json.loads(line) for line in said.splitlines()]
    assert code == 0 and len(lines) == 12, error
    for line in lines:
        assert line["used"].split(" in ")[0] in line["gflops"] and min(line["gflops"].values()) > 0
    assert main("kernels", "--threads", "0")[0] == 2
