import random
from difflib import SequenceMatcher

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opencola.evaluation.benchmarks.grading import grade, map_choice, norm, truncate

CITIES = ["Paris", "London", "Rome", "New York"]

MAPPED = [  # text, options, index
    ("A", CITIES, 0),
    ("d", CITIES, 3),
    (" B ", CITIES, 1),
    ("C.", CITIES, 2),
    ("(C)", CITIES, 2),
    ("[b].", CITIES, 1),
    ("(c).", CITIES, 2),
    ("E", CITIES, None),
    ("(E)", CITIES, None),
    ("D", CITIES[:3], None),
    ("Ｂ", CITIES, None),  # full-width letters are no letters
    ("B)", CITIES, None),  # half a pair does not bracket
    ("(B]", CITIES, None),
    ("((B))", CITIES, 1),  # a short text with a bracketed letter
    ("AB", CITIES, None),
    ("B..", CITIES, None),
    ("B!", CITIES, None),
    ("answer B", CITIES, 1),
    ("Answer: c", CITIES, 2),
    ("ANSWER：D", CITIES, 3),
    ("answer=a, surely", CITIES, 0),
    ("Final answer is B.", CITIES, 1),
    ("the answer is a dog", CITIES, 0),  # a flaw of the rules, kept
    ("the choice is C; the rest is wrong", CITIES, 2),
    ("option b? or Rome", CITIES, 1),
    ("Option A, no, option C", CITIES, 2),
    ("option A, no, option E", CITIES, 0),  # E is no option
    ("options A", CITIES, None),
    ("answered B", CITIES, None),
    ("answer:B)", CITIES, None),
    ("answer isB", CITIES, None),
    ("answerB", CITIES, None),
    ("answer is: B", CITIES, None),  # one of is, =, :
    ("my answer (B)", CITIES, 1),
    ("it is (A) or (B)", CITIES, 1),
    ("it is (A) or (E)", CITIES, 0),
    ("of the four cities this must be (B), surely", CITIES, None),  # 43 characters
    ("of the four cities this must be (B), yes", CITIES, 1),  # 40
    ("of the four cities this must be (B), yes.", CITIES, None),  # 41
    ("Paris", CITIES, 0),
    ("  pArIs!! ", CITIES, 0),
    ("new   york", CITIES, 3),
    ("New-York", CITIES, 3),  # "newyork" is similar
    ("Rom", CITIES, None),  # 6 / 7 < 0.9
    ("Londonn", CITIES, 1),
    ("the capital is Rome, of course", CITIES, 2),
    ("Paris or London", CITIES, None),
    ("The correct answer is New York.", CITIES, 3),
    ("the final answer is london", CITIES, 1),
    ("Answer: Rome", CITIES, 2),
    ("Not Paris. Answer: Rome", CITIES, 2),
    ("Answer: Rome\nor Paris", CITIES, 2),
    ("answer: Rome, answer: Paris", CITIES, 0),
    ("answer: Paris\nanswer: Rome\nor New York", CITIES, 2),
    ("The final answer is an answer", ["an answer", "answer"], 0),  # nothing follows the last keyword
    ("option B, answer: Paris", CITIES, 1),  # letters come first, also in the whole text
    ("(B) Paris", CITIES, 1),
    ("", CITIES, None),
    (" \n ", CITIES, None),
    ("...", CITIES, None),
    ("aabbaabcba", ["aabbabcaba", "x"], None),  # 0.8: the matcher is not symmetric
    ("aabbabcaba", ["aabbaabcba", "x"], 0),  # 0.9
    ("Ålesund", ["Ålesund", "Oslo"], 0),
    ("ÅLESUND", ["ålesund", "Oslo"], 0),
    ("東京", ["東京", "大阪"], 0),
    ("a cat", ["cat", "a cat"], 1),  # equal before contained
    ("one cat", ["cat", "a cat"], 0),
    ("-1", ["0", "1", "-1", "12"], 1),  # signs do not survive the norm
    ("12", ["0", "1", "2", "12"], 3),
    ("answer is 1", ["1", "11"], 0),
    ("", ["+", "no"], 0),  # the norm of "+" is empty, too
    ("yes", ["+", "no"], 0),  # and contained in every text
    ("same", ["same", "Same!"], 0),
]

