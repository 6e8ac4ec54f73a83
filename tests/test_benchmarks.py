"""The benchmarks' floors against counted operations, and their command line."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_cola
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import baselines, data, derivatives, generation, growth, likelihood, quality
from benchmarks import floor as floor_module
from benchmarks.common import COMPARED, SIZES, generation_flops, training_flops, without_zeros
from benchmarks.floor import Floor
from opencola.data.batch import Batch
from opencola.kernels import library, matmul
from opencola.models.cola.model import Cola
from opencola.models.cola.sampling import ColaSampling


@pytest.fixture(autouse=True)
def small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of small products and little memory: what they are is not what is tested."""
    monkeypatch.setattr(floor_module, "SHAPES", ((256, 256, 256),))
    monkeypatch.setattr(floor_module, "MEGABYTES", 1)


def test_the_floor_of_generation_is_what_is_computed_and_little_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opencola.layers.few_rows.PACKED_BYTES", 0)  # packed products are not counted, nor are kernels
    cola = Cola(SIZES["S"]).eval()
    with library.switched_off(), FlopCounterMode(display=False) as counter:
        list(cola.generate([list(range(64))] * 2, ColaSampling(max_new_tokens=32, steps=4)))
    assert 1 <= counter.get_total_flops() / generation_flops(cola, 2, prompt=64, new=32, steps=4) < 1.05


def test_the_floor_of_training_is_what_is_computed_and_little_less() -> None:
    cola = Cola(SIZES["S"])
    data = Batch(torch.zeros(1, 256, dtype=torch.long), torch.arange(1), seed=0, step=0)
    without_zeros(cola.dit)  # a velocity of zero would stop the gradient
    with library.switched_off(), FlopCounterMode(display=False) as counter:  # which sees torch's operations only
        cola.flow_matching(torch.randn(1, 256, 16), data).backward()
    assert 0.95 < counter.get_total_flops() / training_flops(cola, 1, 256) < 1.1


@pytest.mark.parametrize(
    ("kind", "size"), [("ar", "1M"), ("llada", "1M"), ("plaid", "1M"), ("vae", "S"), ("vae", "demo")]
)
def test_the_floors_of_other_models_are_what_is_computed_and_little_less(kind: str, size: str) -> None:
    ((_, _, model),) = baselines.models(kind, size)
    batch = baselines.batch_of(model, 4, 64)
    with library.switched_off(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(batch).total.backward()
    assert 1 <= counter.get_total_flops() / baselines.flops(model, batch) < 1.05  # pairs that do not see each other


def test_other_models_are_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["baselines", "--model", "vae", "--size", "demo", "--batch", "2", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", arguments)
    baselines.main()
    line = json.loads(capsys.readouterr().out)
    assert (line["work"], line["size"], line["batch"]) == ("train vae", "demo", 2)
    assert line["tokens_per_second"] == pytest.approx(160 / line["seconds"], rel=0.01)
    monkeypatch.setattr("sys.argv", [*arguments, "--size", "20M"])
    with pytest.raises(SystemExit, match="2"):
        baselines.main()
    assert "vae has no size 20M" in capsys.readouterr().err


def test_a_line_has_its_keys_and_ratios_to_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generation", "--size", "S", "--batch", "1", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", arguments)
    generation.main()
    first = capsys.readouterr().out
    line = json.loads(first)
    assert line["kernels"] == (library.library() is not None)
    assert line["tokens_per_second"] == pytest.approx(64 / line["seconds"], rel=0.01)
    assert line["floor_ratio"] == pytest.approx(line["seconds"] / line["floor_seconds"], rel=0.01)
    (tmp_path / "earlier.jsonl").write_text(first)
    monkeypatch.setattr("sys.argv", [*arguments, "--compare", str(tmp_path / "earlier.jsonl")])
    generation.main()
    second = json.loads(capsys.readouterr().out)
    for key in COMPARED:
        assert second[f"{key}_over_earlier"] == pytest.approx(second[key] / line[key], abs=1e-3)


def test_the_cost_of_a_log_density_is_counted() -> None:
    line = likelihood.point("N", {"num_latents": 8}, {"samples": 2, "solver": "heun"}, threads=1, repeats=1)
    assert line["evaluations"] == 8 and line["evaluations_per_token"] == 1
    assert line["ms_per_token"] > 0 and line["settings"] == "heun, 4 steps (shift 0.2), 1 rademacher probe"


def test_a_file_of_something_else_cannot_be_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.jsonl").write_text('{"work": "generate"}\n')
    monkeypatch.setattr("sys.argv", ["generation", "--compare", str(tmp_path / "other.jsonl")])
    with pytest.raises(SystemExit, match="2"):
        generation.main()
    assert "other.jsonl is not a file of benchmark lines" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        (ColaSampling(steps=4), 8),
        (ColaSampling(steps=4, guidance=1.0), 4),
        (ColaSampling(steps=2, solver="heun"), 6),  # the last step of Heun's method is Euler's
        (ColaSampling(steps=2, solver="midpoint"), 8),
        (ColaSampling(steps=8, guidance_until=0.5), 13),
        (ColaSampling(steps=8, guidance_every=2), 12),
    ],
)
def test_passes_of_a_block_are_counted(settings: ColaSampling, passes: int) -> None:
    assert quality.evaluations(tiny_cola(), settings) == passes


