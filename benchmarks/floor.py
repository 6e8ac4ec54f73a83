"""The floor of a computation: its useful operations at the best rate that anything on this machine reaches."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from opencola.kernels import matmul, rows

SHAPES = ((1024, 1024, 1024), (4096, 512, 2048))
MEGABYTES = 256


@dataclass(frozen=True)
class Floor:
    """What the machine does with the threads that torch has, now."""

    gflops: float
    """Best rate of large products, 10^9 operations a second."""
    by: str
    """Whose that is."""
    gbytes: float
    """Rate of copying memory that no cache holds, read and written, 10^9 bytes a second."""

    def seconds(self, operations: float) -> float:
        """The least time that so many operations take."""
        return operations / self.gflops / 1e9

    def ratio(self, seconds: float, operations: float) -> float:
        """How far above the floor a time is. Raises ValueError below it: then the floor is not one."""
        ratio = seconds / self.seconds(operations)
        if ratio < 1:
            raise ValueError(
                f"{seconds:.4g} s are {ratio:.3f} of the floor: {operations:.4g} operations are not all useful, or "
                f"something does more than {self.gflops:.0f} GFLOP/s ({self.by}); mend the count or the probe"
            )
        return ratio

    def best(self, other: "Floor") -> "Floor":
        """Of two probes, around what is measured, the faster of each."""
        faster = max(self, other, key=lambda floor: floor.gflops)
        return Floor(faster.gflops, faster.by, max(self.gbytes, other.gbytes))


def probe(bf16: bool = False, repeats: int = 10, memory: bool = True) -> Floor:
    """Take the rates: of float32 products, or of what bfloat16 reaches, whichever implementation.

    memory: the memory's, too, for which twice MEGABYTES are taken; 0 without.
    """
    rates = {f"{name}, {m} x {k} x {n}": rate for m, k, n in SHAPES for name, rate in _rates(m, k, n, bf16, repeats)}
    best = max(rates, key=lambda name: rates[name])
    if not memory:
        return Floor(rates[best], best, 0.0)
    source = torch.zeros(MEGABYTES << 18)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / best_seconds(lambda: target.copy_(source), 3)
    return Floor(rates[best], best, copied / 1e9)


def _rates(m: int, k: int, n: int, bf16: bool, repeats: int) -> list[tuple[str, float]]:
    x, weight = torch.randn(m, k), torch.randn(n, k)
    ways: dict[str, Callable[[], object]] = {
        f"{name} {precision}": lambda by=by: by(x, weight, None)  # type: ignore[misc]
        for precision in (("float32", "bfloat16") if bf16 else ("float32",))
        for name, by in matmul.candidates(precision).items()  # type: ignore[arg-type]
    }
    if "ours float32" in ways:
        packed, index = rows.pack(weight), torch.empty(0)
        ways["ours, packed, float32"] = lambda: rows.product(x, packed, None, n, index)
    if bf16:
        narrow_x, narrow_weight = x.bfloat16(), weight.bfloat16()
        ways["torch bfloat16 throughout"] = lambda: narrow_x @ narrow_weight.T
    return [(name, 2e-9 * m * k * n / least) for name, least in matmul.in_turns(ways, repeats).items()]


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    """The shortest of several runs."""
    return matmul.in_turns({"": run}, repeats)[""]
