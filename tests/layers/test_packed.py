"""The packed pattern, by spans and by FlexAttention, against attention under its dense mask."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from opencola.layers import masks
from opencola.layers.attention import Attend, masked
from opencola.layers.masks import PackedRows, clean_beside_noisy, dense
from opencola.layers.packed import Past, Shared, block_causal, flexible, packed


def by_flex(
    num_clean: int,
    num_latents: int,
    block_size: int,
    copies: int,
    history: Tensor | None,
    documents: Tensor | None,
    past: Past | None = None,
    first: int = 0,
) -> Attend:
    """`packed` by FlexAttention, which is otherwise for CUDA only."""
    shared = Shared(PackedRows(num_clean, num_latents, block_size, copies, first, history, documents))
    return lambda layer, q, k, v: flexible(q, k, v, None if past is None else past[layer], shared)


PACKED = [(8, 12, 4, 1), (8, 12, 4, 3), (0, 4, 4, 2), (0, 8, 4, 1), (3, 4, 1, 2), (12, 12, 4, 2)]


@pytest.mark.parametrize("way", [1, 5, 64, flexible], ids=["span1", "span5", "span64", "flex"])
@pytest.mark.parametrize("bounds", [(), ("history",), ("documents",), ("history", "documents")], ids="+".join)
@pytest.mark.parametrize(("num_clean", "num_latents", "block_size", "copies"), PACKED)
def test_packed_is_attention_under_the_dense_mask(
    num_clean: int, num_latents: int, block_size: int, copies: int, bounds: tuple[str, ...], way: Any
) -> None:
    rows, batch = num_clean + copies * num_latents, 3
    qkv = torch.randn(3, batch, rows, 2, 8).double().requires_grad_()
    predicate = clean_beside_noisy(num_clean, num_latents, block_size)
    mask = dense(predicate, rows, rows).expand(batch, 1, -1, -1).clone()
    history = documents = None
    if "history" in bounds:
        history = torch.tensor([True, False, True])
        mask[1, :, num_clean:, :num_clean] = False
    if "documents" in bounds:
        documents = torch.randint(0, 2, (batch, num_latents)).cumsum(1)
        for b in range(batch):
            place = [*range(num_clean), *list(range(num_latents)) * copies]
            for query, key in itertools.product(range(rows), repeat=2):
                mask[b, :, query, key] &= documents[b, place[query]] == documents[b, place[key]]
    expected = masked(mask)(0, *qkv)
    if way is flexible:  # torch has no gradient of it on a CPU
        out = by_flex(num_clean, num_latents, block_size, copies, history, documents)(0, *qkv.detach())
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        return
    out = packed(num_clean, num_latents, block_size, copies, history, documents, span=way)(0, *qkv)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(out)
    gradients = [torch.autograd.grad((result * weight).sum(), qkv)[0] for result in (out, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", ["spans", "flex"])
def test_packed_without_clean_queries_gives_the_noisy_rows(way: str) -> None:
    q, k, v = torch.randn(3, 2, 32, 2, 8).double()
    history, documents = torch.tensor([True, False]), torch.tensor([[0] * 6 + [1] * 6, [0] * 12])
    attend = (by_flex if way == "flex" else packed)(8, 12, 4, 2, history, documents)
    torch.testing.assert_close(attend(0, q[:, 8:], k, v), attend(0, q, k, v)[:, 8:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [12, 200])
def test_the_gradient_is_that_of_finite_differences_and_runs_in_bfloat16(length: int) -> None:
    documents = torch.arange(length).div(7, rounding_mode="floor")[None]
    attend = packed(length - 4, length, 4, 1, torch.tensor([True]), documents)
    qkv = torch.randn(3, 1, 2 * length - 4, 1, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attend(0, *x), (qkv,), fast_mode=True)
    rough = qkv.detach().bfloat16().requires_grad_()
    out = attend(0, *rough)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), attend(0, *qkv), rtol=0, atol=0.05)
    out.sum().backward()
    assert rough.grad is not None and rough.grad.isfinite().all()


def test_packed_noisy_rows_without_history_do_not_depend_on_the_clean_ones() -> None:
    q, k, v = torch.randn(3, 2, 20, 2, 6).double()
    attend = packed(8, 12, 4, 1, torch.tensor([False, True]))
    before = attend(0, q, k, v)
    k[:, :8], v[:, :8] = 5.0, -3.0
    after = attend(0, q, k, v)
    assert torch.equal(before[0, 8:], after[0, 8:])
    assert not torch.equal(before[1, 12:], after[1, 12:])


@pytest.mark.parametrize("way", [1, 5, 64, flexible], ids=["span1", "span5", "span64", "flex"])
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize(
    ("num_clean", "num_latents", "block_size", "copies", "first"),
    [(8, 12, 4, 1, 0), (8, 12, 4, 2, 4), (8, 12, 4, 3, 8), (11, 12, 1, 2, 5), (12, 12, 4, 2, 4), (0, 4, 4, 2, 0)],
)
def test_noisy_rows_behind_past_ones_are_those_of_the_whole_pattern(
    num_clean: int, num_latents: int, block_size: int, copies: int, first: int, bounded: bool, way: Any
) -> None:
    qkv = torch.randn(3, 3, num_clean + copies * num_latents, 2, 8).double().requires_grad_()
    history = documents = None
    if bounded:
        history, documents = torch.tensor([True, False, True]), torch.randint(0, 2, (3, num_latents)).cumsum(1)
    whole = packed(num_clean, num_latents, block_size, copies, history, documents)(0, *qkv)
    asking = [num_clean + c * num_latents + row for c in range(copies) for row in range(first, num_latents)]
    past = [(qkv[1, :, :num_clean], qkv[2, :, :num_clean])]
    if way is flexible:
        attend = by_flex(
            *(num_clean, num_latents, block_size, copies, history, documents),
            past=[(k.detach(), v.detach()) for k, v in past],
            first=first,
        )
        torch.testing.assert_close(attend(0, *qkv[:, :, asking].detach()), whole[:, asking], rtol=0, atol=1e-12)
        return
    attend = packed(num_clean, num_latents, block_size, copies, history, documents, way, past, first)
    out = attend(0, *qkv[:, :, asking])
    torch.testing.assert_close(out, whole[:, asking], rtol=0, atol=1e-12)
    weight = torch.randn_like(out)
    by_past, expected = (torch.autograd.grad((x * weight).sum(), qkv)[0] for x in (out, whole[:, asking]))
    torch.testing.assert_close(by_past[:, :, asking], expected[:, :, asking], rtol=0, atol=1e-12)
    assert (by_past[:, :, :num_clean] == 0).all()


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize(("rows", "block_size"), [(12, 1), (37, 5), (16, 16), (8, 20), (1, 1)])
def test_clean_rows_alone_are_block_causal(
    rows: int, block_size: int, kv_heads: int, documents: bool, with_kernels: bool
) -> None:
    q, k, v = (torch.randn(3, rows, heads, 16, requires_grad=True) for heads in (2, kv_heads, kv_heads))
    seen = dense(masks.block_causal(block_size), rows, rows).expand(3, 1, -1, -1)
    numbers = torch.randint(0, 3, (3, rows)).cumsum(1) * 2**32 if documents else None  # equal in the lower 32 bits
    if numbers is not None:
        seen = seen & masks.same_document(numbers)
    found = block_causal(rows, block_size, numbers)(0, q, k, v)
    expected = masked(seen)(0, *(x.double() for x in (q, k, v)))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    weight = torch.randn_like(found)
    of_found = torch.autograd.grad((found * weight).sum(), (q, k, v))
    of_expected = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for gradient, right in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=0, atol=2e-5)


@pytest.mark.usefixtures("need_kernels")
def test_block_causal_rows_are_the_same_in_longer_sequences() -> None:
    q, k, v = torch.randn(3, 2, 70, 2, 16)
    whole = block_causal(70, 1)(0, q, k, v)
    for rows in (1, 15, 16, 33, 69):
        assert torch.equal(block_causal(rows, 1)(0, q[:, :rows], k[:, :rows], v[:, :rows]), whole[:, :rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("copies", [1, 2])
def test_on_any_device(device: torch.device, copies: int, past: bool, dtype: torch.dtype) -> None:
    """Whatever attends there (on CUDA FlexAttention, compiled), in values and gradients, against dense float64."""
    num_clean, num_latents, batch = 60, 64, 3
    history, documents = torch.tensor([True, False, True]), torch.arange(num_latents).div(20).long().expand(batch, -1)
    rows = PackedRows(num_clean, num_latents, 4, copies, history=history, documents=documents)
    qkv = torch.randn(3, batch, rows.num_rows, 2, 16).to(dtype).double().requires_grad_()
    row, start = torch.arange(rows.num_rows), num_clean if past else 0
    mask = rows.visible(torch.arange(batch)[:, None, None], row[:, None], row)[:, None]
    expected = masked(mask[:, :, start:])(0, qkv[0, :, start:], *qkv[1:])
    there = qkv.detach().to(device, dtype).requires_grad_()
    before: Past | None = [(there.detach()[1, :, :start], there.detach()[2, :, :start])] if past else None
    attend = packed(num_clean, num_latents, 4, copies, history.to(device), documents.to(device), past=before)
    out = attend(0, *there[:, :, start:])
    assert out.dtype == dtype and out.device.type == device.type
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.02}
    torch.testing.assert_close(out.cpu().double(), expected, **tolerance)
    weight = torch.randn_like(expected)
    (found,) = torch.autograd.grad((out * weight.to(out)).sum(), there)
    (gradient,) = torch.autograd.grad((expected * weight).sum(), qkv)
    tolerance["atol"] *= 5
    torch.testing.assert_close(found.cpu().double()[:, :, start:], gradient[:, :, start:], **tolerance)


def test_block_causal_attention_needs_no_numbers_and_no_break_in_a_graph() -> None:
    def run(q: Tensor, documents: Tensor | None) -> Tensor:
        return block_causal(len(q[0]), 2, documents)(0, q, q, q)

    q, documents = torch.randn(2, 6, 2, 8), torch.arange(6).expand(2, -1) // 4
    assert run(q.to("meta"), documents.to("meta")).shape == q.shape
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for given in (None, documents):
        torch.testing.assert_close(compiled(q, given), run(q, given), rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", [packed, by_flex], ids=["spans", "flex"])
def test_blocks_of_copies_may_begin_anywhere(way: Any) -> None:
    """Copies of latents 5 to 16 in blocks of 4 behind 13 clean ones, which do not ask."""
    q, k, v = torch.randn(3, 2, 13 + 2 * 12, 2, 8).double()
    history, documents = torch.tensor([True, False]), torch.tensor([[0] * 9 + [1] * 8, [0] * 17])
    mask = torch.zeros(2, 1, 24, 37, dtype=torch.bool)
    for b, row, key in itertools.product(range(2), range(24), range(37)):
        latent, start = 5 + row % 12, 5 + row % 12 // 4 * 4
        key_latent = key if key < 13 else 5 + (key - 13) % 12
        own = key >= 13 and (key - 13) // 12 == row // 12 and start <= key_latent < start + 4
        before = key < 13 and key < start and bool(history[b])
        mask[b, :, row, key] = (own or before) and documents[b, latent] == documents[b, key_latent]
    found = way(13, 17, 4, 2, history, documents, first=5)(0, q[:, 13:], k, v)
    torch.testing.assert_close(found, masked(mask)(0, q[:, 13:], k, v), rtol=0, atol=1e-12)
