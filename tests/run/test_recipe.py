"""A recipe file and the command line are read alike, fail alike, and what is written reads back."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from opencola.models import build
from opencola.models.cola.sampling import ColaSampling
from opencola.models.sampling import Sampling
from opencola.run import recipe as recipe_module
from opencola.run.recipe import Recipe, TokenizerConfig, dump, find, read, up_to_date, values
from opencola.train.loop import TrainConfig
from opencola.vae.text_vae import ReleaseConventions


@dataclass(frozen=True)
class Inner:
    """A nested config."""

    depth: int = 2
    """Number of layers."""


@dataclass(frozen=True)
class Vae:
    """A family."""

    width: int
    """Width of the layers."""
    sizes: tuple[int, ...] = (1, 2)
    """Some sizes."""
    inner: Inner = field(default_factory=Inner)
    """Nested."""
    mode: str | None = None
    """A mode or none."""

    def __post_init__(self) -> None:
        if self.width % 2:
            raise ValueError(f"width must be even, but is {self.width}")


@dataclass(frozen=True)
class Prior:
    """Another family."""

    rate: float = 0.5
    """A rate."""


def families(name: str) -> type:
    known = {"vae": Vae, "prior": Prior}
    if name not in known:
        raise ValueError(f"unknown family {name!r}: choose vae or prior")
    return known[name]


def samplings(name: str) -> type[Sampling]:
    return ColaSampling if name == "vae" else Sampling


SINGLE = """
family: vae
out: runs/x
seed: 7
data: {length: 12, batch_size: 3}
model: {width: 8, sizes: [3, 4, 5], inner: {depth: 6}}
train: {steps: 30, learning_rate: 1e-3, betas: [0.5, 0.75], seconds: null, bf16: true}
"""
STAGED = """
out: OUT
data: {length: 12, batch_size: 3}
train: {steps: 30, warmup: 4, betas: [0.5, 0.75]}
stages:
  first: {family: vae, model: {width: 8}}
  second: {family: prior, init: first, data: {batch_size: 5}, train: {steps: 60}}
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write a recipe into a file whose `OUT` is a folder of the test."""

    def write_text(text: str) -> Path:
        path = tmp_path / "my.yaml"
        path.write_text(text.replace("OUT", str(tmp_path / "out")))
        return path

    return write_text


def test_a_file_sets_every_kind_of_value(write: Any) -> None:
    ((name, recipe),) = read(write(SINGLE), [], families, samplings)
    assert name == "vae"
    assert (recipe.family, recipe.out, recipe.seed, recipe.init, recipe.valid) == ("vae", Path("runs/x"), 7, None, None)
    assert (recipe.data.length, recipe.data.batch_size, recipe.data.source) == (12, 3, "stories")
    assert recipe.model == Vae(width=8, sizes=(3, 4, 5), inner=Inner(6))
    assert recipe.train == TrainConfig(steps=30, learning_rate=1e-3, betas=(0.5, 0.75), bf16=True)
    assert recipe.tokenizer == TokenizerConfig()


def test_flags_win_over_the_file(write: Any) -> None:
    argv = ["--train.steps", "10", "--data.source=my.txt", "--model.sizes", "9", "--train.bf16", "False", "--out", "y"]
    ((_, recipe),) = read(write(SINGLE), [*argv, "--train.learning-rate", "0.25"], families, samplings)
    assert (recipe.train.steps, recipe.data.source, recipe.out) == (10, "my.txt", Path("y"))
    assert (recipe.model.sizes, recipe.train.bf16, recipe.train.learning_rate) == ((9,), False, 0.25)
    assert (recipe.train.betas, recipe.seed, recipe.model.width) == ((0.5, 0.75), 7, 8)


def test_stages_share_the_top_and_begin_where_an_earlier_one_ended(write: Any, tmp_path: Path) -> None:
    (first, one), (second, two) = read(write(STAGED), [], families, samplings)
    assert (first, second) == ("first", "second")
    assert isinstance(one.model, Vae) and isinstance(two.model, Prior)
    assert (one.train.steps, two.train.steps, one.train.warmup, two.train.warmup) == (30, 60, 4, 4)
    assert (one.data.batch_size, two.data.batch_size, two.data.length) == (3, 5, 12)
    assert (one.out, one.init) == (tmp_path / "out" / "first", None)
    assert (two.out, two.init) == (tmp_path / "out" / "second", tmp_path / "out" / "first")


def test_flags_reach_all_stages_that_have_them(write: Any, tmp_path: Path) -> None:
    argv = ["--train.steps", "5", "--out", str(tmp_path / "b"), "--model.rate", "0.125", "--model.width=4"]
    (_, one), (_, two) = read(write(STAGED), argv, families, samplings)
    assert (one.train.steps, two.train.steps) == (5, 5)
    assert (one.model.width, two.model.rate) == (4, 0.125)
    assert (one.out, two.init) == (tmp_path / "b" / "first", tmp_path / "b" / "first")


def test_init_on_the_command_line_wins(write: Any, tmp_path: Path) -> None:
    ((_, one), (_, two)) = read(write(STAGED), ["--init", str(tmp_path)], families, samplings)
    assert one.init == two.init == tmp_path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 30", "stps: 30", r"train.stps=30; did you mean train.steps\?"),
        ("steps: 30", "steps: many", "train.steps.*'many'"),
        ("bf16: true", "bf16: 3", "'3'.*train.bf16"),
        ("[0.5, 0.75]", "[0.5]", "train.betas.*2 values"),
        ("seconds: null", "seconds: soon", "train.seconds.*soon"),
        ("seconds: null", "schedule: cubic", "cubic.*train.schedule.*cosine"),
        ("train: {", "train: 3\nfoo: {", "train=3"),
        ("{depth: 6}", "{depth: {a: 1}}", "model.inner.depth.a=1"),
        ("seed: 7", "sed: 7", "sed=7"),
        ("width: 8, ", "", "missing: .*model.width"),
        ("out: runs/x\n", "", "missing: .*out"),
        ("family: vae", "family: gan", "unknown family 'gan': choose vae or prior"),
        ("family: vae\n", "", "'family' is missing"),
        ("width: 8", "width: 7", "width must be even, but is 7"),
        ("steps: 30", "steps: 0", "steps must be at least 1"),
    ],
)
def test_errors_in_the_file_name_file_and_key_in_one_line(write: Any, old: str, new: str, message: str) -> None:
    assert old in SINGLE
    with pytest.raises(ValueError, match=rf"my\.yaml: .*{message}") as caught:
        read(write(SINGLE.replace(old, new)), [], families, samplings)
    assert "\n" not in str(caught.value) and "│" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.stps", "3"], r"^Unrecognized options: --train.stps; did you mean --train.steps\?$"),
        (["--train.steps", "many"], "^Error parsing --train.steps.*'many'$"),
        (["--train.steps"], "--train.steps"),
        (["--train.schedule", "cubic"], "cubic"),
        (["5"], "^Unrecognized options: 5$"),
        (["--train.steps", "5", "6", "--model.rate", "1"], "^Unrecognized options: 6$"),
        (["--family", "vae"], "family"),
        (["--train.keep", "0"], "keep must be at least 1"),
    ],
)
def test_errors_on_the_command_line_name_the_flag(write: Any, argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(write(STAGED), argv, families, samplings)
    assert "\n" not in str(caught.value) and "my.yaml" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("family: vae\ntrain: {steps: 3\nout: x", r"my\.yaml:3: not valid YAML"),
        ("family: vae\n\n  out: @", r"my\.yaml:3: not valid YAML"),
        ("a: \x00", r"my\.yaml: not valid YAML"),
        ("a:\n  b: 1\n  c: 2\n  b: 3", r"my\.yaml:4: not valid YAML: the key 'b' is there twice"),
        ("- family", "mapping"),
        ("", "mapping"),
        ("stages: [a, b]", "'stages' maps"),
        ("stages: {a: 3}", "'stages' maps"),
    ],
)
def test_errors_of_form(write: Any, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(write(text), [], families, samplings)
    assert "\n" not in str(caught.value)


def test_errors_in_a_stage_name_it(write: Any) -> None:
    with pytest.raises(ValueError, match=r"my\.yaml: stage second: .*model\.widt"):
        read(write(STAGED.replace("prior,", "prior, model: {widt: 3},")), [], families, samplings)
    with pytest.raises(FileNotFoundError, match="stage second: init third is neither"):
        read(write(STAGED.replace("init: first", "init: third")), [], families, samplings)
    with pytest.raises(FileNotFoundError, match="stage first: init second is neither"):
        read(write(STAGED.replace("family: vae", "family: vae, init: second")), [], families, samplings)


def test_files_and_shipped_recipes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.yaml").write_text("")
    monkeypatch.setattr(recipe_module, "FOLDERS", (tmp_path / "nowhere", tmp_path))
    assert find("small") == find(tmp_path / "small.yaml") == tmp_path / "small.yaml"
    with pytest.raises(FileNotFoundError, match=r"large: no such file.*small"):
        find("large")
    with pytest.raises(FileNotFoundError, match=r"large\.yaml"):
        read(tmp_path / "large.yaml", [], families, samplings)


def test_shipped_recipes_may_stand_in_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sizes").mkdir()
    for name in ("small.yaml", "sizes/small.yaml"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(recipe_module, "FOLDERS", (tmp_path,))
    assert find("small") == tmp_path / "small.yaml"
    assert find("sizes/small") == tmp_path / "sizes" / "small.yaml"
    with pytest.raises(FileNotFoundError, match=r"sizes: no such file, and the shipped .* are: sizes/small, small$"):
        find("sizes")


def test_a_base_lies_below(write: Any, tmp_path: Path) -> None:
    write(STAGED)
    (tmp_path / "above").mkdir()
    above = tmp_path / "above" / "other.yaml"
    above.write_text("""
