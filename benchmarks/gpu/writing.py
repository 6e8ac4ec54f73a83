"""Generation on the device, with weights in bfloat16 that are drawn there."""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import generation_flops
from benchmarks.gpu.device import forget_peak, peak_bytes, seconds, synchronise
from opencola.models.cola.model import Cola
from opencola.models.cola.parts import ColaConfig
from opencola.models.cola.sampling import ColaSampling


def model(config: ColaConfig, device: torch.device) -> Cola:
    """Random weights in bfloat16, made on the device: nothing passes through the memory of the CPU."""
    torch.manual_seed(0)
    with torch.device("meta"):
        cola = Cola(config).to(torch.bfloat16)
    cola = cola.to_empty(device=device).eval().requires_grad_(False)
    for name, weight in cola.named_parameters():
        torch.nn.init.normal_(weight, mean=float("norm" in name and name.endswith("weight")), std=0.02)
    return cola


def size_of(built: Callable[[], Cola], device: torch.device) -> dict[str, Any]:
    """Parameters, bytes and seconds of the model that is built."""
    forget_peak(device)
    start = time.perf_counter()
    cola = built()
    synchronise(device)
    return {
        "parameters": sum(p.numel() for p in cola.parameters()),
        "weight_bytes": sum(p.nbytes for p in cola.parameters()),
        "built_in_seconds": round(time.perf_counter() - start, 2),
        "peak_bytes": peak_bytes(device),
    }


def write(cola: Cola, batch: int, device: torch.device, new: int, prompt: int = 64, steps: int = 16) -> dict[str, Any]:
    """Figures of `new` tokens after each of `batch` prompts."""
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(cola.vocab_size, (batch, prompt), generator=draw).tolist()
    sampling = ColaSampling(max_new_tokens=new, steps=steps, guidance=7.0)

    def run() -> list[Any]:
        return list(cola.generate(prompts, sampling))

    start = time.perf_counter()
    blocks = run()
    first = time.perf_counter() - start
    forget_peak(device)
    each = seconds(run, device)
    return {
        "batch": batch,
        "new": new,
        "written": sum(len(out.tokens) for block in blocks for out in block),
        "first_seconds": round(first, 3),
        "seconds": each,
        "tokens_per_second": round(batch * new / each, 1),
        "flops": generation_flops(cola, batch, prompt, new, steps),
        "peak_bytes": peak_bytes(device),
    }
