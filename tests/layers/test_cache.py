"""KVCache: rows after committed ones see what they would see in one long sequence, and change nothing."""

import pytest
import torch
from torch import Tensor

from opencola.layers.attention import attention
from opencola.layers.cache import KVCache, prefix_attention
from opencola.layers.masks import block_causal, dense

LENGTHS = torch.tensor([0, 3, 8, 5])  # committed rows of four samples; block sizes divide what is read only in some
LAYERS, HEADS, WIDTH = 2, 2, 6


def rows(count: int, seed: int, batch: int = 4) -> Tensor:
    """q, k, v of some rows for every layer: (layers, 3, B, rows, H, Dh)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, 3, batch, count, HEADS, WIDTH, generator=generator, dtype=torch.float64)


def empty(batch: int = 4, capacity: int = 16) -> KVCache:
    return KVCache.empty(torch.zeros(1).double(), batch, LAYERS, HEADS, WIDTH, capacity)


def read(cache: KVCache, new: Tensor, block_size: int, alone: int = 0) -> Tensor:
    attend = cache.attend(new.shape[3], block_size, alone)
    return torch.stack([attend(layer, *new[layer]) for layer in range(LAYERS)])


def prefilled(committed: Tensor, block_size: int = 1) -> KVCache:
    cache = empty()
    read(cache, committed, block_size)
    return cache.append(LENGTHS)


@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("num_new", [1, 4, 7])
def test_reading_after_mixed_lengths_equals_one_long_sequence(block_size: int, num_new: int) -> None:
    committed, new = rows(8, 1), rows(num_new, 2)
    cache = prefilled(committed)
    assert cache.lengths.tolist() == LENGTHS.tolist()
    assert cache.positions(2).tolist() == [[length, length + 1] for length in LENGTHS.tolist()]
    out = read(cache, new, block_size)
    for sample, length in enumerate(LENGTHS.tolist()):
        mask = dense(block_causal(block_size), length + num_new, length + num_new)[length:]
        for layer in range(LAYERS):
            q, k, v = torch.cat((committed[layer, :, sample, :length], new[layer, :, sample]), dim=1)[:, None]
            expected = attention(q[:, length:], k, v, mask)[0]
            torch.testing.assert_close(out[layer, sample], expected, rtol=0, atol=1e-12)


def test_prefill_of_the_longest_leaves_shorter_samples_as_if_alone() -> None:
    committed, new = rows(8, 1), rows(4, 2)
    out = read(prefilled(committed, 4), new, 4)
    spoiled = committed.clone()
    for sample, length in enumerate(LENGTHS.tolist()):
        spoiled[:, :, sample, length:] = 100.0
    assert torch.equal(read(prefilled(spoiled, 1), new, 4), out)


def test_reading_commits_nothing() -> None:
    cache = prefilled(rows(8, 1))
    before = [[t[i, :n].clone() for i, n in enumerate(LENGTHS)] for t in (*cache.keys, *cache.values)]
    first = read(cache, rows(4, 2), 4)
    read(cache, rows(7, 3), 4)
    after = [[t[i, :n] for i, n in enumerate(LENGTHS)] for t in (*cache.keys, *cache.values)]
    assert all(torch.equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))
    assert torch.equal(read(cache, rows(4, 2), 4), first)
    assert cache.lengths.tolist() == LENGTHS.tolist()


def test_appending_commits_and_leaves_the_older_value_valid() -> None:
    old = prefilled(rows(8, 1))
    first = read(old, rows(4, 2), 4)
    new = old.append(4)
    assert new.lengths.tolist() == (LENGTHS + 4).tolist()
    read(new, rows(4, 3), 4)
    assert torch.equal(read(old, rows(4, 2), 4), first)


def test_select_copies_the_samples_in_the_order_asked_for() -> None:
    cache, order = prefilled(rows(8, 1)), torch.tensor([2, 0, 2])
    out = read(cache, rows(4, 2), 4)
    chosen = cache.select(order)
    assert chosen.lengths.tolist() == LENGTHS[order].tolist()
    assert torch.equal(read(chosen, rows(4, 2)[:, :, order], 4), out[:, order])
    chosen = chosen.append(4)
    read(chosen, rows(4, 9, batch=3), 4)  # written into the copy alone
    read(cache, rows(4, 2), 4)
    assert torch.equal(read(cache.append(4), rows(1, 4), 4), read(prefilled_twice(), rows(1, 4), 4))


def prefilled_twice() -> KVCache:
    cache = prefilled(rows(8, 1))
    read(cache, rows(4, 2), 4)
    return cache.append(4)


def test_samples_alone_see_only_their_own_rows() -> None:
    cache, new = prefilled(rows(8, 1)), rows(4, 2)
    plain = read(cache, new, 4)
    lonely = rows(4, 3, batch=2)
    both = read(cache, torch.cat((new, lonely), dim=2), 4, alone=2)
    assert torch.equal(both[:, :4], plain)
    own = torch.stack([attention(*lonely[layer]) for layer in range(LAYERS)])
    torch.testing.assert_close(both[:, 4:], own, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.usefixtures("need_kernels")
@pytest.mark.parametrize(("num_rows", "width"), [(8, 16), (13, 32), (7, 16), (8, 6), (1, 70)])
def test_attention_to_prefixes_by_its_kernel_is_torchs(num_rows: int, width: int) -> None:
    q, (k, v) = torch.randn(5, num_rows, 2, width), torch.randn(2, 2, 48, 2, width)
    limits, own = torch.randint(1, 49, (2, num_rows)), torch.full((3, num_rows), num_rows)
    alone = (*torch.randn(2, 3, num_rows, 2, width), own)
    unseen = (torch.arange(48) >= limits[..., None])[:, None]
    asked: list[torch.dtype] = []

    def bias(dtype: torch.dtype) -> Tensor:
        asked.append(dtype)
        return torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf)

    out, plain = prefix_attention(q, k, v, limits, bias, alone), prefix_attention(q[:2], k, v, limits, bias)
    assert asked == []  # which the kernel does not need
    assert torch.equal(plain, out[:2])
    for dtype in (torch.float32, torch.float64):
        wide = [x.to(dtype) for x in (q, k, v, *alone[:2])]
        expected = prefix_attention.reference(*wide[:3], limits, bias, (*wide[3:], own))
        torch.testing.assert_close(out.to(dtype), expected, rtol=0, atol=3e-6)


def test_a_full_cache_says_so() -> None:
    capacity = empty(capacity=5).keys[0].shape[1]
    assert capacity >= 5
    cache = empty(capacity=5).append(torch.tensor([0, 1, capacity - 3, 2]))
    read(cache, rows(3, 1), 4)
    with pytest.raises(ValueError, match=f"cache holds {capacity} rows, {capacity + 1} asked for"):
        cache.attend(4, 4)
