"""`opencola inspect` on the shipped model."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from command_line import Main

TEXT = "Once a little girl named Emma lived near the park."


def test_the_shipped_model(main: Main, place: Path) -> None:
    flags = ["inspect", TEXT, "--samples", "8", "--tokens", "5", "3", "--seed", "2", "--density.steps", "8"]
    code, said, error = main(*flags, "--out", "new/a")
    assert code == 0, error
    rows = [json.loads(line) for line in (place / "new" / "a" / "inspect.jsonl").read_text().splitlines()]
    assert "".join(row["token"] for row in rows) == TEXT
    assert [row["number"] for row in rows] == [*range(len(rows))]
    for row in rows:
        assert row["posterior_hit"]["value"] == 1 and row["posterior_hit"]["count"] == 8
        assert row["probe_success"]["value"] >= 0.5 and row["log_decoder"] > -0.1
        assert row["seed"] == row["settings"]["seed"] == 2 and row["samples"] == 8
        assert f"{row['prior_hit']['value']:.2f}" in said and repr(row["token"]) in said
    bound = float(re.search(r"ELBO (\S+) nats", said)[1])  # type: ignore[index]
    assert -60 < bound < 0 and "8 samples, rk4, 8 steps (shift 0.2), 1 rademacher probe." in said
    hits = {row["token"]: row["prior_hit"]["value"] for row in rows}
    # the world leaves no choice after " near the" but of the place, and after "named" but of the name
    assert hits[" lived"] == hits[" near"] == hits[" the"] == hits["."] == 1
    assert hits["Once"] < 1 and hits[" Emma"] < 1 and hits[" park"] < 1
    drawing = (place / "new" / "a" / "slice.svg").read_text()
    assert drawing.index("token 3: ") < drawing.index("token 5: ") and drawing.count("token 5: ") == 1
    assert ElementTree.fromstring(drawing).tag.endswith("svg")
    assert main(*flags, "--out", "b")[0] == 0
    assert (place / "b" / "inspect.jsonl").read_bytes() == (place / "new" / "a" / "inspect.jsonl").read_bytes()
    assert (place / "b" / "slice.svg").read_text() == drawing


def test_a_model_of_blocks(main: Main, place: Path) -> None:
    code, _, error = main(
        "inspect", "The fox", "--model", "runs/tiny", "--samples", "2", "--out", "a", "--contours", "--tokens", "1"
    )
    assert code == 0, error
    rows = [json.loads(line) for line in (place / "a" / "inspect.jsonl").read_text().splitlines()]
    assert "".join(row["token"] for row in rows) == "The fox", "what fills the block is not looked at"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nothing to inspect: give a text"),
        (["a", "--model", "nowhere"], "no such folder: nowhere"),
        (["a", "--model", "runs/tiny/vae"], "runs/tiny/vae"),
        ([TEXT, "--tokens", "99"], "--tokens 99: the text has the tokens 0 to"),
        ([TEXT, "--tokens", "-1"], "--tokens must be at least 0, but is -1"),
        (["a", "--samples", "1"], "--samples must be at least 2, but is 1"),
        (["a", "--probe", "-1"], "--probe must be at least 0, but is -1.0"),
        (["a\udcff"], "not valid Unicode at character 1"),
        (["a", "--steps", "0"], "steps must be at least 1"),
        (["a", "--out", "words.txt"], "words.txt"),
        (["a", "--stepz", "3"], "--stepz"),
    ],
)
def test_mistakes(main: Main, argv: list[str], message: str) -> None:
    code, _, error = main("inspect", *argv)
    assert code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1, error