base: ../my.yaml
out: elsewhere
train: {warmup: 9}
stages:
  second: {train: {steps: 70}}
""")
    (first, one), (second, two) = read(above, [], families, samplings)
    assert (first, second) == ("first", "second")
    assert (one.out, two.out, two.init) == (Path("elsewhere/first"), Path("elsewhere/second"), Path("elsewhere/first"))
    assert (one.train.steps, two.train.steps, one.train.warmup, two.train.warmup) == (30, 70, 9, 9)
    assert (one.model, two.data.batch_size, two.train.betas) == (Vae(width=8), 5, (0.5, 0.75))


def test_errors_of_a_base(write: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"my\.yaml: base .*nowhere\.yaml: no such file"):
        read(write("base: nowhere.yaml"), [], families, samplings)
    with pytest.raises(ValueError, match=r"my\.yaml: base .*my\.yaml has a base of its own"):
        read(write("base: my.yaml"), [], families, samplings)
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"broken\.yaml:1: not valid YAML"):
        read(write("base: broken.yaml"), [], families, samplings)


@pytest.mark.parametrize("text", [SINGLE, STAGED])
def test_what_is_written_reads_back(write: Any, tmp_path: Path, text: str) -> None:
    for name, recipe in read(write(text), ["--train.weight-decay", "1e-05", "--valid", "a: b"], families, samplings):
        recipe = dataclasses.replace(recipe, tokenizer=TokenizerConfig(path=tmp_path / "ü: json"))
        if recipe.init:
            recipe.init.mkdir(parents=True)
        path = tmp_path / name / "recipe.yaml"
        dump(recipe, path)
        assert read(path, [], families, samplings) == [(recipe.family, recipe)]
        assert yaml.safe_load(path.read_text())["train"]["weight_decay"] == 1e-05


def test_help_shows_each_familys_fields_with_the_recipes_values(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read(write(STAGED), ["--help"], families, samplings)
    assert stop.value.code == 0
    first, second = capsys.readouterr().out.split("my.yaml, second")
    words = " ".join(first.replace("│", " ").split())
    assert "my.yaml, first" in words
    assert "--model.width INT Width of the layers. (default: 8)" in words
    assert "--train.steps INT Number of optimizer steps of the run. (default: 30)" in words
    assert "--model.rate" not in words and "--model.rate" in second
    assert "(default: 60)" in second


def test_a_recipe_is_frozen() -> None:
    assert Recipe.__dataclass_params__.frozen  # type: ignore[attr-defined]


OLD = """
family: vae
out: runs/x
data: {length: 12, batch_size: 3}
model: {vae: {width: 8, num_heads: 2, clip_qkv: 3.5, post_norm: false}}
"""


def test_files_of_version_0_1_have_the_releases_conventions_among_the_vaes(write: Any) -> None:
    ((_, old),) = read(write(OLD), [], build.config_class, build.sampling_class)
    ((_, new),) = read(
        write(OLD.replace("clip_qkv: 3.5", "release: {clip_qkv: 3.5}")), [], build.config_class, build.sampling_class
    )
    assert old == new and old.model.vae.release == ReleaseConventions(clip_qkv=3.5, post_norm=False)
    flat = values(old)
    flat["model"]["vae"] |= flat["model"]["vae"].pop("release")
    assert flat["model"]["vae"]["post_norm"] is False and up_to_date(flat) == values(old) == up_to_date(values(old))


@pytest.mark.parametrize(
    "model", [None, 3, "cola", {}, {"vae": None}, {"vae": [1]}, {"vae": {}}, {"trunk": {"bias": 1}}]
)
def test_other_files_stay_as_they_are(model: Any) -> None:
    assert up_to_date({"out": "x", "model": model}) == {"out": "x", "model": model}


def test_help_has_a_group_of_what_only_the_release_needs(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read(write(OLD), ["--help"], build.config_class, build.sampling_class)
    shown = capsys.readouterr().out
    group = shown[shown.index("model.vae.release options") :]
    assert "Only for files of the public release" in group
    assert all(f"--model.vae.release.{field.name} " in group for field in dataclasses.fields(ReleaseConventions))
