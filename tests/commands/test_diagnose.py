"""`opencola diagnose` on the shipped model, and on a tiny run."""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from command_line import Main

from opencola.evaluation.diagnosis.verdicts import CONDITIONS, LINKS


def read(folder: Path) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    rows = [json.loads(line) for line in (folder / "diagnose.jsonl").read_text().splitlines()]
    named = {(row["task"], row["measure"], row["name"]): row for row in rows}
    assert len(named) == len(rows)
    return named


@pytest.mark.slow
def test_the_shipped_model(main: Main, place: Path) -> None:
    flags = ["diagnose", "--num-stories", "4", "--places", "2", "--max-new-tokens", "8", "--guidance", "30"]
    code, said, error = main(*flags, "--out", "new/a")
    assert code == 0, error
    found = read(place / "new" / "a")
    measured = {*CONDITIONS} - {"inside"}
    for task in ("stories", "brackets"):
        assert {name for of, measure, name in found if (of, measure) == (task, "condition")} == measured
        links = {name for of, measure, name in found if (of, measure) == (task, "link")}
        assert links == {link.name for link in LINKS} - {"conditioning"}
        for link in LINKS:
            if link.name in links:
                ends = [found[task, "condition", name]["value"] for name in (link.before, link.after) if name]
                loss = found[task, "link", link.name]
                assert loss["value"] == pytest.approx(ends[-1] - (ends[0] if link.before else 0))
                assert loss["low"] <= loss["value"] <= loss["high"]
                assert loss["at_fault"] == (loss["low"] > loss["allowed"])
    for row in found.values():
        assert row["seed"] == 0 and row["settings"]["guidance"] == 30 and row["num_stories"] == 4
        assert row["model"] == "the shipped model" and row["places"] == 2
    result = found["stories", "verdict", "guidance"]
    assert result["known"] and result["text"] in " ".join(said.split())
    assert found["stories", "setting", "guidance 2"]["value"] < found["stories", "condition", "choice"]["value"]
    assert found["stories", "round_trip", "texts_from_sample"]["value"] == 1
    assert found["stories", "latents", "first_blocks"]["slope"] == pytest.approx(1, abs=0.05)
    assert found["stories", "decoder", "true_latents"]["margin"] > 10
    assert "does not know this task" in " ".join(said.split())
    assert ElementTree.parse(place / "new" / "a" / "diagnose.svg").getroot().tag.endswith("svg")

    assert main(*flags, "--out", "b", "--batch-size", "5")[0] == 0
    assert (place / "b" / "diagnose.jsonl").read_bytes() == (place / "new" / "a" / "diagnose.jsonl").read_bytes()


def test_a_model_of_blocks(main: Main, place: Path) -> None:
    code, _, error = main(
        "diagnose", "--model", "runs/tiny", "--num-stories", "4", "--places", "1", "--max-new-tokens", "4", "--out", "a"
    )
    assert code == 0, error
    found = read(place / "a")
    assert ("stories", "condition", "inside") in found and ("stories", "setting", "first_block left_pad") in found
    assert not found["stories", "verdict", "vae"]["known"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model nowhere", "no such folder: nowhere"),
        ("--model runs/tiny/vae", "runs/tiny/vae"),
        ("--num-stories 3", "--num-stories must be at least 4, but is 3"),
        ("--places 0", "--places must be at least 1, but is 0"),
        ("--batch-size 0", "--batch-size must be at least 1, but is 0"),
        ("--steps 0", "steps must be at least 1"),
        ("--out words.txt", "words.txt"),
        ("--storys 3", "--storys"),
    ],
)
def test_mistakes(main: Main, argv: str, message: str) -> None:
    code, _, error = main("diagnose", *argv.split())
    assert code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1, error
