"""What a log-density of the prior costs: evaluations, seconds and memory per token, and how they grow.

    .venv/bin/python -m benchmarks.likelihood [--threads N] [--repeats N]

A DiT of width 128, 4 layers, blocks of one latent (the demo's); 128 latents of 16 channels, 4 samples, RK4 with 4
steps, one probe; then one of these changed at a time. One JSON line a point. Tokens are latents of one text (patch size
1), those behind its prompt, however many samples K are drawn for it. Memory is what the solve adds to the process's
peak, each point in a process of its own.
"""

import argparse
import multiprocessing
import resource
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common import without_zeros
from benchmarks.floor import best_seconds
from opencola.flow.dit import DiTConfig
from opencola.flow.likelihood import Likelihood
from opencola.models.cola.model import Cola
from opencola.models.cola.parts import ColaConfig
from opencola.models.cola.score import Scoring, log_prior
from opencola.text.lines import dump
from opencola.vae.text_vae import TextVAEConfig

BASE = {"num_latents": 128, "latent_dim": 16, "block_size": 1, "prompt": 0}
SCORING = Scoring(solver="rk4", steps=4, samples=4)
POINTS: list[tuple[str, dict[str, int], dict[str, Any]]] = [
    ("base", {}, {}),
    *(("N", {"num_latents": n}, {}) for n in (32, 512)),
    ("prompt", {"num_latents": 512, "prompt": 504}, {}),
    *(("K", {}, {"samples": k}) for k in (1, 16)),
    *(("probes", {}, {"probes": m}) for m in (4, 16)),
    *(("d, exact", {"latent_dim": d}, {"divergence": "exact"}) for d in (4, 16, 64)),
    ("S, exact", {"block_size": 4}, {"divergence": "exact"}),
    *(("solver", {}, {"solver": solver}) for solver in ("euler", "midpoint", "heun")),
    *(("tolerance", {}, {"solver": "dopri5", "tolerance": tolerance}) for tolerance in (1e-2, 1e-3)),
]


def point(axis: str, sizes: dict[str, int], fields: dict[str, Any], threads: int, repeats: int) -> dict[str, Any]:
    """Time one point."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sizes, settings = BASE | sizes, replace(SCORING, **fields)
    dim, block = sizes["latent_dim"], sizes["block_size"]
    vae = TextVAEConfig(latent_dim=dim)
    cola = Cola(
        ColaConfig(vae=vae, dit=DiTConfig(latent_dim=dim, block_size=block, head_dim=16, num_heads=8, rope_dim=12))
    )
    without_zeros(cola.dit)  # a velocity of zero would cost dopri5 nothing
    cola.requires_grad_(False)
    z_0 = torch.randn(settings.samples, sizes["num_latents"], dim)
    free = (torch.arange(sizes["num_latents"]) >= sizes["prompt"]).expand(settings.samples, -1)
    keys = [(0, sample) for sample in range(settings.samples)]
    warm = replace(settings, solver="euler", steps=1, divergence="hutchinson", probes=1)
    log_prior(cola, z_0[:1, :block], keys[:1], warm)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    evaluations = log_prior(cola, z_0, keys, settings, free).evaluations
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    seconds = best_seconds(lambda: log_prior(cola, z_0, keys, settings, free), repeats)
    tokens = sizes["num_latents"] - sizes["prompt"]
    line: dict[str, Any] = {"axis": axis, **sizes, "samples": settings.samples, "settings": Likelihood.label(settings)}
    line |= {"evaluations": evaluations, "evaluations_per_token": round(evaluations / tokens, 3)}
    line |= {"ms_per_token": round(1e3 * seconds / tokens, 3), "bytes_per_token": round(peak / tokens)}
    return line | {"us_per_token_sample_evaluation": round(1e6 * seconds / tokens / settings.samples / evaluations, 1)}


def main() -> None:
    """Time every point."""
    parser = argparse.ArgumentParser(description="Cost of the prior's log-density.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=2, help="runs, of which the best counts")
    options = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for arguments in POINTS:
            print(dump(pool.apply(point, (*arguments, options.threads, options.repeats))), flush=True)


if __name__ == "__main__":
    main()
