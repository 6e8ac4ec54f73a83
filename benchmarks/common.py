"""What both benchmarks share: the sizes, the machine's GEMM rate, timing, and the JSON line."""

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator

import torch

from opencola.flow.dit import DiTConfig
from opencola.interop import official
from opencola.models.cola import Cola, ColaConfig, PriorObjective
from opencola.vae.text_vae import TextVAEConfig

PRIOR = PriorObjective(strategy="fixed", noisy_copies=1, prompt_in_block=0.05, history_dropout=0.0, lambda_ref=0.0)


def _size(vocab_size: int, vae: tuple[int, int, int], dit: tuple[int, int, int]) -> ColaConfig:
    """Both widths, depths (of either half of the VAE) and numbers of heads; d = 16, block 16, heads of 64."""
    width, layers, heads = vae
    text_vae = TextVAEConfig(
        vocab_size=vocab_size,
        width=width,
        ffn_dim=4 * width,
        num_heads=heads,
        encoder_layers=layers,
        decoder_layers=layers,
        attention="block_causal",
        block_size=16,
    )
    width, layers, heads = dit
    prior = DiTConfig(width=width, num_layers=layers, num_heads=heads, head_dim=64, rope_dim=48, block_size=16)
    return ColaConfig(vae=text_vae, dit=prior, prior=PRIOR)


SIZES = {"S": _size(4096, (256, 2, 4), (256, 6, 4)), "M": _size(8192, (384, 4, 6), (512, 12, 8))}


def rows(description: str, batches: list[int]) -> Iterator[tuple[argparse.Namespace, str, int]]:
    """The (options, size, batch) rows that the command line asks for; all of them without options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size", choices=sorted(SIZES, reverse=True), help="S or M; both when not given")
    parser.add_argument("--batch", type=int, help=f"samples; {batches} when not given")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the best counts")
    parser.add_argument("--dit", help="folder of a DiT in the public format, in place of random weights of the size")
    parser.add_argument("--vae", help="folder of a Text VAE in the public format")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for size in [options.size] if options.size else SIZES:
        for batch in [options.batch] if options.batch else batches:
            yield options, size, batch


def model(options: argparse.Namespace, size: str) -> Cola:
    """The model of a row, its DiT's and VAE's weights read or drawn at random."""
    torch.manual_seed(0)
    cola = Cola(SIZES[size])
    if options.dit:
        cola.dit = official.load_dit(options.dit)
    if options.vae:
        cola.vae = official.load_vae(options.vae)
    return cola


def gemm_gflops(seconds: float = 1.0) -> float:
    """Rate of large float32 matrix products on this machine and number of threads, in GFLOP/s."""
    size = 1024
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def report(
    work: str, size: str, batch: int, options: argparse.Namespace, tokens: int, run: Callable[[], object]
) -> None:
    """Run once to warm up and then `repeats` times; print one JSON line."""
    run()
    best = float("inf")
    for _ in range(options.repeats):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    line = {
        "work": work,
        "size": size,
        "batch": batch,
        "threads": options.threads,
        "seconds": round(best, 4),
        "tokens_per_second": round(tokens / best, 1),
        "gemm_gflops": round(gemm_gflops(), 1),
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    print(json.dumps(line), flush=True)
