"""The DiT gives the velocities of the official implementation, with and without its cache."""

from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from opencola.flow.dit import BlockCausalDiT
from opencola.layers import masks
from opencola.layers.attention import Attend, masked
from opencola.models.cola.caches import read_latents

TOLERANCE: dict[str, Any] = {"atol": 2e-5, "rtol": 0}
SAMPLES = (0, 1)


def velocity(dit: BlockCausalDiT, z: Tensor, t: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """z (B, R, d), times t (B, R) in 0..1000 as the fixtures give them."""
    times, index = (t.double() / 1000).unique(return_inverse=True)
    return dit(z, dit.modulation(times), index, dit.turns(positions), attend)


def positions_of(dit: BlockCausalDiT, x: Tensor) -> tuple[Tensor, Attend]:
    """Places of rows x (1, R, d), and the block-causal pattern."""
    place, size = torch.arange(x.shape[1], device=x.device), dit.config.block_size
    return place, masked(masks.dense(masks.block_causal(size), len(place), len(place), x.device))


@torch.no_grad()
def test_prefix(dit, stored) -> None:
    expected = stored("dit_prefix")
    for i in SAMPLES:
        x = expected[f"x_{i}"][None]
        place, attend = positions_of(dit, x)
        cases = {
            "t0": torch.zeros_like(place),
            "tok": expected[f"t_{i}"],
            "scalar437.5": torch.full_like(place, 437.5, dtype=torch.float32),
        }
        cases["persample"] = expected["t_per_sample"][i].expand(len(place))
        for name, t in cases.items():
            v = velocity(dit, x, t[None], place, attend)
            assert_close(v[0], expected[f"v_{name}_{i}"], **TOLERANCE)


@torch.no_grad()
def test_scalar_time(dit, stored) -> None:
    """A call with one time for all rows needs an index of one element only, in the package's usual float32."""
    expected = stored("dit_prefix")
    for i in SAMPLES:
        x = expected[f"x_{i}"][None]
        place, attend = positions_of(dit, x)
        modulation = dit.modulation(x.new_tensor([0.4375]))
        v = dit(x, modulation, place.new_zeros(1, 1), dit.turns(place), attend)
        assert_close(v[0], expected[f"v_scalar437.5_{i}"], **TOLERANCE)


@torch.no_grad()
def test_blocks_after_a_committed_prefix(dit, stored) -> None:
    """Both samples in one batch, with histories of different lengths."""
    expected, size = stored("dit_block"), dit.config.block_size
    block, block2, t = (
        torch.stack([expected[f"{name}_{i}"] for i in SAMPLES]) for name in ("block", "block2", "t_block")
    )
    prefixes = [expected[f"prefix_{i}"] for i in SAMPLES]
    prefix = torch.nn.utils.rnn.pad_sequence(prefixes, batch_first=True)
    lengths = torch.tensor([len(prefix) for prefix in prefixes], device=prefix.device)
    cache = dit.empty_cache(2, 24)
    read_latents(dit, cache, prefix, dit.modulation(prefix.new_zeros(1)))
    cache = cache.append(lengths)
    both = torch.cat((block, block)), torch.cat((t, t)), cache.positions(size).repeat(2, 1)
    conditional, unconditional = velocity(dit, *both, cache.attend(size, size, alone=2)).chunk(2)
    committed = velocity(dit, block, 0 * t, cache.positions(size), cache.attend(size, size))
    cache = cache.append(size)
    second = velocity(dit, block2, torch.full_like(t, 500.0), cache.positions(size), cache.attend(size, size))
    own_positions = velocity(dit, block, t, torch.arange(size, device=t.device), masked(None))
    for i in SAMPLES:
        assert_close(conditional[i], expected[f"v_cond_{i}"], **TOLERANCE)
        assert_close(unconditional[i], expected[f"v_uncond_{i}"], **TOLERANCE)
        assert_close(own_positions[i], expected[f"v_uncond_{i}"], **TOLERANCE)
        assert_close(committed[i], expected[f"v_commit_{i}"], **TOLERANCE)
        assert_close(second[i], expected[f"v_cond2_{i}"], **TOLERANCE)
