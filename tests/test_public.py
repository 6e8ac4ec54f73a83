"""The public interface: the names of `opencola`, what they load, and that they do what the commands do."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import opencola
from opencola.commands import main as cli
from opencola.errors import UserError
from opencola.models import build
from opencola.run import recipe as recipes

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "opencola"
GUIDE = (ROOT / "docs" / "guide" / "python.md").read_text(encoding="utf-8")
PROMPTS = ["Once a little girl named Mia", "", "One sunny day,"]
TINY = """
out: runs/tiny
family: ar
data: {source: words.txt, length: 16, batch_size: 2}
tokenizer: {vocab_size: 300}
model: {trunk: {width: 16, num_layers: 1, num_heads: 2, ffn_dim: 32}}
train: {steps: 4}
"""


@pytest.fixture(scope="module")
def shipped() -> opencola.Pretrained:
    return opencola.load()


def in_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_nothing_else() -> None:
    code = "import sys; before = {*sys.modules}; import opencola; print(*{*sys.modules} - before)"
    tops = {name.partition(".")[0] for name in in_fresh_process(code).split()}
    assert tops - sys.stdlib_module_names == {"opencola"}


@pytest.mark.parametrize("name", ["UserError", "Message", "__version__"])
def test_what_needs_no_torch_loads_without(name: str) -> None:
    in_fresh_process(f"import sys, opencola; opencola.{name}; assert 'torch' not in sys.modules")


def test_names_are_listed_alike_for_readers_tools_and_python() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {*opencola.__all__} == {*typed} <= {*dir(opencola)}
    assert typed == {name: f"opencola.{module}" for name, module in opencola._MODULES.items()}


def test_no_name_is_a_modules() -> None:
    """Python puts a module that was imported over the name."""
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert "train" in modules and modules.isdisjoint(opencola.__all__)


@pytest.mark.parametrize("name", opencola.__all__)
def test_names_are_there_documented_and_in_the_guide(name: str) -> None:
    value = getattr(opencola, name)
    if name != "__version__":
        assert inspect.getdoc(value) and value.__name__ == name
    assert f"## {name}\n" in GUIDE.replace("`", "")


def test_the_guide_has_no_other_names() -> None:
    headings = [line.removeprefix("### ").strip("`") for line in GUIDE.splitlines() if line.startswith("### ")]
    assert sorted(headings) == sorted(opencola.__all__)


def test_unknown_names_are_said() -> None:
    with pytest.raises(AttributeError, match="module 'opencola' has no attribute 'decode'"):
        opencola.decode  # type: ignore[attr-defined]  # noqa: B018


def test_texts_are_the_commands(
    shipped: opencola.Pretrained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.jsonl"
    settings = ["--seed", "5", "--max-new-tokens", "12", "--temperature", "0.9"]
    assert cli.main(["generate", "--prompt", *PROMPTS, "--jsonl", str(file), *settings]) == 0
    expected = [json.loads(line)["continuation"] for line in file.read_text(encoding="utf-8").splitlines()]
    given = {"seed": 5, "max_new_tokens": 12, "temperature": 0.9}
    assert opencola.generate(shipped, PROMPTS, **given) == expected
    assert opencola.generate(shipped, PROMPTS, batch_size=2, **given) == expected
    assert "".join(opencola.stream(shipped, PROMPTS[0], **given)) == expected[0]
    assert len(capsys.readouterr().out) > 0


def test_scores_are_the_commands(shipped: opencola.Pretrained, tmp_path: Path) -> None:
    texts, out = tmp_path / "texts.jsonl", tmp_path / "out.jsonl"
    rows = [{"text": "Mia ran."}, {"text": "The zoo."}, {"prompt": "Mia met", "continuation": " a frog."}]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["score", str(texts), "--jsonl", str(out), "--samples", "2", "--steps", "3", "--seed", "4"]) == 0
    expected = [json.loads(line) for line in out.read_text().splitlines()]
    for record in expected:
        del record["model"]
    given = ["Mia ran.", "The zoo.", ("Mia met", " a frog.")]
    found = opencola.score(shipped, given, samples=2, steps=3, seed=4)
    assert json.loads(json.dumps(found)) == expected
    assert all(parameter.requires_grad for parameter in shipped.model.parameters())  # as before


def test_a_recipe_is_trained_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("\n".join(f"The fox number {i} ran to the hill." for i in range(40)))
    Path("tiny.yaml").write_text(TINY)
    folder = opencola.train_recipe("tiny.yaml", out=Path("runs/mine"), train={"steps": 2, "betas": [0.8, 0.9]})
    assert folder == Path("runs/mine")
    ((_, ran),) = recipes.read(folder / "recipe.yaml", [], build.config_class, build.sampling_class)
    assert ran.train.steps == 2 and ran.train.betas == (0.8, 0.9)
    model, tokenizer, sampling = opencola.load(folder)
    assert not model.training and tokenizer.vocab_size <= model.vocab_size
    assert opencola.generate(folder, ["The fox"], max_new_tokens=3) == opencola.generate(
        opencola.Pretrained(model, tokenizer, sampling), ["The fox"], max_new_tokens=3
    )
    assert opencola.score(folder, ["The fox"])[0]["kind"] == "exact"
    with pytest.raises(FileExistsError):
        opencola.train_recipe("tiny.yaml", out="runs/mine")
    opencola.train_recipe("tiny.yaml", out="runs/mine", overwrite=True, train={"steps": 1})
    facts = json.loads((folder / "training.json").read_text())
    assert "opencola train tiny.yaml --out=runs/mine --train.steps=1 --overwrite" in json.dumps(facts)


def test_mistakes_are_said(shipped: opencola.Pretrained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prompts is a single string: give a list of them"):
        opencola.generate(shipped, "Once")
    with pytest.raises(UserError, match="texts is a single string: give a list of them"):
        opencola.score(shipped, "Once")
    with pytest.raises(UserError, match="an empty text has no log-probability"):
        opencola.score(shipped, ["Once", ("Once", "")])
    with pytest.raises(UserError, match="steps must be at least 1"):
        opencola.generate(shipped, ["Once"], steps=0)
    with pytest.raises(TypeError, match="temperatur"):
        opencola.generate(shipped, ["Once"], temperatur=1)
    with pytest.raises(TypeError, match="sample"):
        opencola.score(shipped, ["Once"], sample=1)
    with pytest.raises(UserError, match="Unrecognized options: --train.step"):
        opencola.train_recipe("demo", out=tmp_path, train={"step": 1})
    with pytest.raises(FileNotFoundError, match="no such folder: nowhere"):
        opencola.load("nowhere")


def test_nothing_is_nothing(shipped: opencola.Pretrained) -> None:
    assert opencola.generate(shipped, []) == [] == opencola.score(shipped, [])
