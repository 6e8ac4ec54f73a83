"""What `opencola train RECIPE --dry-run` prints: sizes, operations, memory, time and the plan, with nothing done.

The model is built, and a step of it taken, on tensors without memory (`train.cost.unreal`).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from opencola.data.batch import Batch
from opencola.errors import UserError
from opencola.evaluation import screen
from opencola.evaluation.screen import table
from opencola.models import build
from opencola.run import checks, cost, run
from opencola.run.cost import PassCost
from opencola.run.recipe import Recipe
from opencola.run.stage import origin
from opencola.text.lines import append_objects
from opencola.text.tokenizer import FILE_NAME, Tokenizer

USABLE = 0.9
"""Share of a GPU's memory that may be planned for; the rest is for the driver, communication and fragments."""
LAUNCH = 5e-6  # seconds that starting one operation takes at least


@dataclass(frozen=True)
class GPU:
    """A kind of GPU, by its data sheet."""

    gigabytes: float  # 10^9 bytes
    bandwidth: float  # 10^9 bytes a second
    bf16: float  # dense products, 10^12 operations a second
    float32: float


# NVIDIA's data sheets: A100 80GB SXM (2021), H100 SXM5 and H200 SXM (2022, 2024), L40S (2023); for the GeForce the Ada
# whitepaper (2022), products accumulated in float32. Rates that the sheets give with sparsity are halved.
GPUS = {
    "A100": GPU(80, 2039, 312, 19.5),
    "H100": GPU(80, 3350, 989.4, 66.9),
    "H200": GPU(141, 4800, 989.4, 66.9),
    "L40S": GPU(48, 864, 362, 91.6),
    "4090": GPU(24, 1008, 165.2, 82.6),
}


@dataclass(frozen=True)
class Estimate:
    """A stage by the numbers. Bytes are those of one device."""

    name: str
    recipe: Recipe[Any, Any]
    devices: int
    shards: int
    parts: dict[str, tuple[int, bool]]
    """Parameters of each part, and whether they are trained."""
    core: int
    """Core parameters, N."""
    cost: PassCost
    """Of one pass on one device."""
    memory: dict[str, int]
    """Bytes by part."""
    activations: dict[bool, int]
    """Bytes of activations without and with recomputation, where the family has it."""

    @property
    def micro_batch(self) -> int:
        """Sequences of one pass on one device."""
        return self.recipe.data.batch_size // (self.devices * self.recipe.train.accumulate)

    @property
    def tokens_per_step(self) -> int:
        """Over all devices."""
        return self.recipe.data.batch_size * self.recipe.data.length

    @property
    def tokens(self) -> int:
        """Of the whole stage."""
        return self.recipe.train.steps * self.tokens_per_step

    @property
    def flops_per_token(self) -> float:
        """Counted, forward and backward."""
        return self.cost.flops / (self.micro_batch * self.recipe.data.length)

    def seconds_per_step(self, gpu: GPU, utilisation: float) -> float:
        """The longest of: products at a share of the peak rate; all products at that rate, and then the other
        operations as fast as memory allows; starting all of them one by one."""
        rate = 1e12 * (gpu.bf16 if self.recipe.train.bf16 else gpu.float32)
        products = self.cost.flops / rate
        moving = self.cost.moved_bytes / (1e9 * gpu.bandwidth)
        seconds = max(products / utilisation, products + moving, LAUNCH * self.cost.kernels)
        return self.recipe.train.accumulate * seconds

    def fits(self, gpu: GPU) -> bool:
        """Whether the memory is enough."""
        return sum(self.memory.values()) <= USABLE * gpu.gigabytes * 1e9


