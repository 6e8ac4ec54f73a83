"""Ways to the end of a text of a grammar: a search byte by byte, and what is left of its result behind each token.

A text's way is a function of its tokens. Behind a token with which the way before began, it is the rest of that; else
the shortest part of that, from some byte to its end, with which the text ends, too; else a search puts a few bytes in
front of such a part, as those that close what the token has opened.
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache

import llguidance

from opencola.text.tokenizer import num_shared

FIRST_NODES, NODES = 2000, 600
"""Places of a text at which each search looks for a way on: from its beginning, and behind each token."""
END = 256
"""The end of a text, behind the ids of the 256 bytes."""

# What to try first: what closes, and then what is short; in free text, where nearly all may follow, a quote.
_FREE = {byte: 1 if byte in b"\"'" else 16 if byte < 128 else 64 for byte in range(256)}
_COSTS = _FREE | dict.fromkeys(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", 8)
_COSTS |= {
    byte: cost
    for cost, text in enumerate((b"}])>", b"\"'", b",:", b"0", b"123456789", b"", b"", b"", b"[{"), 1)
    for byte in text
}


class _Bytes:
    """The vocabulary of single bytes, as llguidance wants it."""

    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (END,)
    eos_token_id = END
    bos_token_id = None

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@cache
def byte_tokenizer() -> llguidance.LLTokenizer:
    """Texts as bytes, whose end is END."""
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()), slices=[])


def search(matcher: llguidance.LLMatcher, before: bytes, alphabet: bytes, nodes: int) -> bytes | None:
    """A way from where the matcher is to an end: bytes of an alphabet, maybe with a last part of `before` behind them.

    The cheapest is looked for first; if that is too far off, one that takes the best byte in most places; at last, one
    that does so without going round in a loop. The matcher is where it was afterwards, or in an error. None: there is
    no way within so many places.
    """
    for some, deep, loops in ((nodes // 10, False, True), (nodes, True, True), (nodes, True, False)):
        way = _search(matcher, before, {*alphabet}, some, deep, loops)
        if way is not None:
            return way
    return None


def _search(
    matcher: llguidance.LLMatcher, before: bytes, alphabet: set[int], nodes: int, deep: bool, loops: bool
) -> bytes | None:
    """deep: a byte costs what it does more than the best in its place, and of equal ways the longer is followed. No
    loops: it costs more in the like of places that were seen before."""
    heap, seen, often = [(0, 0, b"", -1)], set[tuple[int, bytes]](), Counter[bytes]()
    at = b""
    for node in range(nodes):
        if not heap or matcher.is_error():
            break
        cost, _, path, parent = heapq.heappop(heap)
        shared = num_shared(path, at)
        matcher.rollback(len(at) - shared)
        matcher.consume_tokens(list(path[shared:]))
        forced = matcher.compute_ff_bytes()
        matcher.consume_tokens(list(forced))
        at = path = path + forced
        mask = matcher.compute_bitmask()
        rest = _last_part(matcher, before, mask)
        if not alphabet.issuperset(forced):
            continue
        if rest is not None:
            matcher.rollback(len(at))
            return path + rest
        following = _bytes(mask)
        # Bytes after which the same may follow are mostly of one kind: one of them will do.
        if (parent, mask) not in seen and following & alphabet:
            seen.add((parent, mask))
            costs = _FREE if len(following) > 64 else _COSTS
            cost += (0 if loops else often[mask]) - min(costs[byte] for byte in following) if deep else len(forced)
            often[mask] += 1
            for byte in following & alphabet:
                heapq.heappush(heap, (cost + costs[byte], -len(path) if deep else 0, path + bytes([byte]), node))
    matcher.rollback(len(at))
    return None


@lru_cache(4096)
def _bytes(mask: bytes) -> frozenset[int]:
    return frozenset(byte for byte in range(256) if mask[byte >> 3] >> (byte & 7) & 1)


def _last_part(matcher: llguidance.LLMatcher, way: bytes, mask: bytes) -> bytes | None:
    """The shortest last part of a way that leads to an end, maybe nothing. mask: of what may follow."""
    if matcher.is_accepting():
        return b""
    following = _bytes(mask)
    for start in reversed(range(len(way))):
        part = list(way[start:])
        if part[0] in following and matcher.validate_tokens(part) == len(part):
            matcher.consume_tokens(part)
            ended = matcher.is_accepting()
            matcher.rollback(len(part))
            if ended:
                return way[start:]
    return None


class Ways:
    """The way to its end of one text that grows, shrinks or becomes another."""

    def __init__(self, matcher: llguidance.LLMatcher, first: bytes, alphabet: bytes, tokens: Sequence[bytes]) -> None:
        """matcher: at the beginning of a text, and left there; first: the way from there; tokens: their bytes."""
        self._fresh, self._first, self._alphabet, self._tokens = matcher, first, alphabet, tokens
        self._begin()

    def _begin(self) -> None:
        self._matcher = self._fresh.deep_copy()
        self._at: list[int] = []
        self._ways: list[bytes | None] = [self._first]

    def after(self, tokens: Sequence[int]) -> bytes | None:
        """The way from behind these tokens; None where none is known, or where they are no beginning of a text."""
        if self._matcher.is_error():
            self._begin()
        tokens = list(tokens)
        shared = num_shared(tokens, self._at)
        self._matcher.rollback(sum(len(self._tokens[token]) for token in self._at[shared:]))
        del self._at[shared:], self._ways[shared + 1 :]
        for token in tokens[shared:]:
            piece = self._tokens[token] if token < len(self._tokens) else b""
            if not piece or self._matcher.validate_tokens(list(piece)) < len(piece):
                return None
            self._matcher.consume_tokens(list(piece))
            before = self._ways[-1] or b""
            if before.startswith(piece):
                way: bytes | None = before[len(piece) :]
            else:
                way = search(self._matcher, before, self._alphabet, NODES)
            self._at.append(token)
            self._ways.append(way)
        return None if self._matcher.is_error() else self._ways[-1]
