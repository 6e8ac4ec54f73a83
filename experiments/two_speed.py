"""A prior of two speeds: blocks, steps, candidates and checks, beside one speed and AR at equal counted operations.

    python -m experiments.two_speed --flops 4e13 --out runs/two-speed

Command:  as above; --models NAME ... for some of them, --seeds N for several seeds. Ctrl-C keeps all: the same command
          goes on.
Cost:     with 4e13 operations 15 to 30 minutes of one core a model and seed, and some 10 more for its measures.
Expect:   docs/results.md, "Two speeds".

Trains each model of MODELS on the story world as experiments/matched.py does (tokenizer, data, batch, length, width),
has it write in each of its WAYS, and keeps a row of each in OUT/SEED/MODEL/measures.jsonl: the world's verdicts, how
varied the texts are, serial layer passes a token, tokens a second. OUT/two-speed.md and .svg are made of these alone.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments import matched
from experiments.matched import Options as Matched
from experiments.matched_results import percent, verdicts
from opencola.checkpoints.hub import load
from opencola.checkpoints.settings import load_sampling
from opencola.evaluation.quality.measures import variety
from opencola.evaluation.statistics import bits_per_token, share
from opencola.evaluation.writing import PROMPT_SENTENCES, held_out, write_stories
from opencola.layers.few_rows import FewRowsBlock
from opencola.layers.llama import LlamaBlock
from opencola.layers.transformer import AdaptiveBlock, Block
from opencola.models.ar.score import ARScoring
from opencola.models.build import WholeModel
from opencola.models.cola.model import Cola
from opencola.models.cola.score import Scoring
from opencola.models.sampling import Sampling
from opencola.run import flags
from opencola.storage import write_text
from opencola.text.lines import read_objects, write_objects
from opencola.text.tokenizer import Tokenizer

RATES = {"learning_rate": 1.2e-3, "muon_learning_rate": 0.01}
TRUNK, PRIOR = {"num_layers": 6, "trunk_layers": 4}, {"lambda_ar": 1.0}
# By name: the family, what is trained otherwise than in `matched`, by the fields of the model, and peak rates.
MODELS: dict[str, tuple[matched.Family, dict[str, dict[str, Any]], dict[str, float]]] = {
    "ar": ("ar", {}, {}),
    "one-speed": ("cola", {}, {}),
    "one-speed-low-rates": ("cola", {}, RATES),
    **{
        f"two-speed-{size}": (
            "cola",
            {"vae": {"decoder_layers": 1}, "dit": {**TRUNK, "block_size": size}, "prior": PRIOR},
            RATES,
        )
        for size in (1, 4, 8)
    },
}
FREE: list[dict[str, Any]] = [
    {},
    {"steps": 16},
    {"solver": "euler", "steps": 4},
    {"solver": "euler", "steps": 2},
    {"steps": 8, "guidance": 1.0},
]
CHECKED: list[dict[str, Any]] = [
    {"candidates": 4, "rank": "trunk"},
    {"verify": "greedy", "solver": "euler", "steps": 1, "guidance": 1.0},
    {"verify": "lossless", "temperature": 1.0, "solver": "euler", "steps": 1, "guidance": 1.0},
    {"verify": "typical", "solver": "euler", "steps": 1, "guidance": 1.0},
    {"verify": "typical", "steps": 2},
    {"verify": "typical", "steps": 4},
]
# By the beginning of a model's name: how it writes, beside its own settings.
WAYS = {"ar": [{"temperature": 0.0}, {"temperature": 1.0}], "one-speed": FREE, "two-speed": FREE + CHECKED}


@dataclass(frozen=True)
class Options:
    """What to train, and by how much."""

    out: Path = Path("runs/two-speed")
    """Folder of the whole experiment."""
    flops: float = 4e13
    """Budget of each model by counted operations of training, all stages together."""
    models: tuple[str, ...] = tuple(MODELS)
    """Which to train and to measure now; what is finished is kept."""
    size: matched.SizeName = "1m"
    """About 1 M core parameters; tiny is for trying it out."""
    stories: int = 200
    """Held-out stories to measure on."""
    seeds: int = 1
    """Number of seeds of each, from 66 on."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, measure it, and render all that is known."""
    options: Options = flags.parse(Options, sys.argv[1:] if argv is None else argv, description=__doc__)
    unknown = [name for name in options.models if name not in MODELS]
    if unknown:
        raise SystemExit(f"there is no model {unknown[0]!r}; the models are: {', '.join(MODELS)}")
    tokenizer = matched.shared_tokenizer(Matched(options.out, options.size, flops=options.flops))
    for seed in range(66, 66 + options.seeds):
        for name in options.models:
            folder = options.out / str(seed) / name
            derive(name, Matched(folder, options.size, flops=options.flops, seed=seed), tokenizer)
            matched.train(MODELS[name][0], folder)
            measure(name, folder, options.stories, {"model": name, "seed": seed, "flops": options.flops})
    rows = [row for file in sorted(options.out.glob("*/*/measures.jsonl")) for _, row in read_objects(file)]
    write_text(options.out / "two-speed.md", render(rows))
    draw(rows, options.out / "two-speed.svg")
    print(render(rows))


