"""Grades of generated answers: truncation, normal form, mapping to options (evaluation.md, the release's rules).

Where the rules leave a detail open, the plain reading is taken:

- A letter is an ASCII letter of either case; brackets are a matching pair of ( ) or [ ]. So `the answer is a dog` names
  option A: the rules are kept as they are, flaws included, so that scores can be compared.
- Texts to map are stripped first; the 40 characters are counted after that.
- A letter beyond the options is no match at all: an earlier letter of an option still counts as the last one.
- Of several keywords in the last line that has one, the answer segment follows the last.
- The sequence matcher, which is not symmetric, is given the text first, then the option.
- Among options of one norm, or of one ratio, the first is chosen.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

from opencola.errors import UserError

Rule = Literal["first_word", "exact", "option"]
"""What makes an answer right. `first_word`: LAMBADA; `exact`: equal norms, HellaSwag, Story Cloze, SQuAD; `option`: the
same option, or else equal norms, MMLU, OBQA, RACE, SIQA."""

SHORT = 40
"""Texts of at most so many characters may name their option by a bracketed letter."""
SIMILAR = 0.9
"""The least ratio of a text that resembles an option without naming it."""

_WORD = re.compile(r"\w")
_ODD = re.compile(r"[^\w\s]")
_SPACES = re.compile(r"\s+")
# Whole words only, and ASCII: without that, ignoring case would take a Turkish ı for an i. "final answer" ends in the
# same keyword.
_LINK = r"\s*(?:(?ai:is)\b|[=:：])?\s*"
_SEGMENT = re.compile(r".*\b(?ai:answer)\b" + _LINK + r"(.*)")
_PHRASE = re.compile(r"^(?:the )?(?:correct |final )?answer (?:is )?")


@dataclass(frozen=True)
class Grade:
    """What a generation was taken for."""

    text: str
    """The truncated generation."""
    choice: int | None
    """The option that it maps to; None without options too."""
    gold: int | None
    """The option that the right answer maps to."""
    correct: bool
    """By the task's rule."""
    parsed: bool
    """The generation maps to an option; without options: it holds a word."""

    @property
    def agrees(self) -> bool:
        """Right once formatting is forgiven: correct, or mapped to the right answer's option."""
        return self.correct or (self.choice is not None and self.choice == self.gold)


def truncate(generation: str) -> str:
    """The text before the first newline that has a word character somewhere before it; all of it without one."""
    word = _WORD.search(generation)
    end = generation.find("\n", word.end()) if word else -1
    return generation if end < 0 else generation[:end]


def norm(s: str) -> str:
    """Lower case, stripped, of word characters and single spaces only.

    In this order, so that an outer space remains where punctuation stood before it: norm("- No") is " no".
    """
    return _SPACES.sub(" ", _ODD.sub("", s.lower().strip()))


def map_choice(text: str, choices: Sequence[str]) -> int | None:
    """The index of the option that a text means: by letter, else by text; None if neither tells.

    Each is tried on the answer segment, then on the whole text. Raises UserError for no options, or more than 26.
    """
    if not 1 <= len(choices) <= 26:
        raise UserError(f"there are {len(choices)} options, not 1 to 26")
    whole = text.strip()
    segment = answer_segment(whole)
    for rule in (_by_letter, _by_text):
        for part in (segment, whole):
            choice = rule(part, choices)
            if choice is not None:
                return choice
    return None


def answer_segment(text: str) -> str:
    """The rest of the last line with the keyword answer, after it and its is, =, : or ：; else the whole text."""
    for line in reversed(text.split("\n")):
        if match := _SEGMENT.match(line):
            return match[1].strip()
    return text


def _by_letter(text: str, choices: Sequence[str]) -> int | None:
    last = chr(ord("A") + len(choices) - 1)
    letter = f"([A-{last}a-{last.lower()}])"
    bracketed = rf"(?:\({letter}\)|\[{letter}\])"
    match = re.fullmatch(rf"(?:{letter}|{bracketed})\.?", text)
    if not match:
        match = _last(re.finditer(rf"\b(?ai:answer|option|choice)\b{_LINK}{letter}(?=\Z|[\s.,;:!?])", text))
    if not match and len(text) <= SHORT:
        match = _last(re.finditer(bracketed, text))
    if not match:
        return None
    return ord(next(filter(None, match.groups())).upper()) - ord("A")


def _last(matches: Iterable[re.Match[str]]) -> re.Match[str] | None:
    last = None
    for match in matches:
        last = match
    return last


def _by_text(text: str, choices: Sequence[str]) -> int | None:
    said, options = norm(text), [norm(choice) for choice in choices]
    for form in (said, _PHRASE.sub("", said, count=1)):
        if form in options:
            return options.index(form)
    contained = [i for i, option in enumerate(options) if option in said]
    if len(contained) == 1:
        return contained[0]
    ratios = [SequenceMatcher(None, said, option).ratio() for option in options]
    best = max(ratios, default=0.0)
    return ratios.index(best) if best >= SIMILAR else None


def grade(rule: Rule, generation: str, answer: str, choices: Sequence[str] = ()) -> Grade:
    """The grade of a raw generation, given the right answer's text and the options (none where the task has none)."""
    text = truncate(generation)
    choice, gold = (map_choice(said, choices) if choices else None for said in (text, answer))
    said, right = norm(text), norm(answer)
    match rule:
        case "first_word":
            correct = bool(said.split()) and said.split()[:1] == right.split()[:1]
        case "exact":
            correct = said == right
        case "option":
            correct = (choice is not None and choice == gold) or said == right
    return Grade(text, choice, gold, correct, choice is not None if choices else bool(said.split()))
