"""Wheels have kernels for the compiler's machine, and say so in their names; without a compiler they are for all."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from needed import need

from opencola.kernels import build

ROOT = Path(__file__).resolve().parents[2]


def wheel(folder: Path, **environment: str) -> tuple[str, list[str], str]:
    """Name, what of it is compiled, and what was said while it was built."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    made = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True, cwd=ROOT)
    (file,) = folder.glob("*.whl")
    return file.name, [name for name in zipfile.ZipFile(file).namelist() if name.endswith(".so")], made.stderr


def test_without_a_compiler_a_wheel_is_for_all_machines(tmp_path: Path) -> None:
    name, compiled, said = wheel(tmp_path, CC="no-such-compiler")
    assert name.endswith("-py3-none-any.whl") and not compiled
    assert "no kernels in this wheel: " in said and "no-such-compiler" in said


@pytest.mark.slow
def test_a_cross_compiler_makes_the_wheel_of_another_machine(tmp_path: Path) -> None:
    """And its name has the oldest C library that will do: not a later one than torch's own wheels want."""
    name, compiled, _ = wheel(tmp_path, CC=need("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"))
    platform = name.split("-py3-none-")[1]
    assert platform in {f"manylinux_2_{n}_aarch64.whl" for n in range(17, 29)}
    assert compiled == [f"opencola/kernels/prebuilt/{variant}.so" for variant in build.VARIANTS["aarch64"]]


@pytest.mark.slow
def test_wheels_are_not_made_by_clang(tmp_path: Path) -> None:
    """Whose kernels would want an OpenMP that torch does not have."""
    name, compiled, said = wheel(tmp_path, CC=need("clang", "clang libomp-dev"))
    assert name.endswith("-py3-none-any.whl") and not compiled and "not torch's" in said