def dry_run(
    stages: Sequence[tuple[str, Recipe[Any, Any]]],
    only: str | None,
    devices: int,
    gpu: str | None,
    utilisation: float,
    json: bool = False,
) -> None:
    """Print the estimates of a recipe's stages, or of `only` one, for one kind of GPU or all known; writes nothing.

    json: as an object in a line for each stage, in place of tables.

    Raises UserError for an unknown stage or GPU, and where a stage would not start.
    """
    if gpu is not None and gpu.upper() not in GPUS:
        raise UserError(f"there is no GPU {gpu!r} in the table; it has: {', '.join(GPUS)}")
    if devices < 1:
        raise UserError(f"--devices must be at least 1, not {devices}")
    if not 0 < utilisation <= 1:
        raise UserError(f"--utilisation must be above 0 and at most 1, not {utilisation}")
    if only is not None and only not in dict(stages):
        raise UserError(f"there is no stage {only!r}; the stages are: {', '.join(dict(stages))}")
    gpus = {name: figures for name, figures in GPUS.items() if gpu is None or name == gpu.upper()}
    chosen = [(name, recipe) for name, recipe in stages if only in (None, name)]
    for name, recipe in chosen:
        number = [*dict(stages)].index(name)
        run.check_start(name, recipe, [earlier for _, earlier in stages[:number]])
        checks.check(name, recipe, devices)
    for name, recipe in chosen:
        estimate = estimated(name, recipe, devices, vocabulary(recipe, dict(stages)))
        if json:
            append_objects(sys.stdout, [record(estimate, gpus, utilisation)])
        else:
            show(estimate, gpus, utilisation)


def vocabulary(recipe: Recipe[Any, Any], stages: dict[str, Recipe[Any, Any]]) -> int:
    """Tokens: of the tokenizer to be used if it is there already, else what the recipe says they will be."""
    tokenised = recipe.data.source.removeprefix("shards:")
    place = recipe.tokenizer.path or recipe.init or Path(tokenised)
    if (place if place.suffix == ".json" else place / FILE_NAME).is_file():
        return Tokenizer.load(place).vocab_size
    if recipe.tokenizer.path is None:
        for earlier in stages.values():
            if earlier.out == recipe.init:
                return vocabulary(earlier, stages)
        if recipe.init is None and tokenised == recipe.data.source:
            return recipe.tokenizer.vocab_size
    return build.vocab_size(recipe.model)


