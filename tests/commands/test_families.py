"""Every family of whole models by the same commands: trained, resumed, exported, loaded by name, writing, scoring."""

import contextlib
import functools
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Main

from opencola.checkpoints.hub import from_pretrained, load
from opencola.commands import main as cli
from opencola.models.build import sampling_class, scoring_class
from opencola.text.tokenizer import Tokenizer

RECIPE = """
out: runs/FAMILY
family: FAMILY
data: {source: words.txt, length: 16, batch_size: 4}
valid: words.txt
tokenizer: {vocab_size: 300}
model: {trunk: {width: 16, num_layers: 1, num_heads: 2, ffn_dim: 24}}
train: {steps: 4, warmup: 1, log_every: 2, sample_every: 4, save_every: 2}
sampling: {STEPSmax_new_tokens: 12}
"""
BASELINES = ("ar", "llada", "plaid")
Baseline = Callable[[str], str]


def written(place: Path, family: str, **changes: str) -> str:
    text = RECIPE.replace("FAMILY", family).replace("STEPS", "" if family == "ar" else "steps: 4, ")
    for old, new in changes.items():
        text = text.replace(f"{old}: ", f"{old}: {new} # ", 1)
    (place / f"{family}.yaml").write_text(text)
    return f"{family}.yaml"


