"""Blocks held to a grammar: which candidate may be kept, what was forced, and that latents and caches are its own."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from tiny import VOCABULARY, tiny_dit, tiny_vae
from torch import Tensor

from opencola.models.cola.caches import Caches
from opencola.models.cola.denoise import Block
from opencola.models.cola.hold import HeldBlock, hold
from opencola.models.sampling import Sampling
from opencola.models.stopping import Text

END, SIZE, COUNT = 0, 4, 2
VAE, DIT = tiny_vae(), tiny_dit()


class Only:
    """One text, and its end."""

    def __init__(self, *text: int) -> None:
        self.text = [*text, END]

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        return torch.arange(VOCABULARY) == (self.closing(tokens) or [END])[0]

    def accepted(self, tokens: Sequence[int], new: Sequence[int]) -> int:
        for count, token in enumerate(new):
            if END not in tokens and self.closing([*tokens, token]) is None:
                return count
            tokens = [*tokens, token]
        return len(new)

    def closing(self, tokens: Sequence[int]) -> list[int] | None:
        if END in tokens:
            return []
        return self.text[len(tokens) :] if self.text[: len(tokens)] == [*tokens] else None


def caches(batch: int) -> Caches:
    """Of a history of three blocks, for each row another."""
    generator = torch.Generator().manual_seed(0)
    room = 4 * SIZE
    made = Caches(
        DIT.empty_cache(batch, room), VAE.empty_cache(batch, room, "decoder"), VAE.empty_cache(batch, room, "encoder")
    )
    assert made.encoder is not None
    history = torch.randint(VOCABULARY, (batch, 2 * SIZE), generator=generator)
    VAE.decode(VAE.encode(history, cache=made.encoder).mean, made.decoder)
    return replace(made, decoder=made.decoder.append(2 * SIZE), encoder=made.encoder.append(2 * SIZE))


def begun(constraint: Any, new: list[int], room: int) -> Text:
    """A text that may have so many tokens more."""
    return Text([], Sampling(max_new_tokens=len(new) + room), new=new, constraint=constraint)


def drawn(texts: Sequence[Text], tokens: list[list[int]], pinned: int = 0) -> tuple[HeldBlock, Tensor, Caches]:
    """What becomes of these tokens of all candidates, with latents and logits at random: greedy, where it is forced."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(len(tokens), SIZE, 4, generator=generator, dtype=torch.float64)
    logits = torch.randn(len(tokens), SIZE, VOCABULARY, generator=generator, dtype=torch.float64)
    made = caches(len(tokens))
    VAE.decode(z, made.decoder)
    known = (torch.arange(SIZE) < pinned).expand(len(tokens), SIZE)
    block = Block(known, z * known[..., None], given=[pinned] * len(tokens))
    places: list[tuple[int, int]] = []

    def choose(row: int, place: int, scores: Tensor) -> int:
        places.append((row, place))
        assert torch.equal(scores, logits[row, place].where(torch.isfinite(scores), scores))  # those of this place
        return int(scores.argmax())

    done = hold(VAE, made, block, VAE.normalise(z), logits, torch.tensor(tokens), texts, choose)
    changed = [row for row, count in enumerate(chain(*done.forced)) if count]
    assert {row for row, _ in places} == {*changed}
    return done, z, made


@torch.no_grad()
def test_a_candidate_that_breaks_nothing_is_kept_as_it_is() -> None:
    texts = [begun(Only(5, 6, 7, 8, 9), [], 20), Text([], Sampling()), begun(Only(3, 5, 6), [3], 20)]
    tokens = [[5, 6, 7, 7], [5, 6, 7, 8], [1, 1, 1, 1], [2, 2, 2, 2], [5, 6, END, 9], [5, 6, END, 1]]
    done, z, _ = drawn(texts, tokens)
    assert done.tokens.tolist() == tokens and torch.equal(done.z, VAE.normalise(z))
    assert done.good.tolist() == [[False, True], [True, True], [True, True]]
    assert done.forced == [[0, 0], [0, 0], [0, 0]]


@torch.no_grad()
def test_where_all_break_it_the_longest_beginning_is_kept_and_the_rest_forced() -> None:
    texts = [begun(Only(5, 6, 7, 8, 9), [], 20), Text([], Sampling()), begun(Only(3, 5, 6), [3], 20)]
    tokens = [[5, 6, 1, 8], [5, 1, 7, 8], [1, 1, 1, 1], [2, 2, 2, 2], [5, 1, 1, 4], [5, 1, END, 4]]
    done, z, made = drawn(texts, tokens)
    assert done.good.tolist() == [[True, False], [True, True], [True, True]]
    assert done.forced == [[1, 0], [0, 0], [2, 1]]
    assert done.tokens.tolist() == [[5, 6, 7, 8], *tokens[1:4], [5, 6, END, 4], [5, 6, END, 4]]
    assert made.encoder is not None
    mean = VAE.normalise(VAE.encode(done.tokens, cache=caches(6).encoder).mean)
    assert torch.equal(done.z[[0, 4, 5]], mean[[0, 4, 5]])
    assert torch.equal(done.z[1:4], VAE.normalise(z)[1:4])
    # What comes behind reads the new latents.
    behind = torch.randn(6, SIZE, 4, dtype=torch.float64)
    read = VAE.decode(behind, made.decoder.append(SIZE))
    fresh = caches(6).decoder
    VAE.decode(VAE.denormalise(done.z), fresh)
    torch.testing.assert_close(read, VAE.decode(behind, fresh.append(SIZE)), rtol=0, atol=1e-12)
    assert not torch.allclose(read[0], VAE.decode(behind, caches(6).decoder)[0])


@torch.no_grad()
def test_a_prompts_end_in_the_block_stays_what_it_is() -> None:
    texts = [begun(Only(5, 6), [], 20)]
    done, z, _ = drawn(texts, [[1, 2, 5, 9], [1, 2, 8, 9]], pinned=2)
    assert done.tokens.tolist() == [[1, 2, 5, 6], [1, 2, 8, 9]]
    assert (done.good.tolist(), done.forced) == ([[True, False]], [[1, 0]])
    assert torch.equal(done.z[:, :2], VAE.normalise(z)[:, :2]) and not torch.equal(
        done.z[0, 2:], VAE.normalise(z)[0, 2:]
    )


@torch.no_grad()
def test_a_block_longer_than_the_room_is_brought_to_its_end() -> None:
    done, _, _ = drawn([begun(Only(5, 6, 7, 8), [5, 6, 7], 2)], [[9, 9, 9, 9]])
    assert done.tokens.tolist() == [[8, END, 9, 9]] and done.forced == [[2]]
