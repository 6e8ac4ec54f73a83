"""The tables of docs/scale.md: the ladder of sizes by the numbers, estimated as `opencola train RECIPE --dry-run` does.

    .venv/bin/python -m benchmarks.scale [RECIPE ...]

Markdown; all recipes of the ladder without arguments. Takes two minutes of one core and no GPU.
"""

import sys
from dataclasses import replace

from opencola.models import build
from opencola.run import recipe as recipes
from opencola.run.dry_run import GPUS, Estimate, estimated, short, vocabulary

LADDER = tuple(f"ladder/{size}" for size in ("1m", "5m", "20m", "100m", "500m", "1800m"))
DEVICES, UTILISATION = 8, 0.4
SIZES = (
    "recipe",
    "stage",
    "trained",
    "core N",
    "6 N a token",
    "counted a token",
    "learning rate",
    "sequences",
    "steps",
)
COSTS = ("recipe", "stage", "GB, 1 GPU", f"GB, {DEVICES} GPUs", *GPUS, "days, H100")


def main() -> None:
    """Estimate every stage for one and for several GPUs, and print both tables."""
    sizes, costs = [SIZES, ("---",) * len(SIZES)], [COSTS, ("---",) * len(COSTS)]
    for name in sys.argv[1:] or LADDER:
        stages = recipes.read(name, [], build.config_class, build.sampling_class)
        for stage, recipe in stages:
            tokens = vocabulary(recipe, dict(stages))
            alone = replace(recipe, train=replace(recipe.train, accumulate=DEVICES * recipe.train.accumulate))
            single = estimated(stage, alone, 1, tokens, both=False)
            several = estimated(stage, recipe, DEVICES, tokens, both=False)
            sizes.append((name, stage, *size_cells(several)))
            costs.append((name, stage, *cost_cells(single, several)))
    for rows in (sizes, costs):
        print("\n".join(f"| {' | '.join(row)} |" for row in rows), end="\n\n", flush=True)


def size_cells(estimate: Estimate) -> tuple[str, ...]:
    """A row of the table of sizes."""
    recipe, trained = estimate.recipe, sum(count for count, is_trained in estimate.parts.values() if is_trained)
    flops = [f"{short(value)}FLOP" for value in (6 * estimate.core, estimate.flops_per_token)]
    rate = f"{recipe.train.learning_rate:.2g}"
    return short(trained), short(estimate.core), *flops, rate, f"{recipe.data.batch_size:,}", f"{recipe.train.steps:,}"


def cost_cells(single: Estimate, several: Estimate) -> tuple[str, ...]:
    """A row of the table of costs; tokens a day in brackets where the memory is too small."""
    memory = [f"{sum(estimate.memory.values()) / 1e9:.1f}" for estimate in (single, several)]
    days = []
    for gpu in GPUS.values():
        a_day = short(86400 / several.seconds_per_step(gpu, UTILISATION) * several.tokens_per_step)
        days.append(a_day if several.fits(gpu) else f"({a_day})")
    whole = several.seconds_per_step(GPUS["H100"], UTILISATION) * several.recipe.train.steps / 86400
    return *memory, *days, f"{whole:.2g}"


if __name__ == "__main__":
    main()
