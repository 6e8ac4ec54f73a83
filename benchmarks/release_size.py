"""The public 2 B size: writes a sharded checkpoint of random weights, loads it, and generates a block.

    .venv/bin/python -m benchmarks.release_size [--folder DIR] [--dtype bf16|fp32] [--threads N]

Needs 4 GB of disk (the checkpoint is written in bfloat16 and kept in DIR, if given, for the next run), and memory for
the weights in the dtype asked for. One JSON line; peaks are the processes' own, the parts of files in memory included.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from opencola.checkpoints import official
from opencola.flow.dit import BlockCausalDiT, DiTConfig
from opencola.models.cola.sampling import ColaSampling
from opencola.text.lines import dump
from opencola.vae.text_vae import TextVAE, TextVAEConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DIT = DiTConfig(width=2048, num_layers=24, num_heads=16, head_dim=128, rope_dim=96, block_size=16)
VAE = TextVAEConfig(
    vocab_size=100278,
    width=1536,
    ffn_dim=6144,
    num_heads=12,
    encoder_layers=4,
    decoder_layers=4,
    attention="block_causal",
    block_size=16,
)


def write(root: Path) -> None:
    """Random weights in the release's layout, in shards of 1 GB."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    bounds: dict[str, Any] = {"dtype": torch.bfloat16, "max_shard_bytes": 10**9}
    official.save_vae(TextVAE(VAE), root / official.VAE_FOLDER, **bounds)
    official.save_dit(BlockCausalDiT(DIT), root / official.DIT_FOLDER, **bounds)


def load_and_generate(root: Path, dtype: str, threads: int) -> dict[str, Any]:
    """Seconds and memory of loading, and of generating one block after a prompt of 64 tokens."""
    torch.set_num_threads(threads)
    idle = peak_bytes()
    start = time.perf_counter()
    cola = official.load(root, DTYPES[dtype]).eval()
    loaded = time.perf_counter()
    weights = sum(p.numel() * p.element_size() for p in cola.parameters())
    figures = {
        "parameters": sum(p.numel() for p in cola.parameters()),
        "dtype": dtype,
        "threads": threads,
        "weight_bytes": weights,
        "load_seconds": round(loaded - start, 2),
        "load_peak_over_weights": round((peak_bytes() - idle) / weights, 3),
    }
    list(cola.generate([list(range(64))], ColaSampling(max_new_tokens=16, steps=16)))
    return figures | {
        "block_seconds": round(time.perf_counter() - loaded, 2),
        "generate_peak_over_weights": round((peak_bytes() - idle) / weights, 3),
    }


def peak_bytes() -> int:
    """Largest memory of this process so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Write, load and generate, the latter two in a process of their own."""
    parser = argparse.ArgumentParser(description="The public 2 B size.")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is to be written")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of the loaded weights")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    new_process = multiprocessing.get_context("spawn").Pool
    with tempfile.TemporaryDirectory() as scratch:
        root = options.folder or Path(scratch)
        if not (root / official.DIT_FOLDER / official.CONFIG).exists():
            with new_process(1) as pool:
                pool.apply(write, (root,))
        with new_process(1) as pool:
            print(dump(pool.apply(load_and_generate, (root, options.dtype, options.threads))), flush=True)


if __name__ == "__main__":
    main()
