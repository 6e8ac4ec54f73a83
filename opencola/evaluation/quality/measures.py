"""How good texts are that a model wrote from its own noise: what a judge makes of them, and how varied they are.

Perplexity under a judge alone can be had by repeating likely words, so it never stands alone: it comes with entropy,
distinct n-grams and repetition, at several temperatures. All but the judge's figures and the comparison with a
reference count the tokens that the model wrote, so they compare models with the same tokenizer only.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from opencola.errors import UserError
from opencola.evaluation.quality.mauve import mauve
from opencola.evaluation.statistics import Entry, mean_entry, perplexity, share, share_entry
from opencola.evaluation.writing import continuation_shares, judge

NGRAMS = (1, 2, 3, 4)
STORY_LABELS = {
    "legal_sentences": "sentences that the story world can say",
    "consistent_stories": "stories that the world could have told",
    "order_legal": "stories whose sentences come in the world's order",
    "complete": "stories that miss no obligatory part",
    "conflict_free": "stories that change nothing that they told before",
}


@dataclass(frozen=True)
class Judgement:
    """What the judge `name` makes of a text after its prompt: -log p in nats, over so many of its own tokens."""

    name: str
    nats: float
    tokens: int
    bytes: int
    """Of the text as UTF-8: the same for all judges."""


@dataclass(frozen=True)
class Written:
    """A text that a model wrote after a prompt, maybe "", at a temperature; None: a held-out text instead."""

    temperature: float | None
    index: int
    prompt: str
    text: str
    ids: tuple[int, ...]
    """The text's tokens, without an end of text."""
    judge: Judgement | None = None


def to_record(sample: Written) -> dict[str, Any]:
    """A sample as it is kept in a line of JSON."""
    return {"record": "sample", "task": "samples", **asdict(sample), "num_tokens": len(sample.ids)}


