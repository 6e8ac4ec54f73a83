"""`opencola inspect`: what posterior, prior and decoder make of every token of a text."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from opencola.console import ModelFlags, check_text, load_cola, read_flags, title
from opencola.evaluation.figures import standalone
from opencola.evaluation.latent_slice import Slice, cut, slices
from opencola.evaluation.stories import Share, share
from opencola.flow.likelihood import Likelihood
from opencola.models.build import device
from opencola.models.cola import Cola
from opencola.models.inspection import Inspection, decode_instead, density_instead
from opencola.models.inspection import inspect as inspect_tokens
from opencola.text.tokenizer import Tokenizer

FIGURES, DRAWING = "inspect.jsonl", "slice.svg"
DRAWN = 3


@dataclass(frozen=True)
class InspectFlags(ModelFlags):
    """What to look at. Of the settings of generation, those of the solver and of guidance count, and the seed."""

    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT")] = ""
    """The text."""
    samples: int = 32
    """Samples of posterior and prior, and probes, of every block."""
    probe: float = 0.5
    """Standard deviation of the noise on posterior means that makes probes of them."""
    tokens: tuple[int, ...] = ()
    """Numbers of the tokens to draw, from 0 on; without it the three that the prior hits least."""
    density: Likelihood = field(default_factory=Likelihood)
    """Computation of the prior's densities."""
    contours: bool = False
    """Draw the prior's density into the slices, too: a minute for each token."""
    out: Path = Path("runs/inspect")
    """Folder for inspect.jsonl and slice.svg; older ones there are replaced."""

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ValueError(f"--samples must be at least 2, but is {self.samples}")
        if self.probe < 0:
            raise ValueError(f"--probe must not be negative, but is {self.probe}")


@dataclass(frozen=True)
class Seen:
    """One token. `log_posterior`: mean log-density of its latent's own samples under the posterior (minus its entropy);
    `log_decoder`: mean log-probability of the token from them; `log_prior`: their mean log-density under the prior, of
    the whole block `block`, given those before; all in nats. Shares of samples that decode to it: of
    the posterior, of the prior, of probes. `generated`: what the prior's first sample decodes to."""

    number: int
    token: str
    id: int
    generated: str
    log_posterior: float
    log_decoder: float
    block: int
    log_prior: float
    posterior_hit: Share
    prior_hit: Share
    probe_success: Share


def inspect(argv: Sequence[str], description: str) -> None:
    """`opencola inspect`."""
    options: InspectFlags = read_flags(InspectFlags, argv, prog="opencola inspect", description=description)
    check_text(options.text, "the text")
    model, tokenizer = load_cola(options.model)
    ids = tokenizer.encode(options.text)
    if not ids:
        raise ValueError('nothing to inspect: give a text, as in opencola inspect "Once upon a time"')
    for number in options.tokens:
        if not 0 <= number < len(ids):
            raise ValueError(f"--tokens {number}: the text has the tokens 0 to {len(ids) - 1}")
    if model.vae.config.latent_dim < 2:
        raise ValueError(f"{options.model} has latents of one channel, which no plane cuts")
    options.out.mkdir(parents=True, exist_ok=True)
    # end-of-text tokens fill the last block; they are not looked at
    chunk = model.dit.config.block_size * model.vae.config.patch_size
    filled = torch.tensor([ids + [tokenizer.eos_id] * (-len(ids) % chunk)], device=device())
    with Console(stderr=True).status(f"sampling {options.samples} times {filled.shape[1] // chunk} blocks"):
        found = inspect_tokens(model, filled, options.samples, options.sampling, options.probe, options.density)
        seen = look(model, tokenizer, ids, found)
        drawn = options.tokens or [one.number for one in sorted(seen, key=lambda one: one.prior_hit.value)[:DRAWN]]
        drawing = slices([slice_of(model, tokenizer, seen[number], found, options) for number in sorted(drawn)])
    facts: dict[str, Any] = {
        "samples": options.samples, "probe": options.probe, "seed": options.sampling.seed,
        "model": title(options.model), "settings": asdict(options.sampling), "density": asdict(options.density),
    }  # fmt: skip
    with (options.out / FIGURES).open("w", encoding="utf-8") as file:
        for one in seen:
            file.write(json.dumps({**asdict(one), **facts}, ensure_ascii=False) + "\n")
    (options.out / DRAWING).write_text(standalone(drawing), encoding="utf-8")
    show(seen)
    elbo = found.elbo(len(ids))
    print(
        f"ELBO {float(elbo.mean()):.1f} nats (standard error {float(elbo.std() / len(elbo) ** 0.5):.1f}), "
        f"perplexity {float(torch.exp(-elbo.mean() / len(ids))):.4g}: {len(elbo)} samples, {options.density.label()}."
    )
    print(f"All figures are in {options.out / FIGURES}, the latents of {len(drawn)} tokens in {options.out / DRAWING}.")


