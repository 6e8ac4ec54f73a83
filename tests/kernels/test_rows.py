"""Products with packed weights and attention to prefixes, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opencola.kernels.rows import pack, prefix_attention, product

pytestmark = pytest.mark.usefixtures("need_kernels")


def exact(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("rows", [1, 8, 21, 400])
@pytest.mark.parametrize(("columns", "depth"), [(32, 16), (40, 300), (7, 5), (96, 520)])
def test_products_of_any_shape(rows: int, columns: int, depth: int) -> None:
    x, weight, bias = torch.randn(rows, depth), torch.randn(columns, depth), torch.randn(columns)
    index = torch.zeros(rows, dtype=torch.long)
    packed, scale = pack(weight), depth**0.5
    out = product(x, packed, bias, columns, index)
    torch.testing.assert_close(out.double(), exact(x, weight, bias), rtol=0, atol=4e-6 * scale)
    for few in range(1, min(rows, 9) + 1):  # however many rows there are
        assert torch.equal(product(x[-few:], packed, bias, columns, index), out[-few:])
    for strided in (weight, weight.T.contiguous().T, torch.cat((weight, weight), dim=1)[:, :depth]):
        assert torch.equal(product(x, strided, bias, columns, index), out)
        assert torch.equal(pack(strided), packed)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(("rows", "columns", "depth"), [(5, 40, 24), (390, 33, 18)])
def test_what_is_done_beside_products(rows: int, columns: int, depth: int, times: int, threads: int) -> None:
    x, weight, bias = torch.randn(rows, depth) + 3, torch.randn(columns, depth) / 4, torch.randn(columns)
    h, index = torch.randn(rows, columns), torch.randint(times, (rows,))
    parts = torch.randn(times, 2 * depth + columns)  # parts of rows, as a modulation's are
    shift, scale, gate = parts.split([depth, depth, columns], dim=-1)
    torch.set_num_threads(threads)
    try:
        out = product(x, pack(weight), bias, columns, index, norm=(shift, scale, 1e-3), residual=(h, gate))
        hidden = product(x, pack(weight), None, columns, index, norm=(shift, scale, 1e-3), gelu=True)
    finally:
        torch.set_num_threads(1)
    u = F.layer_norm(x.double(), (depth,), eps=1e-3) * (1 + scale.double()[index]) + shift.double()[index]
    expected = h.double() + gate.double()[index] * exact(u, weight, bias)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-5)
    expected = F.gelu(exact(u, weight), approximate="tanh")
    torch.testing.assert_close(hidden.double(), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("rows", "keys", "width"), [(16, 40, 64), (5, 9, 48), (35, 77, 16), (1, 1, 16), (18, 21, 7), (3, 50, 90)]
)
def test_attention_to_prefixes(rows: int, keys: int, width: int, kv_heads: int, few: bool) -> None:
    q, k, v = (
        torch.randn(3, rows, 4, width),
        torch.randn(3, keys, kv_heads, width),
        torch.randn(3, kv_heads, keys, width),
    )
    v = v.transpose(1, 2)  # of other strides than k
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    limits = torch.randint(1, keys + 1, (3, rows))
    k[0, int(limits[0].max()) :] = torch.nan  # nobody reads these
    out = torch.empty(3, rows, 4, width)
    prefix_attention(q, k, v, limits, out, few)
    one = torch.empty(1, 1, 4, width)
    for sample, row in ((0, 0), (2, rows - 1)):  # depends on what it sees alone
        seen = int(limits[sample, row])
        prefix_attention(
            q[sample : sample + 1, row : row + 1],
            k[sample : sample + 1, :seen],
            v[sample : sample + 1, :seen],
            limits[sample : sample + 1, row : row + 1],
            one,
            few,
        )
        assert torch.equal(one[0, 0], out[sample, row])
    mask = torch.arange(keys) < limits[:, None, :, None]
    q, k, v = (x.double().transpose(1, 2).nan_to_num() for x in (q, k, v))
    k, v = (x.repeat_interleave(4 // kv_heads, dim=1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("few", [False, True])
def test_attention_is_the_same_with_two_threads(few: bool) -> None:
    q, k, v, limits = torch.randn(2, 20, 3, 16), *torch.randn(2, 2, 20, 3, 16), torch.full((2, 20), 20)
    one, two = torch.empty_like(q), torch.empty_like(q)
    prefix_attention(q, k, v, limits, one, few)
    torch.set_num_threads(2)
    try:
        prefix_attention(q, k, v, limits, two, few)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one, two)


def test_there_may_be_no_rows() -> None:
    index, weight = torch.zeros(0, dtype=torch.long), pack(torch.randn(5, 3))
    assert product(torch.empty(0, 3), weight, torch.ones(5), 5, index, gelu=True).shape == (0, 5)
    norm = (torch.ones(2, 3), torch.ones(2, 3), 1e-3)
    assert product(torch.empty(2, 0, 3), weight, None, 5, index.view(2, 0), norm=norm).shape == (2, 0, 5)
    for batch, rows in ((0, 4), (2, 0)):
        q, k, limits = torch.randn(batch, rows, 3, 16), torch.randn(batch, 7, 3, 16), torch.ones(batch, rows).long()
        prefix_attention(q, k, k, limits, torch.empty_like(q))


def test_numbers_may_lie_at_any_address_and_be_denormal() -> None:
    def shifted(x: Tensor) -> Tensor:
        return torch.empty(1 + x.numel())[1:].view_as(x).copy_(x)

    x, weight, bias, index = torch.randn(9, 40), torch.randn(33, 40), torch.randn(33), torch.zeros(9, dtype=torch.long)
    expected = product(x, pack(weight), bias, 33, index)
    assert torch.equal(product(shifted(x), shifted(pack(shifted(weight))), shifted(bias), 33, index), expected)
    q, k, v, limits = torch.randn(2, 20, 3, 16), *torch.randn(2, 2, 20, 3, 16), torch.full((2, 20), 20)
    outs = [torch.empty_like(q), shifted(torch.empty_like(q))]
    prefix_attention(q, k, v, limits, outs[0])
    prefix_attention(shifted(q), shifted(k), shifted(v), limits, outs[1])
    assert torch.equal(*outs)
    tiny = torch.full((1, 1), 2.0**-140)
    assert product(tiny, pack(torch.full((1, 1), 2.0**100)), None, 1, index[:1]).item() == 2.0**-40
    prefix_attention(q, k, v * 0 + 2.0**-140, limits, outs[0])
    torch.testing.assert_close(outs[0], torch.full_like(q, 2.0**-140), rtol=0, atol=20 * 2.0**-149)


@pytest.mark.parametrize("few", [False, True])
def test_scores_may_be_large(few: bool) -> None:
    q, k, v = torch.full((1, 8, 1, 16), 60.0), torch.randn(1, 6, 1, 16) * 60, torch.randn(1, 6, 1, 16)
    out = torch.empty(1, 8, 1, 16)
    prefix_attention(q, k, v, torch.full((1, 8), 6), out, few)
    best = k[0, :, 0].sum(-1).argmax()
    torch.testing.assert_close(out[0, :, 0], v[0, best, 0].expand(8, 16))


@pytest.mark.parametrize("few", [False, True])
def test_what_is_not_a_number_stays_none(few: bool) -> None:
    q, k, v = torch.randn(3, 1, 3, 1, 16)
    q[0, 1, 0, 5] = torch.nan
    out = torch.empty(1, 3, 1, 16)
    prefix_attention(q, k, v, torch.full((1, 3), 3), out, few)
    assert out[0, 1].isnan().all() and out[0, [0, 2]].isfinite().all()
    x = torch.tensor([torch.nan, torch.inf, -1e9, 1e30]).view(4, 1)
    found = product(x, pack(torch.ones(1, 1)), None, 1, torch.zeros(4, dtype=torch.long), gelu=True)[:, 0]
    assert found[0].isnan() and found[1] == torch.inf and abs(found[2]) < 1e-20 and found[3] == x[3, 0]
