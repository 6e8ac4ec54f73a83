"""Rotary positions against complex numbers, attention against loops."""

import math

import pytest
import torch
from torch import Tensor

from opencola.layers.attention import attention, rotary, rotate_halves, rotate_pairs, turns


def unit_numbers(positions: Tensor, dim: int, base: float) -> Tensor:
    """Unit complex numbers (..., R, 1, dim / 2), one angle at a time."""
    angles = [[p * base ** (-2 * j / dim) for j in range(dim // 2)] for p in positions.flatten().tolist()]
    angle = torch.tensor(angles, dtype=torch.float64).view(*positions.shape, 1, dim // 2)
    return torch.polar(torch.ones_like(angle), angle)


@pytest.mark.parametrize("positions", [torch.tensor([0, 1, 5, 300]), torch.tensor([[0, 1, 2, 3], [9, 9, 0, 77]])])
@pytest.mark.parametrize("dim", [2, 6, 8])
def test_pairs_are_turned_as_complex_numbers_and_the_rest_passes(positions: Tensor, dim: int) -> None:
    x = torch.randn(2, 4, 3, 8).double()
    turned = rotate_pairs(x, turns(rotary(positions, dim, 10000.0, torch.float64), 8))
    expected = torch.view_as_complex(x[..., :dim].unflatten(-1, (-1, 2)).contiguous()) * unit_numbers(
        positions, dim, 10000.0
    )
    torch.testing.assert_close(turned[..., :dim], torch.view_as_real(expected).flatten(-2), rtol=0, atol=1e-12)
    assert torch.equal(turned[..., dim:], x[..., dim:])


def test_halves_are_turned_as_complex_numbers() -> None:
    x, positions = torch.randn(2, 4, 3, 8).double(), torch.tensor([0, 1, 5, 300])
    turned = rotate_halves(x, rotary(positions, 8, 500000.0, torch.float64))
    expected = torch.complex(x[..., :4], x[..., 4:]) * unit_numbers(positions, 8, 500000.0)
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), dim=-1), rtol=0, atol=1e-12)


def test_angles_are_computed_in_at_least_float32() -> None:
    assert rotary(torch.arange(4), 8, 10000.0, torch.bfloat16)[0].dtype == torch.float32


@pytest.mark.parametrize("kv_heads", [3, 1])
@pytest.mark.parametrize("with_mask", [False, True])
def test_attention_is_a_softmax_over_visible_keys(kv_heads: int, with_mask: bool) -> None:
    q = torch.randn(2, 4, 3, 5).double()
    k, v = torch.randn(2, 2, 6, kv_heads, 5).double()
    mask = torch.rand(2, 1, 4, 6) < 0.6
    mask[..., 0] = True
    out = attention(q, k, v, mask if with_mask else None)
    for b in range(2):
        for row in range(4):
            for head in range(3):
                kv = head if kv_heads == 3 else 0
                seen = [key for key in range(6) if not with_mask or mask[b, 0, row, key]]
                weights = [math.exp(float(q[b, row, head] @ k[b, key, kv]) / math.sqrt(5)) for key in seen]
                mean = sum(w * v[b, key, kv] for w, key in zip(weights, seen, strict=True)) / sum(weights)
                torch.testing.assert_close(out[b, row, head], mean, rtol=0, atol=1e-12)
