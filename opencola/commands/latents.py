"""Measure how a model's latents hold text: how much noise they survive, what they cost, how they are spread.

Prints the figures, and writes them with their intervals to latents.jsonl, and as a drawing to latents.svg.

examples:
  opencola latents
  opencola latents --model runs/mine --data valid.txt --length 128 --out runs/mine/latents
  opencola latents --model runs/demo/vae --sequences 50 --seed 1
"""

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.markup import escape
from torch import Tensor

from opencola.checkpoints import official
from opencola.checkpoints.hub import SHIPPED, check_vocabulary, locate, title
from opencola.data.corpus import Corpus, CorpusConfig
from opencola.errors import UserError
from opencola.evaluation import screen
from opencola.evaluation.figures import standalone
from opencola.evaluation.latents.figure import overview
from opencola.evaluation.latents.measures import entries
from opencola.evaluation.latents.reconstruction import Documents, pack_documents
from opencola.evaluation.latents.robustness import VAE, join, measure
from opencola.evaluation.screen import progress_bar, table
from opencola.evaluation.statistics import Entry
from opencola.evaluation.writing import held_out
from opencola.layers import randomness
from opencola.layers.device import device
from opencola.ranges import Count, Seed, check
from opencola.run import flags
from opencola.storage import locked, replacing
from opencola.text.lines import append_objects, write_objects
from opencola.text.tokenizer import Tokenizer
from opencola.vae.text_vae import TextVAE

STORIES = "held-out stories"
FIGURES, DRAWING = "latents.jsonl", "latents.svg"


@dataclass(frozen=True)
class LatentsFlags(flags.OutputFlags):
    """Which latents, and of what."""

    model: Path = SHIPPED
    """Folder of a run, of one of its stages or of an exported model, or a repository of the Hugging Face Hub
    (OWNER/NAME); without it the model that comes with the package is measured."""
    data: str | None = None
    """Where documents come from, written like data.source of a recipe; without it, stories of the story world that no
    corpus has, which suit the model that comes with the package and those of the demo."""
    text_field: str = "text"
    """Field or column of the data that holds the text."""
    length: Count = 64
    """Tokens of a sequence, where there is --data; best the data.length of the training. A story is one sequence."""
    sequences: Count = 200
    """Number of sequences to measure; at least 1."""
    seed: Seed = 0
    """Seed of the order of the data and of all noise."""
    batch_size: Count = 50
    """Number of sequences to compute at a time: speed and memory; no figure depends on it."""
    out: Path = Path("runs/latents")
    """Folder for latents.jsonl and latents.svg; older ones there are replaced."""

    def __post_init__(self) -> None:
        check(self)


def command(argv: Sequence[str]) -> None:
    """Run `opencola latents`."""
    options: LatentsFlags = flags.parse(LatentsFlags, argv, prog="opencola latents", description=__doc__)
    folder = locate(options.model)
    vae, tokenizer = official.load_vae(folder).eval().to(device()), Tokenizer.load(folder)
    check_vocabulary(tokenizer, vae.config.vocab_size, options.model)
    documents = read_documents(options, tokenizer, vae)
    with locked(options.out):
        keep(vae, documents, options)
    options.say(f"All figures are in {options.out / FIGURES}, drawn in {options.out / DRAWING}.")


def keep(vae: TextVAE, documents: Documents, options: LatentsFlags) -> None:
    """Measure, write and show all figures."""
    figures = examine(vae, documents, options)
    facts = {
        "model": title(options.model),
        "data": options.data or STORIES,
        "sequences": len(documents.tokens),
        "patch_size": vae.config.patch_size,
        "seed": options.seed,
    }
    records = [{**asdict(entry), **facts} for entry in figures]
    with replacing(options.out) as draft:
        write_objects(draft / FIGURES, records)
        (draft / DRAWING).write_text(standalone(overview(figures)), encoding="utf-8")
    if options.json:
        append_objects(sys.stdout, records)
    else:
        show(figures, facts)


