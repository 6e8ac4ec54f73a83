"""What a model knows of the story world, measured on held-out stories: it continues them, and finds their last words.

Every verdict is exact, given by the world itself (`opencola.worlds.stories`); no judge model is asked. A writer is any
callable from prompts and a budget of new tokens to continuations, in the prompts' order.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.progress import Progress

from opencola.errors import UserError
from opencola.evaluation.screen import progress_bar
from opencola.evaluation.statistics import Share, share
from opencola.models.language_model import LanguageModel
from opencola.models.sampling import Sampling
from opencola.models.text_stream import generate_text
from opencola.text.lines import write_objects
from opencola.text.tokenizer import Tokenizer
from opencola.worlds.stories import Story, check, last_word_choices, log_probability, parse, split_sentences, story

Writer = Callable[[Sequence[str], int], Sequence[str]]

HELD_OUT_SEED = -1
"""Corpora are made of the non-negative seeds' stories."""
PROMPT_SENTENCES = 2
BATCH_SIZE = 50

_LAST_WORD = re.compile(r"(.*?)\s*(\w+)[.!?]", re.DOTALL)
_FIRST_WORD = re.compile(r"\s+(\w+)")


@dataclass(frozen=True)
class Sentence:
    """A sentence of a story and what is wrong with it, in words ("" when nothing is)."""

    text: str
    fault: str


@dataclass(frozen=True)
class Continuation:
    """A held-out story's first sentences, what the model wrote after them, and the world's verdict on the whole.

    `legal`: per written sentence (an unfinished one counts as illegal, and so does writing nothing); `sentences`: of
    prompt and continuation; the other verdicts as in `opencola.worlds.stories.Check`; `log_probability`: of the whole
    story in nats, None where the world cannot tell it.
    """

    prompt: str
    continuation: str
    reference: str
    legal: tuple[bool, ...]
    order_legal: bool
    complete: bool
    conflicts: tuple[str, ...]
    consistent: bool
    log_probability: float | None
    sentences: tuple[Sentence, ...]

    @property
    def fault(self) -> str:
        """What is wrong with the whole story, in a few words; "" when the world could have told it."""
        if not self.continuation.strip():
            return "nothing written"
        faults = []
        if illegal := self.legal.count(False):
            faults.append(f"{illegal} illegal sentence{'s' if illegal > 1 else ''}")
        if self.conflicts:
            faults.append(f"{', '.join(self.conflicts)} changed")
        if not self.order_legal:
            faults.append("sentences out of order")
        if not faults and not self.complete:
            faults.append("a part is missing")
        return "; ".join(faults)


@dataclass(frozen=True)
class LastWord:
    """A held-out story without its last word, the model's text, and whether its first word is the right one.

    `probability`: that of the likeliest last word, given the prompt, in the world: the best accuracy anyone can expect.
    """

    prompt: str
    answer: str
    probability: float
    continuation: str
    guess: str
    correct: bool


def held_out(count: int, seed: int = HELD_OUT_SEED) -> list[Story]:
    """Stories 0 to count - 1 of a seed that no corpus can have. Raises UserError for a seed that one can."""
    if seed >= 0:
        raise UserError(f"seed {seed} may have been trained on: held-out stories have a negative seed")
    return [story(seed, index) for index in range(count)]


def token_budgets(stories: Sequence[Story], count_tokens: Callable[[str], int]) -> tuple[int, int]:
    """New tokens that suffice to continue any story of the world (half as many again as the longest continuation of
    these takes), and to write any of their last words."""
    rest = [" ".join(["", *tale.sentences[PROMPT_SENTENCES:]]) for tale in stories]
    ends = [" " + tale.text.split()[-1] for tale in stories]
    return 3 * max(map(count_tokens, rest)) // 2, max(map(count_tokens, ends))


def continue_stories(stories: Sequence[Story], write: Writer, max_new_tokens: int) -> list[Continuation]:
    """Let the model continue each story after its first two sentences, and judge the result."""
    prompts = [" ".join(tale.sentences[:PROMPT_SENTENCES]) for tale in stories]
    texts = write(prompts, max_new_tokens)
    references = [tale.text[len(prompt) :] for tale, prompt in zip(stories, prompts, strict=True)]
    return [judge(*parts) for parts in zip(prompts, texts, references, strict=True)]


def judge(prompt: str, continuation: str, reference: str) -> Continuation:
    """The world's verdict on a prompt (whole sentences) and its continuation."""
    whole = prompt + continuation
    verdict = check(whole)
    nats = log_probability(" ".join(split_sentences(whole)))
    return Continuation(
        prompt,
        continuation,
        reference,
        tuple(sentence.kind is not None for sentence in parse(continuation)) or (False,),
        verdict.order_legal,
        verdict.complete,
        tuple(verdict.conflicts),
        verdict.consistent,
        nats if math.isfinite(nats) else None,
        tuple(find_faults(whole)),
    )


