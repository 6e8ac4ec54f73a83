"""What exists is replaced only by what is whole: refused, interrupted, killed, on a full disk, and by two at once."""

import contextlib
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from command_line import WEIGHTS, Main, command
from forked import Started
from results_files import answers, head, write

from opencola import storage
from opencola.checkpoints import card
from opencola.commands import generate
from opencola.commands import main as cli
from opencola.run import stage
from opencola.train.loop import Interrupted

AR = """
family: ar
out: runs/ar
data: {source: words.txt, length: 16, batch_size: 4}
valid: words.txt
tokenizer: {vocab_size: 300}
model: {trunk: {width: 16, num_layers: 1, num_heads: 2, ffn_dim: 32}}
train: {steps: 4, warmup: 2, log_every: 2, ema: 0.9}
"""
RUN = ("train", "ar.yaml")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def exported(folder: Path) -> dict[str, bytes]:
    """What is replaced when another model is whole."""
    kept = ("ar_model", "tokenizer.json", "opencola.json", "training.json", "README.md", "valid.json")
    return {name: content for name, content in contents(folder).items() if name.startswith(kept)}


@pytest.fixture(scope="module")
def finished(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one stage; left as it is by all tests."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(trained / "words.txt", folder)
    (folder / "ar.yaml").write_text(AR)
    with contextlib.chdir(folder):
        assert cli.main(RUN) == 0
    out = folder / "runs" / "ar"
    assert not list(out.glob(".*")) and not (out / "unfinished").exists()
    return folder


@pytest.fixture
def out(place: Path, finished: Path) -> Path:
    """A copy of that run, beside the tiny one."""
    shutil.copytree(finished, place, dirs_exist_ok=True)
    return place / "runs" / "ar"


def damage_checkpoint(out: Path) -> None:
    (file,) = out.glob("checkpoints/step-*/*.distcp")
    file.write_bytes(file.read_bytes()[:-1] + b"x")


def delete_checkpoints(out: Path) -> None:
    shutil.rmtree(out / "checkpoints")


def delete_steps(out: Path) -> None:
    (step,) = out.glob("checkpoints/step-*")
    shutil.rmtree(step)


def train_other_tokenizer(out: Path) -> None:
    shutil.copytree(out.parent / "tiny", "other")


def leave(out: Path) -> None:
    """Change nothing."""


@pytest.mark.parametrize(
    ("before", "flags", "message"),
    [
        (leave, "--seed 1", "does not fit this recipe, or is damaged: .*seed was 0 .*, but is 1"),
        (leave, "--data.length 32", "length was 16 .*, but is 32"),
        (leave, "--model.trunk.width 32", "runs/ar/checkpoints/step-000004 does not fit this recipe"),
        (leave, "--train.steps 2", "train.steps 2, as the run in runs/ar has taken 4 steps, has no effect"),
        (leave, "--train.seconds 0.0001", "train.seconds 0.0001, as the run in runs/ar .* has no effect"),
        (leave, "--tokenizer.vocab_size 299", "tokenizer.vocab_size 299, as .* begun with 300, has no effect"),
        (leave, "--tokenizer.special x", r"tokenizer.special \['x'\], as .* has no effect"),
        (train_other_tokenizer, "--tokenizer.path other", "other holds another tokenizer than the run in runs/ar"),
        (leave, "--init runs/tiny", "the family 'ar' starts from AR model"),
        (leave, "--data.source nowhere.txt", "no such file or folder: nowhere.txt"),
        (leave, "--valid nowhere.txt --train.steps 8", "no such file or folder: nowhere.txt"),
        (damage_checkpoint, "--train.steps 8", "is damaged"),
        (delete_checkpoints, "--train.steps 8", "runs/ar holds a trained model, but no checkpoint .*--overwrite"),
        (delete_steps, "--train.steps 8", "runs/ar holds a trained model, but no checkpoint .*another --out"),
    ],
)
def test_a_refused_resume_touches_nothing(
    main: Main, out: Path, before: Callable[[Path], None], flags: str, message: str
) -> None:
    before(out)
    there = contents(out)
    code, _, error = main(*RUN, "--resume", *flags.split())
    assert code == 2 and re.fullmatch(rf"error: .*{message}.*\n", error), error
    assert contents(out) == there
    code, said, _ = main(*RUN, "--resume")
    assert code == 0 and "finished before" in said and contents(out) == there


def test_a_refused_resume_of_a_model_without_a_run_touches_nothing(main: Main, out: Path, place: Path) -> None:
    assert main("export", "--model", "runs/ar", "--to", "mine")[0] == 0
    there = contents(place / "mine")
    code, _, error = main(*RUN, "--out", "mine", "--resume")
    assert code == 2 and "mine holds a model" in error and contents(place / "mine") == there
    code, _, error = main(*RUN, "--out", "mine", "--resume", "--train.steps", "8")
    assert code == 2 and "mine holds a trained model, but no checkpoint" in error and contents(place / "mine") == there
    code, _, error = main("train", "tiny.yaml", "--out", "mine", "--resume")
    assert code == 2 and "mine holds a model" in error and contents(place / "mine") == there


def test_no_room_for_what_shall_be_written(main: Main, out: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(storage.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
        for argv in ((*RUN, "--resume", "--train.steps", "8"), ("export", "--model", "runs/ar", "--to", "new/mine")):
            code, _, error = main(*argv)
            assert code == 2 and re.fullmatch(r"error: no room in .* MB are free, .*\n", error), error
    assert contents(out) == there and not (place / "new").exists()


def interrupt(monkeypatch: pytest.MonkeyPatch, main: Main, *argv: str) -> None:
    """Stop a command where training is about to begin."""

    def stop(*arguments: Any, **options: Any) -> None:
        raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(stage, "proceed", stop)
        assert main(*argv)[0] == 130


@pytest.mark.parametrize(
    "flags", [("--overwrite",), ("--overwrite", "--seed", "1"), ("--resume", "--train.steps", "8")]
)
def test_a_model_stays_until_another_one_is_whole(
    main: Main, out: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("metrics.json", "report.html", "evaluation.jsonl"):  # as the demo leaves them
        (out / name).write_text('{"counts": {}, "intervals": {}}')
    before = exported(out)
    (out / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')  # of an earlier tokenizer
    interrupt(monkeypatch, main, *RUN, *flags)
    assert exported(out) == before and (out / "metrics.json").exists()
    settings = [flag for flag in flags if flag not in ("--overwrite", "--resume")]
    code, said, error = main(*RUN, *settings, "--resume")
    assert code == 0 and "finished before" not in said, error
    after = exported(out)
    assert after.keys() == before.keys() and after["training.json"] != before["training.json"]
    obsolete = {"metrics.json", "report.html", "evaluation.jsonl", "unfinished", "tokenizer_config.json"}
    assert not obsolete & contents(out).keys()
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert card.read_facts(out)["stages"][-1]["recipe"] == recipe
    assert main(*RUN, *settings, "--resume")[1].count("finished before") == 1


def test_a_stage_that_started_from_what_changed_is_not_finished(
    main: Main, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = place / "runs" / "tiny"
    before = (root / WEIGHTS).read_bytes()
    interrupt(monkeypatch, main, "train", "tiny.yaml", "--overwrite", "--train.steps", "2")
    assert [(folder / WEIGHTS).read_bytes() for folder in (root, root / "prior")] == [before, before]
    code, said, error = main("train", "tiny.yaml", "--resume", "--train.steps", "2")
    assert code == 0 and "finished before" not in said, error
    assert (root / WEIGHTS).read_bytes() == (root / "prior" / WEIGHTS).read_bytes() != before
    assert main("train", "tiny.yaml", "--resume", "--train.steps", "2")[1].count("finished before") == 2


def test_killed_while_the_model_is_swapped_in(main: Main, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    delete = storage.delete

    def killed(path: Path) -> None:
        if path.name == "training.json":
            raise Killed
        delete(path)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(storage, "delete", killed)
        main(*RUN, "--overwrite", "--seed", "1")
    assert (out / storage.NEXT / storage.PLAN).is_file()
    code, said, error = main(*RUN, "--seed", "1", "--resume")
    assert code == 0 and "finished before" in said, error
    assert not list(out.glob(".*")) and card.read_facts(out)["stages"][-1]["recipe"]["seed"] == 1


@pytest.mark.parametrize("limit", [20, 3000, 20_000])
def test_a_disk_that_fills_up_while_a_model_is_exported(main: Main, out: Path, place: Path, limit: int) -> None:
    """The largest size of a file stands for the room on the disk."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        code, _, error = main("export", "--model", "runs/ar", "--to", "mine")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    assert code == 2 and re.fullmatch(r"error: .*\n", error), error
    assert not (place / "mine").exists()


@pytest.mark.parametrize(
    ("argv", "broken"),
    [
        ("latents --sequences 5", "opencola.commands.latents.standalone"),
        ("quality --num-samples 2 --temperatures 1", "opencola.commands.quality.write_objects"),
        ("inspect Once --samples 2", "opencola.commands.inspect.standalone"),
        ("diagnose --num-stories 4 --places 1", "opencola.commands.diagnose.standalone"),
        ("report results.jsonl", "opencola.commands.report.write_objects"),
    ],
)
def test_what_is_measured_is_written_whole_or_not_at_all(
    main: Main, place: Path, argv: str, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = argv.split()[0]
    if name == "report":
        code, _, error = main("evaluate", "--model", "runs/tiny", "--limit", "2", "--tasks", "last_word", "--out", ".")
        assert code == 0, error
    names = {
        "latents": ("latents.jsonl", "latents.svg"), "quality": ("samples.jsonl", "quality.jsonl", "quality.svg"),
        "inspect": ("inspect.jsonl", "slice.svg"), "diagnose": ("diagnose.jsonl", "diagnose.svg"),
        "report": ("results.html", "results.md", "accuracies.svg", "summary.jsonl"),
    }[name]  # fmt: skip
    (place / "there").mkdir()
    for file in names:
        (place / "there" / file).write_text("before")

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(broken, full)
    model = [] if name == "report" else ["--model", "runs/tiny"]
    for folder in ("there", "new"):
        code, _, error = main(*argv.split(), *model, "--out", folder)
        assert code == 2 and error.endswith("error: [Errno 28] No space left on device\n"), error
    assert contents(place / "there") == dict.fromkeys(names, b"before") and not (place / "new").exists()


def test_texts_replace_earlier_ones_when_all_are_written(
    main: Main, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "x.jsonl").write_text("before")
    write_all = generate.generate_text

    def interrupted(*arguments: Any) -> Any:
        if arguments[-1] == [1]:
            raise KeyboardInterrupt
        return write_all(*arguments)

    argv = ("generate", "--model", "runs/tiny", "--steps", "1", "--max-new-tokens", "2", "--batch-size", "1")
    argv += ("--prompt", "The fox", "The bear", "--jsonl", "x.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(generate, "generate_text", interrupted)
        code, _, error = main(*argv)
    assert code == 130 and error == "\nwhat is done is in x.draft.jsonl\n"
    assert (place / "x.jsonl").read_text() == "before" and "The fox" in (place / "x.draft.jsonl").read_text()
    assert main(*argv)[0] == 0
    assert (place / "x.jsonl").read_text().count("\n") == 2 and not (place / "x.draft.jsonl").exists()


TWO = {
    "train": ("train tiny.yaml --out two --train.steps 100000", "two/vae/metrics.jsonl"),
    "tokenize": ("tokenize stories --limit 400000 --vocab-size 300 --shard-tokens 20000 --workers 1 --to two",
                 "two/manifest.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", TWO)
def test_two_processes_on_one_folder(main: Main, place: Path, name: str) -> None:
    argv, sign = TWO[name]
    first = Started(command(*argv.split()))
    try:
        while not (place / sign).exists() and first.poll() is None:
            time.sleep(0.05)
        for again in ([], ["--resume"], ["--overwrite"]) if name == "train" else ([],):
            code, _, error = main(*argv.split(), *again)
            named = rf"error: two is in use by process {first.pid} on \S+ \(opencola {re.escape(argv)}\): wait .*\n"
            assert code == 2 and re.fullmatch(named, error), error
        assert first.poll() is None  # and goes on
        first.send_signal(signal.SIGINT)
        _, error = first.communicate(timeout=120)
        assert first.returncode == 130 and "Traceback" not in error, error
    finally:
        first.kill()
        first.wait()
    assert not {*storage.OURS} & {file.name for file in (place / "two").rglob("*")}
    with storage.locked(place / "two"):
        pass


@pytest.mark.parametrize(
    "argv",
    ["evaluate --model runs/tiny --limit 1 --out runs/ar", "export --model runs/tiny --to runs/ar",
     "latents --model runs/tiny --sequences 2 --out runs/ar", "quality --model runs/tiny --num-samples 2 --out runs/ar",
     "inspect Once --model runs/tiny --samples 2 --out runs/ar", "train ar.yaml --resume",
     "diagnose --model runs/tiny --num-stories 4 --places 1 --out runs/ar", "demo --overwrite --out runs/ar",
     "report runs/ar/results.jsonl --out runs/ar", "tokenize words.txt --vocab-size 300 --to runs/ar"],
)  # fmt: skip
def test_a_folder_that_another_process_writes_to(
    main: Main, out: Path, argv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(out / "results.jsonl", head({"mmlu": 2}), *answers("mmlu", ["on a hill"] * 2))
    there = contents(out)

    class Taken(storage.FileLock):
        def acquire(self, *arguments: Any, **options: Any) -> Any:
            raise storage.Timeout("lock")

    monkeypatch.setattr(storage, "FileLock", Taken)
    code, _, error = main(*argv.split())
    assert code == 2 and error == "error: runs/ar is in use by another process: choose another folder\n", error
    assert contents(out) == there
