"""How far Cola DLM's likelihood estimates lie from the truth, by the signal that its latents keep.

    python -m experiments.likelihood_gap --ar runs/matched/ar --out runs/gap

Command:  as above, after experiments/matched.py for the AR model (or without --ar). Ctrl-C keeps all: the same command
          goes on.
Cost:     about 7 minutes of a core a setting to train, and 5 to score.
Expect:   docs/results.md.

For each VAE logSNR (learned, or fixed) a first stage and a prior on frozen latents are trained on the story world. Then
held-out stories, whose log-probability under the generator is exact, are scored: IWAE by the number of samples K, and
the ELBO's terms decoder, prior and posterior. Writes gap.jsonl, gap.md and gap.svg.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import matched
from opencola.checkpoints.hub import load, load_cola
from opencola.evaluation.statistics import bits_per_token
from opencola.evaluation.writing import held_out
from opencola.models.ar.model import AR
from opencola.models.ar.score import ARScoring
from opencola.models.cola.model import Cola
from opencola.models.cola.score import Scoring, evaluate
from opencola.run import flags
from opencola.storage import write_text
from opencola.text.lines import write_objects
from opencola.text.tokenizer import Tokenizer
from opencola.worlds.stories import log_probability

SHARES = {"vae": 0.08, "prior": 0.92}
LEARNED = "learned"


@dataclass(frozen=True)
class Options:
    """What to train, and how to score."""

    out: Path = Path("runs/gap")
    """Folder of the whole experiment."""
    size: matched.SizeName = "1m"
    """As in experiments/matched.py."""
    logsnr: tuple[str, ...] = ("1", "2", "3", LEARNED)
    """VAE logSNRs: numbers, or `learned`."""
    flops: float = 1.3e13
    """Counted operations of training, for each."""
    ar: Path | None = None
    """Folder of an AR model to set beside them."""
    stories: int = 24
    """Held-out stories to score."""
    samples: int = 32
    """Posterior samples K of every story."""
    seed: int = 66
    """Of weights, data and noise."""

    def scoring(self) -> Scoring:
        """How Cola DLM is scored."""
        return Scoring(solver="heun", steps=12, samples=self.samples, rows=32, estimator="iwae", seed=self.seed)


def main(argv: Sequence[str] | None = None) -> None:
    """Train every setting, score all, and render."""
    options: Options = flags.parse(Options, sys.argv[1:] if argv is None else argv, description=__doc__)
    budget = matched.Options(out=options.out, size=options.size, flops=options.flops, seed=options.seed)
    tokenizer = matched.shared_tokenizer(budget)
    rows = [world(options, tokenizer)]
    if options.ar is not None:
        rows.append(ar(options))
    for logsnr in options.logsnr:
        name = f"logsnr_{logsnr}"
        matched.settle(sketch(logsnr, budget), options.out / "recipes" / f"{name}.yaml", SHARES, budget, tokenizer)
        matched.train(name, options.out)
        rows.append(scored(options, logsnr, options.out / name))
        write(rows, options)
    write(rows, options)


def sketch(logsnr: str, budget: matched.Options) -> dict[str, Any]:
    """Cola DLM's recipe with this logSNR, and with a frozen Text VAE to the end."""
    plan = matched.sketch("cola", budget)
    plan["out"] = str(budget.out / f"logsnr_{logsnr}")
    plan["model"]["vae"]["fixed_logsnr"] = None if logsnr == LEARNED else float(logsnr)
    del plan["stages"]["joint"]
    plan["stages"]["prior"]["train"] = {}
    return plan


def texts_of(options: Options, tokenizer: Tokenizer) -> list[list[int]]:
    """The held-out stories, each with its end-of-text token."""
    return [[*tokenizer.encode(tale.text), tokenizer.eos_id] for tale in held_out(options.stories)]