def look(model: Cola, tokenizer: Tokenizer, ids: Sequence[int], found: Inspection) -> list[Seen]:
    """What was found of every token."""
    patch, count = model.vae.config.patch_size, len(found.posterior_samples)
    chunk = patch * model.dit.config.block_size
    log_posterior = -found.posterior.entropy()[0]

    def hits(tokens: torch.Tensor, number: int) -> Share:
        return share(int((tokens[:, number] == ids[number]).sum()), count)

    return [
        Seen(
            number,
            tokenizer.decode([token]),
            token,
            tokenizer.decode([int(found.prior_tokens[0, number])]),
            float(log_posterior[number // patch]),
            float(found.log_decoder[:, number].mean()),
            number // chunk,
            float(found.log_prior[:, number // chunk].mean()),
            hits(found.posterior_tokens, number),
            hits(found.prior_tokens, number),
            hits(found.probe_tokens, number),
        )
        for number, token in enumerate(ids)
    ]


def slice_of(model: Cola, tokenizer: Tokenizer, one: Seen, found: Inspection, options: InspectFlags) -> Slice:
    """The latent of a token on a plane."""
    mean, patch = found.posterior.mean, model.vae.config.patch_size
    latent, place = divmod(one.number, patch)

    def decode(points: np.ndarray) -> list[str]:
        tokens = decode_instead(model, mean, latent, torch.from_numpy(points).to(mean))[:, place]
        return [tokenizer.decode([token]) for token in tokens.tolist()]

    def density(points: np.ndarray) -> np.ndarray:
        placed = torch.from_numpy(points).to(mean)
        return density_instead(model, mean, latent, placed, options.density).double().cpu().numpy()

    centre, posterior, prior = (
        z[:, latent].double().cpu().numpy() for z in (mean, found.posterior_samples, found.prior_samples)
    )
    return cut(
        f"token {one.number}: {one.token!r}",
        one.token,
        centre[0],
        posterior,
        prior,
        decode,
        density if options.contours else None,
    )


def show(seen: Sequence[Seen]) -> None:
    """A line for each token, and means."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    shares = ("posterior hit", "prior hit", "probe success")
    for column in ("", "token", "generated", "log q(z|x)", "log p(z)", "log p(x|z)", *shares):
        word = column in ("token", "generated")
        table.add_column(column, justify="left" if word else "right", no_wrap=word or not column)
    for one in seen:
        same = one.token == one.generated
        rates = (f"{rate.value:.2f}" for rate in (one.posterior_hit, one.prior_hit, one.probe_success))
        table.add_row(
            str(one.number), escape(repr(one.token)), f"[{'green' if same else 'red'}]{escape(repr(one.generated))}[/]",
            f"{one.log_posterior:.2f}", f"{one.log_prior:.2f}", f"{one.log_decoder:.3f}", *rates,
        )  # fmt: skip
    logs = [np.mean([getattr(one, name) for one in seen]) for name in ("log_posterior", "log_prior", "log_decoder")]
    hits = ("posterior_hit", "prior_hit", "probe_success")
    means = [np.mean([getattr(one, name).value for one in seen]) for name in hits]
    table.add_section()
    table.add_row("", "mean", "", *(f"{x:.3g}" for x in logs), *(f"{x:.3f}" for x in means), style="bold")
    Console(highlight=False).print(table)