def derive(name: str, options: Matched, tokenizer: Tokenizer) -> matched.Stages:
    """Write a model's recipe, with as many steps as the budget buys, and read it."""
    tokenizer.save(options.out)
    family, fields, rates = MODELS[name]
    plan = matched.sketch(family, options)
    for model in (plan["model"], *(stage.get("model", {}) for stage in plan.get("stages", {}).values())):
        for part in model.keys() & fields.keys():
            model[part] |= fields[part]
    plan["train"] |= rates
    shares: Mapping[str, float] = matched.SHARES if family == "cola" else {family: 1.0}
    return matched.settle(plan, options.out / "recipes" / f"{family}.yaml", shares, options, tokenizer)


def measure(name: str, folder: Path, number: int, facts: Mapping[str, Any]) -> None:
    """Write a row for each way in which a model writes that has none yet."""
    file = folder / "measures.jsonl"
    ways = WAYS[next(kind for kind in WAYS if name.startswith(kind))]
    rows = [row for _, row in read_objects(file)] if file.is_file() else []
    done = [row["way"] for row in rows if row["stories"] == number]
    model, tokenizer = load(folder / MODELS[name][0])
    model.requires_grad_(False)
    for way in ways:
        if way not in done:
            print(f"{folder}: {way or 'as trained'}", flush=True)
            sampling = replace(load_sampling(folder / MODELS[name][0]), **way)
            row = {**facts, "way": way, "stories": number, **texts_of(model, tokenizer, sampling, number)}
            rows.append(row | bits(model, tokenizer) | speed(model, tokenizer, sampling))
            write_objects(file, rows)


def texts_of(model: WholeModel, tokenizer: Tokenizer, sampling: Sampling, number: int) -> dict[str, Any]:
    """The world's verdicts on continued held-out stories, shares with intervals; and how varied they are, beside the
    held-out texts."""
    continuations, last_words, _ = write_stories(model, tokenizer, sampling, held_out(number))
    own = variety([tokenizer.encode(story.continuation) for story in continuations])
    real = variety([tokenizer.encode(story.reference) for story in continuations])
    return verdicts(continuations, last_words) | {
        f"{what}_{entry.name}": entry.value
        for what, entries in (("own", own), ("real", real))
        for entry in entries
        if entry.name in ("distinct_3", "pool_entropy", "token_entropy")
    }


