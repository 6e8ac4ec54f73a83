"""The parity tests run on every folder of fixtures: the official implementation's, and our own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from opencola.checkpoints import official
from opencola.flow.dit import BlockCausalDiT
from opencola.models.cola.model import Cola
from opencola.vae.text_vae import TextVAE

OWN = Path(__file__).resolve().parent.parent / "golden"

Stored = Callable[[str], dict[str, Tensor]]


@pytest.fixture(scope="session", params=["golden/configA", "golden/configB", "own/configA", "own/configB"])
def folder(request: pytest.FixtureRequest, golden: Path) -> Path:
    """A folder of fixtures. Where the official ones are missing, `golden` is our own folder, too."""
    origin, _, name = request.param.partition("/")
    return (golden if origin == "golden" else OWN) / name


@pytest.fixture(scope="session")
def meta(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "meta.json").read_text())
    return values


@pytest.fixture(scope="session")
def stored(folder: Path, device: torch.device) -> Stored:
    """The tensors of one of the folder's files: ``stored("vae_encode")["mean_0"]``."""
    return lambda name: load_file(folder / f"{name}.safetensors", str(device))


@pytest.fixture
def cola(folder: Path, device: torch.device) -> Cola:
    return official.load(folder).to(device)


@pytest.fixture
def vae(folder: Path, device: torch.device) -> TextVAE:
    return official.load_vae(folder / "cola_vae").requires_grad_(False).to(device)


@pytest.fixture
def dit(folder: Path, device: torch.device) -> BlockCausalDiT:
    return official.load_dit(folder / "cola_dit").to(device)
