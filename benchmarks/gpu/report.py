"""One JSON file and one page of Markdown of the rows that are there, however few."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

COLUMNS = {
    "seconds": ("s a run", lambda value: f"{value:.4g}"),
    "tokens_per_second": ("tokens/s", lambda value: f"{value:,.0f}"),
    "mfu_measured": ("of the measured rate", lambda value: f"{value:.1%}"),
    "mfu_stated": ("of the stated peak", lambda value: f"{value:.1%}"),
    "peak_bytes": ("peak, GB", lambda value: f"{value / 1e9:.2f}"),
    "loss": ("loss", lambda value: f"{value:.5f}"),
    "first_step_seconds": ("first, s", lambda value: f"{value:.1f}"),
    "first_seconds": ("first, s", lambda value: f"{value:.2f}"),
    "graphs": ("graphs", str),
    "parameters": ("parameters", lambda value: f"{value:,}"),
    "weight_bytes": ("weights, GB", lambda value: f"{value / 1e9:.2f}"),
    "built_in_seconds": ("built in, s", lambda value: f"{value:.2f}"),
    "passed": ("passed", str),
    "failed": ("failed", str),
    "skipped": ("skipped", str),
}


def report(folder: Path, took: float) -> None:
    """Write gpu.json and gpu.md of the lines in gpu.jsonl; a line that is not whole is passed over."""
    rows = with_rates(read(folder / "gpu.jsonl"))
    (folder / "gpu.json").write_text(json.dumps({"seconds": round(took, 1), "rows": rows}, indent=1))
    (folder / "gpu.md").write_text("\n".join(page(rows, took)) + "\n")


def read(file: Path) -> list[Row]:
    """The rows; the last may have been cut off."""
    rows = []
    for line in file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def with_rates(rows: list[Row]) -> list[Row]:
    """With the share of the device's rate that a row's useful operations have, where both are known."""
    facts: Row = {}
    for row in rows:
        facts |= row if row["part"] == "device" else {}
    stated = stated_peak(facts.get("name", ""))
    out = []
    for row in rows:
        if row.get("flops") and row.get("seconds"):
            rate = row["flops"] / row["seconds"]
            for name, peak in (("mfu_measured", facts.get("bf16_flops")), ("mfu_stated", stated)):
                row = row | ({name: round(rate / peak, 4)} if peak else {})
        out.append(row)
    return out


def stated_peak(device: str) -> float | None:
    """Dense bfloat16 products of a device, operations a second by its data sheet, if it is one of those known."""
    try:
        from opencola.run.dry_run import GPUS
    except ImportError:  # what recipes need is not there
        return None
    return next((1e12 * gpu.bf16 for name, gpu in GPUS.items() if name in device), None)


def page(rows: list[Row], took: float) -> Iterable[str]:
    """Tables part by part, then what went wrong."""
    yield from ("# OpenCola on a GPU", "", f"{took:.0f} s in all. Figures are rounded here; gpu.json has them whole.")
    for part in dict.fromkeys(row["part"] for row in rows):
        of_part = [row for row in rows if row["part"] == part]
        yield from ("", f"## {part}", "")
        if part == "device":
            yield from (f"- {name}: {value}" for row in of_part for name, value in row.items() if name not in NOT_SHOWN)
            continue
        columns = [name for name in COLUMNS if any(name in row and row[name] is not None for row in of_part)]
        yield from line("row", *(COLUMNS[name][0] for name in columns), "", head=True)
        for row in of_part:
            cells = (COLUMNS[name][1](row[name]) if row.get(name) is not None else "" for name in columns)
            yield from line(row["row"], *cells, "FAILED" if row.get("error") or row.get("failed") else "")
        for row in of_part:
            if row.get("kernels"):
                yield from ("", f"Busiest kernels of {row['row']}, a run:", "")
                yield from line("kernel", "calls", "µs", head=True)
                for kernel in row["kernels"]:
                    name = kernel["kernel"].replace("|", "\\|")
                    yield from line(f"`{name}`", f"{kernel['calls']:g}", f"{kernel['microseconds']:,.0f}")
    for row in rows:
        failures = {"": row["error"]} if row.get("error") else row.get("failures", {})
        for name, text in failures.items():
            yield from ("", f"## Failed: {row['part']}, {row['row']} {name}".rstrip(), "", "```", text.strip(), "```")


NOT_SHOWN = {"part", "row", "row_seconds", "error"}


def line(*cells: str, head: bool = False) -> Iterable[str]:
    """A row of a table; of its head, with the rule below."""
    yield f"| {' | '.join(cells)} |"
    if head:
        yield f"|{'---|' * len(cells)}"