def estimated(name: str, recipe: Recipe[Any, Any], devices: int, vocab_size: int, both: bool = True) -> Estimate:
    """Count a stage; `both`: with and without recomputation, not only as the recipe has it."""
    data, train = recipe.data, recipe.train
    shards = checks.num_shards(name, recipe, devices)
    config = build.with_vocabulary(recipe.model, vocab_size)
    ids = torch.arange(data.batch_size // (devices * train.accumulate))
    variants = (build.recomputing(config, False), build.recomputing(config, True))
    models: dict[Any, build.Model] = {}
    with torch.device("meta"):
        for variant in {config, *(variants if both else ())}:
            models[variant] = build.build(variant)
            build.start(models[variant])
    model = models[config]
    with cost.unreal(*models.values()):
        batch = Batch(torch.zeros(len(ids), data.length, dtype=torch.long), ids, recipe.seed, step=0)
        passes = {variant: cost.of_pass(model, batch, train.bf16) for variant, model in models.items()}
        memory = {part: total // shards for part, total in cost.state_bytes(model, train).items()}
        if shards > 1:
            memory["gathered"] = cost.gathered_bytes(model)
        memory["activations"] = passes[config].peak_bytes
    activations = {bool(on): passes[variant].peak_bytes for on, variant in enumerate(variants) if variant in passes}
    return Estimate(
        name=name,
        recipe=recipe,
        devices=devices,
        shards=shards,
        parts=parts(model),
        core=build.num_core(model),
        cost=passes[config],
        memory={part: size for part, size in memory.items() if size},
        activations=activations if len(models) > 1 else {},
    )


def parts(model: build.Model) -> dict[str, tuple[int, bool]]:
    """Parameters by part: the first two words of their names; modulations of the time apart."""
    counted: dict[str, tuple[int, bool]] = {}
    for name, parameter in model.named_parameters():
        words = name.split(".")
        part = ".".join([words[0], "modulations"] if any("modulation" in word for word in words) else words[:2])
        counted[part] = (counted.get(part, (0, False))[0] + parameter.numel(), parameter.requires_grad)
    return counted


def record(estimate: Estimate, gpus: dict[str, GPU], utilisation: float) -> dict[str, Any]:
    """All figures of an estimate, in bytes, operations and seconds."""
    return {
        "stage": estimate.name, "plan": settings(estimate), "devices": estimate.devices, "shards": estimate.shards,
        "parameters": {part: count for part, (count, _) in estimate.parts.items()}, "core": estimate.core,
        "tokens": estimate.tokens, "flops_per_token": estimate.flops_per_token, "memory": estimate.memory,
        "activations": {"recomputed" if on else "kept": size for on, size in estimate.activations.items()},
        "fits": {name: estimate.fits(gpu) for name, gpu in gpus.items()}, "utilisation": utilisation,
        "seconds_per_step": {name: estimate.seconds_per_step(gpu, utilisation) for name, gpu in gpus.items()},
    }  # fmt: skip


def show(estimate: Estimate, gpus: dict[str, GPU], utilisation: float) -> None:
    """Print an estimate: the plan, parameters, operations, memory, time."""

    console = screen.console()

    def put(title: str, grid: Table) -> None:
        console.print(f"[bold]{escape(estimate.name)}: {title}[/]\n")
        screen.put(grid)
        console.print()

    plan = table("", "", words=(0, 1))
    for title, text in settings(estimate).items():
        plan.add_row(title, escape(text))
    put("the plan", plan)

    total = sum(count for count, _ in estimate.parts.values())
    sizes = table("part", "parameters", "", words=(0, 2))
    for part, (count, is_trained) in estimate.parts.items():
        if count >= total / 1000:
            sizes.add_row(part, f"{count:,}", "" if is_trained else "frozen")
    sizes.add_row("all", f"{total:,}", style="bold")
    sizes.add_row("trained", f"{sum(count for count, is_trained in estimate.parts.values() if is_trained):,}")
    sizes.add_row("core, N", f"{estimate.core:,}")
    put("parameters", sizes)

    flops = table("", "a token", "whole stage")
    for title, per_token in (("6 N", 6.0 * estimate.core), ("counted", estimate.flops_per_token)):
        flops.add_row(title, f"{short(per_token)}FLOP", f"{short(per_token * estimate.tokens)}FLOP")
    put("operations", flops)

    memory = table("part", "GB")
    for part, size in estimate.memory.items():
        memory.add_row(part, f"{size / 1e9:.2f}")
    memory.add_row("all", f"{sum(estimate.memory.values()) / 1e9:.2f}", style="bold")
    for recompute, size in estimate.activations.items():
        memory.add_row(f"(activations {'with' if recompute else 'without'} recomputation", f"{size / 1e9:.2f})")
    put("memory of one device", memory)

    time = table("GPU", "GB", "fits", "s / step", "tokens / day", "days", words=(0, 2))
    for name, gpu in gpus.items():
        seconds = estimate.seconds_per_step(gpu, utilisation)
        a_day = short(86400 / seconds * estimate.tokens_per_step)
        days = f"{seconds * estimate.recipe.train.steps / 86400:.3g}"
        time.add_row(name, f"{gpu.gigabytes:g}", "yes" if estimate.fits(gpu) else "no", f"{seconds:.3g}", a_day, days)
    put(f"time on {estimate.devices} GPU(s), estimated, at most {utilisation:.0%} of the peak rate", time)


def settings(estimate: Estimate) -> dict[str, str]:
    """What the stage starts from, reads, and does, in words."""
    recipe, data, train = estimate.recipe, estimate.recipe.data, estimate.recipe.train
    rates = f"AdamW {train.learning_rate:.3g}"
    if train.optimizer == "muon":
        rates = f"Muon {train.muon_learning_rate:.3g}, {rates}"
    fall = "" if train.schedule == "constant" else f" to {train.final:.3g} of it over the last {train.decay:.0%}"
    kept = sum(estimate.memory.get(part, 0) for part in cost.SAVED) * estimate.shards
    return {
        "starts from": origin(recipe),
        "data": f"{data.source}, {data.batch_size:,} sequences of {data.length:,} tokens a step",
        "devices": f"{estimate.devices}: {train.replicate} x {estimate.shards} shards, "
        f"passes of {estimate.micro_batch:,} sequences, {train.accumulate:,} a step",
        "steps": f"{train.steps:,}, or {train.seconds:g} seconds" if train.seconds else f"{train.steps:,}",
        "tokens": short(estimate.tokens),
        "learning rate": f"{rates}, warm-up {train.warmup:,} steps, {train.schedule}{fall}",
        "precision": "bfloat16 autocast over float32 weights" if train.bf16 else "float32",
        "checkpoints": f"every {train.save_every:,} steps, {short(kept)}B each, {train.keep} kept",
        "writes to": str(recipe.out),
    }


def short(value: float) -> str:
    """Three digits and a unit, such as 1.83 G."""
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} Z"
