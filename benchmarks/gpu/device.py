"""Times, memory and rates of a device, with its queue emptied before every look at the clock."""

import time
from collections.abc import Callable
from typing import Any

import torch


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device, groups: int = 3) -> float:
    """Of one run: the best mean of several groups of runs, warmed up before. On a CPU hardly measured, only done."""
    lasting = 1.5 if device.type == "cuda" else 0.05  # all groups together

    def timed(count: int) -> float:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(count):
            run()
        synchronise(device)
        return (time.perf_counter() - start) / count

    once = timed(1)
    count = max(1, round(lasting / groups / max(once, 1e-6)))
    return min(timed(count) for _ in range(groups))


def forget_peak(device: torch.device) -> None:
    """Count the peak of the device's memory from here on."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most that torch has held at once since `forget_peak`; None where the device does not count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def about(device: torch.device) -> dict[str, Any]:
    """What it is, and what runs on it."""
    facts: dict[str, Any] = {"torch": torch.__version__, "device": device.type, "cuda": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "processors": properties.multi_processor_count,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        }
    return facts


def rates(device: torch.device, size: int) -> dict[str, Any]:
    """Of products of random square matrices, operations a second by type, and of a copy, bytes read and written."""
    found: dict[str, Any] = {"matrix": size}
    for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        found[f"{name}_flops"] = round(2 * size**3 / seconds(lambda a=a, b=b: a @ b, device))  # type: ignore[misc]
    source = torch.randn(8 * size, size, device=device)
    to = torch.empty_like(source)
    found["copy_bytes_per_second"] = round(2 * source.nbytes / seconds(lambda: to.copy_(source), device))
    return found


def busiest(run: Callable[[], object], device: torch.device, count: int = 15) -> list[dict[str, Any]]:
    """The kernels that take most of the device's time in three runs: name, calls and microseconds a run."""
    from torch.profiler import ProfilerActivity, profile

    runs, cuda = 3, device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as record:
        for _ in range(runs):
            run()
        synchronise(device)
    time_of = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(record.key_averages(), key=lambda event: -getattr(event, time_of))
    return [
        {"kernel": e.key[:120], "calls": e.count / runs, "microseconds": round(getattr(e, time_of) / runs, 1)}
        for e in events[:count]
    ]
