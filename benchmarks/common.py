"""What the benchmarks share: the sizes, the operations that are counted, and the JSON line."""

import argparse
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.floor import best_seconds, probe
from opencola.checkpoints import official
from opencola.data.batch import Batch
from opencola.flow.dit import BlockCausalDiT, DiTConfig
from opencola.kernels import library
from opencola.layers.compiling import compile_blocks
from opencola.layers.device import bfloat16
from opencola.models.cola.model import Cola
from opencola.models.cola.parts import ColaConfig, PriorObjective
from opencola.text.lines import dump, read_objects
from opencola.vae.text_vae import TextVAEConfig

ROW = ("work", "size", "batch", "threads", "bf16", "recompute", "compile")
COMPARED = ("seconds", "floor_ratio", "peak_bytes")
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
    parser.add_argument("--bf16", action="store_true", help="generate with bfloat16 weights, train as train.bf16")
    parser.add_argument("--recompute", action="store_true", help="train with activation checkpointing")
    parser.add_argument("--compile", action="store_true", help="compile the DiT's blocks")
    parser.add_argument("--compare", help="file of an earlier run's lines; adds the ratios to it", type=earlier_lines)
    parser.set_defaults(compare=[])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for size in [options.size] if options.size else SIZES:
        for batch in [options.batch] if options.batch else batches:
            yield options, size, batch


def earlier_lines(path: str) -> list[dict[str, Any]]:
    """The JSON lines of an earlier run, all of which must be the benchmarks'."""
    try:
        lines = [line for _, line in read_objects(Path(path))]
        for line in lines:
            for key in (*ROW, *COMPARED):
                line[key]
    except (OSError, ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{path} is not a file of benchmark lines: {error!r}") from error
    return lines


def model(options: argparse.Namespace, size: str) -> Cola:
    """The model of a row, its DiT's and VAE's weights read or drawn at random."""
    torch.manual_seed(0)
    cola = Cola(replace(SIZES[size], prior=replace(PRIOR, recompute=options.recompute)))
    if options.dit:
        cola.dit = official.load_dit(options.dit)
    if options.vae:
        cola.vae = official.load_vae(options.vae)
    if options.compile:
        compile_blocks(cola.dit.blocks)
    return cola


def without_zeros(dit: BlockCausalDiT) -> None:
    """Random weights where a new DiT has zeros, so that it moves its input and a gradient reaches all of it."""
    for name, weight in dit.named_parameters():
        if name.endswith(("modulation.weight", "velocity_out.weight")):
            torch.nn.init.normal_(weight, std=0.02)


def training_step(
    cola: Cola, batch: int, length: int, bf16: bool = False, compiled: bool = False
) -> Callable[[], None]:
    """Forward and backward of the prior on random latents, to be timed; bf16: as training computes it."""
    z_0 = torch.randn(batch, length, cola.dit.config.latent_dim)
    data = Batch(torch.zeros(batch, length, dtype=torch.long), torch.arange(batch), seed=0, step=0)

    return stepping(cola.dit, lambda: cola.flow_matching(z_0, data), bf16, compiled)


def stepping(
    module: torch.nn.Module, loss: Callable[[], Tensor], bf16: bool = False, compiled: bool = False
) -> Callable[[], None]:
    """Forward and backward of a loss, to be timed; bf16: as training computes it."""

    def step() -> None:
        module.zero_grad()
        with bfloat16(torch.device("cpu"), bf16, compiled):
            total = loss()
        total.backward()

    return step


def transformer_flops(rows: int, pairs: int, layers: int, width: int, heads_width: int, hidden: int) -> int:
    """Of `rows` through `layers` blocks, with `pairs` of rows that see each other; hidden: both MLP sides together."""
    return layers * (rows * 2 * width * (4 * heads_width + hidden) + pairs * 4 * heads_width)


def dit_flops(dit: DiTConfig, rows: int, pairs: int) -> int:
    """Of a forward pass of the DiT's blocks."""
    heads_width = dit.num_heads * dit.head_dim
    return transformer_flops(rows, pairs, dit.num_layers, dit.width, heads_width, 2 * dit.expansion * dit.width)


def generation_flops(cola: Cola, batch: int, prompt: int, new: int, steps: int) -> int:
    """What generation must compute (model.md §5): whole blocks, guided, each time's modulation once."""
    dit, vae = cola.dit.config, cola.vae.config
    size, total = dit.block_size, prompt + new - dit.block_size
    starts = range(prompt, prompt + new, size)
    pairs = sum(size * (start + size) + size * size for start in starts)  # with and without history
    flops = dit_flops(dit, 2 * steps * new, steps * pairs)
    flops += dit_flops(dit, total, sum(range(size, total + 1, size)) * size)  # what is committed
    mlp = (3 if vae.release.activation == "swiglu" else 4) * vae.ffn_dim // 2
    for layers, rows in ((vae.encoder_layers, prompt), (vae.decoder_layers, prompt + new)):
        flops += transformer_flops(rows, rows * (rows + vae.visible_block) // 2, layers, vae.width, vae.width, mlp)
    flops += new * 2 * vae.width * vae.vocab_size
    return batch * flops + (steps + 1) * 2 * dit.width * 6 * dit.width * dit.num_layers


def training_flops(cola: Cola, batch: int, length: int) -> int:
    """Forward and backward of the packed DiT with one noisy copy, only what may see each other (model.md §3)."""
    dit = cola.dit.config
    blocks = length // dit.block_size
    history = dit.block_size**2 * blocks * (blocks - 1) // 2
    pairs = 2 * history + length * dit.block_size
    return 3 * batch * dit_flops(dit, 2 * length - dit.block_size, pairs)


def print_row(
    work: str,
    size: str,
    batch: int,
    options: argparse.Namespace,
    tokens: int,
    flops: int,
    run: Callable[[], object],
) -> None:
    """Run once to warm up and then `repeats` times; print one JSON line."""
    floor = probe(options.bf16, memory=False)
    run()
    best = best_seconds(run, options.repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    floor = floor.best(probe(options.bf16))
    line: dict[str, Any] = {
        "work": work,
        "size": size,
        "batch": batch,
        "threads": options.threads,
        "bf16": options.bf16,
        "recompute": options.recompute,
        "compile": options.compile,
        "kernels": library.library() is not None,
        "seconds": round(best, 4),
        "tokens_per_second": round(tokens / best, 1),
        "gemm_gflops": round(floor.gflops, 1),
        "gemm_by": floor.by,
        "memory_gbytes": round(floor.gbytes, 1),
        "floor_seconds": round(floor.seconds(flops), 4),
        "floor_ratio": round(floor.ratio(best, flops), 3),
        "peak_bytes": 1024 * peak,
    }
    for earlier in options.compare:
        if all(earlier[key] == line[key] for key in ROW):
            line |= {f"{key}_over_earlier": round(line[key] / earlier[key], 3) for key in COMPARED}
    print(dump(line), flush=True)