VERDICTS = [  # rule, generation, answer, options, correct, parsed
    ("first_word", " signs and wonders", "signs", (), True, True),
    ("first_word", "Signs.", "signs", (), True, True),
    ("first_word", "sign", "signs", (), False, True),
    ("first_word", "\n\nsigns\nmore", "signs", (), True, True),
    ("first_word", "- signs", "signs", (), True, True),
    ("first_word", "", "signs", (), False, False),
    ("first_word", "...\n", "signs", (), False, False),
    ("exact", "Denver Broncos\nQuestion", "denver broncos.", (), True, True),
    ("exact", "the Denver Broncos", "Denver Broncos", (), False, True),
    ("exact", "- Denver", "Denver", (), False, True),  # an outer space remains
    ("exact", "B", "is asleep.", ("is awake.", "is asleep."), False, True),
    ("exact", "is asleep", "is asleep.", ("is awake.", "is asleep."), True, True),
    ("exact", "", "is asleep.", ("is awake.", "is asleep."), False, False),
    ("option", "B", "London", tuple(CITIES), True, True),
    ("option", "(B) Rome", "London", tuple(CITIES), True, True),
    ("option", "London", "B", tuple(CITIES), True, True),
    ("option", "Rome", "London", tuple(CITIES), False, True),
    ("option", "Madrid", "London", tuple(CITIES), False, False),
    ("option", "Madrid", "madrid!", tuple(CITIES), True, False),  # both unmapped, equal norms
    ("option", "\nLondon\nRome", "London", tuple(CITIES), True, True),
    ("option", "Answer:\nLondon", "London", tuple(CITIES), False, False),  # truncated after "Answer:"
]


def test_the_tables_are_long() -> None:
    assert len(MAPPED) + len(VERDICTS) >= 80


@pytest.mark.parametrize(("text", "choices", "index"), MAPPED)
def test_tricky_texts_map_as_expected(text: str, choices: list[str], index: int | None) -> None:
    assert map_choice(text, choices) == index


@pytest.mark.parametrize(("rule", "generation", "answer", "choices", "correct", "parsed"), VERDICTS)
def test_verdicts(rule, generation, answer, choices, correct, parsed) -> None:
    verdict = grade(rule, generation, answer, choices)
    assert (verdict.correct, verdict.parsed) == (correct, parsed)
    assert verdict.text == truncate(generation)
    assert verdict.choice == (map_choice(verdict.text, choices) if choices else None)
    assert verdict.gold == (map_choice(answer, choices) if choices else None)


def test_formatting_is_forgiven_beside_the_rule() -> None:
    verdict = grade("exact", "B", "is asleep.", ["is awake.", "is asleep."])
    assert verdict.agrees and not verdict.correct
    assert not grade("exact", "A", "is asleep.", ["is awake.", "is asleep."]).agrees
    assert not grade("option", "Madrid", "Lisbon", CITIES).agrees  # both unmapped: no agreement


@pytest.mark.parametrize("choices", [[], ["x"] * 27])
def test_the_alphabet_has_an_end(choices: list[str]) -> None:
    with pytest.raises(ValueError, match=f"there are {len(choices)} options, not 1 to 26"):
        map_choice("A", choices)


# ---- A second reading of the rules, by loops over characters ----


def is_word(character: str) -> bool:
    return character == "_" or character.isalnum()


def brute_truncate(generation: str) -> str:
    kept, told = "", False
    for character in generation:
        if character == "\n" and told:
            break
        told = told or is_word(character)
        kept += character
    return kept


def brute_norm(s: str) -> str:
    kept = [c for c in s.lower().strip() if is_word(c) or c.isspace()]
    out = ""
    for character in kept:
        if not character.isspace():
            out += character
        elif not out.endswith(" "):
            out += " "
    return out


def skip(text: str, i: int) -> int:
    while i < len(text) and text[i].isspace():
        i += 1
    return i


def after_link(text: str, i: int) -> list[int]:
    """Where a text goes on after a keyword that ends at i: past its link, or, as a link is optional, before it."""
    i = skip(text, i)
    ends = [i]
    if i < len(text) and text[i] in "=:：":
        ends.insert(0, skip(text, i + 1))
    elif text[i : i + 2] in ("is", "Is", "iS", "IS") and (len(text) == i + 2 or not is_word(text[i + 2])):
        ends.insert(0, skip(text, i + 2))
    return ends


def keyword_ends(text: str, words: tuple[str, ...]) -> list[int]:
    ends = []
    for i in range(len(text)):
        for word in words:
            piece = text[i : i + len(word)]
            end = i + len(word)
            same = len(piece) == len(word) and all(a in (b, b.upper()) for a, b in zip(piece, word, strict=True))
            if same and (i == 0 or not is_word(text[i - 1])) and (end == len(text) or not is_word(text[end])):
                ends.append(end)
    return ends


