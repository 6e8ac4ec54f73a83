"""Show what posterior, prior and decoder make of every token of a text, each given the true text before it.

Prints a line for each token, and writes them to inspect.jsonl; slice.svg shows the latents around a few of them:
samples of posterior and prior, and what the decoder reads where.

examples:
  opencola inspect "Once a little girl named Mia lived near the lake."
  opencola inspect "The fox ran to the hill." --model runs/demo --tokens 1 4 --guidance 1 --out runs/demo/fox
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.markup import escape

from opencola.checkpoints.hub import load_cola, title
from opencola.commands.terminal import ModelFlags, read_flags
from opencola.errors import UserError
from opencola.evaluation.figures import standalone
from opencola.evaluation.latents.slices import slices
from opencola.evaluation.latents.tokens import Seen, inspect_tokens, slice_of
from opencola.evaluation.screen import put, table
from opencola.evaluation.statistics import standard_error
from opencola.flow.likelihood import Likelihood
from opencola.ranges import LARGEST, NotNegative, Range, Size, check
from opencola.run.flags import OutputFlags
from opencola.storage import locked, replacing
from opencola.text.lines import append_objects, check_text, write_objects

FIGURES, DRAWING = "inspect.jsonl", "slice.svg"
DRAWN = 3


@dataclass(frozen=True)
class InspectFlags(OutputFlags, ModelFlags):
    """What to look at. Of the settings of generation, those of the solver and of guidance count, and the seed."""

    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT")] = ""
    """The text to look at."""
    samples: Annotated[int, Range(2, LARGEST)] = 32
    """Number of samples of the posterior, of samples of the prior, and of probes, of every block; at least 2."""
    probe: NotNegative = 0.5
    """Standard deviation of the noise that makes probes of posterior means, in units of normalised latents; 0 or
    more."""
    tokens: tuple[Size, ...] = ()
    """Numbers of the tokens to draw, from 0 on; without it the three that the prior hits least."""
    density: Likelihood = field(default_factory=Likelihood)
    """How the prior's densities are computed."""
    contours: bool = False
    """Draw the prior's density into the slices, too: a minute for each token."""
    out: Path = Path("runs/inspect")
    """Folder for inspect.jsonl and slice.svg; older ones there are replaced."""

    def __post_init__(self) -> None:
        check(self)


def command(argv: Sequence[str]) -> None:
    """Run `opencola inspect`."""
    options: InspectFlags = read_flags(InspectFlags, argv, prog="opencola inspect", description=__doc__)
    check_text(options.text, "the text")
    model, tokenizer = load_cola(options.model)
    ids = tokenizer.encode(options.text)
    if not ids:
        raise UserError('nothing to inspect: give a text, as in opencola inspect "Once upon a time"')
    for number in options.tokens:
        if not 0 <= number < len(ids):
            raise UserError(f"--tokens {number}: the text has the tokens 0 to {len(ids) - 1}")
    if model.vae.config.latent_dim < 2:
        raise UserError(f"{options.model} has latents of one channel, which no plane cuts")
    status = Console(stderr=True).status(f"sampling {options.samples} times {len(ids)} tokens")
    with locked(options.out), status, replacing(options.out) as draft:
        inspection, seen = inspect_tokens(
            model, tokenizer, ids, options.samples, options.sampling, options.probe, options.density
        )
        least_hit = sorted(seen, key=lambda token: token.prior_hit.value)[:DRAWN]
        drawn = options.tokens or [token.number for token in least_hit]
        density = options.density if options.contours else None
        drawing = slices([slice_of(model, tokenizer, seen[number], inspection, density) for number in sorted(drawn)])
        facts: dict[str, Any] = {
            "samples": options.samples, "probe": options.probe, "seed": options.sampling.seed,
            "model": title(options.model), "settings": asdict(options.sampling), "density": asdict(options.density),
        }  # fmt: skip
        records = [{**asdict(token), **facts} for token in seen]
        write_objects(draft / FIGURES, records)
        (draft / DRAWING).write_text(standalone(drawing), encoding="utf-8")
    elbo = inspection.elbo(len(ids))
    bound, error = float(elbo.mean()), standard_error(elbo)
    perplexity = float(torch.exp(-elbo.mean() / len(ids)))
    if options.json:
        append_objects(sys.stdout, records)
        whole = {"number": None, "text": options.text, "elbo": bound, "standard_error": error, "perplexity": perplexity}
        append_objects(sys.stdout, [{**whole, "estimator": options.density.label(), **facts}])
    else:
        show(seen)
        print(
            f"ELBO {bound:.1f} nats (standard error {error:.1f}), perplexity {perplexity:.4g}: {len(elbo)} samples, "
            f"{options.density.label()}."
        )
    drawn_in = f"the latents of {len(drawn)} tokens in {options.out / DRAWING}"
    options.say(f"All figures are in {options.out / FIGURES}, {drawn_in}.")


def show(seen: Sequence[Seen]) -> None:
    """A line for each token, and means."""
    heads = ("", "token", "generated", "log q(z|x)", "log p(z)", "log p(x|z)")
    grid = table(*heads, "posterior hit", "prior hit", "probe success", words=(1, 2), whole=(0, 1, 2))
    for token in seen:
        colour = "green" if token.token == token.generated else "red"
        rates = (f"{rate.value:.2f}" for rate in (token.posterior_hit, token.prior_hit, token.probe_success))
        grid.add_row(
            str(token.number), escape(repr(token.token)), f"[{colour}]{escape(repr(token.generated))}[/]",
            f"{token.log_posterior:.2f}", f"{token.log_prior:.2f}", f"{token.log_decoder:.3f}", *rates,
        )  # fmt: skip
    logs = [np.mean([getattr(token, name) for token in seen]) for name in ("log_posterior", "log_prior", "log_decoder")]
    hits = ("posterior_hit", "prior_hit", "probe_success")
    means = [np.mean([getattr(token, name).value for token in seen]) for name in hits]
    grid.add_row("", "mean", "", *(f"{x:.3g}" for x in logs), *(f"{x:.3f}" for x in means), style="bold")
    put(grid)
