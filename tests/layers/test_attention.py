"""Rotary positions against complex numbers, attention against loops, the packed pattern against its dense mask."""

import math

import pytest
import torch
from torch import Tensor

from opencola.layers.attention import attention, masked, packed, rotary, rotate_halves, rotate_pairs, turns
from opencola.layers.masks import clean_beside_noisy, dense


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


PACKED = [(8, 12, 4, 1), (8, 12, 4, 3), (0, 4, 4, 2), (0, 8, 4, 1), (3, 4, 1, 2), (12, 12, 4, 2)]


@pytest.mark.parametrize("span", [1, 5, 64], ids=lambda span: f"span{span}")
@pytest.mark.parametrize("with_history", [False, True], ids=["all", "dropout"])
@pytest.mark.parametrize(("num_clean", "num_latents", "block_size", "copies"), PACKED)
def test_packed_is_attention_under_the_dense_mask(
    num_clean: int, num_latents: int, block_size: int, copies: int, with_history: bool, span: int
) -> None:
    rows = num_clean + copies * num_latents
    qkv = torch.randn(3, 3, rows, 2, 6).double().requires_grad_()
    history = torch.tensor([True, False, True]) if with_history else None
    mask = dense(clean_beside_noisy(num_clean, num_latents, block_size), rows, rows).expand(3, 1, -1, -1).clone()
    if with_history:
        mask[1, :, num_clean:, :num_clean] = False
    out = packed(num_clean, num_latents, block_size, copies, history, span=span)(0, *qkv)
    expected = masked(mask)(0, *qkv)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(out)
    gradients = [torch.autograd.grad((result * weight).sum(), qkv)[0] for result in (out, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_packed_without_clean_queries_gives_the_noisy_rows() -> None:
    q, k, v = torch.randn(3, 2, 32, 2, 6).double()
    attend = packed(8, 12, 4, 2, torch.tensor([True, False]))
    torch.testing.assert_close(attend(0, q[:, 8:], k, v), attend(0, q, k, v)[:, 8:], rtol=0, atol=1e-12)


def test_packed_noisy_rows_without_history_do_not_depend_on_the_clean_ones() -> None:
    q, k, v = torch.randn(3, 2, 20, 2, 6).double()
    attend = packed(8, 12, 4, 1, torch.tensor([False, True]))
    before = attend(0, q, k, v)
    k[:, :8], v[:, :8] = 5.0, -3.0
    after = attend(0, q, k, v)
    assert torch.equal(before[0, 8:], after[0, 8:])
    assert not torch.equal(before[1, 12:], after[1, 12:])