def read_documents(options: LatentsFlags, tokenizer: Tokenizer, vae: TextVAE) -> Documents:
    """The sequences to measure. Raises FileNotFoundError and UserError for data that cannot be read or is too short,
    and for a length that the latents do not divide."""
    multiple = vae.config.patch_size * vae.config.visible_block
    if options.data is None:
        stories = held_out(options.sequences)
        return pack_documents([[*tokenizer.encode(tale.text), tokenizer.eos_id] for tale in stories], multiple)
    if options.length % multiple:
        raise UserError(f"--length {options.length} must be a multiple of {multiple}: the model's latents demand it")
    config = CorpusConfig(
        source=options.data, length=options.length, batch_size=options.sequences, text_field=options.text_field
    )
    corpus = Corpus(config, tokenizer, options.seed)
    tokens = next(corpus).tokens
    (position,) = corpus.state_dict()["streams"].values()
    if tuple(position.values()) > (1, 0, 0):  # (epoch, index, offset) of what comes next: a sequence went round
        raise UserError(
            f"{options.data} holds fewer than {options.sequences} sequences of {options.length} tokens: lower "
            "--sequences or --length"
        )
    return Documents(tokens, torch.ones_like(tokens, dtype=torch.bool))


def examine(vae: TextVAE, documents: Documents, options: LatentsFlags) -> list[Entry]:
    """All figures, with a bar while they come. Raises UserError for latents that are not finite."""

    def encode(tokens: Tensor) -> tuple[Tensor, Tensor]:
        posterior = vae.encode(tokens)
        return posterior.mean, posterior.logvar.exp()

    def draw(shape: Sequence[int], purpose: str, ids: Tensor) -> Tensor:
        return randomness.normal(shape, options.seed, purpose, ids)

    measured = VAE(encode, vae.decode, vae.config.latent_shift, vae.config.latent_scale)
    placed = Documents(documents.tokens.to(device()), documents.scored.to(device()))
    with progress_bar(transient=True) as bar:
        batches = math.ceil(len(documents.tokens) / options.batch_size)
        parts = bar.track(
            measure(placed, measured, draw, batch_size=options.batch_size), batches, description="decoding"
        )
        result = join(list(parts))
    if not (result.posteriors.mean.isfinite().all() and result.posteriors.variance.isfinite().all()):
        raise UserError(f"the latents of {options.model} are not finite: its weights are damaged, or diverged")
    return entries(result, documents, measured, draw)


SUMMARY = (
    "rate", "distortion", "standard_normal_bound", "information", "mismatch_gaussian", "mismatch_estimate",
    "active_channels", "effective_dimension", "vae_logsnr", "most_frequent_token",
)  # fmt: skip


def show(figures: Sequence[Entry], facts: Mapping[str, object]) -> None:
    """The figures as tables; those of single channels are left to the file."""
    console = screen.console()
    named = {(entry.name, entry.at): entry for entry in figures}
    heading = f"{facts['model']}: {facts['sequences']} sequences of {facts['data']}, seed {facts['seed']}"
    console.print(f"[bold]{escape(heading)}[/]\n")
    summary = table("", "value", "95 % interval", "unit", "what it says", words=(0, 3, 4))
    for entry in (named[name, None] for name in SUMMARY):
        value = f"[bold]{entry.value:.4g}[/]"
        summary.add_row(entry.name.replace("_", " "), value, interval(entry), entry.unit, entry.label)
    path = table("t", "right from z_t", "95 % interval", "right from z_t / (1 - t)", "95 % interval", words=())
    mean = table("s", "right from posterior mean + s noise", "95 % interval", words=())
    for shown, kinds in ((path, ("path", "rescaled")), (mean, ("mean",))):
        for at in (entry.at for entry in figures if entry.name == f"accuracy_{kinds[0]}"):
            cells = [named.get((f"accuracy_{kind}", at)) for kind in kinds]
            texts = [(f"[bold]{cell.value:.4f}[/]", interval(cell)) if cell else ("", "") for cell in cells]
            shown.add_row(f"{at:.1f}", *itertools.chain(*texts))
    for grid in (summary, path, mean):
        screen.put(grid)
        console.print()


def interval(entry: Entry) -> str:
    """Its two ends, or nothing."""
    return "" if entry.low is None or entry.high is None else f"{entry.low:.4g} to {entry.high:.4g}"
