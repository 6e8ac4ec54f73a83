"""Measure what a model writes, at several temperatures: perplexity under a judge, variety, likeness to texts.

Prints the figures; samples.jsonl holds the texts, quality.jsonl the figures with their intervals, and quality.svg
shows perplexity against entropy, where there is a judge. Held-out texts are measured beside them.

examples:
  opencola quality
  opencola quality --model runs/mine --judge openai-community/gpt2 --reference valid.txt --max-new-tokens 128
  opencola quality --model runs/demo --temperatures 0 0.5 1 --num-samples 100 --prompted --out runs/demo/quality
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.markup import escape

from opencola.checkpoints.hub import load, title
from opencola.commands.terminal import ModelFlags, read_flags
from opencola.errors import UserError
from opencola.evaluation import screen
from opencola.evaluation.figures import standalone
from opencola.evaluation.likelihood import read_pairs
from opencola.evaluation.quality import judge as judges
from opencola.evaluation.quality.figure import Frontier, frontier
from opencola.evaluation.quality.judge import Judge
from opencola.evaluation.quality.measures import Written, by_temperature, entries, to_record
from opencola.evaluation.screen import progress_bar, table
from opencola.evaluation.writing import PROMPT_SENTENCES, held_out
from opencola.models.language_model import LanguageModel
from opencola.models.samples import first_words
from opencola.models.sampling import Sampling
from opencola.models.text_stream import TextPiece, generate_text
from opencola.paths import home
from opencola.ranges import Count, NotNegative, check
from opencola.run.flags import OutputFlags
from opencola.storage import draft_of, locked, replacing
from opencola.text.lines import append_objects, write_objects
from opencola.text.tokenizer import Tokenizer

STORIES = "stories"
SAMPLES, FIGURES, DRAWING = "samples.jsonl", "quality.jsonl", "quality.svg"


@dataclass(frozen=True)
class QualityFlags(OutputFlags, ModelFlags):
    """What to write, and what to compare it with. --temperatures are in place of the --temperature below."""

    temperatures: tuple[NotNegative, ...] = (0.5, 0.7, 1.0)
    """Temperatures of the token choice, different numbers from 0 on; the noise is the same for all."""
    num_samples: Count = 200
    """Number of texts to write at each temperature; distinct n-grams and mauve_ngram depend on it."""
    judge: str | None = None
    """Causal language model whose perplexity is measured: a folder with config.json and tokenizer.json, or a repository
    of the Hugging Face Hub, such as openai-community/gpt2."""
    reference: str = STORIES
    """Texts to be like: held-out stories of the story world, or a file as `opencola score` reads it. There must be two
    for each sample: one half is compared with, the other half is measured as if a model had written it."""
    prompted: bool = False
    """Begin each sample as a text of the first half begins: with two sentences of a story, else with 8 words."""
    batch_size: Count = 16
    """Number of texts to write at a time: speed and memory; the texts do not depend on it."""
    out: Path = Path("runs/quality")
    """Folder for samples.jsonl, quality.jsonl and quality.svg; older ones there are replaced. Ctrl-C keeps the samples
    that are done, in samples.draft.jsonl."""

    def __post_init__(self) -> None:
        check(self)
        if not len({*self.temperatures}) == len(self.temperatures) > 0:
            raise UserError("--temperatures must be different numbers, at least one")


@dataclass(frozen=True)
class ReferenceText:
    """A reference text in two parts, of which the first is a prompt, maybe ""."""

    prompt: str
    rest: str


def command(argv: Sequence[str]) -> None:
    """Run `opencola quality`."""
    options: QualityFlags = read_flags(QualityFlags, argv, prog="opencola quality", description=__doc__)
    if options.sampling.chat:
        raise UserError("quality is that of texts, not of answers: give --no-chat")
    texts = read_texts(options)
    model, tokenizer = load(options.model)
    judge = None if options.judge is None else judges.load(options.judge)
    obsolete = (DRAWING, draft_of(Path(SAMPLES)).name)
    with locked(options.out), replacing(options.out, *obsolete, kept=SAMPLES) as draft:
        figures = measure(model, tokenizer, judge, texts, options, draft)
        keep(figures, options, draft)
    if not options.json:
        show(figures, options)
    options.say(f"\nSamples and all figures with their intervals are in {options.out}.")


def measure(
    model: LanguageModel,
    tokenizer: Tokenizer,
    judge: Judge | None,
    texts: Sequence[ReferenceText],
    options: QualityFlags,
    draft: Path,
) -> Frontier:
    """Write samples into a folder, and measure them; returns the figures of the reference and of each temperature."""
    like, held_out_texts = texts[: options.num_samples], texts[options.num_samples :]
    samples: list[Written] = []
    with (draft / SAMPLES).open("w", encoding="utf-8", newline="\n") as file, progress_bar() as bar:
        for temperature in (None, *options.temperatures):
            name = "held-out texts" if temperature is None else f"temperature {temperature:g}"
            for first in bar.track(range(0, options.num_samples, options.batch_size), description=name):
                ids = range(first, min(first + options.batch_size, options.num_samples))
                if temperature is None:
                    batch = [cut(tokenizer, held_out_texts[i], i, options.sampling) for i in ids]
                else:
                    settings = replace(options.sampling, temperature=temperature)
                    batch = write_texts(model, tokenizer, [like[i].prompt for i in ids], ids, settings)
                batch = batch if judge is None else judged(judge, batch)
                samples += batch
                append_objects(file, map(to_record, batch))
    wholes = [text.prompt + cut(tokenizer, text, i, options.sampling).text for i, text in enumerate(like)]
    return {
        temperature: entries(group, wholes, options.reference == STORIES)
        for temperature, group in by_temperature(samples).items()
    }


def read_texts(options: QualityFlags) -> list[ReferenceText]:
    """Twice as many reference texts as samples. Raises UserError where there are fewer, and as `score.read_pairs`."""
    count = 2 * options.num_samples
    if options.reference == STORIES:
        stories = held_out(count)
        prompts = [" ".join(tale.sentences[:PROMPT_SENTENCES]) if options.prompted else "" for tale in stories]
        return [ReferenceText(prompt, tale.text[len(prompt) :]) for prompt, tale in zip(prompts, stories, strict=True)]
    texts = [pair.prompt + pair.continuation for pair in read_pairs(home(options.reference))]
    if len(texts) < count:
        raise UserError(
            f"{options.reference} holds {len(texts)} texts, but two for each of --num-samples {options.num_samples} "
            "are needed"
        )
    prompts = [first_words(text) if options.prompted else "" for text in texts[:count]]
    return [ReferenceText(prompt, text[len(prompt) :]) for prompt, text in zip(prompts, texts, strict=False)]


def cut(tokenizer: Tokenizer, text: ReferenceText, number: int, sampling: Sampling) -> Written:
    """A reference text as if it had been written, cut to as many tokens as a model may write."""
    first, rest = tokenizer.encode_pair(text.prompt, text.rest)
    ids = rest[: sampling.max_new_tokens]
    # a decoder may treat the beginning of a text differently, so the prompt is decoded along and cut off
    return Written(None, number, text.prompt, tokenizer.decode(first + ids)[len(tokenizer.decode(first)) :], tuple(ids))


def write_texts(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], ids: Sequence[int], sampling: Sampling
) -> list[Written]:
    """What the model writes after prompts, noise being that of the samples `ids`."""
    written: list[list[TextPiece]] = [[] for _ in ids]
    for pieces in generate_text(model, tokenizer, prompts, sampling, ids):
        for piece in pieces:
            written[piece.sample].append(piece)
    return [
        Written(
            sampling.temperature,
            number,
            prompt,
            "".join(piece.text for piece in pieces),
            tuple(token for piece in pieces for token in piece.tokens),
        )
        for number, prompt, pieces in zip(ids, prompts, written, strict=True)
    ]


def judged(judge: Judge, samples: Sequence[Written]) -> list[Written]:
    """The samples with the judge's judgements."""
    judgements = judge([sample.prompt for sample in samples], [sample.text for sample in samples])
    return [replace(sample, judge=judgement) for sample, judgement in zip(samples, judgements, strict=True)]