def from_record(record: Mapping[str, Any], place: str) -> Written:
    """A sample of a line of JSON. Raises UserError, naming the place, where it is none."""
    try:
        sample = Written(
            record["temperature"],
            record["index"],
            record["prompt"],
            record["text"],
            tuple(record["ids"]),
            None if record["judge"] is None else Judgement(**record["judge"]),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{place}: not a record of a sample: {error}") from error
    if record.get("num_tokens") != len(sample.ids):
        raise UserError(f"{place}: num_tokens is {record.get('num_tokens')}, but there are {len(sample.ids)} ids")
    return sample


def by_temperature(samples: Iterable[Written]) -> dict[float | None, list[Written]]:
    """Samples of each temperature by their indices; held-out texts (None) first, then from cold to hot.

    Raises UserError where a temperature has an index twice.
    """
    groups: dict[float | None, list[Written]] = {}
    for sample in samples:
        groups.setdefault(sample.temperature, []).append(sample)
    for temperature, group in groups.items():
        group.sort(key=lambda sample: sample.index)
        if len({sample.index for sample in group}) < len(group):
            raise UserError(f"samples of temperature {temperature} have an index twice")
    return dict(sorted(groups.items(), key=lambda item: -math.inf if item[0] is None else item[0]))


def entries(samples: Sequence[Written], reference: Sequence[str] = (), story_world: bool = False) -> list[Entry]:
    """All figures of the samples of one temperature.

    reference: whole texts (prompts included) that they should be like; story_world: judge them by the story world, too,
    prompts being whole sentences of it. Intervals take samples for independent. Raises UserError without samples, and
    where not all or different judges have judged.
    """
    if not samples:
        raise UserError("there are no samples to measure")
    figures = [*variety([sample.ids for sample in samples]), *judged(samples)]
    wholes = [sample.prompt + sample.text for sample in samples]
    if reference:
        label = "likeness to reference texts: area under the divergence curve of byte n-gram clusters, c = 5"
        figures.append(Entry("mauve_ngram", label, "", mauve(wholes, reference), len(samples), "samples"))
    if story_world:
        shares = continuation_shares([judge(sample.prompt, sample.text, "") for sample in samples])
        counted = {"legal_sentences": "sentences"}
        figures += [
            share_entry(name, label, shares[name], counted.get(name, "samples")) for name, label in STORY_LABELS.items()
        ]
    return figures


def variety(texts: Sequence[Sequence[int]]) -> list[Entry]:
    """Length, entropy, distinct n-grams and repetition of texts as tokens.

    Distinct n-grams and the entropy of all texts grow or shrink with the number and length of texts: compare at equal
    ones. Texts without tokens count in `empty` and `length` alone, those without n-grams nowhere else of that n.
    """
    lengths = [len(text) for text in texts]
    full = [text for text in texts if text]
    empty = share(len(texts) - len(full), len(texts))
    figures = [
        share_entry("empty", "samples without a token", empty, "samples"),
        mean_entry("length", "tokens of a sample", "tokens", _tensor(lengths), _tensor([1] * len(texts)), "samples"),
    ]
    if not full:
        return figures
    pool = Counter(token for text in full for token in text)
    each = _tensor([1] * len(full))
    entropies = _tensor([entropy(Counter(text)) for text in full])
    repeated = _tensor([longest_repeat(text) for text in full])
    within = "entropy of a sample's own distribution of tokens, mean of samples"
    whole = "entropy of the distribution of all samples' tokens"
    longest = "longest stretch of a sample's tokens that stood in it before, mean of samples"
    figures += [
        mean_entry("token_entropy", within, "nats", entropies, each, "samples"),
        Entry("pool_entropy", whole, "nats", entropy(pool), sum(lengths), "tokens"),
        mean_entry("longest_repeat", longest, "tokens", repeated, each, "samples"),
    ]
    for n in NGRAMS:
        grams = [list(ngrams(text, n)) for text in full]
        counts = [len(own) for own in grams]
        if not any(counts):
            continue
        label = f"different {n}-grams of all samples, of all their {n}-grams"
        distinct = len({gram for own in grams for gram in own}) / sum(counts)
        figures.append(Entry(f"distinct_{n}", label, "share", distinct, sum(counts), f"{n}-grams"))
        repeats = _tensor([len(own) - len({*own}) for own in grams])
        label = f"{n}-grams that stood in their sample before"
        figures.append(mean_entry(f"repetition_{n}", label, "share", repeats, _tensor(counts), f"{n}-grams"))
    return figures


def judged(samples: Sequence[Written]) -> list[Entry]:
    """What the judge makes of all samples' tokens together; none where nothing was judged."""
    judgements = [sample.judge for sample in samples if sample.judge is not None]
    names = {judgement.name for judgement in judgements}
    if len(judgements) not in (0, len(samples)) or len(names) > 1:
        raise UserError(f"{len(judgements)} of {len(samples)} samples are judged, by {', '.join(sorted(names))}")
    nats, tokens, size = (
        _tensor([getattr(judgement, name) for judgement in judgements]) for name in ("nats", "tokens", "bytes")
    )
    if not tokens.sum():
        return []
    (name,) = names
    label, counted = f"-log p of a token by {name}", "judge's tokens"
    cross_entropy = mean_entry("judge_nats", label, "nats per token", nats, tokens, counted)
    low, high = (None if end is None else perplexity(end) for end in (cross_entropy.low, cross_entropy.high))
    value, label = perplexity(cross_entropy.value), f"exp of the mean {label}"
    figures = [cross_entropy, Entry("judge_perplexity", label, "", value, cross_entropy.count, counted, low, high)]
    if size.sum():
        bits, label = nats / math.log(2), f"-log2 p of a byte by {name}"
        figures.append(mean_entry("judge_bits_per_byte", label, "bits per byte", bits, size, "bytes"))
    return figures


def entropy(counts: Mapping[int, int]) -> float:
    """Of the distribution that such counts, all positive, are of, in nats."""
    total = sum(counts.values())
    return math.fsum(count / total * math.log(total / count) for count in counts.values())


def ngrams(tokens: Sequence[int], n: int) -> Iterator[tuple[int, ...]]:
    """All runs of n tokens, from first to last."""
    return (tuple(tokens[first : first + n]) for first in range(len(tokens) - n + 1))


def longest_repeat(tokens: Sequence[int]) -> int:
    """Tokens of the longest stretch that also stands at an earlier place, which it may overlap; 0 without repeats."""
    low, high = 0, max(len(tokens) - 1, 0)  # what repeats has a beginning that does, so it can be searched by halves
    while low < high:
        n = (low + high + 1) // 2
        grams = list(ngrams(tokens, n))
        low, high = (n, high) if len({*grams}) < len(grams) else (low, n - 1)
    return low


def _tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
