"""Running recipes: what is left behind, starting, stopping, going on, overwriting."""

import json
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from command_line import TINY, WEIGHTS, Main, command
from forked import Started

from opencola.checkpoints import card, official
from opencola.checkpoints.parts import PARTS
from opencola.checkpoints.settings import load_sampling
from opencola.models import build
from opencola.run import demo, export
from opencola.run import recipe as recipes
from opencola.run.run import check_start


def test_a_run_leaves_everything_that_it_promises(place: Path) -> None:
    out = place / "runs" / "tiny"
    for stage in ("vae", "prior"):
        names = {"recipe.yaml", "metrics.jsonl", "valid.json", "tokenizer.json", "checkpoints", "cola_dlm"}
        assert {path.name for path in (out / stage).iterdir()} >= names
        valid = json.loads((out / stage / "valid.json").read_text())
        terms = sum(value for name, value in valid.items() if name.startswith("loss/"))
        assert valid["loss"] == pytest.approx(terms, rel=1e-4)
        samples = [json.loads(line) for line in (out / stage / "samples.jsonl").open()]
        kinds = ["continuation", "reconstruction"] if stage == "prior" else ["reconstruction"]
        assert [(sample["step"], sample["kind"]) for sample in samples] == [
            (step, kind) for step in (4, 8) for kind in kinds for _ in range(4)
        ]
        assert len({sample["prompt"] for sample in samples}) == 4 * len(kinds)
    ((family, recipe),) = recipes.read(out / "prior" / "recipe.yaml", [], build.config_class, build.sampling_class)
    assert (
        family == "cola"
        and recipe == dict(recipes.read("tiny.yaml", [], build.config_class, build.sampling_class))["prior"]
    )
    sampling = load_sampling(out)
    assert (sampling.steps, sampling.guidance, sampling.stop) == (4, 2.0, ("zzz",))
    model = official.load(out)
    assert model.vae.config.vocab_size == 300
    assert (out / WEIGHTS).read_bytes() == (out / "prior" / WEIGHTS).read_bytes()


def test_training_says_what_it_starts_from(main: Main) -> None:
    code, said, error = main("train", "tiny.yaml", "--overwrite", "--train.steps", "1")
    first, second = (line for line in said.splitlines() if "parameters to train" in line)
    assert code == 0 and first.startswith("[1/2] vae: 1 steps, "), error
    assert first.endswith("; starts from random weights")
    assert second.endswith("; starts from runs/tiny/vae; prior: random weights")
    code, said, error = main("train", "tiny.yaml", "--resume", "--stage", "prior", "--train.steps", "2")
    assert code == 0 and said.count("parameters to train; goes on after step 1\n") == 1, error


def test_what_is_known_of_the_training_goes_with_the_model(main: Main, place: Path) -> None:
    (place / "runs" / "tiny" / "metrics.json").write_text('{"x": 0.5, "counts": {"x": 7}, "intervals": {}}')
    assert main("export", "--model", "runs/tiny", "--to", "mine", "--license", "cc-by-4.0")[0] == 0
    facts = json.loads((place / "mine" / "training.json").read_text())
    assert facts["evaluation"] == {"x": {"value": 0.5, "cases": 7, "interval": None}}
    for stage, found in zip(("vae", "prior"), facts["stages"], strict=True):
        folder = place / "runs" / "tiny" / stage
        assert found["name"] == stage and found["command"] == "opencola train tiny.yaml"
        assert found["final"] == json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert found["validation"] == json.loads((folder / "valid.json").read_text())
        assert found["recipe"]["data"]["source"] == "words.txt" and found["made_with"]["torch"] == torch.__version__
        weights = {part: sum(p.numel() for p in PARTS[part].load(folder).parameters())
                   for part in ("vae", "dit") if PARTS[part].is_in(folder)}  # fmt: skip
        assert found["num_parameters"] == sum(weights.values())
    for folder in ("mine", "runs/tiny", "runs/tiny/prior"):
        text = (place / folder / "README.md").read_text()
        assert "opencola train tiny.yaml" in text and "| prior | `words.txt` | 8 | 512 |" in text
        assert ("license: cc-by-4.0" in text) == (folder == "mine")
        assert ("## Evaluation" in text) == (folder == "mine")  # metrics.json came after the others
    # training anew leaves nothing of what was known of the old model
    again = ("train", "tiny.yaml", "--stage", "prior", "--train.steps", "2", "--overwrite")
    assert main(*again)[0] == 0
    facts = json.loads((place / "runs" / "tiny" / "training.json").read_text())
    assert [stage["final"]["step"] for stage in facts["stages"]] == [8, 2] and "evaluation" not in facts
    assert facts["stages"][1]["command"] == f"opencola {' '.join(again)}"