def brute_letter(text: str, count: int) -> int | None:
    letters = {c: i for i in range(count) for c in ("abcdefghijklmnopqrstuvwxyz"[i], "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[i])}
    bracketed = {f"{a}{c}{b}": i for c, i in letters.items() for a, b in ("()", "[]")}
    for form, i in {**letters, **bracketed}.items():
        if text in (form, form + "."):
            return i
    found = None
    for end in keyword_ends(text, ("answer", "option", "choice")):
        for start in after_link(text, end):
            follows = text[start + 1 : start + 2]
            if text[start : start + 1] in letters and (not follows or follows.isspace() or follows in ".,;:!?"):
                found = letters[text[start]]
                break
    if found is None and len(text) <= 40:
        for i in range(len(text) - 2):
            found = bracketed.get(text[i : i + 3], found)
    return found


def brute_by_text(text: str, choices: list[str]) -> int | None:
    said, options = brute_norm(text), [brute_norm(choice) for choice in choices]
    forms = [said]
    for the in ("the ", ""):
        for which in ("correct ", "final ", ""):
            for verb in ("is ", ""):
                phrase = f"{the}{which}answer {verb}"
                if len(forms) == 1 and said.startswith(phrase):
                    forms.append(said[len(phrase) :])
    for form in forms:
        for i, option in enumerate(options):
            if form == option:
                return i
    held = [i for i, option in enumerate(options) if said.find(option) >= 0]
    if len(held) == 1:
        return held[0]
    best, index = 0.0, None
    for i, option in enumerate(options):
        ratio = SequenceMatcher(a=said, b=option).ratio()
        if ratio > best:
            best, index = ratio, i
    return index if best >= 0.9 else None


def brute_map(text: str, choices: list[str]) -> int | None:
    whole = text.strip()
    segment = whole
    for line in whole.split("\n"):
        ends = keyword_ends(line, ("answer",))
        if ends:
            segment = line[after_link(line, ends[-1])[0] :].strip()
    for found in (
        brute_letter(segment, len(choices)),
        brute_letter(whole, len(choices)),
        brute_by_text(segment, choices),
        brute_by_text(whole, choices),
    ):
        if found is not None:
            return found
    return None


PIECES = [
    *"ABCDEabcdeZ_19+-.,;:!?()[]=：\n\t éß東ıſ",
    *("answer", "Answer", "ANSWER", "final answer", "the correct answer is", "The answer is", "option", "Choice"),
    *(
        " is ",
        " is",
        ": ",
        " = ",
        "(B)",
        "(c)",
        "[A]",
        "(F)",
        " B.",
        " a ",
        "A",
        " D",
        "answers",
        "\n\n",
        "\u00a0",
        "\u2028",
    ),
    *("Paris", "paris", "Pari", "London", "the cat", "cat", "a cat sat", "Rome", "new york", "New  York!", "İ", "..."),
]
texts = st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | st.text(max_size=20)
options = st.lists(
    st.sampled_from([*CITIES, "the cat", "cat", "A", "d", "+", "-1", "1"]) | texts, min_size=1, max_size=5
)


@settings(max_examples=1000, deadline=None)
@given(texts)
def test_truncate_and_norm_agree_with_a_loop(text: str) -> None:
    assert truncate(text) == brute_truncate(text)
    assert norm(text) == brute_norm(text)


@settings(max_examples=1500, deadline=None)
@given(texts, options)
def test_mapping_agrees_with_loops(text: str, choices: list[str]) -> None:
    assert map_choice(text, choices) == brute_map(text, choices)


def generated(count: int) -> list[tuple[str, list[str], str]]:
    """Texts of many pieces, often with an option in them as it is, changed a little or by its letter."""
    cases = []
    for i in range(count):
        rng = random.Random(i)
        choices = rng.sample(
            [*CITIES, "the cat sat", "a cat", "cat", "of", "12", "a b c d e f g h i j k"], rng.randint(2, 5)
        )
        meant = rng.choice(choices)
        j = rng.randrange(len(meant))
        forms = [
            meant,
            meant.upper(),
            meant[:j] + meant[j + 1 :],
            meant[:j] + "x" + meant[j:],
            rng.choice("ABCDEFabcdef"),
        ]
        parts = [rng.choice(PIECES) for _ in range(rng.randint(0, 5))]
        parts.insert(rng.randint(0, len(parts)), rng.choice(forms))
        cases.append((rng.choice(["", " "]).join(parts), choices, rng.choice(choices)))
    return cases


def test_verdicts_agree_with_loops_on_generated_cases() -> None:
    seen = {"mapped": 0, "unmapped": 0, "correct": 0}
    for generation, choices, answer in generated(4000):
        text = brute_truncate(generation)
        choice, gold = brute_map(text, choices), brute_map(answer, choices)
        same = brute_norm(text) == brute_norm(answer)
        agree = choice is not None and choice == gold
        for rule, correct in (("option", agree or same), ("exact", same)):
            verdict = grade(rule, generation, answer, choices)  # type: ignore[arg-type]
            found = (verdict.text, verdict.choice, verdict.gold, verdict.correct, verdict.parsed)
            assert found == (text, choice, gold, correct, choice is not None), (rule, generation, choices, answer)
        words = brute_norm(text).split()
        verdict = grade("first_word", generation, answer)
        assert (verdict.correct, verdict.parsed) == (words[:1] == brute_norm(answer).split()[:1], bool(words))
        seen["mapped" if choice is not None else "unmapped"] += 1
        seen["correct"] += agree
    assert min(seen.values()) > 300, seen
