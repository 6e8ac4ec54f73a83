"""The kernels are compiled once, and where they cannot be, torch does it all and says why."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from opencola.kernels import library as kernels


def say(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opencola.kernels"]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder)} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.usefixtures("need_kernels")
def test_several_processes_compile_one_library_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "opencola.kernels"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate()[0] for process in started}
    (library,) = (tmp_path / "opencola").iterdir()
    assert said == {f"kernels: {library}\n"}
    before = library.stat().st_mtime_ns
    assert say(tmp_path).returncode == 0 and library.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"CC": "no-such-compiler"}, "no-such-compiler"), ({"CC": "false"}, "false -std"), ({}, "cache is a file")],
)
def test_without_a_compiler_or_a_folder_the_reason_is_said(
    environment: dict[str, str], reason: str, tmp_path: Path
) -> None:
    folder = tmp_path / "cache is a file"
    if not environment:
        folder.write_text("")
    said = say(folder, **environment)
    assert said.returncode == 1 and said.stderr.startswith("no kernels, torch does it all: ") and reason in said.stderr


@pytest.mark.parametrize("environment", [{"CC": "no-such-compiler"}, {"OPENCOLA_KERNELS": "0"}])
def test_without_kernels_torch_does_it(environment: dict[str, str], tmp_path: Path) -> None:
    code = "import torch; from opencola.kernels.library import library, usable; print(library(), usable(torch.ones(1)))"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)} | environment
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout == "None False\n"


@pytest.mark.usefixtures("need_kernels")
def test_kernels_take_float32_outside_of_autocast_and_where_they_are_on() -> None:
    x = torch.ones(1)
    assert kernels.usable(x) and not kernels.usable(x, x.double()) and not kernels.usable(x.to("meta"))
    assert kernels.usable(torch.nn.Parameter(x)) and not kernels.usable(FakeTensorMode().from_tensor(x))
    with torch.autocast("cpu"):
        assert not kernels.usable(x)
    with kernels.switched_off():
        assert not kernels.usable(x)
    assert kernels.usable(x)
