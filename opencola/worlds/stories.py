"""The story world: an endless corpus of short English stories with an exact checker and an exact probability.

`story(seed, index)` writes any story of the endless corpus; `check(text)` says whether a text is one that the world
could have told; `log_probability(text)` says how likely, in nats. A tiny language model trained on these stories can
therefore be judged without a judge model: its legal sentences, its consistency, its last words and its nats all have
exact answers. The tables (words, templates) are in `story_world`.
"""

import hashlib
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from opencola.errors import UserError
from opencola.worlds.story_world import ENGLISH, Kind, Template, World

_SENTENCE = re.compile(r"[^.!?]*[.!?]+|[^.!?]+")
_PLACE = re.compile(r"\{(\w+)\}")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Story:
    """A story: its `text`, its `sentences`, their `kinds`, and every hidden variable's value (told or not)."""

    text: str
    sentences: tuple[str, ...]
    kinds: tuple[str, ...]
    variables: dict[str, str]


@dataclass(frozen=True)
class ParsedSentence:
    """One sentence of a text: its `kind` and `template` (None when no template says it), what it tells of the
    variables (`commits`), and the variables of which it tells two different values at once (`conflicts`)."""

    text: str
    kind: str | None
    template: Template | None
    commits: dict[str, str]
    conflicts: frozenset[str]


@dataclass(frozen=True)
class Check:
    """The verdict on a text.

    `legal`: per sentence, some template says it. `order_legal`: the legal sentences come in the world's order, and
    none refers to a variable that only a later one could tell. `complete`: it opens with a legal opening, closes
    with a legal ending, and misses no obligatory kind. `conflicts`: the variables told with two values, sorted.
    """

    legal: list[bool]
    order_legal: bool
    complete: bool
    conflicts: list[str]

    @property
    def consistent(self) -> bool:
        """Whether the world could have told this text."""
        return all(self.legal) and self.order_legal and self.complete and not self.conflicts


def split_sentences(text: str) -> list[str]:
    """The sentences of any text, each with its closing `.`, `!` or `?` (the last one may lack it)."""
    return [part for part in (match.strip() for match in _SENTENCE.findall(text)) if part]