@pytest.mark.slow
def test_quality_is_measured_on_the_shipped_model_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality, "settings", lambda: [("euler", ColaSampling(steps=n)) for n in (1, 8)])
    file = tmp_path / "quality.svg"
    monkeypatch.setattr("sys.argv", ["quality", "--stories", "4", "--figure", str(file), "--threads", "2"])
    quality.main()
    poor, good = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [poor["evaluations"], good["evaluations"]] == [2, 16]
    assert good["legal_sentences"] > poor["legal_sentences"] and good["last_words"] == 1
    assert "<svg" in file.read_text()


def test_growth_prints_and_draws_its_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, values in (
        ("PROMPTS", (16, 32)),
        ("BATCHES", (1, 2)),
        ("LENGTHS", (32, 64)),
        ("TRAINED", 64),
        ("NEW", 16),
    ):
        monkeypatch.setattr(growth, name, values)
    monkeypatch.setattr("sys.argv", ["growth", "--figure", str(tmp_path / "growth.svg")])
    growth.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["axis"], line["size"]) for line in lines] == [
        ("prompt", 16), ("prompt", 32), ("batch", 1), ("batch", 2), ("length", 32), ("length", 64)
    ]  # fmt: skip
    for line in lines:
        assert line["floor_ratio"] == pytest.approx(line["us_per_token"] / line["floor_us_per_token"], rel=0.02)
    assert "<svg" in (tmp_path / "growth.svg").read_text()


def test_the_data_pipeline_is_timed_from_every_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["data", "--training", "1000", "--tokens", "2000", "--documents", "300"]
    monkeypatch.setattr("sys.argv", arguments)
    data.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["source"] for line in lines] == ["stories", "jsonl", "shards"]
    for line in lines:
        assert line["over_training"] == pytest.approx(line["tokens_per_second"] / 1000, abs=0.1)


@pytest.mark.parametrize(("num_latents", "samples", "block_size"), [(8, 2, 1), (8, 1, 4)])
def test_the_derivatives_that_are_timed_are_the_same_number(num_latents: int, samples: int, block_size: int) -> None:
    found = [way().item() for way in derivatives.ways(num_latents, samples, block_size).values()]
    assert found[0] != 0 and found == pytest.approx([found[0]] * 3, rel=1e-3)


def test_the_derivatives_are_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(derivatives, "SIZES", ((8, 2, 1),))
    monkeypatch.setattr("sys.argv", ["derivatives", "--repeats", "1"])
    derivatives.main()
    line = json.loads(capsys.readouterr().out)
    assert line["num_latents"] == 8 and min(line[f"{way}, ms"] for way in derivatives.ways(8, 2, 1)) > 0


def test_a_time_below_the_floor_is_an_error_of_the_benchmark() -> None:
    floor = Floor(gflops=100.0, by="a product", gbytes=10.0)
    assert floor.seconds(2e11) == 2.0 and floor.ratio(3.0, 2e11) == 1.5
    with pytest.raises(ValueError, match=r"1\.9 s are 0\.950 of the floor: .* more than 100 GFLOP/s \(a product\)"):
        floor.ratio(1.9, 2e11)


def test_the_floor_is_the_best_of_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A way to multiply that is faster than all others is what counts, whosever it is."""
    monkeypatch.setattr(floor_module, "SHAPES", ((64, 64, 64),))
    monkeypatch.setitem(matmul.IMPLEMENTATIONS["float32"], "onednn", lambda a, b, bias: None)
    floor = floor_module.probe(repeats=2)
    assert floor.by.startswith("onednn float32") and floor.gbytes > 0
    assert floor.best(Floor(2 * floor.gflops, "other", 0.0)) == Floor(2 * floor.gflops, "other", floor.gbytes)
