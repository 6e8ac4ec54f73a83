"""Every mask against the specification's words, pair by pair."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opencola.kernels import library
from opencola.kernels.attention import attend_packed
from opencola.layers.attention import attention
from opencola.layers.masks import PackedRows, block_causal, clean_beside_noisy, dense
from opencola.layers.packed import Shared, make_plan, packed_attention


@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 11), (11, 3)])
def test_block_causal(block_size: int, queries: int, keys: int) -> None:
    mask = dense(block_causal(block_size), queries, keys)
    assert mask.dtype == torch.bool
    for p in range(queries):
        for r in range(keys):
            own_block = range(p // block_size * block_size, (p // block_size + 1) * block_size)
            assert mask[p, r] == (r < own_block.start or r in own_block)


@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("num_clean", [0, 4, 8])
def test_clean_beside_noisy(num_clean: int, copies: int, block_size: int) -> None:
    num_latents = 8
    rows = [("clean", 0, place) for place in range(num_clean)]
    rows += [("noisy", copy, place) for copy in range(copies) for place in range(num_latents)]

    def sees(query: tuple[str, int, int], key: tuple[str, int, int]) -> bool:
        (kind, copy, place), (key_kind, key_copy, key_place) = query, key
        block, key_block = place // block_size, key_place // block_size
        if kind == "clean":  # block-causal among themselves, never a noisy row
            return key_kind == "clean" and key_block <= block
        if key_kind == "clean":  # the clean history before its own block
            return key_block < block
        return key_copy == copy and key_block == block  # and its own noisy block

    mask = dense(clean_beside_noisy(num_clean, num_latents, block_size), len(rows), len(rows))
    assert mask.tolist() == [[sees(query, key) for key in rows] for query in rows]


@st.composite
def patterns(draw: st.DrawFn) -> tuple[PackedRows, bool]:
    """Rows of three samples, and whether the clean ones are past."""
    block_size, copies = draw(st.integers(1, 5)), draw(st.integers(0, 3))
    blocks = draw(st.integers(1, 5))
    first = draw(st.integers(0, blocks - 1)) if copies else 0
    clean_blocks = draw(st.integers(0 if copies else 1, blocks))
    mark = st.lists(st.booleans(), min_size=3, max_size=3)
    places = st.lists(st.integers(0, 2), min_size=3 * blocks * block_size, max_size=3 * blocks * block_size)
    history, documents = draw(st.none() | mark), draw(st.none() | places)
    rows = PackedRows(
        *(clean_blocks * block_size, blocks * block_size, block_size, copies, first * block_size),
        None if history is None else torch.tensor(history),
        None if documents is None else torch.tensor(documents, dtype=torch.int32).view(3, -1),
    )
    return rows, copies > 0 and draw(st.booleans())


def in_words(rows: PackedRows) -> Tensor:
    """The rule of model.md §3, pair by pair: (3, R, R)."""
    places = [(0, latent) for latent in range(rows.num_clean)]
    places += [(part + 1, latent) for part in range(rows.copies) for latent in range(rows.first, rows.num_latents)]

    def sees(sample: int, query: tuple[int, int], key: tuple[int, int]) -> bool:
        (part, latent), (key_part, key_latent) = query, key
        block, key_block = latent // rows.block_size, key_latent // rows.block_size
        if rows.documents is not None and documents[sample][latent] != documents[sample][key_latent]:
            return False
        if part and not key_part and rows.history is not None and not history[sample]:
            return False
        return (key_part == part and key_block == block) or (key_part == 0 and key_block < block)

    history = [] if rows.history is None else rows.history.tolist()
    documents = [] if rows.documents is None else rows.documents.tolist()
    return torch.tensor([[[sees(sample, query, key) for key in places] for query in places] for sample in range(3)])


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(patterns(), st.sampled_from([1, 3, 64]))
def test_every_way_of_attention_has_the_one_rule(pattern: tuple[PackedRows, bool], span: int) -> None:
    """In words, dense, by FlexAttention's mask, by the plan's biases and spans, and by values of plan and kernel."""
    rows, has_past = pattern
    count, shared = rows.num_rows, Shared(rows, span)
    start = rows.num_clean if has_past else 0
    row = torch.arange(count)
    seen = rows.visible(torch.arange(3)[:, None, None], row[:, None], row).expand(3, -1, -1)
    assert torch.equal(seen, in_words(rows))

    mask = shared.block_mask(count - start, count, torch.device("cpu"))
    sample, query = torch.arange(3)[:, None, None], torch.arange(count - start)[:, None]
    assert torch.equal(mask.mask_mod(sample, 0, query, row).expand(3, -1, -1), seen[:, start:])

    plan = make_plan(rows, span, has_past, torch.device("cpu"))
    by_plan = torch.zeros(3, count - start, count, dtype=torch.bool)
    for begin, end, keys in plan.spans:
        by_plan[:, begin:end, :keys] |= plan.bias[:, 0, begin:end, :keys] == 0
        assert not (plan.bias[:, 0, begin:end, keys:] == 0).any()  # no visible pair lies beyond its span
    assert [begin for begin, _, _ in plan.spans] == [0, *(end for _, end, _ in plan.spans[:-1])]
    own = torch.arange(start, count) // rows.block_size * rows.block_size
    for i in range(rows.block_size):
        by_plan[:, query[:, 0], own + i] |= True if plan.own_bias is None else plan.own_bias[:, 0, :, i] == 0
    assert torch.equal(by_plan, seen[:, start:])

    torch.manual_seed(7)
    q, k, v = torch.randn(3, 3, count, 2, 4).double()
    q, past = q[:, start:], (k[:, :start], v[:, :start]) if has_past else None
    expected = attention(q, k, v, seen[:, None, start:])
    given_rows = q, k[:, start:], v[:, start:], past
    torch.testing.assert_close(packed_attention(*given_rows, shared), expected, rtol=0, atol=1e-12)
    if library.library() is not None:
        narrow = [x.float() for x in given_rows[:3]]
        before = None if past is None else (past[0].float(), past[1].float())
        out = packed_attention(*narrow, before, shared)
        torch.testing.assert_close(out, attend_packed(*narrow, before, **vars(rows)), rtol=0, atol=0)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
