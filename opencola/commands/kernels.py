"""Show what computes on this machine's CPU: the kernels in C, and whose matrix products are the fastest.

Products are timed once for a number of threads, in a second or two, and the rates kept in the cache folder.
OPENCOLA_PRODUCTS in the environment fixes whose are used: torch, onednn or ours; OPENCOLA_KERNELS=0 leaves the kernels
out.

examples:
  opencola kernels
  opencola kernels --threads 1 --json
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opencola.evaluation import screen
from opencola.kernels import matmul
from opencola.kernels.build import NotCompiled
from opencola.kernels.library import load
from opencola.ranges import Count, check
from opencola.run import flags
from opencola.text.lines import append_objects


@dataclass(frozen=True, kw_only=True)
class KernelsFlags(flags.OutputFlags):
    """For how many threads."""

    threads: Count | None = None
    """Number of threads that products are timed with; torch's own when not given."""

    def __post_init__(self) -> None:
        check(self)


def command(argv: Sequence[str]) -> None:
    """Run `opencola kernels`."""
    options: KernelsFlags = flags.parse(KernelsFlags, argv, prog="opencola kernels", description=__doc__)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    records = list(products(torch.get_num_threads()))
    try:
        options.say(str(load()))
    except NotCompiled as error:
        options.say(f"no kernels, torch does it all: {error}")
    if options.json:
        append_objects(sys.stdout, records)
        return
    ways = list(dict.fromkeys(name for record in records for name in record["gflops"]))
    table = screen.table("product", "used", *(f"{way}, GFLOP/s" for way in ways), words=(0, 1), whole=(0, 1))
    for record in records:
        rates = (f"{record['gflops'][way]:,.0f}" if way in record["gflops"] else "-" for way in ways)
        table.add_row(f"{record['precision']} {record['direction']} {record['size']}", record["used"], *rates)
    screen.put(table)


def products(threads: int) -> Iterator[dict[str, Any]]:
    """A record for every kind of product: its rates, and whose is used."""
    used, rates = matmul.choices(threads), matmul.rates(threads)
    for (precision, direction, size), by in used.items():
        names = [
            name if kind == precision else f"{name} in {kind}"
            for kind, ways in matmul.IMPLEMENTATIONS.items()
            for name, way in ways.items()
            if way is by
        ]
        record = {"precision": precision, "direction": direction, "size": size, "threads": threads, "used": names[0]}
        yield record | {"shape": matmul.SIZES[size], "gflops": rates[f"{precision} {direction} {size}"]}
