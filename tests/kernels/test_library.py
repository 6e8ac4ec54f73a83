"""The kernels are compiled once, and where they cannot be, torch does it all and says why."""

import contextlib
import functools
import os
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from opencola.kernels import build
from opencola.kernels import library as kernels

# In the place of a C compiler: what it links is what a real one has made before.
COMPILER = """#!/bin/sh
for last; do :; done
case " $* " in *" -shared "*) while [ "$1" != -o ]; do shift; done; cp {library} "$2" ;; *) : > "$last" ;; esac
"""
Say = Callable[..., tuple[str, str]]


@pytest.fixture
def compiler(need_kernels: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile nothing again: the kernels of this processor are there."""
    script = tmp_path_factory.mktemp("compiler") / "cc"
    script.write_text(COMPILER.format(library=shlex.quote(str(kernels.load().file))))
    script.chmod(0o700)
    monkeypatch.setenv("CC", shlex.quote(str(script)))


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """`python -m opencola.kernels` in this process: what it prints, and its exit code and errors in one."""

    def run(folder: Path, **environment: str) -> tuple[str, str]:
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", None)
            for name, value in {"XDG_CACHE_HOME": str(folder), **environment}.items():
                patch.setenv(name, value)
            try:
                runpy.run_module("opencola.kernels", run_name="__main__")
            except SystemExit as stop:
                print(stop.code, file=sys.stderr)
        return capsys.readouterr()

    return run


@pytest.mark.usefixtures("need_kernels")
def test_several_processes_compile_one_library_once(say: Say, tmp_path: Path) -> None:
    """By the real compiler, whose work has the same bytes wherever it is done."""
    command = [sys.executable, "-m", "opencola.kernels"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "CC": f"{os.environ.get('CC') or 'cc'} -O0"}
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate()[0] for process in started}
    (library,) = (tmp_path / "opencola").iterdir()
    assert said == {f"kernels: {library} (native, compiled by cc)\n"}
    before = library.stat().st_mtime_ns
    assert say(tmp_path, CC=environment["CC"]) == (*said, "")
    assert library.stat().st_mtime_ns == before and [*(tmp_path / "opencola").iterdir()] == [library]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"CC": "no-such-compiler"}, "no-such-compiler"), ({"CC": "false"}, "false -std"), ({}, "cache is a file")],
)
def test_without_a_compiler_or_a_folder_the_reason_is_said(
    environment: dict[str, str], reason: str, say: Say, tmp_path: Path
) -> None:
    folder = tmp_path / "cache is a file"
    if not environment:
        folder.write_text("")
        temporary = tmp_path / f"opencola-{os.getuid()}"
        temporary.write_text("")
        environment = {"TMPDIR": str(tmp_path)}
    _, error = say(folder, **environment)
    assert error.startswith("no kernels, torch does it all: ") and reason in error


@pytest.mark.parametrize("environment", [{"CC": "no-such-compiler"}, {"OPENCOLA_KERNELS": "0"}])
def test_without_kernels_torch_does_it(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "library", functools.cache(kernels.library.__wrapped__))
    for name, value in {"XDG_CACHE_HOME": str(tmp_path), **environment}.items():
        monkeypatch.setenv(name, value)
    assert kernels.library() is None and not kernels.usable(torch.ones(1))


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


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-100], lambda data: data[:5000] + b"\0" * 9])
def test_a_damaged_library_is_made_anew(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    library = kernels.compile_library(tmp_path, build.NATIVE)
    whole = library.read_bytes()
    library.write_bytes(damage(whole))
    assert (kernels.compile_library(tmp_path, build.NATIVE), library.read_bytes()) == (library, whole)
    assert [*tmp_path.iterdir()] == [library]


@pytest.mark.usefixtures("compiler")
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


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
def test_no_folder_is_named_like_the_home_folder(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where nobody knows it (HOME empty or ~, no such user), nor where the environment says ~."""
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    where = tmp_path / f"opencola-{os.getuid()}"
    if variable == "XDG_CACHE_HOME":
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
        where = tmp_path / "home" / "cache" / "opencola"
    assert kernels.load().file.parent == where and not (tmp_path / "~").exists()


@pytest.mark.usefixtures("need_kernels")
def test_without_a_compiler_those_of_the_wheel_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best that the processor can run, by torch's OpenMP; and none for `native`, or where its file is damaged."""
    *_, least = build.runnable()
    made = kernels.load().file.read_bytes()
    for folder, content in (("whole", made), ("damaged", b"")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{least}.so").write_bytes(content)
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "library", functools.cache(kernels.library.__wrapped__))
    monkeypatch.setattr(kernels, "PREBUILT", tmp_path / "whole")
    loaded = kernels.load()
    assert loaded.file == tmp_path / "whole" / f"{least}.so" and kernels.usable(torch.ones(1))
    assert loaded.about.startswith(f"{least}, of the wheel: ") and "no-such-compiler" in loaded.about
    monkeypatch.setenv("OPENCOLA_KERNELS", "native")
    with pytest.raises(kernels.NotCompiled):
        kernels.load()
    monkeypatch.setenv("OPENCOLA_KERNELS", "1")
    monkeypatch.setattr(kernels, "PREBUILT", tmp_path / "damaged")
    with pytest.raises(kernels.NotCompiled):
        kernels.load()


def test_values_of_the_variable_are_known(say: Say, tmp_path: Path) -> None:
    _, error = say(tmp_path, OPENCOLA_KERNELS="x86-64-v9")
    assert error.endswith("\n2\n") and error.count("\n") == 2
    assert "OPENCOLA_KERNELS is 'x86-64-v9'" in error and "0, 1, native, x86-64-v4-bf16" in error
    others = {name for names in build.VARIANTS.values() for name in names} - {*build.runnable()}
    _, error = say(tmp_path, OPENCOLA_KERNELS=min(others))
    assert error.startswith("no kernels") and f"OPENCOLA_KERNELS is {min(others)}, and this processor can run" in error


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


def test_kernels_that_are_switched_off_are_not_said_to_be_there(say: Say, tmp_path: Path) -> None:
    said, error = say(tmp_path, OPENCOLA_KERNELS="0")
    assert (
        not said and error.startswith("no kernels") and "OPENCOLA_KERNELS is 0" in error and not [*tmp_path.iterdir()]
    )
