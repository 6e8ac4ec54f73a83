"""Training on the device in bfloat16: by the package's attention or under a dense mask, compiled or not."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.common import PRIOR, training_flops, without_zeros
from benchmarks.gpu.device import busiest, forget_peak, peak_bytes, seconds, synchronise
from opencola.data.batch import Batch
from opencola.layers.attention import Attend, attention
from opencola.layers.compiling import compile_blocks
from opencola.layers.masks import PackedRows
from opencola.models.cola.model import Cola
from opencola.models.cola.parts import ColaConfig


@dataclass(frozen=True)
class Way:
    """How a step is computed."""

    attention: Literal["own", "dense"] = "own"
    """The package's (on CUDA FlexAttention), or torch's under a dense mask."""
    compile: bool = False
    documents: bool = False
    """Eight documents a sample, which do not see each other."""
    whole: bool = False
    """Draws, the VAE's encoder, gradient clipping and AdamW, too."""
    recompute: bool = False


WAYS = {
    "dense mask": Way(attention="dense"),
    "packed": Way(),
    "packed, compiled": Way(compile=True),
    "packed, compiled, whole step": Way(compile=True, whole=True),
    "packed, compiled, documents": Way(compile=True, documents=True),
    "dense mask, compiled": Way(attention="dense", compile=True),
}


def dense_packed(device: torch.device) -> Callable[..., Attend]:
    """`layers.packed.packed` by torch's attention under one dense mask, the plain way."""

    def packed(
        num_clean: int,
        num_latents: int,
        block_size: int,
        copies: int,
        history: Tensor | None = None,
        documents: Tensor | None = None,
        first: int = 0,
    ) -> Attend:
        rows = PackedRows(num_clean, num_latents, block_size, copies, first, history, documents)
        row, sample = torch.arange(rows.num_rows, device=device), torch.arange(rows.samples or 1, device=device)
        mask = rows.visible(sample[:, None, None], row[:, None], row).expand(len(sample), -1, -1)[:, None]
        return lambda layer, q, k, v: attention(q, k, v, mask[..., -q.shape[1] :, :])

    return packed


def step_of(cola: Cola, way: Way, batch: int, length: int, device: torch.device) -> Callable[[], Tensor]:
    """Forward and backward of the prior on random latents, or a whole step of training; gives the loss."""
    draw = torch.Generator().manual_seed(1)
    documents = (torch.arange(length) // max(1, length // 8)).expand(batch, -1).to(device) if way.documents else None
    if way.whole:
        tokens = torch.randint(cola.vocab_size, (batch, length), generator=draw)
        data = Batch(tokens, torch.arange(batch), seed=0, step=0, documents=documents).to(device)
        parameters = [p for p in cola.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    else:
        shape = (batch, 1, length, cola.dit.config.latent_dim)
        z_0, z_t, target = (torch.randn(shape, generator=draw).to(device) for _ in range(3))
        t = torch.rand(batch, 1, length // cola.dit.config.block_size, generator=draw).to(device)
        optimizer = None

    def step() -> Tensor:
        cola.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            if way.whole:
                loss = cola.loss(data).total
            else:
                velocity = cola.dit.packed(z_0[:, 0], z_t, t, documents=documents, recompute=way.recompute)
                loss = (velocity.float() - target).square().mean()
        loss.backward()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        return loss.detach()

    return step


def measure(
    config: ColaConfig,
    way: Way,
    batch: int,
    length: int,
    device: torch.device,
    kernels: bool = False,
    backend: str = "inductor",
) -> dict[str, Any]:
    """Figures of one way of training; kernels: with what the device's time goes to."""
    torch.compiler.reset()
    counters.clear()
    forget_peak(device)
    torch.manual_seed(0)
    cola = Cola(replace(config, prior=replace(PRIOR, recompute=way.recompute))).to(device)
    without_zeros(cola.dit)
    cola.freeze_parts()
    if way.compile:
        compile_blocks(cola.dit.blocks, backend)
    with mock.patch("opencola.flow.dit.packed", dense_packed(device)) if way.attention == "dense" else nullcontext():
        step = step_of(cola, way, batch, length, device)
        start = time.perf_counter()
        loss = step().item()
        first = time.perf_counter() - start
        for _ in range(2):
            step()
        synchronise(device)
        each = seconds(step, device)
        figures = {
            "batch": batch,
            "length": length,
            "parameters": sum(p.numel() for p in cola.dit.parameters()),
            "loss": loss,
            "first_step_seconds": round(first, 2),
            "seconds": each,
            "tokens_per_second": round(batch * length / each),
            "flops": training_flops(cola, batch, length),
            "peak_bytes": peak_bytes(device),
        }
        if way.compile:
            figures["graphs"] = counters["stats"]["unique_graphs"]
        return figures | ({"kernels": busiest(step, device)} if kernels else {})
