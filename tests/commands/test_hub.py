"""Models of the Hub, by a hub on this machine: uploading a run, loading it by its name, and what goes wrong."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import environment
from fake_hub import TOKEN, FakeHub, fake_hub
from huggingface_hub import ModelCard

Python = Callable[..., str]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as server:
        yield server


@pytest.fixture
def python(hub: FakeHub, place: Path) -> Python:
    """Runs code in a process that knows the hub, and is known to it; gives what it prints."""

    def run(code: str, *argv: str) -> str:
        env = {**environment(), **hub.environment(place / "home"), "HF_TOKEN": TOKEN}
        env.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run(
            [sys.executable, "-c", code, *argv], cwd=place, env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


COMMANDS = """
import contextlib, io, json, os, sys
from opencola.commands.main import main
for token, *argv in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def test_a_run_goes_to_the_hub_and_comes_back(hub: FakeHub, python: Python, place: Path) -> None:
    hub.commits["you/secret"] = [("0" * 40, {"tokenizer.json": b"{}"})]
    hub.private.add("you/secret")
    export, generate = ("export", "--model", "runs/tiny", "--to"), ("generate", "--prompt", "The fox", "--model")
    commands = [
        (TOKEN, *export, "mine", "--push", "me/tiny", "--private"),
        (TOKEN, *generate, "mine"),
        (TOKEN, *generate, "me/tiny"),
        ("hf_wrong", *generate, "me/tiny"),  # has been downloaded
        ("hf_wrong", *generate, "you/secret"),
        ("hf_wrong", *export, "a", "--push", "me/tiny"),
        (TOKEN, *export, "b", "--push", "tiny"),
    ]
    said = [json.loads(line) for line in python(COMMANDS, json.dumps(commands)).splitlines()]
    pushed, here, there, again, secret, unknown, nameless = said
    assert pushed == [0, f"The model is in mine.\nIt is at {hub.url}/me/tiny, too.\n", ""]
    held = {str(file.relative_to(place / "mine")) for file in (place / "mine").rglob("*") if file.is_file()}
    assert hub.files("me/tiny").keys() - {".gitattributes"} == held
    assert {"README.md", "training.json", "opencola.json", "tokenizer.json", "cola_dlm/cola_dit/config.json"} <= held
    assert "me/tiny" in hub.private
    assert here[0] == 0 and here[1].startswith("The fox") and here == there == again
    assert secret[0] == 2 and secret[2].startswith("error: you/secret is no folder, and cannot be had from the Hugging")
    assert unknown[0] == 2 and unknown[2].startswith("error: cannot upload to me/tiny: ")
    assert secret[2].count("\n") == unknown[2].count("\n") == 1
    assert nameless == [2, "", "error: 'tiny' is no name of a repository: write OWNER/NAME\n"]
    assert not (place / "b").exists()


PUSH = """
from opencola.checkpoints.hub import from_pretrained, push_to_hub
push_to_hub("runs/tiny", "me/run")
from_pretrained("me/run")
push_to_hub("runs/tiny/vae", "me/run")  # a repository that is there; its other files stay
model, tokenizer, sampling = from_pretrained("me/run", revision="main")
print(sampling.stop, tokenizer.vocab_size, model.training)
for name, revision in (("me/run", "0" * 40), ("me/nothing", None), ("runs/tiny", "main"), ("nothing", None)):
    try:
        from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        print(type(error).__name__, error)
try:
    push_to_hub("runs", "me/run")
except FileNotFoundError as error:
    print(error)
"""


def test_from_python(hub: FakeHub, python: Python) -> None:
    said = python(PUSH).splitlines()
    assert said[0] == "('zzz',) 300 False"
    assert said[1].startswith("FileNotFoundError me/run is no folder, and cannot be had from the Hugging Face Hub: ")
    assert said[2].startswith("FileNotFoundError me/nothing is no folder, and cannot be had from the Hugging Face Hub")
    assert said[3] == "UserError runs/tiny is a folder: it has no revision main"
    assert said[4] == "FileNotFoundError no such folder: nothing"
    assert said[5] == "runs holds no model: give the folder of a finished run"
    uploaded = {name.split("/")[0] for name in hub.files("me/run")} - {".gitattributes"}
    assert uploaded == {"cola_dlm", "tokenizer.json", "opencola.json", "training.json", "README.md"}  # no checkpoints
    assert ModelCard(hub.files("me/run")["README.md"].decode()).data.library_name == "opencola"
    assert len(hub.commits["me/run"]) == 3
