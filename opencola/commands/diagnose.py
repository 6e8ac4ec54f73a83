"""Find the link of a model that loses text: VAE, prior, normalisation, sampler, guidance, tokens, prompts, history.

Each is measured by two conditions that differ in it alone, on stories of the story world and on nests of brackets,
in failures per token. Prints them with their intervals, names the link at fault, and writes all of it to
diagnose.jsonl, and the losses as a drawing to diagnose.svg.

examples:
  opencola diagnose
  opencola diagnose --model runs/demo --num-stories 64 --out runs/demo/diagnose
  opencola diagnose --model runs/demo --guidance 7 --steps 4
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from rich.markup import escape

from opencola.checkpoints.hub import load_cola, title
from opencola.commands.terminal import ModelFlags, read_flags
from opencola.evaluation import screen
from opencola.evaluation.diagnosis import tasks
from opencola.evaluation.diagnosis.conditions import prepare
from opencola.evaluation.diagnosis.figure import draw
from opencola.evaluation.diagnosis.findings import Findings, examine
from opencola.evaluation.diagnosis.verdicts import ALLOWED, losses
from opencola.evaluation.figures import standalone
from opencola.evaluation.screen import progress_bar, table
from opencola.ranges import LARGEST, Count, Range, check
from opencola.run.flags import OutputFlags
from opencola.storage import locked, replacing
from opencola.text.lines import append_objects, write_objects

FIGURES, DRAWING = "diagnose.jsonl", "diagnose.svg"


@dataclass(frozen=True)
class DiagnoseFlags(OutputFlags, ModelFlags):
    """What to measure. The model's settings of generation are among what is diagnosed."""

    num_stories: Annotated[int, Range(4, LARGEST)] = 32
    """Number of held-out stories, and of nests of brackets, to measure on; at least 4."""
    places: Count = 8
    """Number of places in each text at which a block is generated; at least 1."""
    batch_size: Count = 256
    """Number of places to compute at a time: speed and memory; no figure depends on it."""
    out: Path = Path("runs/diagnose")
    """Folder for diagnose.jsonl and diagnose.svg; older ones there are replaced."""

    def __post_init__(self) -> None:
        check(self)


def command(argv: Sequence[str]) -> None:
    """Run `opencola diagnose`."""
    options: DiagnoseFlags = read_flags(DiagnoseFlags, argv, prog="opencola diagnose", description=__doc__)
    model, tokenizer = load_cola(options.model)
    facts = {
        "model": title(options.model), "num_stories": options.num_stories, "places": options.places,
        "seed": options.sampling.seed, "settings": asdict(options.sampling),
    }  # fmt: skip
    findings: dict[str, Findings] = {}
    with locked(options.out), replacing(options.out) as draft:
        for task in (tasks.stories(options.num_stories), tasks.nests(options.num_stories)):
            with progress_bar(transient=True) as bar:
                bench = prepare(model, tokenizer, task, options.sampling, options.places, options.batch_size)
                findings[task.name] = examine(bench, bar)
            records = [{"task": task.name, **record, **facts} for record in findings[task.name].records()]
            write_objects(draft / FIGURES, records, append=len(findings) > 1)
            if options.json:
                append_objects(sys.stdout, records)
            else:
                show(task.name, findings[task.name])
        panels = {name: losses(of_task.conditions) for name, of_task in findings.items()}
        (draft / DRAWING).write_text(standalone(draw(panels)), encoding="utf-8")
    options.say(f"All figures are in {options.out / FIGURES}, the losses drawn in {options.out / DRAWING}.")


def show(task: str, findings: Findings) -> None:
    """What each link costs, settings, statistics, and the diagnosis."""
    console = screen.console()
    rates = {name: condition.rate.value for name, condition in findings.conditions.items()}
    console.print(f"[bold]{task}[/]: failures per token (a blind guess: {rates['blind']:.4f})\n")
    grid = table("link", "without", "with it", "costs", "95 % interval")
    for loss in losses(findings.conditions):
        before = f"{rates[loss.link.before]:.4f}" if loss.link.before else ""
        ends = f"{loss.low:.4f} to {loss.high:.4f}"
        cells = (loss.link.label, before, f"{rates[loss.link.after]:.4f}", f"[bold]{loss.value:.4f}[/]", ends)
        grid.add_row(*cells, style="red" if loss.at_fault else "")
    screen.put(grid)
    changed = ", ".join(f"{setting} {tally.rate.value:.4f}" for setting, tally in findings.settings.items())
    console.print(f"\nWith one setting changed: {changed}.")
    back = ", ".join(f"{of.replace('_', ' ')} {rate.value:.4f}" for of, rate in findings.round_trip.items())
    console.print(f"Given back by the VAE: {back}.")
    latents, (true, made) = findings.latents, findings.decoder.values()
    console.print(
        f"First blocks: the prior's samples are spread {latents.ratio:.2f} times as wide as the data's latents. "
        f"The prior's velocities should be {latents.slope:.2f} times as large. The decoder's margin is "
        f"{true.margin:.1f} nats on true latents, {made.margin:.1f} on generated ones; noise of the posterior's size "
        f"changes {true.changed:.4f} and {made.changed:.4f} of the tokens."
    )
    console.print(f"\n[bold]{escape(findings.diagnosis.text)}[/]")
    console.print(f"(A link is at fault where it surely costs more than {ALLOWED} failures per token.)\n", style="dim")