def test_the_code_is_named_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*argv: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, *argv], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    module = tmp_path / "package" / "run" / "export.py"
    module.parent.mkdir(parents=True)
    module.write_text("one")
    monkeypatch.setattr(export, "__file__", str(module))
    assert export.made_with()["git"] is None
    git("init")
    assert export.made_with()["git"] is None  # no commit yet
    git("add", ".")
    git("commit", "-m", "x")
    git("tag", "v1", "-m", "v1")
    commit = git("rev-parse", "HEAD").strip()
    assert export.made_with()["git"] == commit
    module.write_text("two")
    assert export.made_with()["git"] == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert export.made_with()["git"] is None


def test_samples_leave_training_as_it_is(main: Main, place: Path) -> None:
    assert main("train", "tiny.yaml", "--out", "silent", "--train.sample_every", "0")[0] == 0
    assert not (place / "silent" / "prior" / "samples.jsonl").exists()
    assert (place / "silent" / WEIGHTS).read_bytes() == (place / "runs" / "tiny" / WEIGHTS).read_bytes()
    for stage in ("vae", "prior"):
        both = [json.loads((place / out / stage / "valid.json").read_text()) for out in ("silent", "runs/tiny")]
        assert both[0] == both[1]


def test_the_exported_weights_are_the_average(trained: Path, place: Path, main: Main) -> None:
    assert main("train", "tiny.yaml", "--out", "plain", "--train.ema", "0")[0] == 0
    plain, averaged = official.load_vae("plain/vae"), official.load_vae("runs/tiny/vae")
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), averaged.parameters(), strict=True))
    losses = [
        [json.loads(line)["loss"] for line in (place / out / "vae" / "metrics.jsonl").open()]
        for out in ("plain", "runs/tiny")
    ]
    assert losses[0] == losses[1]


def test_a_run_is_not_overwritten_by_accident(main: Main, place: Path) -> None:
    out = place / "runs" / "tiny"
    before = (out / "prior" / WEIGHTS).read_bytes()
    code, _, error = main("train", "tiny.yaml", "--seed", "1")
    assert code == 2
    assert "runs/tiny/vae holds a run" in error and "--resume" in error and "--overwrite" in error
    assert (out / "prior" / WEIGHTS).read_bytes() == before
    assert main("export", "--model", "runs/tiny", "--to", "mine")[0] == 0
    code, _, error = main("train", "tiny.yaml", "--out", "mine")  # a model that no recipe of ours made
    assert code == 2 and "mine holds a model" in error and (place / "mine" / WEIGHTS).exists()
    (out / "prior" / "notes.txt").write_text("mine")
    code, _, error = main("train", "tiny.yaml", "--seed", "1", "--overwrite", "--data.source", "nowhere.txt")
    assert code == 2 and "nowhere.txt" in error
    assert (out / "prior" / WEIGHTS).read_bytes() == before  # a mistake in the settings costs nothing
    assert main("train", "tiny.yaml", "--seed", "1", "--overwrite")[0] == 0
    assert (out / "prior" / WEIGHTS).read_bytes() != before
    assert (out / WEIGHTS).read_bytes() == (out / "prior" / WEIGHTS).read_bytes()
    assert (out / "prior" / "notes.txt").read_text() == "mine"
    assert [json.loads(line)["step"] for line in (out / "vae" / "metrics.jsonl").open()] == [2, 4, 6, 8]


