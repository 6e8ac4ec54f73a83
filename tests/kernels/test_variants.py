"""The kernels' tests again, with kernels by other compilers and for other processors: a program of pytest for each."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from needed import lacking, need

from opencola.kernels import build

HERE = Path(__file__).parent
OTHERS = ("bfloat16", "choice", "library", "matmul", "variants", "wheel")
# Of tests, and of calls of theirs: elsewhere.py may leave out others.
LEAST = 700 // int(os.environ.get("OPENCOLA_EVERY", "1"))
TESTS = sorted(map(str, {*HERE.glob("test_*.py")} - {HERE / f"test_{name}.py" for name in OTHERS}))


def passes(folder: Path, *options: str, **environment: str) -> str:
    """Run the tests; all must pass, and none be skipped. What was printed."""
    own = {"XDG_CACHE_HOME": str(folder), "PYTHONPATH": str(HERE.parent), "OPENCOLA_PRODUCTS": "torch"}
    environment = os.environ | own | environment
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options, *TESTS]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1]).stdout
    summary = re.search(r"^(\d+) passed(, \d+ warnings?)? in .*$", said, re.MULTILINE)
    assert summary and int(summary[1]) > LEAST, said
    return said


@pytest.mark.slow
def test_clang(tmp_path: Path) -> None:
    """Its threads are of another OpenMP than torch's."""
    environment = {"CC": need("clang", "clang libomp-dev"), "OPENCOLA_KERNELS": build.NATIVE}
    passes(tmp_path, **environment)
    command = [sys.executable, "-m", "opencola.kernels"]
    environment |= {"XDG_CACHE_HOME": str(tmp_path)}
    said = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stdout
    assert said.endswith("(native, compiled by clang)\n")


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "compiler"), [("x86-64-v3", "cc"), ("armv8-a", "aarch64-linux-gnu-gcc")])
def test_called_from_another_program(
    variant: str, compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In which what lies behind a tensor can be neither read nor written; that for aarch64 is emulated."""
    emulator = ""
    if variant == "armv8-a":
        emulator = f"{need('qemu-aarch64', 'qemu-user')} -L /usr/aarch64-linux-gnu "
    elif variant not in build.runnable():
        lacking(f"this processor cannot run {variant}")
    monkeypatch.setenv("CC", need(compiler, "gcc or gcc-aarch64-linux-gnu"))
    driver, kernels = tmp_path / "driver", tmp_path / "kernels.so"
    openmp = ["-Wl,--no-as-needed", "-fopenmp", "-ldl"]
    subprocess.run([compiler, "-O1", str(HERE / "driver.c"), *openmp, "-o", str(driver)], check=True)
    build.compile_kernels(kernels, variant)
    said = passes(tmp_path, "-s", "-p", "elsewhere", OPENCOLA_ELSEWHERE=f"{emulator}{driver} {kernels}")
    calls = re.search(r"^(\d+) calls elsewhere, which ended with 0$", said, re.MULTILINE)
    assert calls and int(calls[1]) > LEAST, said


def test_the_best_variant_is_what_the_c_library_finds() -> None:
    """Which tells it itself, from glibc 2.33 on."""
    loader = "/lib64/ld-linux-x86-64.so.2"
    said = subprocess.run([loader, "--help"], capture_output=True, text=True).stdout if Path(loader).exists() else ""
    if "x86-64-v2" not in said:
        pytest.skip("this C library does not say")
    found = [name for name in build.runnable() if not name.endswith("bf16")]
    assert found == re.findall(r"^  (x86-64-v\d) \(supported", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "variants"),
    [
        ("x86_64", f"processor: 0\nflags\t\t: fpu {build._V3} ibrs\n", ["x86-64-v3", "x86-64-v2"]),
        ("x86_64", f"flags\t\t: {build._V4.replace('avx512dq', '')}\nflags: {build._V4}", ["x86-64-v3", "x86-64-v2"]),
        ("x86_64", f"flags\t\t: {build._V4} avx512_bf16", [*build.VARIANTS["x86_64"]]),
        ("x86_64", f"bugs: {build._V4}\nflags\t\t: fpu sse sse2", []),
        ("x86_64", "", []),
        ("aarch64", "processor\t: 0\nFeatures\t: fp asimd evtstrm\n", ["armv8-a"]),
        ("riscv64", "isa: rv64imafdc\n", []),
    ],
)
def test_a_processor_is_given_what_its_flags_allow(machine: str, cpuinfo: str, variants: list[str]) -> None:
    assert build.runnable(machine, cpuinfo) == variants