def keep(figures: Frontier, options: QualityFlags, draft: Path) -> None:
    """Write all figures into a folder and, where there is a judge, the drawing."""
    facts = {
        "record": "figure",
        "task": "samples",
        "model": title(options.model),
        "judge": options.judge,
        "reference": options.reference,
        "prompted": options.prompted,
        "settings": asdict(options.sampling),
    }
    records = [
        {**facts, "temperature": temperature, **asdict(entry)}
        for temperature, group in figures.items()
        for entry in group
    ]
    write_objects(draft / FIGURES, records)
    if options.json:
        append_objects(sys.stdout, records)
    if options.judge is not None:
        drawing = standalone(frontier({title(options.model): figures}))
        (draft / DRAWING).write_text(drawing, encoding="utf-8")


def show(figures: Frontier, options: QualityFlags) -> None:
    """A column of figures for each temperature."""
    heads = ["held-out" if temperature is None else f"{temperature:g}" for temperature in figures]
    ends = (0, len(heads) + 1)
    grid = table("", *heads, "unit", words=ends, whole=ends)
    columns = [{entry.name: entry for entry in group} for group in figures.values()]
    for name, unit in {entry.name: entry.unit for group in figures.values() for entry in group}.items():
        cells = [f"{column[name].value:.4g}" if name in column else "" for column in columns]
        grid.add_row(name.replace("_", " "), *cells, unit)
    console = screen.console()
    console.print(f"[bold]{escape(title(options.model))}[/]: {options.num_samples} samples at each temperature\n")
    screen.put(grid)
