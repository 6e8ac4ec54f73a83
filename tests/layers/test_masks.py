"""Every mask against the specification's words, pair by pair."""

import pytest
import torch

from opencola.layers.masks import block_causal, clean_beside_noisy, dense


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