@pytest.fixture(scope="module")
def finished(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a family, trained when it is first asked for; left as it is by all tests."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(trained / "words.txt", folder)

    @functools.cache
    def run(family: str) -> Path:
        said = io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            assert cli.main(["train", written(folder, family)]) == 0, said.getvalue()
        return folder / "runs" / family

    return run


@pytest.fixture
def baseline(finished: Callable[[str], Path], place: Path) -> Baseline:
    """Copies the run of a family into runs/; its recipe."""

    def copy(family: str) -> str:
        shutil.copytree(finished(family), place / "runs" / family)
        return written(place, family)

    return copy


@pytest.mark.parametrize("family", BASELINES)
def test_train_export_write_and_score(main: Main, place: Path, family: str) -> None:
    recipe, folder = written(place, family), f"runs/{family}"
    code, said, error = main("train", recipe)
    assert code == 0, error
    assert f"opencola generate --model {folder}" in said and (place / folder / "valid.json").exists()
    samples = [json.loads(line) for line in (place / folder / "samples.jsonl").open()]
    assert {sample["kind"] for sample in samples} == {"continuation"}
    assert main("export", "--model", folder, "--to", "given")[0] == 0
    (original, tokenizer), given = load(Path(folder)), from_pretrained("given")
    for name, value in original.state_dict().items():
        assert torch.equal(value, given.model.state_dict()[name]), name
    assert given.model.vocab_size == tokenizer.vocab_size and given.sampling == sampling_class(family)(
        max_new_tokens=12, **({} if family == "ar" else {"steps": 4})
    )
    if family == "ar":
        assert original.config.bos_id == tokenizer.eos_id
    texts = [main("generate", "--model", name, "--prompt", "The fox")[1] for name in (folder, "given")]
    assert texts[0] == texts[1] and texts[0].startswith("The fox")

    (place / "t.jsonl").write_text('{"text": "The fox ran."}\n{"prompt": "The fox", "continuation": " sat"}\n')
    extra = () if family == "ar" else ("--samples", "3", "--seed", "2")
    code, said, error = main("score", "t.jsonl", "--model", folder, "--jsonl", "scores.jsonl", *extra)
    assert code == 0, error
    records = [json.loads(line) for line in (place / "scores.jsonl").open()]
    settings = scoring_class(family)(**({} if family == "ar" else {"samples": 3, "seed": 2}))
    continuation = [*tokenizer.encode(" sat"), tokenizer.eos_id]
    expected = original.score([tokenizer.encode("The fox")], [continuation], settings, ids=[1])
    assert records[1]["log_probability"] == pytest.approx(expected.total.item(), rel=1e-5)
    assert records[1]["kind"] == expected.kind == ("exact" if family == "ar" else "bound")
    assert f"{records[0]['log_probability']:,.2f}" in said and expected.estimator in said


@pytest.mark.parametrize("family", BASELINES)
def test_the_next_stage_starts_from_the_weights(main: Main, place: Path, baseline: Baseline, family: str) -> None:
    baseline(family)
    still = (
        "--train.steps",
        "1",
        "--train.learning_rate",
        "0",
        "--train.muon_learning_rate",
        "0",
        "--train.warmup",
        "0",
        "--train.sample_every",
        "0",
    )
    recipe = written(place, family, out="runs/next")
    code, _, error = main("train", recipe, "--init", f"runs/{family}", *still)
    assert code == 0, error
    before, after = (load(Path("runs", name))[0].state_dict() for name in (family, "next"))
    assert all(torch.equal(before[name], value) for name, value in after.items())
    code, _, error = main("train", recipe, "--init", f"runs/{family}", "--model.trunk.width", "32", "--overwrite")
    assert code == 2 and "model.trunk.width is 32, but 16 in runs" in error
    Tokenizer.train(["abc"], 280).save(place / "other")
    code, _, error = main("train", recipe, "--init", f"runs/{family}", "--tokenizer.path", "other", "--overwrite")
    assert code == 2 and "knows 300: leave tokenizer.path out" in error


@pytest.mark.parametrize("family", BASELINES)
def test_dry_run(main: Main, place: Path, family: str) -> None:
    code, said, error = main("train", written(place, family), "--dry-run")
    assert code == 0, error
    assert "trunk.blocks" in said and "core, N" in said


def test_what_needs_latents(main: Main, baseline: Baseline) -> None:
    baseline("ar")
    code, _, error = main("inspect", "The fox", "--model", "runs/ar")
    assert code == 2 and error.endswith("runs/ar holds a model without latents (AR): name a Cola DLM\n")
    code, _, error = main("score", "words.txt", "--model", "runs/ar", "--samples", "3")
    assert code == 2 and "--samples" in error


def test_a_llama_of_the_hub(main: Main, place: Path, baseline: Baseline) -> None:
    """A folder that is a Hugging Face Llama itself."""
    baseline("ar")
    (place / "runs/ar/ar_model").rename(place / "llama")
    (place / "runs/ar/tokenizer.json").rename(place / "llama/tokenizer.json")
    code, said, error = main("generate", "--model", "llama", "--prompt", "The fox", "--max-new-tokens", "3")
    assert code == 0, error
    assert main("export", "--model", "llama", "--to", "again")[0] == 0
    assert main("generate", "--model", "again", "--prompt", "The fox", "--max-new-tokens", "3")[1] == said


@pytest.mark.parametrize("family", ("llada", "plaid"))
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"width": 16', '"width": "wide"', "trunk.width is 'wide', but must be a whole number"),
        ('"width": 16', '"breadth": 16', "trunk.breadth is unknown"),
        ('"num_layers": 1', '"num_layers": 0', "trunk.num_layers is 0, but must be at least 1"),
        ('"num_layers": 1', '"num_layers": 2', "tensor trunk.blocks.1.norm_attention.weight is missing"),
        ('"model_type": "opencola', '"model_type": "x', "model_type is 'x_"),
        ('"vocab_size"', '"vocabulary"', "vocab_size is missing"),
    ],
)
def test_damaged_files(
    main: Main, place: Path, baseline: Baseline, family: str, old: str, new: str, message: str
) -> None:
    baseline(family)
    file = place / "runs" / family / f"{family}_model" / "config.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    code, _, error = main("generate", "--model", f"runs/{family}", "--prompt", "x")
    assert code == 2 and message in error and error.count("\n") == 1
    file.write_text(text)
    weights = file.with_name("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    code, _, error = main("generate", "--model", f"runs/{family}", "--prompt", "x")
    assert code == 2 and "model.safetensors" in error


@pytest.mark.usefixtures("workers_start_at_once")
@pytest.mark.parametrize("family", BASELINES)
def test_evaluate_and_report(main: Main, place: Path, baseline: Baseline, family: str) -> None:
    """The same records at any batch size and with two processes; option scores are the model's own."""
    baseline(family)
    rows = [
        {"id": n, "question": f"Where is the fox{'?' * n}", "choices": ["the hill", "a bear", "x", "ö"], "answer": "x"}
        for n in range(5)
    ]
    (place / "data").mkdir()
    (place / "data" / "obqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    extra = () if family == "ar" else ("--scoring.samples", "2", "--steps", "4")
    command = (
        "evaluate",
        "--model",
        f"runs/{family}",
        "--data",
        "data",
        "--tasks",
        "obqa",
        "last_word",
        "--limit",
        "5",
    )
    for out, flags in {"one": ("--batch-size", "1"), "two": ("--processes", "2", "--batch-size", "3")}.items():
        code, _, error = main(*command, "--out", out, "--likelihood", *extra, *flags)
        assert code == 0, error
    text = (place / "one" / "results.jsonl").read_text()
    assert text == (place / "two" / "results.jsonl").read_text()
    header, first, *_ = map(json.loads, text.splitlines())
    assert header["family"] == family and header["likelihood"]["kind"] == ("exact" if family == "ar" else "bound")
    model, tokenizer = load(Path("runs", family))
    settings = scoring_class(family)(**header["likelihood"]["settings"])
    prompt, answer = tokenizer.encode(first["prompt"]), tokenizer.encode(" the hill")
    expected = model.score([prompt], [answer], settings, ids=[0]).total.item()
    assert first["likelihood"]["sum"][0] == pytest.approx(expected, rel=1e-4)
    assert main("report", "one/results.jsonl", "--out", "page")[0] == 0
    assert header["likelihood"]["estimator"] in (place / "page" / "results.md").read_text()
