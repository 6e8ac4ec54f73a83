"""What is no flag of a command line stands before or behind its flags."""

import json
from pathlib import Path

import pytest
from command_line import Main

from opencola.commands.train import recipe_first
from opencola.errors import UserError

FLAGS = ("--train.steps", "2", "--stage", "vae", "--dry-run", "--json", "--devices=2", "--sampling.stop", "a", "--")


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("number", range(1, 7))
def test_a_recipe_stands_anywhere_between_flags(main: Main, number: int) -> None:
    groups = [FLAGS[:2], FLAGS[2:4], *((flag,) for flag in FLAGS[4:7]), FLAGS[7:]]
    first = main("train", "tiny.yaml", *FLAGS)
    assert first[0] == 0 and json.loads(first[1])["stage"] == "vae", first[2]
    words = [word for group in [*groups[:number], ("tiny.yaml",), *groups[number:]] for word in group]
    assert main("train", *words)[:2] == first[:2]


@pytest.mark.usefixtures("place")
def test_which_word_is_the_recipe() -> None:
    assert recipe_first(["--data.source", "words.txt", "tiny.yaml"])[0] == "tiny.yaml"
    assert recipe_first(["--out", "demo", "tiny.yaml", "--overwrite"]) == ["tiny.yaml", "--out", "demo", "--overwrite"]
    assert recipe_first(["--no-resume", "ar", "--seed=1"])[0] == "ar"
    assert recipe_first(["tiny.yaml", "--out", "ar"]) == ["tiny.yaml", "--out", "ar"]
    with pytest.raises(UserError, match="missing: RECIPE"):
        recipe_first(["--out", "ar"])


@pytest.mark.usefixtures("place")
def test_a_recipe_behind_flags_that_is_none_is_named(main: Main) -> None:
    code, _, error = main("train", "--train.steps", "2", "nowhere.yaml")
    assert code == 2 and error.startswith("error: nowhere.yaml: no such file")


@pytest.mark.usefixtures("place")
def test_help_of_a_recipe_behind_the_flag(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main("train", "--help", "tiny.yaml")
    assert "--model.vae.width" in capsys.readouterr().out


def test_texts_files_and_sources_stand_behind_flags_of_many_values(main: Main, place: Path) -> None:
    inspected = ("--tokens", "0", "1", "--model", "runs/tiny", "--steps", "1", "--samples", "2", "--json")
    flags = {
        "inspect": (inspected, inspected[3:] + inspected[:3], "The fox"),
        "tokenize": (("--vocab-size", "300", "--to", "t", "--special", "<a>", "<b>"), None, "words.txt"),
        "score": (
            ("--model", "runs/tiny", "--steps", "1", "--samples", "2", "--solver", "euler", "--json"),
            None,
            "t.txt",
        ),
    }
    (place / "t.txt").write_text("The fox ran.\n")
    for command, (words, other, last) in flags.items():
        before = main(command, last, *words)
        after = main(command, *(other or words), last)
        assert before[0] == after[0] == 0, (command, before[2], after[2])
        assert before[1] == after[1] or command == "tokenize"


def test_results_stand_in_the_order_in_which_they_are_named(main: Main, place: Path) -> None:
    for number in ("1", "2"):
        flags = ("--tasks", "last_word", "--limit", "2", "--steps", number, "--max-new-tokens", "2", "--out", number)
        assert main("evaluate", "--model", "runs/tiny", *flags)[0] == 0
    files = ("1/results.jsonl", "2/results.jsonl")
    said = [
        main("report", *words)[1]
        for words in ((*files, "--json"), ("--json", *files), (files[0], "--out", str(place / "r"), "--json", files[1]))
    ]
    assert said[0] == said[1] == said[2]


@pytest.mark.usefixtures("place")
def test_what_cannot_be_read_either_way_is_told_as_it_was_given(main: Main) -> None:
    code, _, error = main("inspect", "--model", "runs/tiny", "--tokens", "1x")
    assert code == 2 and "--tokens" in error and "1x" in error
    code, _, error = main("inspect", "--model", "runs/tiny", "The fox", "--tokens", "1", "2x")
    assert code == 2 and "--tokens" in error and "2x" in error