class Grammar:
    """A world made ready to write and to read: all functions of this module, for tables of one's own.

    `slots` lists each template's slot names in order. Raises UserError when a template names an unknown slot or when
    two values of a slot share a surface.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.slots = {t: _PLACE.findall(t.text) for kind in world.kinds for t in kind.templates}
        for template, names in self.slots.items():
            for name in names:
                if name not in world.slots:
                    raise ValueError(f"template {template.text!r}: no slot is called {name!r}")
        for name, slot in world.slots.items():
            if len(set(slot.surface.values())) < len(slot.surface):
                raise ValueError(f"slot {name!r}: two values share one surface, so a reader could not tell them apart")
        self._value = {name: {s: v for v, s in slot.surface.items()} for name, slot in world.slots.items()}
        self._pattern = {template: self._compile(template) for template in self.slots}
        self._tells = {template: self._told(names) for template, names in self.slots.items()}
        self._rank = {kind.name: rank for rank, kind in enumerate(world.kinds)}

    def _compile(self, template: Template) -> re.Pattern[str]:
        pieces = _PLACE.split(template.text)  # literal, slot, literal, slot, ..., literal
        for i in range(0, len(pieces), 2):
            pieces[i] = re.escape(pieces[i])
        for i in range(1, len(pieces), 2):
            pieces[i] = "(" + "|".join(map(re.escape, self.world.slots[pieces[i]].surface.values())) + ")"
        return re.compile("".join(pieces))

    def _told(self, names: Sequence[str]) -> frozenset[str]:
        told = {self.world.slots[name].variable for name in names}
        return frozenset(told | {variable for variable, (source, _) in self.world.implied.items() if source in told})

    def _allowed(self, kind: Kind, told: set[str]) -> list[Template]:
        return [template for template in kind.templates if template.needs <= told]

    def write(self, template: Template, variables: dict[str, str], until: int | None = None) -> str:
        """The sentence that `template` makes of `variables` (implied ones included), cut before its slot `until`."""
        pieces = _PLACE.split(template.text)  # literal, slot, literal, slot, ..., literal
        for i, name in enumerate(self.slots[template]):
            slot = self.world.slots[name]
            pieces[2 * i + 1] = slot.surface[variables[slot.variable]]
        return "".join(pieces if until is None else pieces[: 2 * until + 1])

    def with_implied(self, variables: dict[str, str]) -> dict[str, str]:
        """The independent `variables` and all that they imply."""
        implied = {name: table[variables[source]] for name, (source, table) in self.world.implied.items()}
        return variables | implied

    def story(self, seed: int, index: int) -> Story:
        """Story number `index` of the endless corpus `seed`; the same two numbers always give the same story."""
        digest = hashlib.blake2b(f"story {seed} {index}".encode(), digest_size=16).digest()
        rng = random.Random(int.from_bytes(digest, "big"))
        variables = self.with_implied({name: rng.choice(values) for name, values in self.world.variables.items()})
        told: set[str] = set()
        sentences, kinds = [], []
        for kind in self.world.kinds:
            # drawn even when it decides nothing: every kind then takes its own place in the random stream
            skipped = rng.random() >= kind.chance
            if skipped or not kind.needs <= told:
                continue
            template = rng.choice(self._allowed(kind, told))
            sentences.append(self.write(template, variables))
            kinds.append(kind.name)
            told |= self._tells[template]
        return Story(" ".join(sentences), tuple(sentences), tuple(kinds), variables)

    def parse_sentence(self, text: str, kinds: Sequence[Kind] | None = None) -> ParsedSentence:
        """The reading of one sentence, by the templates of `kinds` (by default all); `kind` None when there is none."""
        for kind in self.world.kinds if kinds is None else kinds:
            for template in kind.templates:
                match = self._pattern[template].fullmatch(text)
                if match is not None:
                    commits, conflicts = self._commits(self.slots[template], match.groups())
                    return ParsedSentence(text, kind.name, template, commits, conflicts)
        return ParsedSentence(text, None, None, {}, frozenset())

    def _commits(self, names: Sequence[str], surfaces: Sequence[str]) -> tuple[dict[str, str], frozenset[str]]:
        commits: dict[str, str] = {}
        conflicts: set[str] = set()
        for name, surface in zip(names, surfaces, strict=True):
            variable, value = self.world.slots[name].variable, self._value[name][surface]
            facts = [(variable, value)]
            facts += [(i, table[value]) for i, (source, table) in self.world.implied.items() if source == variable]
            for fact, told in facts:
                if commits.setdefault(fact, told) != told:
                    conflicts.add(fact)
        return commits, frozenset(conflicts)

    def parse(self, text: str) -> list[ParsedSentence]:
        """The reading of every sentence of any text."""
        return [self.parse_sentence(sentence) for sentence in split_sentences(text)]

    def check(self, text: str) -> Check:
        """The verdict on any text; never raises."""
        parsed = self.parse(text)
        legal = [sentence.kind is not None for sentence in parsed]
        order_legal, rank, told = True, -1, set[str]()
        first_told: dict[str, str] = {}
        conflicts: set[str] = set()
        for sentence in parsed:
            if sentence.kind is None or sentence.template is None:
                continue
            kind = self.world.kinds[self._rank[sentence.kind]]
            if self._rank[sentence.kind] <= rank or not kind.needs | sentence.template.needs <= told:
                order_legal = False
            rank = self._rank[sentence.kind]
            told |= self._tells[sentence.template]
            conflicts |= sentence.conflicts
            for variable, value in sentence.commits.items():
                if first_told.setdefault(variable, value) != value:
                    conflicts.add(variable)
        return Check(legal, order_legal, self._complete(parsed), sorted(conflicts))

    def _complete(self, parsed: list[ParsedSentence]) -> bool:
        if not parsed or parsed[0].kind != self.world.kinds[0].name or parsed[-1].kind != self.world.kinds[-1].name:
            return False
        told: set[str] = set()
        for kind in self.world.kinds:
            templates = [sentence.template for sentence in parsed if sentence.kind == kind.name]
            if not templates and kind.chance == 1.0 and kind.needs <= told:
                return False
            for template in templates:
                if template is not None:
                    told |= self._tells[template]
        return True

    def log_probability(self, text: str) -> float:
        """Exact log-probability of `text` under `story`, in nats; -inf when no story reads so.

        A text has one derivation at most, so this is the chance of its kinds and templates times the chance of the
        values it tells; variables that it does not tell sum out to one.
        """
        parsed = self.parse(text)
        if " ".join(sentence.text for sentence in parsed) != text:
            return -math.inf
        return self._log_probability(parsed)

    def _log_probability(self, parsed: Sequence[ParsedSentence]) -> float:
        total, position = 0.0, 0
        told: set[str] = set()
        commits: dict[str, str] = {}
        for kind in self.world.kinds:
            if not kind.needs <= told:
                continue
            sentence = parsed[position] if position < len(parsed) else None
            if sentence is None or sentence.template is None or sentence.kind != kind.name:
                if kind.chance == 1.0:
                    return -math.inf
                total += math.log1p(-kind.chance)
                continue
            allowed = self._allowed(kind, told)
            if sentence.template not in allowed or sentence.conflicts:
                return -math.inf
            total += math.log(kind.chance) - math.log(len(allowed))
            for variable, value in sentence.commits.items():
                if commits.setdefault(variable, value) != value:
                    return -math.inf
            told |= self._tells[sentence.template]
            position += 1
        if position < len(parsed):
            return -math.inf
        for variable, values in self.world.variables.items():
            possible = [value for value in values if self._agrees(variable, value, commits)]
            if not possible:
                return -math.inf
            total += math.log(len(possible) / len(values))
        return total

    def _agrees(self, variable: str, value: str, commits: dict[str, str]) -> bool:
        if commits.get(variable, value) != value:
            return False
        implied = ((name, table[value]) for name, (source, table) in self.world.implied.items() if source == variable)
        return all(commits.get(name, told) == told for name, told in implied)

    def words(self) -> set[str]:
        """Every word a story can hold, as it is written there."""
        said: set[str] = set()
        for template, names in self.slots.items():
            said.update(_WORD.findall(_PLACE.sub(" ", template.text)))
            for name in names:
                said.update(word for surface in self.world.slots[name].surface.values() for word in surface.split())
        return said

    def last_word_choices(self, text: str) -> dict[str, float]:
        """Exact distribution of a story's last word given all the text before it: word -> probability, summing to 1.

        `text` is a whole story; its own last word plays no part. Raises UserError when no story begins like that.
        """
        match = re.fullmatch(r"(.*?)(\w+)([.!?])", text, re.DOTALL)
        if match is None:
            raise UserError(f"the text must end in a word and a full stop, and ends in {text[-20:]!r}")
        before, _, stop = match.groups()
        sentences = split_sentences(before + "x" + stop)
        told = [self.parse_sentence(sentence) for sentence in sentences[:-1]]
        ending, stem = self.world.kinds[-1], sentences[-1].removesuffix("x" + stop)
        chances: dict[str, float] = {}
        if " ".join(sentences) == before + "x" + stop:
            for word in sorted({word for template in ending.templates for word in self._last_words(template)}):
                last = self.parse_sentence(stem + word + stop, [ending])
                chance = math.exp(self._log_probability([*told, last]))
                if chance > 0:
                    chances[word] = chance
        if not chances:
            raise UserError(f"no story of this world begins with {before[:60]!r}")
        return {word: chance / sum(chances.values()) for word, chance in chances.items()}

    def _last_words(self, template: Template) -> list[str]:
        names = self.slots[template]
        literal = _WORD.findall(_PLACE.split(template.text)[-1])
        if literal:
            return [literal[-1]]
        return [surface.split()[-1] for surface in self.world.slots[names[-1]].surface.values()]


GRAMMAR = Grammar(ENGLISH)
story = GRAMMAR.story
parse = GRAMMAR.parse
parse_sentence = GRAMMAR.parse_sentence
check = GRAMMAR.check
log_probability = GRAMMAR.log_probability
last_word_choices = GRAMMAR.last_word_choices
words = GRAMMAR.words
