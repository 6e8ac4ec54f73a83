"""Texts that one model writes side by side: block by block they grow, and in between some leave and others join."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from opencola.models.inputs import sample_ids
from opencola.models.stopping import StopRule, Text, TokenBlock, unfinished


class Writing(Protocol):
    """A batch of texts that are being written; what one becomes does not depend on the others."""

    texts: Sequence[Text]

    def step(self) -> list[TokenBlock]:
        """Write the next block of every text, in their order. Where it raises, all is as it was before."""
        ...

    def select(self, rows: Sequence[int]) -> "Writing":
        """Only the texts at these places; without those that have ended it can go on."""
        ...

    def join(self, other: Any) -> "Writing":
        """With those of another behind, both of which have written a block: of one model, and of settings that differ
        in nothing but the fields that every family has."""
        ...


def begun(
    prompts: Sequence[Sequence[int]],
    sampling: Any,
    eos_ids: Sequence[int],
    ids: Sequence[int] | None,
    stop: StopRule,
    watch: bool = False,
) -> list[Text]:
    """Texts of the same settings, one for each prompt, as `LanguageModel.generate` is given them."""
    rows = enumerate(zip(prompts, sample_ids(prompts, ids), strict=True))
    return [Text(list(prompt), sampling, place, i, eos_ids, stop, watch) for place, (prompt, i) in rows]


def write(writing: Writing) -> Iterator[list[TokenBlock]]:
    """Yield the blocks of all texts that are not at their ends yet, until all are."""
    while writing.texts:
        blocks = writing.step()
        yield blocks
        still = unfinished(blocks)
        if len(still) < len(blocks):
            writing = writing.select(still)
