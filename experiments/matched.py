"""Cola DLM, AR, LLaDA and Plaid, matched: one tokenizer, one order of data, one optimiser, one size, one budget.

    python -m experiments.matched --flops 4e13 --out runs/matched

Command:  as above; exactly one of --flops (counted, forward and backward), --tokens and --seconds is the budget of each
          family. Ctrl-C keeps all: the same command goes on.
Cost:     with 4e13 operations about 15 minutes of 2 cores a family, and 10 more for the measures.
Expect:   docs/results.md.

Writes OUT/recipes/FAMILY.yaml, which `opencola train` takes as well; each family's run in OUT/FAMILY; equal.json, what
was held equal; results.jsonl, matched.md and matched.svg, what came out (experiments/matched_results.py).
"""

import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
import yaml

from opencola.data.corpus import Corpus, CorpusConfig
from opencola.models import build
from opencola.run import dry_run, flags
from opencola.run import recipe as recipes
from opencola.run.recipe import Recipe
from opencola.storage import write_text
from opencola.text.tokenizer import FILE_NAME, Tokenizer

Family = Literal["cola", "ar", "llada", "plaid"]
FAMILIES: tuple[Family, ...] = get_args(Family)
TOLERANCE = 0.02
"""By how much of Cola DLM's core parameters those of another family may differ."""
SHARES = {"vae": 0.06, "prior": 0.84, "joint": 0.1}
"""Of Cola DLM's budget, by stage."""
UNBOUNDED = 1_000_000  # steps of a run that the clock ends


@dataclass(frozen=True)
class Size:
    """A size by the shape of Cola DLM's prior; the others' SwiGLU is made as wide as their core parameters ask."""

    width: int
    num_layers: int
    num_heads: int
    vocab_size: int
    length: int
    batch_size: int


SizeName = Literal["tiny", "1m"]
SIZES: dict[SizeName, Size] = {"tiny": Size(16, 1, 2, 300, 32, 2), "1m": Size(128, 4, 8, 1024, 96, 4)}
STORIES = "stories"
TRAIN = {"schedule": "linear", "decay": 0.1, "ema": 0.995}
# Peak rates of AdamW and Muon. Of the baselines, those with the lowest validation loss after 1 500 steps among
# (2.5e-3, 0.04), (2.5e-3, 0.02), (1.2e-3, 0.01) and (6e-4, 0.005): at Cola DLM's, which the demo has, LLaDA learns
# nothing, so that a common rate would compare failures (docs/results.md).
RATES = {"cola": (2.5e-3, 0.04), "ar": (6e-4, 0.005), "llada": (6e-4, 0.005), "plaid": (6e-4, 0.005)}
SAMPLING: dict[str, dict[str, Any]] = {
    "cola": {"solver": "stochastic", "steps": 8, "guidance": 2.5},
    "ar": {},
    "llada": {"guidance": 1, "steps": 16, "block_length": 16},
    "plaid": {"guidance": 1, "steps": 64},
}


