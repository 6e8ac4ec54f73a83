import itertools

from opencola.worlds import brackets
from opencola.worlds.brackets import MAX_DEPTH, MIN_DEPTH, PAIRS, can_begin, is_nest, nest, prompt

ALL = {
    brackets.closed(opened) for k in range(MIN_DEPTH, MAX_DEPTH + 1) for opened in itertools.product(PAIRS, repeat=k)
}
BEGINNINGS = {text[:end] for text in ALL for end in range(len(text) + 1)}


def test_closed_by_hand() -> None:
    assert brackets.closed("([(") == "( [ ( ) ] )"
    assert prompt("( [ ( ) ] )") == "( [ ( )"
    assert prompt("( [ ] )") == "( [ ]"


def test_verdicts_by_brute_force() -> None:
    """Every string of up to seven brackets, of these with one character spoilt, and all beginnings of all nests."""
    signs = [*PAIRS, *PAIRS.values()]
    texts = [" ".join(row) for count in range(6) for row in itertools.product(signs, repeat=count)]
    texts += sorted(BEGINNINGS)
    spoilt = [
        text[:i] + sign + text[i + 1 :] for text in sorted(ALL)[::40] for i in range(len(text)) for sign in " ([)x"
    ]
    joined = [text + more for text in sorted(ALL)[::40] for more in (" ", " (", " )", ")", "\n")]
    assert len(texts) > 10_000
    for text in [*texts, *spoilt, *joined]:
        assert can_begin(text) == (text in BEGINNINGS), text
        assert is_nest(text) == (text in ALL), text


def test_corpus() -> None:
    texts = [nest(0, i) for i in range(500)]
    assert texts == [nest(0, i) for i in range(500)] != [nest(1, i) for i in range(500)]
    assert all(map(is_nest, texts))
    assert {len(text) // 4 + 1 for text in texts} == set(range(MIN_DEPTH, MAX_DEPTH + 1))
    assert {text[0] for text in texts} == set(PAIRS)
    for text in texts:
        begun = prompt(text)
        assert begun[-1] == PAIRS[begun[-3]] and begun.count(" ") == len(text) // 4 + 1
        assert sum(whole.startswith(begun) for whole in ALL) == 1, "the rest is determined"
