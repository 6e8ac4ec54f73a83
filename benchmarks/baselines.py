"""Training speed of the baselines and of the Text VAE's stage 1: forward and backward of their losses.

    .venv/bin/python -m benchmarks.baselines [--model ar|llada|plaid|vae] [--size 1M|20M|S|M|demo] [--batch N] [--bf16]

256 tokens a sequence, 80 in the demo's VAE. The baselines' sizes are those of their blocks, without embedding and head.
One JSON line a row, as `benchmarks.training` prints them; peak_bytes is the process's peak so far.
"""

import argparse
from collections.abc import Callable, Iterator

import torch

from benchmarks.common import SIZES, earlier_lines, print_row, stepping, transformer_flops
from opencola.data.batch import Batch
from opencola.layers.llama import LlamaConfig
from opencola.models.ar.model import AR
from opencola.models.ar.network import ARConfig
from opencola.models.build import Model
from opencola.models.cola.stage_one import StageOne, StageOneConfig
from opencola.models.llada.model import LLaDA
from opencola.models.llada.network import LLaDAConfig
from opencola.models.plaid.model import Plaid
from opencola.models.plaid.network import PlaidConfig
from opencola.train.memory import keep_freed
from opencola.vae.objective import VAEObjective
from opencola.vae.text_vae import TextVAEConfig

TRUNKS = {
    "1M": (1024, LlamaConfig(width=128, num_layers=4, num_heads=4, ffn_dim=384)),
    "20M": (8192, LlamaConfig(width=512, num_layers=6, num_heads=8, ffn_dim=1408)),
}
DEMO = StageOneConfig(TextVAEConfig(vocab_size=1024, encoder_layers=0), VAEObjective(beta=1e-4, lambda_mask=0))
VAES = {"S": StageOneConfig(SIZES["S"].vae), "M": StageOneConfig(SIZES["M"].vae), "demo": DEMO}


def models(only: str | None = None, size: str | None = None) -> Iterator[tuple[str, str, Model]]:
    """The (kind, size, model) that are timed, of one kind or one size alone where these are given."""
    makers: dict[str, dict[str, Callable[[], Model]]] = {"ar": {}, "llada": {}, "plaid": {}}
    for name, (vocabulary, trunk) in TRUNKS.items():
        makers["ar"][name] = lambda v=vocabulary, t=trunk: AR(ARConfig(v, t))
        makers["llada"][name] = lambda v=vocabulary, t=trunk: LLaDA(LLaDAConfig(v, t))
        makers["plaid"][name] = lambda v=vocabulary, t=trunk: Plaid(PlaidConfig(v, trunk=t))
    makers["vae"] = {name: lambda c=config: StageOne(c) for name, config in VAES.items()}
    for kind in [only] if only else makers:
        for name, make in makers[kind].items():
            if size in (None, name):
                torch.manual_seed(0)
                yield kind, name, make()


def batch_of(model: Model, sequences: int, length: int) -> Batch:
    """Random tokens."""
    vocabulary = model.vae.config.vocab_size if isinstance(model, StageOne) else model.config.vocab_size
    return Batch(torch.randint(vocabulary, (sequences, length)), torch.arange(sequences), seed=0, step=0)


def flops(model: Model, batch: Batch) -> int:
    """Forward and backward of the loss, only what may see each other."""
    count, length = batch.tokens.shape
    if isinstance(model, StageOne):
        return vae_flops(model.config, count, length)
    trunk, vocabulary = model.config.trunk, model.config.vocab_size
    rows, pairs = count * length, count * length**2
    if isinstance(model, AR):
        pairs = count * length * (length + 1) // 2
    width = trunk.width
    forward = transformer_flops(rows, pairs, trunk.num_layers, width, width, 3 * trunk.ffn_dim)
    forward += rows * 2 * width * vocabulary
    if not isinstance(model, Plaid):
        return 3 * forward
    channels, first = model.config.embedding_dim, len(model.conditioned(batch.ids))
    estimate = forward + rows * 2 * channels * (2 * width + 2 * vocabulary)  # output prior and mean embedding, too
    return 3 * (estimate + rows * 2 * channels * vocabulary) + estimate * first // count  # with p(x | z_0)


def vae_flops(config: StageOneConfig, count: int, length: int) -> int:
    """Of stage 1, with both views where there are two."""
    vae = config.vae
    latents, rows = length // vae.patch_size, (2 if config.objective.lambda_mask else 1) * count * length
    pairs = rows * (latents + vae.visible_block) // 2
    layers = vae.encoder_layers + vae.decoder_layers
    blocks = transformer_flops(rows, pairs, layers, vae.width, vae.width, 3 * vae.ffn_dim // 2)
    ends = vae.patch_size * vae.width * 2 + 3 * vae.latent_dim + vae.vocab_size  # patches, latents, head
    return 3 * (blocks + rows * 2 * vae.width * ends)


def main() -> None:
    """Time the rows that the command line asks for."""
    keep_freed()
    parser = argparse.ArgumentParser(description="Training speed of the baselines and of the Text VAE.")
    parser.add_argument("--model", choices=("ar", "llada", "plaid", "vae"), help="all when not given")
    parser.add_argument("--size", choices=(*TRUNKS, *VAES), help="all when not given")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the best counts")
    parser.add_argument("--bf16", action="store_true", help="train under autocast")
    parser.add_argument("--compare", help="file of an earlier run's lines; adds the ratios to it", type=earlier_lines)
    parser.set_defaults(compare=[], recompute=False, compile=False)
    options = parser.parse_args()
    if options.model and options.size not in (None, *(VAES if options.model == "vae" else TRUNKS)):
        parser.error(f"{options.model} has no size {options.size}")
    torch.set_num_threads(options.threads)
    for kind, size, model in models(options.model, options.size):
        batch = batch_of(model, options.batch, 80 if size == "demo" else 256)
        step = stepping(model, lambda: model.loss(batch).total, options.bf16)  # noqa: B023 - called in this round
        print_row(f"train {kind}", size, options.batch, options, batch.tokens.numel(), flops(model, batch), step)


if __name__ == "__main__":
    main()
