"""Every mistake of a user's is one line on stderr and exit code 2."""

import re
from pathlib import Path

import pytest
from command_line import TINY, Main, opencola

from opencola import from_pretrained
from opencola import load as opencola_load
from opencola.checkpoints import official
from opencola.errors import UserError


@pytest.mark.parametrize(
    ("old", "new", "flags", "message"),
    [
        ("train: {", "train: {stepz: 3, ", "", "tiny.yaml: stage vae: .*train.stepz"),
        ("steps: 8", "steps: many", "", "tiny.yaml: stage vae: .*train.steps.*'many'"),
        ("family: vae", "family: gpt", "", "tiny.yaml: stage vae: there is no model family 'gpt'; .* vae, cola"),
        ("family: cola", "family: vae", "", "tiny.yaml: stage prior: .*model.dit"),
        ("[\"zzz\"]}", "[\"zzz\"]", "", "tiny.yaml:.*not valid YAML"),
        ("source: words.txt", "source: nowhere.txt", "", "no such file or folder: nowhere.txt"),
        ("valid: words.txt", "valid: nowhere.txt", "", "no such file or folder: nowhere.txt"),
        ("init: vae", "init: nowhere", "", "init nowhere is neither an earlier stage nor a folder"),
        ("    init: vae\n", "", "", "stage prior needs a trained Text VAE: set init"),
        ("init: vae", "init: .", "--stage prior", r"\. holds no model"),
        ("init: vae", "init: vae\n    tokenizer: {path: nowhere.json}", "", "no tokenizer at nowhere.json"),
        ("model:\n      dit", "model:\n      vae: {width: 32}\n      dit", "", "vae.width is 32, but 16 in stage vae"),
        ("strategy: joint", "strategy: free", "", "'free'"),
        ("latent_dim: 8, width", "latent_dim: 4, width", "", "vae.latent_dim 8 differs from dit.latent_dim 4"),
        ("", "", "--train.stepz 3", "--train.stepz; did you mean --train.steps"),
        ("", "", "--train.steps many", "--train.steps.*'many'"),
        ("", "", "--train.steps", "--train.steps"),
        ("", "", "--family vae", "family"),
        ("", "", "--stage joint", "no stage 'joint'; the stages are: vae, prior"),
        ("", "", "--stage", "stage"),
        ("", "", "--resume --overwrite", "choose one of --resume and --overwrite"),
        ("", "", "--train.learning_rate 1e30 --train.steps 50 --train.clip 1e9", "not finite at step .*: "),
        ("", "", "--init runs/tiny --tokenizer.path other.json", "in other.json has 260 ids, .* knows 300: "),
    ],
)  # fmt: skip
def test_mistakes_in_training(main: Main, place: Path, old: str, new: str, flags: str, message: str) -> None:
    official.Tokenizer.train(["no words to learn from"], 260).save("other.json")
    assert old in TINY
    (place / "tiny.yaml").write_text(TINY.replace(old, new, 1) if old else TINY)
    code, _, error = main("train", "tiny.yaml", "--out", "new", *flags.split())
    assert code == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", error), error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("tarin x", "no command 'tarin'; did you mean train"),
        ("sing", "no command 'sing'; the commands are: "),
        ("train", "missing: RECIPE"),
        ("train nowhere.yaml", "nowhere.yaml: no such file, and the shipped recipes are: .*demo"),
        ("generate --model nowhere --prompt a", "no such folder: nowhere"),
        ("generate --model runs/tiny/vae --prompt a", "runs/tiny/vae .*cola_dit"),
        ("generate --model runs/tiny", "nothing to continue: give --prompt TEXT or --prompts-file FILE"),
        ("generate --model runs/tiny --prompt", "nothing to continue"),
        ("generate --model runs/tiny --prompt a --stepz 3", "--stepz"),
        ("generate --model runs/tiny --prompt a --steps many", "--steps.*'many'"),
        ("generate --model runs/tiny --prompt a --steps 0", "--steps must be at least 1, but is 0"),
        ("generate --model runs/tiny --prompt a --batch-size 0", "--batch-size must be at least 1"),
        ("generate --model runs/tiny --prompt a --solver best", "best"),
        ("generate --model runs/tiny --prompt a\udcff", "not valid Unicode at character 1"),
        ("generate --model runs/tiny --prompts-file nowhere.txt", "no such file: nowhere.txt"),
        ("generate --model runs/tiny --prompts-file tiny.yaml", "tiny.yaml: prompts are in"),
        ("generate --model runs/tiny --prompts-file empty.txt", "empty.txt holds no prompts"),
        ("generate --model runs/tiny --prompts-file latin.txt", "latin.txt, line 3: not UTF-8 at byte 1"),
        ("generate --model runs/tiny --prompts-file broken.jsonl", "broken.jsonl, line 2: not JSON"),
        ("generate --model runs/tiny --prompts-file list.jsonl", "list.jsonl, line 1: .* 'prompt'"),
        ("generate --model runs/tiny --prompts-file other.jsonl", "other.jsonl, line 2: .* 'prompt'"),
        ("generate --model runs/tiny --prompts-file half.jsonl", "half.jsonl, line 1: not valid Unicode"),
        ("generate --model runs/tiny --prompts-file good.jsonl --jsonl ./good.jsonl", "good.jsonl holds the prompts"),
        ("generate --model runs/tiny --prompt a --jsonl runs", "runs"),
        ("chat --model nowhere", "no such folder: nowhere"),
        ("export --model nowhere --to x", "no such folder: nowhere"),
        ("export --model runs --to x", "runs holds no model"),
        ("export --model runs/tiny --to runs", "runs is not empty"),
        ("export --model runs/tiny", "missing: --to"),
        ("export --model runs/tiny --to x --dtype int4", "int4"),
        ("demo --out runs/tiny --foo 3", "--foo"),
    ],
)
def test_mistakes(main: Main, place: Path, argv: str, message: str) -> None:
    (place / "empty.txt").write_text("\n \n")
    (place / "latin.txt").write_bytes(b"a\n\nb\xff\n")
    (place / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a"\n')
    (place / "list.jsonl").write_text('["a"]\n')
    (place / "other.jsonl").write_text('{"prompt": "a"}\n{"prompts": "a"}\n')
    (place / "half.jsonl").write_text('{"prompt": "\\ud800"}\n')
    (place / "good.jsonl").write_text('{"prompt": "a"}\n')
    code, _, error = main(*argv.split(" "))
    assert code == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", error), error


def test_a_missing_tracker_costs_nothing(main: Main, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opencola.train.sinks.importlib.util.find_spec", lambda name: None)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    code, _, error = main("train", "tiny.yaml", "--overwrite", "--train.trackers", "tensorboard")
    assert code == 2
    assert error == (
        "error: train.trackers names tensorboard, whose package is not installed: pip install 'opencola[tensorboard]'\n"
    )
    assert before == {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    code, _, error = main("train", "tiny.yaml", "--out", "new", "--train.trackers", "paper")
    assert code == 2 and "paper" in error and not (place / "new").exists()


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = opencola("tarin", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: there is no command 'tarin'; did you mean train?\n"


def test_without_a_shipped_model(main: Main, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opencola.checkpoints.hub.SHIPPED", place / "shipped")
    code, _, error = main("generate", "--model", str(place / "shipped"), "--prompt", "a")
    assert code == 2 and "opencola demo" in error and "--model" in error


def test_a_model_with_the_tokenizer_of_a_larger_one(main: Main, place: Path) -> None:
    words = [f"{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(300)]
    assert official.Tokenizer.train(words * 9, 400).vocab_size == 400
    official.Tokenizer.train(words * 9, 400).save("runs/tiny")
    code, _, error = main("generate", "--model", "runs/tiny", "--prompt", "a")
    assert (code, error) == (2, "error: the tokenizer in runs/tiny has 400 ids, but its model knows 300\n")
    for load in (opencola_load, from_pretrained):
        with pytest.raises(UserError, match="the tokenizer in runs/tiny has 400 ids, but its model knows 300"):
            load("runs/tiny")


def test_bugs_are_not_dressed_up_as_mistakes(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opencola.commands.generate.load", lambda folder: int("a bug, in code that is not ours"))
    code, _, error = main("generate", "--model", "runs/tiny", "--prompt", "a")
    assert code == 1 and "Traceback" in error and "a bug, in code that is not ours" in error
    assert error.splitlines()[-1].startswith("this is a bug in OpenCola")


def test_a_value_error_of_our_own_code_is_a_bug(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opencola.layers.cache.KVCache.positions", lambda self, rows: self.attend(1 << 20, 1))
    code, _, error = main("generate", "--model", "runs/tiny", "--prompt", "a")
    assert code == 1 and "ValueError: cache holds" in error and "layers/cache.py" in error
