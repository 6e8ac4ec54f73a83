"""`opencola evaluate` as a user meets it: the same file however it comes about, and its mistakes."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import WEIGHTS, Main, command
from forked import Started

from opencola.checkpoints import hub
from opencola.commands.evaluate import DTYPES
from opencola.evaluation.benchmarks.results_writer import ResultsWriter
from opencola.evaluation.benchmarks.tasks import TASKS, find_task, read_demonstrations, read_questions
from opencola.models.cola.sampling import ColaSampling
from opencola.models.cola.score import Scoring
from opencola.models.text_stream import generate_text
from opencola.worlds import story_tasks

QUICK = ("--model", "runs/tiny", "--max-new-tokens", "6", "--steps", "2")
SCORED = ("--likelihood", "--scoring.steps", "1", "--scoring.samples", "2")
RESULTS = "results.jsonl"


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / RESULTS).read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def data(place: Path) -> Path:
    """Questions of the story world in all eight formats, one of them with a ready prompt."""
    folder = place / "data"
    folder.mkdir()
    for task in TASKS:
        questions = story_tasks.records(task.name, 5, 0)
        if task.name == "mmlu":
            questions[2] |= {"id": "ready", "prompt": "  Q \n", "few_shot_prefix": "F\n"}
        lines = "".join(json.dumps(question) + "\n" for question in questions)
        (folder / f"{task.name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.mark.usefixtures("data")
def test_all_tasks(main: Main, place: Path) -> None:
    code, said, error = main("evaluate", *QUICK, "--data", "data", "--limit", "3", "--out", "o/new", "--seed", "3")
    assert code == 0, error
    head, *records = rows(place / "o/new")
    names = [*(task.name for task in TASKS), "stories", "last_word"]
    assert [(r["task"], r["index"]) for r in records] == [(name, i) for name in names for i in range(3)]
    assert head["record"] == "run" and head["family"] == "cola" and head["seed"] == 3 and head["likelihood"] is None
    assert (head["settings"]["max_new_tokens"], head["settings"]["steps"], head["settings"]["guidance"]) == (6, 2, 2.0)
    assert head["settings"]["temperature"] == 0  # not the model's own
    assert re.fullmatch("[0-9a-f]{64}", head["tasks"]["mmlu"].pop("sha256"))
    assert re.fullmatch("[0-9a-f]{64}", head["tasks"]["mmlu"].pop("demonstrations_sha256"))
    assert head["tasks"]["mmlu"] == {"file": "mmlu.jsonl", "records": 3}
    assert head["opencola"]["opencola"]
    model, tokenizer = hub.load(Path("runs/tiny"))
    model.to(DTYPES[head["dtype"]])
    settings = ColaSampling(**{**head["settings"], "stop": tuple(head["settings"]["stop"])})
    for task in (find_task("mmlu"), find_task("squad")):
        demonstrations = read_demonstrations()[task.name]
        asked = read_questions(place / "data", task)[:3]
        for record, found in zip(asked, [r for r in records if r["task"] == task.name], strict=True):
            prompt = task.prompt(record, demonstrations)
            pieces = generate_text(model, tokenizer, [prompt], settings, [found["index"]])
            text = "".join(piece.text for step in pieces for piece in step)
            verdict = task.grade(record, text)
            assert (found["id"], found["prompt"], found["generation"]) == (record.id, prompt, text)
            assert (found["truncated"], found["correct"], found["parsed"]) == (
                verdict.text, verdict.correct, verdict.parsed,
            )  # fmt: skip
    ready = next(r for r in records if r.get("id") == "ready")
    assert ready["prompt"] == "F\n  Q \n"
    right = [r["correct"] for r in records if r["task"] == "siqa"]
    assert re.search(rf"^siqa +right +{100 * sum(right) / 3:.2f} ", said, re.MULTILINE)
    values = [r["correct"] for r in records if r["record"] == "answer"]
    assert f"tasks average: {100 * sum(values) / 24:.2f} (8 of the 8 benchmarks)" in said
    timing = json.loads((place / "o/new/timing.jsonl").read_text())
    assert timing["records"] == 30 and sorted(file.name for file in (place / "o/new").iterdir()) == [
        RESULTS, "timing.jsonl",
    ]  # fmt: skip


@pytest.mark.usefixtures("workers_start_at_once")
def test_the_file_depends_neither_on_batches_nor_on_processes(main: Main, place: Path) -> None:
    questions = [
        {"id": i, "prompt": "Who ran? " * i + "Who?", "answer": "b", "choices": ["the fox", "a bear", f"{i} hills"]}
        for i in (3, 0, 9, 1, 4, 5)
    ]
    (place / "siqa.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    flags = ("evaluate", *QUICK, *SCORED, "--data", ".", "--tasks", "siqa", "last_word", "--limit", "5")
    ways = {"a": ("--batch-size", "1"), "b": ("--batch-size", "4", "--processes", "2"), "c": ("--batch-size", "99")}
    for out, way in ways.items():
        code, _, error = main(*flags, *way, "--out", out)
        assert code == 0, error
    files = [(place / out / RESULTS).read_bytes() for out in ways]
    assert files[0] == files[1] == files[2]
    head, *records = rows(place / "a")
    assert [r["task"] for r in records] == ["siqa"] * 5 + ["last_word"] * 5
    assert len({r["generation"] for r in records[:5]}) == 5
    label = "IWAE, K = 2, midpoint, 1 steps (shift 0.2), 1 rademacher probe, blockwise"
    assert (head["likelihood"]["estimator"], head["likelihood"]["kind"]) == (label, "estimate")
    assert head["likelihood"]["settings"]["samples"] == 2
    model, tokenizer = hub.load(Path("runs/tiny"))
    settings = Scoring(solver="midpoint", steps=1, samples=2)
    model.to(DTYPES[head["dtype"]])
    for record in records[:2]:
        pairs = [(record["prompt"], f" {option}") for option in record["options"]]
        prompts, options = ([tokenizer.encode(text) for text in texts] for texts in zip(*pairs, strict=True))
        ids = [record["index"]] * 3
        sums = model.score(prompts, options, settings, pad_id=tokenizer.eos_id, ids=ids).total.tolist()
        assert record["likelihood"]["sum"] == pytest.approx(sums, abs=1e-5)
        assert record["likelihood"]["choice_sum"] == sums.index(max(sums))


def test_the_default_type_is_one_in_which_texts_do_not_depend_on_the_batch(
    main: Main, place: Path, with_kernels: bool
) -> None:
    flags = ("evaluate", *QUICK, "--tasks", "last_word", "--limit", "2")
    assert main(*flags, "--out", "a")[0] == 0
    assert rows(place / "a")[0]["dtype"] == ("fp32" if with_kernels else "fp64")
    assert main(*flags, "--out", "b", "--dtype", "bf16")[0] == 0
    assert rows(place / "b")[0]["dtype"] == "bf16"


def test_the_models_hash_is_of_weights_and_tokenizer(place: Path) -> None:
    model = place / "runs/tiny"
    before = hub.hash_model(model)
    shutil.copytree(model, place / "copy")
    (place / "copy/README.md").write_text("other words")
    (place / "copy/opencola.json").unlink()
    assert hub.hash_model(place / "copy") == before
    with (place / "copy" / WEIGHTS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert hub.hash_model(place / "copy") != before
    shutil.copy(model / WEIGHTS, place / "copy" / WEIGHTS)
    assert hub.hash_model(place / "copy") == before
    (place / "copy/tokenizer.json").write_text((model / "tokenizer.json").read_text() + " ")
    assert hub.hash_model(place / "copy") != before


def kill_and_go_on(main: Main, place: Path, kills: int) -> int:
    """Kill a run again and again, let it end, and compare; returns how often a draft with records was left."""
    flags = ["evaluate", *QUICK, "--limit", "50", "--tasks", "last_word", "lambada", "--data", "data"]
    assert main(*flags, "--out", "whole")[0] == 0
    whole = (place / "whole" / RESULTS).read_bytes()
    chance, draft, in_the_middle = random.Random(kills), place / "killed/results.draft.jsonl", 0
    for number in range(kills):
        before = draft.stat().st_size if draft.exists() else 0
        wanted = before + chance.choice([3000, 9000, 1])
        size, processes = str(chance.choice([1, 3, 7])), str(2 - number % 2)
        argv = command(*flags, "--out", "killed", "--batch-size", size, "--processes", processes)
        with Started(argv, quick=True) as process:
            while process.poll() is None and not (draft.exists() and draft.stat().st_size >= wanted):
                time.sleep(0.001)
            process.kill()
        if draft.exists():
            in_the_middle += draft.stat().st_size > 3000
            with draft.open("r+b") as file:  # as if the system had not written all of it
                file.truncate(draft.stat().st_size - chance.choice([0, 0, 1, 200]))
    assert main(*flags, "--out", "killed", "--batch-size", "64")[0] == 0
    assert (place / "killed" / RESULTS).read_bytes() == whole
    assert not draft.exists()
    return in_the_middle


@pytest.mark.usefixtures("data")
def test_killed_at_any_moment_it_goes_on_to_the_same_end(main: Main, place: Path) -> None:
    assert kill_and_go_on(main, place, 1)


@pytest.mark.slow
@pytest.mark.usefixtures("data")
def test_killed_often(main: Main, place: Path) -> None:
    assert kill_and_go_on(main, place, 15) > 5


@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(main: Main, place: Path, processes: str) -> None:
    flags = ["evaluate", *QUICK, "--tasks", "stories", "--limit", "300", "--batch-size", "2", "--processes", processes]
    process = Started(command(*flags, "--overwrite", "--out", "a b"), alone=True)
    (place / "a b").mkdir()
    (place / "a b" / RESULTS).write_text("earlier")
    draft = place / "a b/results.draft.jsonl"
    while process.poll() is None and not (draft.exists() and draft.stat().st_size > 5000):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process gets it
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error, error
    kept = len(draft.read_text().splitlines()) - 1
    assert kept >= 2 and f"{kept} of 300 records are kept in a b" in error
    again = shlex.split(error.splitlines()[-1].removeprefix("go on: "))
    assert again == ["opencola", *flags, "--out", "a b"]
    assert (place / "a b" / RESULTS).read_text() == "earlier"


def interrupted(*arguments: Any, **options: Any) -> None:
    raise KeyboardInterrupt


def test_another_run_is_refused_unless_it_is_to_be_overwritten(
    main: Main, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("evaluate", *QUICK, "--tasks", "last_word", "--limit", "2", "--out", "x")
    assert main(*flags)[0] == 0
    before = (place / "x" / RESULTS).read_bytes()
    code, said, error = main(*flags, "--batch-size", "1")  # all is there
    assert code == 0 and "last_word" in said and len((place / "x/timing.jsonl").read_text().splitlines()) == 1
    assert (place / "x" / RESULTS).read_bytes() == before
    code, _, error = main(*flags, "--steps", "3", "--seed", "5")
    assert code == 2 and re.fullmatch(
        r"error: x/results.jsonl is of another run: settings.seed is 0 there, 5 now; settings.steps is 2 there, 3 now; "
        r"seed is 0 there, 5 now. Choose another --out, or --overwrite it\n", error,
    )  # fmt: skip
    assert (place / "x" / RESULTS).read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(ResultsWriter, "append", interrupted)
        code, _, error = main(*flags, "--steps", "3", "--overwrite")
    assert code == 130 and "go on: opencola evaluate" in error and "--overwrite" not in error
    assert (place / "x" / RESULTS).read_bytes() == before
    assert main(*flags, "--steps", "3")[0] == 0  # as was said
    assert rows(place / "x")[0]["settings"]["steps"] == 3


@pytest.mark.usefixtures("data")
def test_what_is_not_finite_stops_it_or_is_counted(main: Main, place: Path) -> None:
    flags = ("evaluate", *QUICK, "--tasks", "obqa", "--data", "data", "--limit", "3", "--dtype", "fp32", "--out", "x")
    code, said, error = main(*flags, "--guidance", "3e38")
    assert (code, said) == (2, "") and re.search(r"error: sample \d, .*not finite", error)
    code, said, error = main(*flags, "--guidance", "3e38", "--allow-not-finite")
    assert code == 0 and said.count("3 of 3 records are not finite, and count as not right\n") == 1, error
    _, *records = rows(place / "x")
    assert [(r["generation"], r["correct"], "not finite" in r["not_finite"]) for r in records] == [
        ("", False, True)
    ] * 3
    code, said, _ = main("report", "x/results.jsonl", "--out", "y")
    assert code == 0 and "Records of runs/tiny are not finite, and count as not right: OBQA 3." in said
    assert '"not_finite": 3' in (place / "y/summary.jsonl").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--tasks mmlu", "mmlu needs --data: the folder that holds mmlu.jsonl"),
        ("--tasks arc", "unknown task 'arc': choose among lambada, mmlu, .*, stories, last_word"),
        ("--tasks stories last_word stories", "each once is enough"),
        ("--data nowhere", "no such file: nowhere/lambada.jsonl; put the records of LAMBADA there"),
        ("--data data --tasks broken", "unknown task 'broken'"),
        ("--data bad --tasks squad", "bad/squad.jsonl, line 2: field 'answer'"),
        ("--data bad --tasks lambada", "bad/lambada.jsonl, record 'u': not valid Unicode"),
        ("--data data --demonstrations one.json --tasks obqa", "one.json: obqa takes a list of 2 demonstrations"),
        ("--data data --demonstrations none.json --tasks obqa", "obqa takes 2 demonstrations, not 0"),
        ("--data data --demonstrations nowhere.json", "nowhere.json"),
        ("--limit 0", "--limit must be at least 1, but is 0"),
        ("--batch-size 0", "--batch-size must be at least 1, but is 0"),
        ("--processes -1", "--processes must be at least 1, but is -1"),
        ("--scoring.samples 0", "samples must be at least 1, but is 0"),
        ("--dtype fp8", "fp8"),
        ("--model nowhere", "no such folder: nowhere"),
    ],
)
@pytest.mark.usefixtures("data")
def test_mistakes(main: Main, place: Path, argv: str, message: str) -> None:
    (place / "bad").mkdir()
    good = '{"id": 1, "context": "c", "question": "q", "answer": "a"}\n'
    (place / "bad/squad.jsonl").write_text(good + '{"id": 2, "context": "c", "question": "q"}\n')
    (place / "bad/lambada.jsonl").write_text('{"id": "u", "question": "q \\ud800", "answer": "a"}\n')
    (place / "one.json").write_text('{"obqa": []}')
    (place / "none.json").write_text("{}")
    code, _, error = main("evaluate", *(() if "--model" in argv else QUICK), *argv.split(), "--out", "o")
    assert code == 2 and not (place / "o").exists()
    assert re.fullmatch(rf"error: .*{message}.*\n", error), error
