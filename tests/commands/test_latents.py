"""`opencola latents` on the shipped model, and on a stage of a tiny run."""

import itertools
import json
import math
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Main
from safetensors.torch import load_file, save_file

from opencola.checkpoints import hub
from opencola.evaluation.writing import held_out
from opencola.text.tokenizer import Tokenizer


def read(folder: Path) -> dict[tuple[str, float | None], Mapping[str, Any]]:
    rows = [json.loads(line) for line in (folder / "latents.jsonl").read_text().splitlines()]
    named = {(row["name"], row["at"]): row for row in rows}
    assert len(named) == len(rows)
    return named


def test_the_shipped_model(main: Main, place: Path) -> None:
    code, said, error = main("latents", "--sequences", "8", "--out", "new/a")
    assert code == 0, error
    found = read(place / "new" / "a")
    tokenizer = Tokenizer.load(hub.SHIPPED)
    documents = [[*tokenizer.encode(tale.text), tokenizer.eos_id] for tale in held_out(8)]
    counts = torch.tensor([*itertools.chain(*documents)]).bincount().double()
    shares = counts[counts > 0] / counts.sum()
    for row in found.values():
        assert row["sequences"] == 8 and row["seed"] == 0 and row["data"] == "held-out stories"
        assert row["count"] == counts.sum(), "a latent is a token"
        assert math.isfinite(row["value"])
    path = [found["accuracy_path", i / 10]["value"] for i in range(11)]
    assert path[0] == 1 and path == sorted(path, reverse=True)
    floor = found["most_frequent_token", None]
    assert floor["value"] == pytest.approx(float(shares.max()))
    assert path[-1] < floor["high"], "noise alone tells nothing of the tokens"
    assert found["accuracy_mean", 0.3]["value"] > 0.99 > found["accuracy_mean", 1.0]["value"] > 0.6
    # this encoder has no layers: a latent tells its token and nothing else
    assert found["information", None]["value"] == pytest.approx(float(-(shares * shares.log()).sum()), abs=0.01)
    assert found["active_channels", None]["value"] == 16
    assert 10 < found["effective_dimension", None]["value"] <= 15, "the mean's norm takes one dimension of 16"
    assert 2.2 < found["vae_logsnr", None]["value"] < 2.7
    assert f"{found['rate', None]['value']:.4g}" in said and f"{path[4]:.4f}" in said
    assert ElementTree.parse(place / "new" / "a" / "latents.svg").getroot().tag.endswith("svg")

    assert main("latents", "--sequences", "8", "--out", "b", "--batch-size", "5")[0] == 0
    other = read(place / "b")
    assert [*other] == [*found]
    for key, row in found.items():
        assert other[key]["value"] == pytest.approx(row["value"], rel=1e-5, abs=1e-7), key
    assert main("latents", "--sequences", "8", "--out", "b", "--seed", "1")[0] == 0
    assert read(place / "b")["accuracy_path", 0.5]["value"] != found["accuracy_path", 0.5]["value"]


def test_a_stage_on_data_of_its_own(main: Main, place: Path) -> None:
    flags = ["latents", "--model", "runs/tiny/vae", "--data", "words.txt", "--length", "16", "--out", "a"]
    assert main(*flags, "--sequences", "9")[0] == 0
    found = read(place / "a")
    assert found["rate", None]["count"] == 9 * 16 and found["rate", None]["model"] == "runs/tiny/vae"
    tokenizer = Tokenizer.load(place / "runs" / "tiny")
    total = len(tokenizer.encode((place / "words.txt").read_text())) + 1  # one document
    assert main(*flags, "--sequences", str(total // 16))[0] == 0
    code, _, error = main(*flags, "--sequences", str(total // 16 + 1))
    assert code == 2 and error.startswith(f"error: words.txt holds fewer than {total // 16 + 1} sequences of 16 tokens")


def test_latents_that_are_not_finite(main: Main, place: Path) -> None:
    shutil.copytree(place / "runs" / "tiny", place / "broken")
    (file,) = (place / "broken" / "cola_dlm" / "cola_vae").glob("*.safetensors")
    weights = load_file(file)
    save_file({name: value * math.nan for name, value in weights.items()}, file)
    code, _, error = main("latents", "--model", "broken", "--sequences", "2", "--out", "a")
    assert code == 2 and error.startswith(f"error: {file.relative_to(place)}: tensor ") and "is not finite" in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model nowhere", "no such folder: nowhere"),
        ("--model runs", "runs holds no config.json"),
        ("--data nowhere.txt", "no such file or folder: nowhere.txt"),
        ("--sequences 0", "--sequences must be at least 1, but is 0"),
        ("--batch-size 0", "--batch-size must be at least 1, but is 0"),
        ("--data words.txt --length 0", "--length must be at least 1, but is 0"),
        ("--data words.txt --seed -1", "--seed must be at least 0, but is -1"),
        ("--out words.txt --sequences 2", "words.txt"),
        ("--sequnces 3", "--sequnces"),
    ],
)
def test_mistakes(main: Main, argv: str, message: str) -> None:
    code, _, error = main("latents", *argv.split())
    assert code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1, error