def bits(model: WholeModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """Exact bits a token of held-out stories, where the model predicts tokens one by one."""
    if isinstance(model, Cola) and model.dit.next_token is None:
        return {}
    exact: Any = Scoring(estimator="trunk") if isinstance(model, Cola) else ARScoring()
    texts = [[*tokenizer.encode(tale.text), tokenizer.eos_id] for tale in held_out(100)]
    score = model.score([[]] * len(texts), texts, exact, pad_id=tokenizer.eos_id)
    value, error = bits_per_token(score.total, int(score.num_tokens.sum()))
    return {"bits_per_token": value, "bits_error": error}


def speed(model: WholeModel, tokenizer: Tokenizer, sampling: Sampling) -> dict[str, float]:
    """Serial layer passes a token, all networks together, of a few held-out stories after their first block; and tokens
    a second, one text and 16 at a time."""
    stories = held_out(16)
    prompts = [tokenizer.encode(" ".join(tale.sentences[:PROMPT_SENTENCES])) for tale in stories]
    settings: Any = replace(sampling, max_new_tokens=40, ignore_eos=True)
    passes = tokens = 0
    seconds = {}
    for batch in (1, 16):
        started = time.perf_counter()
        with counted_layers() as calls:
            before = None
            for blocks in model.generate(prompts[:batch], settings):
                if batch == 1 and before is not None:
                    tokens += len(blocks[0].tokens)
                before = calls[0] if before is None else before
        passes = calls[0] - (before or 0) if batch == 1 else passes
        seconds[batch] = time.perf_counter() - started
    rates = {f"tokens_per_second_{batch}": batch * 40 / taken for batch, taken in seconds.items()}
    return {"serial_layers_per_token": passes / max(tokens, 1), **rates}


@contextmanager
def counted_layers() -> Iterator[list[int]]:
    """A counter of passes through transformer blocks, however many rows go along."""
    calls = [0]
    kinds: tuple[Any, ...] = (AdaptiveBlock, FewRowsBlock, Block, LlamaBlock)
    originals = [kind.forward for kind in kinds]

    def counting(forward: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            calls[0] += 1
            return forward(*arguments, **named)

        return call

    for kind, forward in zip(kinds, originals, strict=True):
        kind.forward = counting(forward)
    try:
        yield calls
    finally:
        for kind, forward in zip(kinds, originals, strict=True):
            kind.forward = forward


def pooled(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """A share over all seeds' stories together."""
    hits = sum(round(row[name]["value"] * row[name]["count"]) for row in rows)
    return asdict(share(hits, sum(row[name]["count"] for row in rows)))


def by_way(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Rows of the same model and way, which differ in their seeds."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{list(MODELS).index(row['model'])} {row['way']}", []).append(row)
    return list(groups.values())


def name_of(row: Mapping[str, Any]) -> str:
    """How a row is called."""
    return ", ".join([row["model"], *(f"{name} {value}" for name, value in row["way"].items())])


def mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """Over the rows that have it."""
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else float("nan")


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table."""
    head = "| model, way | seeds | consistent | legal | last word | distinct | trigrams, own / real | bits a token "
    head += "| serial layers a token | tokens/s, 1 | tokens/s, 16 |"
    lines = [head, "|" + " --- |" * 11]
    for group in by_way(rows):
        shares = [
            percent(pooled(group, name))
            for name in ("consistent_stories", "legal_sentences", "last_word_accuracy", "distinct_continuations")
        ]
        varied = f"{mean(group, 'own_distinct_3'):.3f} / {mean(group, 'real_distinct_3'):.3f}"
        exact = f"{mean(group, 'bits_per_token'):.3f}" if "bits_per_token" in group[0] else ""
        cost = [f"{mean(group, 'serial_layers_per_token'):.2f}"]
        cost += [f"{mean(group, f'tokens_per_second_{batch}'):.0f}" for batch in (1, 16)]
        cells = [name_of(group[0]), str(len(group)), *shares, varied, exact, *cost]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\nShares in percent with 95 % intervals, all seeds' stories together.\n"


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Consistent stories against serial layer passes a token: what is above and to the left is better."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    groups = by_way(rows)
    for model in MODELS:
        own = [group for group in groups if group[0]["model"] == model]
        if not own:
            continue
        shares = [pooled(group, "consistent_stories") for group in own]
        values = [100 * entry["value"] for entry in shares]
        errors = [[100 * abs(entry["value"] - entry[end]) for entry in shares] for end in ("low", "high")]
        passes = [mean(group, "serial_layers_per_token") for group in own]
        axes.errorbar(passes, values, yerr=errors, fmt="o", label=model, capsize=2)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("serial layer passes a token")
    axes.set_ylabel("consistent stories, %, 95 % interval")
    axes.legend()
    figure.savefig(file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
