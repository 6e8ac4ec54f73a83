"""The kernels are compiled once, and where they cannot be, torch does it all and says why."""

import os
import subprocess
import sys
from collections.abc import Callable
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
    assert said == {f"kernels: {library} (native, compiled by cc)\n"}
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
        temporary = tmp_path / f"opencola-{os.getuid()}"
        temporary.write_text("")
        environment = {"TMPDIR": str(tmp_path)}
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


@pytest.mark.usefixtures("need_kernels")
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-100], lambda data: data[:5000] + b"\0" * 9])
def test_a_damaged_library_is_made_anew(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    first = say(tmp_path)
    (library,) = (tmp_path / "opencola").iterdir()
    whole = library.read_bytes()
    library.write_bytes(damage(whole))
    assert (say(tmp_path).stdout, library.read_bytes()) == (first.stdout, whole)
    assert [*(tmp_path / "opencola").iterdir()] == [library]


@pytest.mark.usefixtures("need_kernels")
def test_where_nothing_may_be_loaded_from_the_cache_it_is_a_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = kernels.ctypes.CDLL

    def no_exec(file: str) -> object:
        if "cache" in file:
            raise OSError(f"{file}: failed to map segment from shared object")
        return load(file)

    monkeypatch.setattr(kernels.ctypes, "CDLL", no_exec)
    monkeypatch.setattr(kernels.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = kernels.load().file
    assert file.parent == tmp_path / "temporary" / f"opencola-{os.getuid()}"
    assert file.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(kernels, "USER", os.getuid() + 1)  # what is there is another's
    with pytest.raises(kernels.NotCompiled, match=r"cache/opencola: .*failed to map.*; .*another user's"):
        kernels.load()


@pytest.mark.usefixtures("need_kernels")
@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
def test_no_folder_is_named_like_the_home_folder(variable: str, tmp_path: Path) -> None:
    """Neither where nobody knows it (HOME empty or ~, no such user), nor where the environment says ~."""
    code = (
        "import pwd; pwd.getpwuid = lambda uid: {}[uid]; from opencola.kernels.library import load as l; print(l()[0])"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    environment |= {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(kernels.__file__).parents[2])}
    where = tmp_path / f"opencola-{os.getuid()}"
    if variable == "XDG_CACHE_HOME":
        environment |= {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": "~/cache"}
        where = tmp_path / "home" / "cache" / "opencola"
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert Path(said.stdout.strip()).parent == where and not (tmp_path / "~").exists()


def test_kernels_that_are_switched_off_are_not_said_to_be_there(tmp_path: Path) -> None:
    said = say(tmp_path, OPENCOLA_KERNELS="0")
    assert said.returncode == 1 and "OPENCOLA_KERNELS is 0" in said.stderr and not [*tmp_path.iterdir()]