def per_token(nats: Tensor, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Mean of -log p (B,) in bits a token, and its standard error over the texts."""
    value, error = bits_per_token(nats, sum(map(len, texts)))
    return {"bits": value, "error": error}


def world(options: Options, tokenizer: Tokenizer) -> dict[str, Any]:
    """The generator itself."""
    nats = torch.tensor([log_probability(tale.text) for tale in held_out(options.stories)], dtype=torch.float64)
    return {"model": "the world", "kind": "exact", **per_token(nats, texts_of(options, tokenizer))}


def ar(options: Options) -> dict[str, Any]:
    """The AR model."""
    assert options.ar is not None
    model, tokenizer = load(options.ar)
    if not isinstance(model, AR):
        raise ValueError(f"{options.ar} holds no AR model: name one for --ar")
    texts = texts_of(options, tokenizer)
    score = model.score([[]] * len(texts), texts, ARScoring())
    return {"model": "AR", "kind": score.kind, **per_token(score.total, texts)}


def scored(options: Options, logsnr: str, folder: Path) -> dict[str, Any]:
    """A setting's estimates and terms, kept beside its model."""
    note = folder / "gap.json"
    settings = {"stories": options.stories, "scoring": asdict(options.scoring())}
    if note.is_file() and json.loads(note.read_text())["settings"] == settings:
        kept: dict[str, Any] = json.loads(note.read_text())
        return kept
    cola, tokenizer = load_cola(folder)
    cola.requires_grad_(False)
    texts = texts_of(options, tokenizer)
    measured = {
        "model": f"Cola DLM, logSNR {logsnr}",
        "kind": "bound",
        "settings": settings,
        **estimates(cola, texts, options.scoring(), tokenizer.eos_id),
        "logsnr": measured_logsnr(cola, texts),
    }
    write_text(note, json.dumps(measured) + "\n")
    return measured


def estimates(cola: Cola, texts: Sequence[Sequence[int]], settings: Scoring, pad_id: int) -> dict[str, Any]:
    """ELBO and IWAE by the number of samples, and the ELBO's terms, in bits a token.

    IWAE of k samples is the mean over groups of k of the same draws, so that they differ by k alone.
    """
    of_texts = evaluate(cola, [[]] * len(texts), texts, settings, pad_id=pad_id)
    weights = torch.stack([text.terms.log_weights for text in of_texts])
    iwae = {}
    size = 1
    while size <= settings.samples:
        groups = weights[:, : settings.samples // size * size].unflatten(1, (-1, size))
        iwae[size] = per_token((groups.logsumexp(-1) - math.log(size)).mean(1), texts)
        size *= 2
    parts = {name: torch.stack([text.parts()[name] for text in of_texts]) for name in of_texts[0].parts()}
    best = iwae[max(iwae)]
    return {**best, "iwae": iwae, "parts": {name: per_token(value, texts)["bits"] for name, value in parts.items()}}


@torch.no_grad()
def measured_logsnr(cola: Cola, texts: Sequence[Sequence[int]]) -> float:
    """VAE logSNR of the texts' latents."""
    device = cola.vae.head.weight.device
    values = [cola.vae.encode(torch.tensor([list(text)], device=device)).logsnr() for text in texts]
    return torch.stack(values).mean().item()


def write(rows: Sequence[Mapping[str, Any]], options: Options) -> None:
    """gap.jsonl, gap.md and gap.svg."""
    options.out.mkdir(parents=True, exist_ok=True)
    write_objects(options.out / "gap.jsonl", rows)
    table = render(rows, options)
    write_text(options.out / "gap.md", table)
    draw(rows, options.out / "gap.svg")
    print(table, flush=True)


def render(rows: Sequence[Mapping[str, Any]], options: Options) -> str:
    """A Markdown table: bits a token, the gap to the generator, and the terms."""
    truth = rows[0]["bits"]
    head = ["", "measured logSNR", "IWAE", "gap", "ELBO", "decoder", "prior", "posterior", "rate: prior + posterior"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row["model"], "", f"{row['bits']:.3f} ± {row['error']:.3f}", f"{row['bits'] - truth:.3f}"]
        if "parts" in row:
            parts = row["parts"]
            cells[1] = f"{row['logsnr']:.2f}"
            cells += [
                f"{value:.3f}" for value in (sum(parts.values()), *parts.values(), parts["prior"] + parts["posterior"])
            ]
        lines.append(cells + [""] * (len(head) - len(cells)))
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    label = options.scoring().label()
    return f"{table}\n\nBits a token of {options.stories} held-out stories, ± over stories; Cola DLM by {label}.\n"


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """The estimates by K, and the ELBO's terms by logSNR."""
    from matplotlib.figure import Figure

    settings = [row for row in rows if "iwae" in row]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in settings:
        points = [(int(size), value["bits"]) for size, value in row["iwae"].items()]
        left.plot(*zip(*points, strict=True), "o-", label=row["model"])
    for row, style in zip(rows, (":", "--"), strict=False):
        if "iwae" not in row:
            left.axhline(row["bits"], linestyle=style, color="grey", label=row["model"])
    left.set_xscale("log", base=2)
    left.set_xlabel("samples K")
    left.set_ylabel("bits a token, IWAE")
    left.legend()
    names = [row["model"].removeprefix("Cola DLM, ") for row in settings]
    decoder = [row["parts"]["decoder"] for row in settings]
    rate = [row["parts"]["prior"] + row["parts"]["posterior"] for row in settings]
    right.bar(names, decoder, label="decoder: distortion")
    right.bar(names, rate, bottom=decoder, label="prior + posterior: rate")
    right.axhline(rows[0]["bits"], linestyle=":", color="grey", label="the world")
    right.set_ylabel("bits a token, ELBO")
    right.legend()
    figure.savefig(file)


if __name__ == "__main__":
    main()
