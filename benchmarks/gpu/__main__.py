"""The check for the day on which a GPU is at hand: parity, training, generation and the public size, in 8 minutes.

    python -m benchmarks.gpu [--out FOLDER] [--seconds N] [--device cuda] [--part NAME] [--tiny]

Writes gpu.jsonl (a line a row, as soon as it is measured), gpu.json and gpu.md into the folder. Every part runs in a
process of its own and every row by itself: what fails or takes too long leaves its traceback, and the rest goes on.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import report

GRACE = 5  # seconds that a process has to notice by itself that its time is over


def main() -> None:
    """Run the parts that the command line asks for, or, as a child of that, the rows of one."""
    parser = argparse.ArgumentParser(description="Check and measure OpenCola on a GPU.")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=460, help="time in all")
    parser.add_argument("--device", default="cuda", help="device, as torch names it")
    parser.add_argument("--part", action="append", help="part to run, may be given several times; all when not given")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to test the check itself on a CPU")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # in a child: where the rows go
    options = parser.parse_args()
    if options.rows:
        run_rows(options.part[0], options)
    else:
        run_parts(options)


def run_parts(options: argparse.Namespace) -> None:
    """Every part in a process of its own; the results are written after each."""
    from benchmarks.gpu.parts import PARTS

    begin = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = options.out / "gpu.jsonl"
    lines.write_text("")
    names = options.part or [*PARTS]
    if unknown := [name for name in names if name not in PARTS]:
        sys.exit(f"there is no part {unknown[0]!r}; there are: {', '.join(PARTS)}")
    for name in names:
        left = options.seconds - (time.monotonic() - begin) - GRACE
        seconds = left if options.tiny else min(PARTS[name][0], left)
        say(f"{name}: {seconds:.0f} s at most, {left:.0f} s left")
        ended = "the time was over before it began" if seconds < 1 else child(name, seconds, lines, options)
        if ended:
            add(lines, name, "(the part)", {"error": ended})
        report(options.out, time.monotonic() - begin)
    say(f"results: {options.out / 'gpu.md'}")


def child(name: str, seconds: float, lines: Path, options: argparse.Namespace) -> str | None:
    """Run one part in a process of its own; what went wrong with the process as a whole, if anything did."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--rows", str(lines), "--device", options.device]
    command += ["--seconds", str(seconds), *(["--tiny"] if options.tiny else [])]
    process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
    try:
        code = process.wait(seconds + GRACE)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds + GRACE:.0f} s; the rows that are missing were not reached"
    finally:
        if process.poll() is None:  # the compiler's workers, too
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return None if code == 0 else f"the process ended with code {code}"


def run_rows(part: str, options: argparse.Namespace) -> None:
    """Measure the rows of a part, each by itself, until they are done or the time is over."""
    begin = time.monotonic()
    import torch

    from benchmarks.gpu.parts import PARTS, Where

    for name, measure in PARTS[part][1](Where(torch.device(options.device), options.tiny)):
        start = time.monotonic()
        if start - begin > options.seconds:
            add(options.rows, part, name, {"error": "the time of this part was over"})
            continue
        try:
            found = measure()
        except Exception:
            found = {"error": traceback.format_exc()[-4000:]}
        add(options.rows, part, name, {**found, "row_seconds": round(time.monotonic() - start, 1)})


def add(lines: Path, part: str, name: str, found: dict[str, Any]) -> None:
    """Append a row, so that it outlives whatever comes next."""
    say(f"  {part}, {name}: {'FAILED' if 'error' in found else 'done'} {found.get('row_seconds', '')}")
    with lines.open("a") as file:
        file.write(json.dumps({"part": part, "row": name, **found}) + "\n")


def say(text: str) -> None:
    """Tell what is going on."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
