"""opencola.json: of every family, written now or before families had settings of their own."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from earlier import SAMPLING

from opencola.checkpoints import parts
from opencola.checkpoints.settings import EXTRAS, load_sampling, save_sampling, without_others
from opencola.errors import UserError
from opencola.layers.llama import LlamaConfig
from opencola.models import build
from opencola.models.ar.sampling import ARSampling
from opencola.models.cola.sampling import ColaSampling

BASELINES = ("ar", "llada", "plaid")
WHOLE = ("cola", *BASELINES)


@pytest.fixture(params=WHOLE)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A family, of which the folder has a model (or none, which counts as a Cola DLM's)."""
    if request.param in BASELINES:
        trunk = LlamaConfig(width=16, num_layers=1, num_heads=2, ffn_dim=24)
        config = build.config_class(request.param)(vocab_size=30, trunk=trunk)  # type: ignore[call-arg]
        part = parts.PARTS[request.param]
        part.save(build.build(config), tmp_path / part.folder, dtype=torch.float32)
    return str(request.param)


def write(folder: Path, sampling: object) -> None:
    (folder / EXTRAS).write_text(json.dumps({"sampling": sampling}))


def test_a_family_has_its_own_class(family: str, tmp_path: Path) -> None:
    settings = build.sampling_class(family)
    assert load_sampling(tmp_path) == settings()
    write(tmp_path, {"max_new_tokens": 5})
    assert load_sampling(tmp_path) == settings(max_new_tokens=5)


def test_what_is_saved_loads_and_is_the_familys_alone(family: str, tmp_path: Path) -> None:
    sampling = build.sampling_class(family)(temperature=0.5, stop=("a", "\n"))
    save_sampling(sampling, tmp_path)
    assert load_sampling(tmp_path) == sampling
    assert json.loads((tmp_path / EXTRAS).read_text())["sampling"].keys() == asdict(sampling).keys()


def test_earlier_files_load(family: str, tmp_path: Path) -> None:
    write(tmp_path, SAMPLING | {"guidance": 2.5, "steps": 9, "stop": ["x"], "seed": 3})
    own = {"stop": ("x",), "seed": 3} | ({} if family == "ar" else {"guidance": 2.5, "steps": 9})
    assert load_sampling(tmp_path) == build.sampling_class(family)(**own)


def test_values_of_others_are_not_looked_at(tmp_path: Path) -> None:
    write(tmp_path, {"block_length": "many", "steps": 3})
    assert load_sampling(tmp_path) == ColaSampling(steps=3)


def test_a_name_that_no_family_has(family: str, tmp_path: Path) -> None:
    write(tmp_path, SAMPLING | {"stepz": 3})
    names = ", ".join(build.sampling_class(family).hints())
    with pytest.raises(UserError) as caught:
        load_sampling(tmp_path)
    assert str(caught.value) == f"{tmp_path / EXTRAS}: sampling.stepz is not a setting; there are: {names}"


def test_without_others() -> None:
    assert without_others({"seed": 1, "steps": 2, "odd": 3}, ARSampling.hints()) == {"seed": 1, "odd": 3}
