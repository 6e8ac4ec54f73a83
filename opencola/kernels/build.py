"""Compiling the kernels, for this processor or as the variants of a wheel, by the standard library alone.

A variant is for every processor that has the instructions of its level. None is linked with an OpenMP: torch has loaded
one by then, and a second would be threads beside threads.
"""

import os
import platform
import re
import shlex
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fopenmp", "-fPIC")
SOURCES = Path(__file__).parent
PREBUILT = SOURCES / "prebuilt"  # of an installed wheel
NATIVE = "native"
# Of each machine, best first: name, the compiler's options, and what the processor must have by /proc/cpuinfo.
_V2 = "cx16 lahf_lm pni popcnt sse4_1 sse4_2 ssse3"
_V3 = f"{_V2} abm avx avx2 bmi1 bmi2 f16c fma movbe xsave"
_V4 = f"{_V3} avx512bw avx512cd avx512dq avx512f avx512vl"
_BF16 = "-march=x86-64-v4 -mavx512bf16 -mamx-tile -mamx-bf16"  # tiles are used where the system allows them
VARIANTS = {
    "x86_64": {
        "x86-64-v4-bf16": (_BF16, f"{_V4} avx512_bf16"),
        "x86-64-v4": ("-march=x86-64-v4", _V4),
        "x86-64-v3": ("-march=x86-64-v3", _V3),
        "x86-64-v2": ("-march=x86-64-v2", _V2),
    },
    "aarch64": {"armv8-a": ("-march=armv8-a", "asimd")},
}


class NotCompiled(Exception):
    """There are no kernels; the message says why."""


def runnable(machine: str | None = None, cpuinfo: str | None = None) -> list[str]:
    """The variants that a processor can run, best first; that of this machine, unless its cpuinfo is given."""
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    has = {*found[1].split()} if found else set()
    variants = VARIANTS.get(machine or platform.machine(), {})
    return [name for name, (_, needs) in variants.items() if has >= {*needs.split()}]


def options(variant: str) -> list[str]:
    """The compiler's, for a variant or for NATIVE, this processor alone."""
    every = {name: given for variants in VARIANTS.values() for name, (given, _) in variants.items()}
    return every.get(variant, f"-march={variant}").split()


def compiler() -> list[str]:
    """The C compiler's command: CC of the environment, or cc."""
    first, *others = shlex.split(os.environ.get("CC") or "cc")
    return [os.path.expanduser(first), *others]


def compile_kernels(to: Path, variant: str) -> None:
    """Compile a variant, or NATIVE for this processor alone, into the file `to`. Raises NotCompiled."""
    with tempfile.TemporaryDirectory(dir=to.parent) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = {str(source): f"{folder}/{source.stem}.o" for source in sorted(SOURCES.glob("*.c"))}
        name, *own = compiler()  # whose own options have the last word
        command = [name, *FLAGS, *options(variant), *own, "-c"]
        list(pool.map(lambda pair: _run([*command, pair[0], "-o", pair[1]]), objects.items()))
        # Clang's threads are of its own OpenMP only; gcc's are found in torch's when the library is loaded.
        openmp = ["-fopenmp"] if any(b"__kmpc_" in Path(made).read_bytes() for made in objects.values()) else []
        _run([*compiler(), "-shared", *openmp, *objects.values(), "-o", str(to), "-lm"])


def compile_variants(folder: Path) -> tuple[list[Path], str]:
    """Files of all variants of the compiler's machine, and the platform of their wheel. Raises NotCompiled."""
    machine, _, system = _run([*compiler(), "-dumpmachine"]).strip().partition("-")
    if machine not in VARIANTS or not system.endswith("linux-gnu"):
        raise NotCompiled(f"there are no variants for {machine}-{system}")
    files = [folder / f"{name}.so" for name in VARIANTS[machine]]
    needed = 17  # of glibc, the second number of its version: no platform's name has a lower one
    for file in files:
        compile_kernels(file, file.stem)
        made = file.read_bytes()
        if b"__kmpc_" in made:
            raise NotCompiled(f"{compiler()[0]} wants an OpenMP that is not torch's: gcc does not")
        needed = max([needed, *map(int, re.findall(rb"\0GLIBC_2\.(\d+)", made))])
    return files, f"manylinux_2_{needed}_{machine}"


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    except subprocess.CalledProcessError as error:
        raise NotCompiled(f"{shlex.join(error.cmd)} failed:\n{error.stderr}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotCompiled(f"{error} (the compiler is named by CC)") from error
