"""The kernels are compiled once, and where they cannot be, torch does it all and says why."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from opencola.kernels import build
from opencola.kernels import library as kernels


@pytest.fixture(autouse=True)
def compiled_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast the kernels are is not what is tested."""
    monkeypatch.setenv("CC", f"{os.environ.get('CC') or 'cc'} -O0")


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
        "import pwd; pwd.getpwuid = lambda uid: {}[uid]; from opencola.kernels.library import load; print(load().file)"
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


@pytest.mark.usefixtures("need_kernels")
def test_without_a_compiler_those_of_the_wheel_are_loaded(tmp_path: Path) -> None:
    """The best that the processor can run, by torch's OpenMP; and none for `native`, or where its file is damaged."""
    *_, least = build.runnable()
    file = tmp_path / f"{least}.so"
    build.compile_kernels(file, least)
    code = f"""
from pathlib import Path
from opencola.kernels import library
library.PREBUILT = Path({str(tmp_path)!r})
print(library.load().about, library.usable(library.torch.ones(1)))
"""
    environment = os.environ | {"CC": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"{least}, of the wheel: ") and "no-such-compiler" in said and said.endswith(" True\n")
    environment["OPENCOLA_KERNELS"] = "native"
    assert "NotCompiled" in subprocess.run(command, env=environment, capture_output=True, text=True).stderr
    environment["OPENCOLA_KERNELS"] = "1"
    file.write_bytes(b"")
    assert "NotCompiled" in subprocess.run(command, env=environment, capture_output=True, text=True).stderr


def test_values_of_the_variable_are_known(tmp_path: Path) -> None:
    said = say(tmp_path, OPENCOLA_KERNELS="x86-64-v9")
    assert said.returncode == 2 and said.stderr.count("\n") == 1
    assert "OPENCOLA_KERNELS is 'x86-64-v9'" in said.stderr and "0, 1, native, x86-64-v4-bf16" in said.stderr
    others = {name for names in build.VARIANTS.values() for name in names} - {*build.runnable()}
    said = say(tmp_path, OPENCOLA_KERNELS=min(others))
    assert said.returncode == 1 and f"OPENCOLA_KERNELS is {min(others)}, and this processor can run" in said.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
@pytest.mark.usefixtures("need_kernels")
def test_a_fork_does_not_wait_for_its_parents_threads(tmp_path: Path) -> None:
    """The kernels' and torch's, of which only the parent has the second."""
    code = """
import os, torch
from opencola.kernels import elementwise
torch.set_num_threads(2)
x = torch.randn(512, 256)
here = elementwise.gelu(x), x @ x.T
if os.fork() == 0:
    there = elementwise.gelu(x), x @ x.T
    os._exit(0 if torch.equal(here[0], there[0]) and there[1].isfinite().all() else 1)
print(os.waitstatus_to_exitcode(os.wait()[1]), torch.get_num_threads())
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.communicate(timeout=120)[0] == "0 2\n"
    finally:
        with contextlib.suppress(ProcessLookupError):  # a child that waits forever, too
            os.killpg(process.pid, signal.SIGKILL)


def test_kernels_that_are_switched_off_are_not_said_to_be_there(tmp_path: Path) -> None:
    said = say(tmp_path, OPENCOLA_KERNELS="0")
    assert said.returncode == 1 and "OPENCOLA_KERNELS is 0" in said.stderr and not [*tmp_path.iterdir()]
