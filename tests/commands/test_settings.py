"""Settings of generation belong to a family: flags, help, `/set` and recipes of a baseline, and folders of before."""

import json
import re
from pathlib import Path

import pytest
import yaml
from command_line import Main
from earlier import SAMPLING

from opencola.checkpoints.settings import load_sampling
from opencola.models import build

RECIPE = """
out: runs/FAMILY
family: FAMILY
data: {source: words.txt, length: 16, batch_size: 4}
tokenizer: {vocab_size: 300}
model: {trunk: {width: 16, num_layers: 1, num_heads: 2, ffn_dim: 24}}
train: {steps: 2, warmup: 1}
sampling: {max_new_tokens: 6}
"""
COMMON = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "stop", "ignore_eos", "chat", "seed")
AR = f"error: an AR model has no NAME; its settings are {', '.join(COMMON)}\n"
AR_FLAGS = AR.replace(", ".join(COMMON), ", ".join(f"--{name.replace('_', '-')}" for name in COMMON))
BASELINES = ("ar", "llada", "plaid")


@pytest.fixture
def train(main: Main, place: Path) -> None:
    """The baselines, trained a little."""
    for family in BASELINES:
        (place / f"{family}.yaml").write_text(RECIPE.replace("FAMILY", family))
        assert main("train", f"{family}.yaml")[0] == 0


@pytest.mark.usefixtures("train")
def test_flags(main: Main, place: Path) -> None:
    commands = {
        "generate": ("--prompt", "a"),
        "chat": (),
        "evaluate": ("--tasks", "stories"),
        "quality": (),
        "inspect": ("a text",),
        "diagnose": (),
    }
    for command, argv in commands.items():
        for name, words in {
            "--steps": ("--steps", "4"),
            "--solver": ("--solver=heun",),
            "--guidance-every": ("--guidance_every", "2"),
            "--bf16-times": ("--no-bf16-times",),
        }.items():
            code, _, error = main(command, "--model", "runs/ar", *argv, *words)
            assert (code, error) == (2, AR_FLAGS.replace("NAME", name)), command
    code, _, error = main("generate", "--model", "runs/llada", "--prompt", "a", "--shift", "2")
    assert code == 2 and error.startswith("error: a LLaDA has no --shift; its settings are --max-new-tokens, ")
    code, _, error = main("generate", "--model", "runs/plaid", "--prompt", "a", "--remasking", "random")
    assert code == 2 and error.endswith("--seed, --steps, --shift, --guidance\n")
    code, _, error = main("generate", "--prompt", "a", "--block-length", "4")
    assert code == 2 and error.startswith("error: a Cola DLM has no --block-length; its settings are --max-new-tokens")
    assert main("generate", "--model", "runs/llada", "--prompt", "a", "--block-length", "2", "--steps", "2")[0] == 0


@pytest.mark.usefixtures("train")
@pytest.mark.parametrize("family", BASELINES)
def test_help_has_the_familys_settings(main: Main, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = set(build.sampling_class(family).hints())
    with pytest.raises(SystemExit):
        main("generate", "--model", f"runs/{family}", "--help")
    said = capsys.readouterr().out
    for name in build.SETTINGS:
        line = rf"^\W*--{name.replace('_', '-')}[ ,]"
        assert bool(re.search(line, said, re.MULTILINE)) == (name in own), name
    with pytest.raises(SystemExit):
        main("train", f"{family}.yaml", "--help")
    said = capsys.readouterr().out
    for name in build.SETTINGS:
        assert (f"--sampling.{name} " in said) == (name in own), name


@pytest.mark.usefixtures("train")
def test_set_in_chat(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["/set steps 4", "/set max_new_tokens 3", "/set", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, said, errors = main("chat", "--model", "runs/ar")
    assert (code, errors) == (0, "")
    assert AR.replace("NAME", "steps") in said and "  max_new_tokens 3\n" in said
    assert "  steps" not in said and "  solver" not in said


@pytest.mark.usefixtures("train")
def test_recipes(main: Main, place: Path) -> None:
    code, _, error = main("train", "ar.yaml", "--sampling.steps", "4", "--overwrite")
    assert (code, error) == (2, AR.replace("NAME", "--sampling.steps"))
    (place / "steps.yaml").write_text(RECIPE.replace("FAMILY", "ar").replace("{max_new", "{steps: 4, max_new"))
    code, _, error = main("train", "steps.yaml", "--overwrite")
    assert (code, error) == (2, AR.replace("NAME", "sampling.steps").replace("error: ", "error: steps.yaml: "))


@pytest.mark.usefixtures("train")
@pytest.mark.parametrize("family", BASELINES)
def test_a_run_of_before(main: Main, place: Path, family: str) -> None:
    """Its recipe and its settings have those of all families; it is finished, exported, trained on, and writes."""
    folder = place / "runs" / family
    ask = ("generate", "--model", f"runs/{family}", "--prompt", "The fox", "--temperature", "1")
    text = main(*ask)[1]
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["sampling"] = SAMPLING | {"guidance": 1.0, "max_new_tokens": 6} | recipe["sampling"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "opencola.json").write_text(json.dumps({"sampling": recipe["sampling"]}))
    assert load_sampling(folder) == build.sampling_class(family)(max_new_tokens=6)
    assert main(*ask)[1] == text
    for name in (f"{family}.yaml", f"runs/{family}/recipe.yaml"):
        code, said, error = main("train", name, "--resume")
        assert code == 0 and "finished before" in said, error
    code, said, error = main("train", f"runs/{family}/recipe.yaml", "--train.steps", "3", "--resume")
    assert code == 0 and ": 3 steps in" in said, error
    assert set(json.loads((folder / "opencola.json").read_text())["sampling"]) == set(
        build.sampling_class(family).hints()
    )


def test_stages_of_before(main: Main, place: Path) -> None:
    for stage in ("vae", "prior"):
        file = place / "runs/tiny" / stage / "recipe.yaml"
        recipe = yaml.safe_load(file.read_text())
        recipe["sampling"] = SAMPLING | recipe["sampling"]
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    code, said, error = main("train", "tiny.yaml", "--resume")
    assert code == 0 and said.count("finished before") == 2, error
    assert main("train", "runs/tiny/vae/recipe.yaml", "--resume")[1].count("finished before") == 1


def test_a_flag_of_the_baselines_is_none_of_a_text_vae(main: Main) -> None:
    code, _, error = main("train", "tiny.yaml", "--sampling.block_length", "4", "--out", "new")
    assert code == 2 and error.startswith("error: a Cola DLM has no --sampling.block_length; its settings are max_new_")