def find_faults(text: str) -> list[Sentence]:
    """Every sentence of a text with its own fault: illegal, against what was told before, or out of place."""
    parsed = parse(text)
    in_order = [True] * len(parsed)
    if not check(text).order_legal:
        in_order = [check(" ".join(s.text for s in parsed[: i + 1])).order_legal for i in range(len(parsed))]
    told: dict[str, str] = {}
    sentences = []
    for i, sentence in enumerate(parsed):
        changed = sorted(v for v, value in sentence.commits.items() if told.setdefault(v, value) != value)
        faults = [f"another {', '.join(changed)} than before"] if changed else []
        if sentence.conflicts:
            faults.append(f"two values of {', '.join(sorted(sentence.conflicts))}")
        if sentence.kind is None:
            faults.append("illegal")
        elif not in_order[i] and (i == 0 or in_order[i - 1]):  # what follows the first is not its own fault
            faults.append("out of place")
        sentences.append(Sentence(sentence.text, "; ".join(faults)))
    return sentences


def continuation_shares(records: Sequence[Continuation]) -> dict[str, Share]:
    """Shares of legal sentences, and of stories that are consistent, in order, complete, free of conflicts; of
    continuations that differ from each other, and that repeat the held-out original.

    Sentences of one story are not independent, so the interval of `legal_sentences` is somewhat too narrow.
    """
    legal = [verdict for record in records for verdict in record.legal]
    original = [record.continuation.strip() == record.reference.strip() for record in records]
    return {
        "legal_sentences": share(sum(legal), len(legal)),
        "consistent_stories": share(sum(r.consistent for r in records), len(records)),
        "order_legal": share(sum(r.order_legal for r in records), len(records)),
        "complete": share(sum(r.complete for r in records), len(records)),
        "conflict_free": share(sum(not r.conflicts for r in records), len(records)),
        "distinct_continuations": share(len({r.continuation for r in records}), len(records)),
        "original_continuations": share(sum(original), len(records)),
    }


def mean_log_probability(records: Sequence[Continuation]) -> dict[str, float | None]:
    """Mean exact log-probability, in nats a story, of the consistent stories, and of the originals of all records."""
    consistent = [record.log_probability for record in records if record.consistent]
    originals = [log_probability(record.prompt + record.reference) for record in records]
    told = [nats for nats in consistent if nats is not None]
    return {"consistent": fmean(told) if told else None, "held_out": fmean(originals) if originals else None}


def predict_last_words(stories: Sequence[Story], write: Writer, max_new_tokens: int) -> list[LastWord]:
    """Let the model continue each story before its last word; correct if it writes that word next."""
    parts = [_LAST_WORD.fullmatch(tale.text) for tale in stories]
    assert all(parts), "a story ends in a word and a full stop"
    prompts, answers = zip(*(part.groups() for part in parts if part), strict=True)
    records = []
    for tale, prompt, answer, text in zip(stories, prompts, answers, write(prompts, max_new_tokens), strict=True):
        match = _FIRST_WORD.match(text)
        guess = match[1] if match else ""
        probability = max(last_word_choices(tale.text).values())
        records.append(LastWord(prompt, answer, probability, text, guess, guess == answer))
    return records


def last_word_scores(records: Sequence[LastWord]) -> tuple[Share, float, float]:
    """Accuracy; its ceiling, the mean probability of the most probable word; accuracy / ceiling."""
    accuracy = share(sum(record.correct for record in records), len(records))
    ceiling = fmean(record.probability for record in records)
    return accuracy, ceiling, accuracy.value / ceiling


def write_records(path: Path, continuations: Sequence[Continuation], last_words: Sequence[LastWord]) -> None:
    """Write one JSON object per prompt, `measure` being `continuation` or `last_word`."""
    records: list[dict[str, Any]] = [{"measure": "continuation"} | asdict(record) for record in continuations]
    records += [{"measure": "last_word"} | asdict(record) for record in last_words]
    write_objects(path, records)


def write_stories(
    model: LanguageModel, tokenizer: Tokenizer, sampling: Sampling, stories: Sequence[Story], display: bool = True
) -> tuple[list[Continuation], list[LastWord], dict[str, int]]:
    """Have the model continue stories and find their last words; the third result is the token budgets of both."""
    budgets = token_budgets(stories, lambda text: len(tokenizer.encode(text)))
    budget = dict(zip(("continuation", "last_word"), budgets, strict=True))
    with progress_bar(display) as progress:
        write = _writer(model, tokenizer, sampling, progress, "continuing stories", len(stories))
        continuations = continue_stories(stories, write, budget["continuation"])
        write = _writer(model, tokenizer, sampling, progress, "finding last words", len(stories))
        last_words = predict_last_words(stories, write, budget["last_word"])
    return continuations, last_words, budget


def _writer(
    model: LanguageModel, tokenizer: Tokenizer, sampling: Sampling, progress: Progress, task: str, total: int
) -> Writer:
    """The model as a writer of texts; a prompt's place in the list decides its noise, and the bar follows."""
    bar = progress.add_task(task, total=total)

    def write(prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        settings = replace(sampling, max_new_tokens=max_new_tokens)
        texts = [""] * len(prompts)
        for start in range(0, len(prompts), BATCH_SIZE):
            batch = prompts[start : start + BATCH_SIZE]
            ids = range(start, start + len(batch))
            for pieces in generate_text(model, tokenizer, batch, settings, ids):
                for piece in pieces:
                    texts[start + piece.sample] += piece.text
                    progress.advance(bar, bool(piece.finished))
        return texts

    return write
