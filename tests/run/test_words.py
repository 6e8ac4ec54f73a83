"""Values that begin with `-`, and paths that begin with `~`: as flags, in recipes, and read back from a file."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from opencola.checkpoints.hub import locate
from opencola.data.shards import folder_of
from opencola.data.sources import documents
from opencola.errors import UserError
from opencola.models import build
from opencola.models.sampling import Sampling
from opencola.paths import home
from opencola.run import flags, recipe
from opencola.text.tokenizer import Tokenizer

PLAIN = {"out": "runs", "family": "ar", "data": {"length": 16, "batch_size": 4}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and its subfolder `home` as home."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(values: dict[str, Any], *argv: str) -> Any:
    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    return recipe.read("recipe.yaml", argv, build.config_class, build.sampling_class)[0][1]


def again(stage: Any) -> Any:
    """A stage as it reads back from its own file."""
    recipe.dump(stage, Path("written.yaml"))
    return recipe.read("written.yaml", [], build.config_class, build.sampling_class)[0][1]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "stop", [["--", "x"], ["x", "--"], ["--seed", "-h", "--help"], ["--a b=c", "-1.5", "-", "-x"], ["--out=x"], []]
)
def test_a_recipe_may_say_any_text(stop: list[str]) -> None:
    stage = read(PLAIN | {"sampling": {"stop": stop}, "tokenizer": {"special": [*stop]}})
    assert list(stage.sampling.stop) == list(stage.tokenizer.special) == stop
    assert again(stage) == stage
    named = {"sampling": {"stop": tuple(stop)}}
    assert read(PLAIN, *flags.words_of(named)).sampling.stop == tuple(stop)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("argv", "stop"),
    [
        (["--sampling.stop=--"], ("--",)),
        (["--sampling.stop=--seed"], ("--seed",)),
        (["--sampling.stop", "--foo bar", "-x y", "b"], ("--foo bar", "-x y", "b")),
        (["--sampling.stop", "--"], ("--",)),
        (["--sampling.stop", "--", "x", "--seed", "3"], ("--", "x")),
        (["--seed", "3", "--sampling.stop", "x", "--"], ("x", "--")),
    ],
)
def test_a_flag_may_say_it_too(argv: list[str], stop: tuple[str, ...]) -> None:
    stage = read(PLAIN, *argv)
    assert stage.sampling.stop == stop and again(stage) == stage


@pytest.mark.usefixtures("folder")
def test_what_looks_like_a_flag_is_taken_for_one_and_it_is_said_how_to_give_it() -> None:
    said = "Unrecognized options: --foo; if --foo is a value: --stop=--foo"
    with pytest.raises(UserError, match=f"^{said}$"):
        flags.parse(Sampling, ["--stop", "--foo"])
    with pytest.raises(UserError, match=f"^{said.replace('--stop', '--sampling.stop')}$"):
        read(PLAIN, "--sampling.stop", "--foo")
    for word in ("--foo", "-x"):
        with pytest.raises(UserError, match=f"if {word} is a value: --out={word}$"):
            read(PLAIN, "--out", word)
    with pytest.raises(UserError, match=r"^Unrecognized options: --stepz$"):
        read(PLAIN, "--seed", "1", "--stepz", "3")


def test_the_home_folder_has_its_sign_everywhere(folder: Path) -> None:
    here = folder / "home"
    paths = {"out": "~/runs", "tokenizer": {"path": "~/t"}, "valid": "~/texts.txt"}
    stage = read(PLAIN | paths | {"data": PLAIN["data"] | {"source": "~/texts.txt"}})  # type: ignore[operator]
    assert (stage.out, stage.tokenizer.path) == (here / "runs", here / "t")
    assert read(PLAIN, "--out=~/x", "--tokenizer.path", "~").tokenizer.path == here
    (here / "texts.txt").write_text("one")
    assert [*documents("~/texts.txt", 0).one_pass()] == ["one"]
    Tokenizer.train(["one"], 260).save(here)
    assert Tokenizer.load("~").vocab_size == Tokenizer.load("~/tokenizer.json").vocab_size
    assert locate("~") == here and folder_of("shards:~/x") == here / "x"
    (here / "manifest.json").write_text("{}")
    assert folder_of("~") == here and folder_of("hf:a/b") is None
    (here / "mine.yaml").write_text(yaml.safe_dump(PLAIN))
    (folder / "over.yaml").write_text("base: ~/mine.yaml\nseed: 3\n")
    assert recipe.find("~/mine.yaml") == here / "mine.yaml"
    assert recipe.read("over.yaml", [], build.config_class, build.sampling_class)[0][1].seed == 3
    assert not [path for path in folder.rglob("*") if path.name == "~"]


def test_where_nobody_knows_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda user: {}[user])
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UserError, match="^~/x: no home folder is known here"):
        home("~/x")
    assert home("a/~") == Path("a/~")