@dataclass(frozen=True)
class Options:
    """What to match, and by what."""

    out: Path = Path("runs/matched")
    """Folder of the whole experiment."""
    size: SizeName = "1m"
    """About 1 M core parameters; tiny is for trying it out."""
    families: tuple[Family, ...] = FAMILIES
    """Which to train and to measure now; runs that are finished are kept."""
    flops: float | None = None
    """Budget by counted operations of training, the packed sequence and the Text VAE among them."""
    tokens: float | None = None
    """Budget by tokens of training, those of Cola DLM's first stage among them."""
    seconds: float | None = None
    """Budget by the clock."""
    stories: int = 200
    """Held-out stories to measure on."""
    scored: int = 40
    """Of these, stories whose bits per token are estimated."""
    seed: int = 66
    """Of weights, data and noise."""

    def __post_init__(self) -> None:
        given = [name for name in ("flops", "tokens", "seconds") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of --flops, --tokens and --seconds, not {given or 'none'}")


Stages = list[tuple[str, Recipe[Any, Any]]]


def main(argv: Sequence[str] | None = None) -> None:
    """Derive the recipes, hold them against each other, train them, and measure what comes out."""
    from experiments import matched_results

    options: Options = flags.parse(Options, sys.argv[1:] if argv is None else argv, description=__doc__)
    tokenizer = shared_tokenizer(options)
    family_recipes: dict[str, Stages] = {family: derive(family, options, tokenizer) for family in FAMILIES}
    equal = held_equal(family_recipes, tokenizer)
    write_text(options.out / "equal.json", json.dumps(equal, indent=2) + "\n")
    for name, value in equal.items():
        print(f"{name}: {json.dumps(value)}")
    for family in options.families:
        train(family, options.out)
    matched_results.measure_all(options, family_recipes, tokenizer)


def shared_tokenizer(options: Options) -> Tokenizer:
    """The tokenizer of all families, trained on the stories, in OUT."""
    file = options.out / FILE_NAME
    if not file.is_file():
        config = CorpusConfig(source=STORIES, length=1, batch_size=1)
        texts = itertools.islice(config.texts(options.seed), recipes.TokenizerConfig.train_documents)
        Tokenizer.train(texts, SIZES[options.size].vocab_size).save(options.out)
    return Tokenizer.load(file)


def derive(family: str, options: Options, tokenizer: Tokenizer) -> Stages:
    """Write a family's recipe, with as many steps as its budget buys, and read it."""
    shares = SHARES if family == "cola" else {family: 1.0}
    return settle(sketch(family, options), options.out / "recipes" / f"{family}.yaml", shares, options, tokenizer)


def settle(
    plan: dict[str, Any], file: Path, shares: Mapping[str, float], options: Options, tokenizer: Tokenizer
) -> Stages:
    """Write a recipe whose stages take these shares of the budget, and read it."""
    write(plan, file)
    for stage, share in shares.items():
        train = plan["stages"][stage]["train"] if "stages" in plan else plan["train"]
        if options.seconds is not None:
            train |= {"seconds": share * options.seconds, "steps": UNBOUNDED}
            continue
        recipe = dict(read(file))[stage]
        per_step = recipe.data.length * recipe.data.batch_size
        if options.flops is not None:
            per_step = step_flops(stage, recipe, tokenizer)
        train["steps"] = max(1, round(share * (options.flops or options.tokens or 0) / per_step))
    write(plan, file)
    return read(file)


def sketch(family: str, options: Options) -> dict[str, Any]:
    """A recipe's keys and values, one step for each stage."""
    size, (adamw, muon) = SIZES[options.size], RATES[family]
    plan: dict[str, Any] = {
        "out": str(options.out / family),
        "seed": options.seed,
        "tokenizer": {"path": str(options.out / FILE_NAME)},
        "data": {"source": STORIES, "length": size.length, "batch_size": size.batch_size, "packing": "aligned"},
        "train": {**TRAIN, "learning_rate": adamw, "muon_learning_rate": muon, "steps": 1},
        "sampling": {"max_new_tokens": size.length, **SAMPLING[family]},
    }
    if family != "cola":
        return plan | {"family": family, "model": {"trunk": trunk(family, size)}}
    head_dim = size.width // size.num_heads
    dit = {"width": size.width, "num_layers": size.num_layers, "num_heads": size.num_heads, "head_dim": head_dim}
    plan["model"] = {
        "vae": {
            "width": size.width,
            "ffn_dim": 4 * size.width,
            "num_heads": 4,
            "encoder_layers": 0,
            "decoder_layers": 2,
        },
        "objective": {"beta": 1e-4, "lambda_mask": 0},
    }
    prior = {"dit": {**dit, "rope_dim": 3 * head_dim // 4, "block_size": 1}}
    frozen, along = {"strategy": "fixed", "lambda_ref": 0}, {"strategy": "joint", "lambda_ref": 0.02}
    plan["stages"] = {
        # the first stage, and the last, see other stories than the one that does most of the learning
        "vae": {"family": "vae", "seed": options.seed + 1, "train": {}},
        "prior": {
            "family": "cola",
            "init": "vae",
            "model": {**prior, "prior": frozen},
            "train": {"schedule": "constant"},
        },
        "joint": {
            "family": "cola",
            "seed": options.seed + 2,
            "init": "prior",
            "model": {**prior, "prior": along},
            "train": {"learning_rate": 4e-4, "muon_learning_rate": 0.006, "decay": 1.0, "ema": 0.98},
        },
    }
    return plan


def trunk(family: str, size: Size) -> dict[str, int]:
    """A baseline's transformer, as wide and deep as the prior, its SwiGLU as wide as equal core parameters ask."""
    shape: dict[str, int] = {"width": size.width, "num_layers": size.num_layers, "num_heads": size.num_heads}
    head_dim = size.width // size.num_heads
    dit: dict[str, Any] = {**shape, "head_dim": head_dim, "rope_dim": 3 * head_dim // 4, "block_size": 1}
    goal = core({"family": "cola", "model": {"dit": dit}})
    few, many = (core({"family": family, "model": {"trunk": {**shape, "ffn_dim": width}}}) for width in (8, 16))
    return {**shape, "ffn_dim": 8 * round(1 + (goal - few) / (many - few))}


def core(values: Mapping[str, Any]) -> int:
    """Core parameters of the model that a family and its settings describe."""
    config = tyro.cli(build.config_class(values["family"]), args=flags.words_of(values["model"]), use_underscores=True)
    with torch.device("meta"):
        return build.num_core(build.build(config))


def write(plan: Mapping[str, Any], file: Path) -> None:
    """Write a recipe, if it is another one than is there."""
    text = yaml.safe_dump(plan, sort_keys=False)
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write_text(file, text)


def read(file: Path) -> Stages:
    """The stages of a recipe."""
    return recipes.read(file, [], build.config_class, build.sampling_class)


def step_flops(name: str, recipe: Recipe[Any, Any], tokenizer: Tokenizer) -> int:
    """Counted operations of an optimizer step, forward and backward."""
    estimate = dry_run.estimated(name, recipe, 1, tokenizer.vocab_size, both=False)
    return estimate.cost.flops * recipe.train.accumulate


def main_stage(stages: Stages) -> tuple[str, Recipe[Any, Any]]:
    """The stage that does most of the learning: that with most steps."""
    return max(stages, key=lambda stage: stage[1].train.seconds or stage[1].train.steps)


def held_equal(families: Mapping[str, Stages], tokenizer: Tokenizer) -> dict[str, Any]:
    """What all families share. Raises ValueError, with both values, where something that must be equal is not."""
    settings = {family: shared_settings(stages, tokenizer) for family, stages in families.items()}
    (first, wanted), *others = settings.items()
    for family, own in others:
        for name, value in own.items():
            if value != wanted[name]:
                raise ValueError(f"not comparable: {name} is {wanted[name]} for {first}, but {value} for {family}")
    cores = {family: num_parameters(stages, tokenizer)[0] for family, stages in families.items()}
    for family, count in cores.items():
        if abs(count / cores[first] - 1) > TOLERANCE:
            raise ValueError(f"not comparable: {family} has {count:,} core parameters, but {first} {cores[first]:,}")
    return {**wanted, "core parameters": cores}


def shared_settings(stages: Stages, tokenizer: Tokenizer) -> dict[str, Any]:
    """What must be the same for all families: of every stage, or of the one that does most of the learning."""
    _, recipe = main_stage(stages)
    for _, other in stages:
        if (other.data, other.tokenizer) != (recipe.data, recipe.tokenizer):
            raise ValueError(f"not comparable: data or tokenizer of {other.out} and {recipe.out} differ")
    learning = ("optimizer", "weight_decay", "betas", "clip", "warmup", "ema")
    # the batches themselves: a family may cut its sequences in its own way
    corpus = Corpus(
        replace(recipe.data, verify=False), tokenizer, recipe.seed, multiple=build.tokens_per_block(recipe.model)
    )
    tokens = torch.cat([batch.tokens for batch in itertools.islice(corpus, 3)])
    return {
        "data": dataclasses.asdict(recipe.data),
        "tokenizer": str(recipe.tokenizer.path),
        "first batches": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16],
        "optimiser": {name: getattr(recipe.train, name) for name in learning},
    }


def num_parameters(stages: Stages, tokenizer: Tokenizer) -> tuple[int, int]:
    """Core parameters, and all."""
    with torch.device("meta"):
        model = build.build(build.sized(stages[-1][1].model, tokenizer))
    return build.num_core(model), sum(parameter.numel() for parameter in model.parameters())


def train(family: str, out: Path) -> None:
    """Train a family in a process of its own, going on where it stopped, and note what the process took."""
    file, folder = out / "recipes" / f"{family}.yaml", out / family
    process = subprocess.Popen([sys.executable, "-m", "opencola", "train", str(file), "--resume"])
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:  # it has been told as well, and writes a checkpoint
        process.wait()
        raise
    if status:
        raise SystemExit(f"training {family} failed")
    note = folder / "usage.json"
    if not note.is_file():
        write_text(note, json.dumps({"peak_bytes": 1024 * usage.ru_maxrss}) + "\n")


if __name__ == "__main__":
    main()
