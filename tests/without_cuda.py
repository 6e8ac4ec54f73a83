"""Let torch's CUDA build load where NVIDIA's libraries are not installed, by libraries that have no device to offer.

    python tests/without_cuda.py SITE_PACKAGES

A CUDA build computes on a CPU as any other, but is linked to 3 GB of NVIDIA's packages. What it asks of them is made
here: every function returns 100, cudaErrorNoDevice.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

OWN = re.compile("cu|nccl")


def said(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def make(file: Path, functions: list[str], version: str) -> None:
    """A library of these functions, under one version, as NVIDIA's have it, or none."""
    with tempfile.TemporaryDirectory() as scratch:
        source, versions = Path(scratch, "functions.c"), Path(scratch, "versions")
        source.write_text("".join(f"long {name}(void) {{ return 100; }}\n" for name in functions))
        versions.write_text(f"{version} {{ global: *; }};")
        options = ["-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{file.name},--version-script,{versions}"]
        subprocess.run(["cc", *options, str(source), "-o", str(file)], check=True)


def main() -> None:
    """Write the libraries into torch/lib, where torch looks first."""
    folder = Path(sys.argv[1], "torch", "lib")
    files = [str(file) for file in sorted(folder.glob("lib*.so"))]
    linked = said("objdump", "-p", *files)
    needed = sorted(set(re.findall(r"NEEDED +(lib(?:cu|nccl|nv)[\w-]*\.so\.\d+)", linked)))
    versions = dict(re.findall(r"required from (\S+):\n +\S+ \S+ \S+ (\S+)", linked))
    asked = set(re.findall(r" U (\w+)(?:@(\S+))?$", said("nm", "-D", *files), re.MULTILINE))
    for name in needed:
        of_it = versions.get(name, "")
        make(folder / name, sorted(f for f, version in asked if version == of_it and (of_it or OWN.match(f))), of_it)
    print(f"{len(needed)} libraries without a device in {folder}")


if __name__ == "__main__":
    main()
