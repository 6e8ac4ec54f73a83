"""Log-probabilities of the texts in a file: what is scored together, and the figures of each text."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opencola.errors import UserError
from opencola.evaluation.statistics import perplexity
from opencola.models.language_model import LanguageModel, Score
from opencola.text import lines
from opencola.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Pair:
    """A continuation and what comes before it, maybe nothing."""

    prompt: str
    continuation: str


def together(pairs: Sequence[Pair], size: int) -> Iterator[list[int]]:
    """Places of pairs to score at a time, in order; those with a prompt apart, as their scores are of another kind."""
    for _, group in itertools.groupby(range(len(pairs)), lambda place: bool(pairs[place].prompt)):
        places = list(group)
        yield from (places[first : first + size] for first in range(0, len(places), size))


def score_pairs(
    model: LanguageModel,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    ids: Sequence[int],
    settings: Any,
    end_of_text: bool,
    allow_not_finite: bool = False,
) -> Iterator[dict[str, Any]]:
    """A record of every pair. settings: of the family's own class; end_of_text: score that token, too.

    Raises NotFiniteError, naming the text by its id, for a log-probability that is not finite; with `allow_not_finite`
    its record has null in its place.
    """
    end = [tokenizer.eos_id] if end_of_text else []
    encoded = [tokenizer.encode_pair(pair.prompt, pair.continuation) for pair in pairs]
    prompts, continuations = [first for first, _ in encoded], [[*rest, *end] for _, rest in encoded]
    # only an end of text tells the model that nothing follows, so blocks are filled up with more of them
    scores = model.score(prompts, continuations, settings, pad_id=tokenizer.eos_id, ids=ids)
    if not allow_not_finite:
        scores.check_finite([f"text {i}" for i in ids])
    for place, (i, pair) in enumerate(zip(ids, pairs, strict=True)):
        record = {"id": i, **asdict(pair), "num_prompt_tokens": len(prompts[place])}
        if not pair.prompt:
            record = {"id": i, "text": pair.continuation}
        num_bytes = tokenizer.num_bytes(continuations[place][: int(scores.num_tokens[place])])
        yield record | figures(scores, place, num_bytes) | {"settings": asdict(settings), "end_of_text": end_of_text}


def figures(score: Score, place: int, num_bytes: int) -> dict[str, Any]:
    """The labelled figures of one text, in nats but for the bits per byte; null where there are none."""
    total, tokens = score.total[place].item(), int(score.num_tokens[place])
    nats = -total if math.isfinite(total) else math.nan
    parts = {name: value[place].item() for name, value in score.parts.items()}
    blocks = score.blocks[place] if score.blocks else {}
    named = {
        "log_probability": total,
        "standard_error": score.standard_error[place].item(),
        "kind": score.kind,
        "estimator": score.estimator,
        "num_tokens": tokens,
        "num_bytes": num_bytes,
        **rates(nats, tokens, num_bytes),
        **{name: value[place].item() for name, value in score.others.items()},
        "parts": parts,
        "parts_per_token": {name: value / tokens for name, value in parts.items()},
        "parts_per_block": {name: value.tolist() for name, value in blocks.items()},
    }
    return {name: _finite(value) for name, value in named.items()}


def _finite(value: Any) -> Any:
    """A figure, or figures by name or in a list, with None for those that JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_pairs(file: Path) -> Iterator[Pair]:
    """Texts from a .txt or .jsonl file; blank lines are none.

    Raises FileNotFoundError, and UserError naming the line that holds none.
    """
    for place, line in lines.read_lines(file, "texts"):
        yield pair_of(line, place) if lines.holds_object(file, line) else Pair("", line)


def pair_of(line: str, place: str) -> Pair:
    """The text in a line of a .jsonl file; raises UserError, naming the place, where it holds none."""
    match lines.parse_json(line, place):
        case {"text": str(text)} if text:
            pair = Pair("", text)
        case {"prompt": str(prompt), "continuation": str(text)} if text:
            pair = Pair(prompt, text)
        case _:
            raise UserError(f"{place}: expected strings in a field 'text', or in 'prompt' and 'continuation'")
    for text in (pair.prompt, pair.continuation):
        lines.check_text(text, place)
    return pair


def total(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sums of all records that have a log-probability, of which there is one at least, and what follows from them.

    not_finite: how many have none, where that is so.
    """
    whole: dict[str, Any] = {"id": "all"}
    if bad := sum(record["log_probability"] is None for record in records):
        records = [record for record in records if record["log_probability"] is not None]
        whole["not_finite"] = bad
    for name in ("num_tokens", "num_bytes", "log_probability", *(["elbo"] if "elbo" in records[0] else [])):
        values = [record[name] for record in records]
        whole[name] = None if None in values else sum(values)
    errors = [record["standard_error"] for record in records]
    whole["standard_error"] = None if None in errors else math.hypot(*errors)
    parts = {name: [record["parts"][name] for record in records] for name in records[0]["parts"]}
    whole["parts"] = {name: None if None in values else sum(values) for name, values in parts.items()}
    return whole | rates(-whole["log_probability"], whole["num_tokens"], whole["num_bytes"])


def rates(nats: float, num_tokens: int, num_bytes: int) -> dict[str, float | None]:
    """Perplexity, and bits per byte where there are bytes, of -log p in nats."""
    bits_per_byte = nats / math.log(2) / num_bytes if num_bytes else None
    return {"perplexity": perplexity(nats / num_tokens), "bits_per_byte": bits_per_byte}