def test_resume_passes_over_finished_stages(main: Main, place: Path) -> None:
    out = place / "runs" / "tiny"
    shutil.move(out, place / "runs" / "other")  # a run may be moved
    out = place / "runs" / "other"
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}
    code, said, _ = main("train", "tiny.yaml", "--out", "runs/other", "--resume")
    assert code == 0 and said.count("finished before") == 2
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}
    # a changed recipe of the last stage goes on; one of an earlier stage would leave the later one behind
    code, said, _ = main("train", "tiny.yaml", "--out", "runs/other", "--resume", "--stage", "prior",
                         "--train.steps", "10")  # fmt: skip
    assert code == 0 and "prior: 10 steps" in said
    assert json.loads((out / "prior" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 10
    assert (out / WEIGHTS).read_bytes() == (out / "prior" / WEIGHTS).read_bytes()
    after = (out / WEIGHTS).read_bytes()
    code, _, error = main("train", "tiny.yaml", "--out", "runs/other", "--resume", "--train.steps", "12")
    assert code == 2 and "runs/other/prior started from runs/other/vae, which would change" in error
    assert main("train", "tiny.yaml", "--out", "runs/other", "--overwrite", "--stage", "vae")[0] == 2
    assert (out / WEIGHTS).read_bytes() == after


@pytest.mark.parametrize("told", [True, False], ids=["training.json", "recipe.yaml"])
def test_resume_knows_stages_that_version_0_1_finished(main: Main, place: Path, told: bool) -> None:
    for stage in ("vae", "prior"):  # whose files have the release's conventions among the VAE's settings
        file = place / "runs" / "tiny" / stage / "recipe.yaml"
        values = yaml.safe_load(file.read_text())
        values["model"]["vae"] |= values["model"]["vae"].pop("release")
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        facts = card.read_facts(file.parent)
        facts["stages"][-1]["recipe"] = values
        card.write_facts(file.parent, facts if told else {"stages": []})
    code, said, _ = main("train", "tiny.yaml", "--resume")
    assert code == 0 and said.count("finished before") == 2


def test_stages_one_by_one(main: Main, place: Path) -> None:
    code, _, error = main("train", "tiny.yaml", "--out", "steps", "--stage", "prior")
    assert code == 2 and "steps/vae holds no model" in error and not (place / "steps").exists()
    assert main("train", "tiny.yaml", "--out", "steps", "--stage", "vae")[0] == 0
    assert not (place / "steps" / "cola_dlm").exists()
    assert main("train", "tiny.yaml", "--out", "steps", "--stage", "prior")[0] == 0
    assert (place / "steps" / WEIGHTS).read_bytes() == (place / "runs" / "tiny" / WEIGHTS).read_bytes()


def test_ctrl_c_and_resume_equal_not_stopping(main: Main, place: Path) -> None:
    flags = ["train", "tiny.yaml", "--train.steps", "60", "--train.log_every", "1", "--out"]
    process = Started(command(*flags, "a b"))
    metrics = place / "a b" / "prior" / "metrics.jsonl"
    for _ in range(2000):
        if (metrics.exists() and metrics.read_text().count("\n") > 2) or process.poll() is not None:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error and "stopped after step" in error
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] < 60
    assert not (place / "a b" / "cola_dlm").exists()
    again = shlex.split(error.splitlines()[-1].removeprefix("go on: "))
    assert again[0] == "opencola" and again[-1] == "--resume"
    code, said, _ = main(*again[1:])
    assert code == 0 and "vae: finished before" in said
    assert main(*flags, "whole")[0] == 0
    assert (place / "a b" / WEIGHTS).read_bytes() == (place / "whole" / WEIGHTS).read_bytes()
    steps = [json.loads(line)["step"] for line in metrics.open()]
    assert steps == list(range(1, 61))


def test_starting_from_another_model(main: Main, place: Path) -> None:
    single = TINY[: TINY.index("stages:")].replace("valid: words.txt\n", "") + "family: cola\n"
    single = single.replace("model:\n", "model:\n  dit: {latent_dim: 8, width: 16, num_layers: 1, num_heads: 2, "
                            "head_dim: 8, rope_dim: 4}\n  prior: {strategy: WAY, lambda_ref: 0}\n")  # fmt: skip
    still = ("--train.learning_rate", "0", "--train.muon_learning_rate", "0", "--train.steps", "1")
    base = official.load("runs/tiny").state_dict()
    for way, same in (("joint", {"vae", "dit"}), ("fixed", {"vae", "dit"}), ("scratch", {"dit"})):
        (place / "single.yaml").write_text(single.replace("WAY", way))
        code, _, error = main("train", "single.yaml", "--init", "runs/tiny", "--out", way, *still)
        assert code == 0, error
        assert not (place / way / "cola").exists()
        loaded = official.load(way).state_dict()
        parts = ("vae", "dit")
        equal = {part: all(torch.equal(v, base[k]) for k, v in loaded.items() if k.startswith(part)) for part in parts}
        assert {part for part, is_equal in equal.items() if is_equal} == same
    assert main("train", "single.yaml", "--out", "anew", *still)[0] == 0  # scratch needs no init


@pytest.mark.parametrize("name", ["demo", "text", "tinystories", "fairytales"])
def test_the_recipes_that_come_with_the_package(name: str) -> None:
    stages = recipes.read(name, [], build.config_class, build.sampling_class)
    for number, (stage, recipe) in enumerate(stages):
        check_start(stage, recipe, [earlier for _, earlier in stages[:number]])
        assert recipe.out.parent == Path("runs", name)
    assert stages[-1][1].family == "cola"
    comments = [line for line in recipes.find(name).read_text().splitlines() if line.startswith("#")]
    assert f"opencola {'demo' if name == 'demo' else f'train {name}'}" in "\n".join(comments[:5])


def test_demo(main: Main, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[tuple[Path, float | None]] = []
    monkeypatch.setattr(demo, "finish", lambda out, started: finished.append((out, started)))
    small = ["--tokenizer.train_documents", "50", "--tokenizer.vocab_size", "300", "--data.batch_size", "2",
             "--train.steps", "2", "--model.vae.width", "16", "--model.dit.width", "16"]  # fmt: skip
    begin = time.time()
    code, _, error = main("demo", "--out", "d", *small)
    assert code == 0, error
    assert finished[0][0] == Path("d") and begin <= (finished[0][1] or 0) <= time.time()
    assert official.load("d").vae.config.width == 16
    assert load_sampling("d") == recipes.read("demo", [], build.config_class, build.sampling_class)[-1][1].sampling
    assert main("demo", "--out", "d", *small)[0] == 2
    assert main("demo", "--out", "d", "--resume", *small)[0] == 0
    assert finished[1:] == [(Path("d"), None)]
