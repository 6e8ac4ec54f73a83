"""The kernel of packed attention against softmax attention under a dense mask in float64."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from opencola.kernels import library
from opencola.layers.attention import masked
from opencola.layers.packed import packed

pytestmark = pytest.mark.skipif(library.library() is None, reason="no C compiler: see python -m opencola.kernels")


@pytest.fixture(autouse=True, params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def rows(batch: int, number: int, heads: int, channels: int, seed: int) -> Tensor:
    """Queries, keys and values (3, B, R, H, Dh) in the order that the DiT gives them."""
    drawn = torch.randn(3, batch, heads, number, channels, generator=torch.Generator().manual_seed(seed))
    return drawn.transpose(2, 3).requires_grad_()


def seen(
    num_clean: int,
    num_latents: int,
    block: int,
    copies: int,
    history: Tensor | None,
    documents: Tensor | None,
    batch: int,
    first: int = 0,
) -> Tensor:
    """The mask (B, 1, R, R), pair by pair."""
    copy = range(first, num_latents)
    places = [(0, i) for i in range(num_clean)] + [(c, i) for c in range(1, copies + 1) for i in copy]
    mask = torch.zeros(batch, len(places), len(places), dtype=torch.bool)
    for (a, (part, i)), (b, (key_part, j)) in itertools.product(enumerate(places), repeat=2):
        begin = first if part else 0
        start = begin + (i - begin) // block * block
        mask[:, a, b] = (key_part == 0 and j < start) or (key_part == part and start <= j < start + block)
    if history is not None:
        mask[~history, num_clean:, :num_clean] = False
    if documents is not None:
        of_rows = documents[:, [place for _, place in places]]
        mask &= of_rows[:, :, None] == of_rows[:, None, :]
    return mask[:, None]


def agree(found: Tensor, expected: Tensor, qkv: Tensor) -> None:
    """Values, and gradients of a weighted sum, to what float32 can give."""
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).double()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad((x * weight).sum(), qkv)[0].double() for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=3e-5)


def marks(bounds: str, batch: int, num_latents: int) -> tuple[Tensor | None, Tensor | None]:
    draw = torch.Generator().manual_seed(2)
    history = torch.arange(batch) != 1 if "history" in bounds else None
    documents = torch.randint(0, 5, (batch, num_latents), generator=draw) // 4 if "documents" in bounds else None
    if documents is not None:
        documents = documents.cumsum(1) * 2**32  # equal in the lower 32 bits
        documents[0, -1] = documents[0, 0]  # and one that comes again
    return history, documents


@pytest.mark.parametrize("bounds", ["", "history", "documents", "history and documents"])
@pytest.mark.parametrize(
    ("num_clean", "num_latents", "block", "copies", "channels"),
    [
        (32, 48, 16, 1, 64),
        (32, 48, 16, 2, 128),
        (38, 39, 1, 2, 16),
        (28, 32, 4, 1, 32),
        (15, 20, 5, 3, 20),
        (35, 40, 5, 1, 8),
        (0, 21, 3, 2, 48),
        (12, 12, 4, 0, 64),
        (40, 80, 40, 1, 16),
        (0, 1, 1, 1, 1),
    ],
)
def test_values_and_gradients_are_those_under_the_dense_mask(
    num_clean: int, num_latents: int, block: int, copies: int, channels: int, bounds: str
) -> None:
    history, documents = marks(bounds, 3, num_latents)
    qkv = rows(3, num_clean + copies * num_latents, 2, channels, seed=0)
    mask = seen(num_clean, num_latents, block, copies, history, documents, 3)
    attend = packed(num_clean, num_latents, block, copies, history, documents)
    agree(attend(0, *qkv), masked(mask)(0, *qkv.double()), qkv)


@pytest.mark.parametrize("block", [1, 8])
def test_long_sequences(block: int) -> None:
    qkv = rows(1, 1040 - block, 2, 16, seed=3)
    place = torch.cat((torch.arange(520 - block), torch.arange(520))) // block
    noisy = torch.arange(len(place)) >= 520 - block
    mask = (~noisy & (place < place[:, None])) | ((noisy == noisy[:, None]) & (place == place[:, None]))
    agree(packed(520 - block, 520, block, 1)(0, *qkv), masked(mask)(0, *qkv.double()), qkv)


@pytest.mark.parametrize("bounds", ["", "history and documents"])
@pytest.mark.parametrize("skipped", [32, 21, 40])
def test_the_last_rows_may_ask_alone(skipped: int, bounds: str) -> None:
    history, documents = marks(bounds, 2, 36)
    q, k, v = rows(2, 68, 2, 16, seed=4)
    mask = seen(32, 36, 4, 1, history, documents, 2)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    found = packed(32, 36, 4, 1, history, documents)(0, q[:, skipped:], k, v)
    expected = masked(mask[:, :, skipped:])(0, q[:, skipped:].double(), k.double(), v.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        *(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found, expected)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bounds", ["", "history and documents"])
@pytest.mark.parametrize(("first", "copies", "block"), [(0, 1, 1), (20, 2, 4), (16, 1, 4), (36, 1, 4), (15, 2, 5)])
def test_rows_behind_past_ones_are_those_of_the_whole_pattern(first: int, copies: int, block: int, bounds: str) -> None:
    history, documents = marks(bounds, 3, 40)
    clean = 40 - block
    qkv = rows(3, clean + 40 * copies, 2, 20, seed=5)
    mask = seen(clean, 40, block, copies, history, documents, 3)
    whole = masked(mask)(0, *qkv.double())
    asking = [clean + 40 * copy + row for copy in range(copies) for row in range(first, 40)]
    past = {0: (qkv[1, :, :clean].detach(), qkv[2, :, :clean].detach())}
    attend = packed(clean, 40, block, copies, history, documents, past=past, first=first)
    found = attend(0, *qkv[:, :, asking])
    torch.testing.assert_close(found.double(), whole[:, asking], rtol=1e-5, atol=1e-5)
    by_past, expected = (torch.autograd.grad(x.square().sum(), qkv)[0] for x in (found, whole[:, asking]))
    torch.testing.assert_close(by_past[:, :, asking], expected[:, :, asking], rtol=1e-5, atol=1e-4)
    assert (by_past[:, :, :clean] == 0).all()


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("bounds", ["", "history", "history and documents"])
@pytest.mark.parametrize(
    ("num_clean", "num_latents", "first", "block", "copies"), [(13, 17, 5, 4, 2), (40, 43, 1, 3, 1), (2, 19, 3, 16, 2)]
)
def test_blocks_of_copies_are_counted_from_their_first_row(
    num_clean: int,
    num_latents: int,
    first: int,
    block: int,
    copies: int,
    bounds: str,
    by_kernel: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not by_kernel:
        monkeypatch.setattr("opencola.layers.packed.packed_attention.worthwhile", lambda *_: False)
    history, documents = marks(bounds, 3, num_latents)
    mask = seen(num_clean, num_latents, block, copies, history, documents, 3, first)
    q, k, v = (x.detach().requires_grad_() for x in rows(3, mask.shape[-1], 2, 16, seed=7))
    found = packed(num_clean, num_latents, block, copies, history, documents, first=first)(0, q[:, num_clean:], k, v)
    expected = masked(mask[:, :, num_clean:])(0, q[:, num_clean:].double(), k.double(), v.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_any_strides_and_an_expanded_gradient() -> None:
    attend = packed(12, 16, 4, 1)
    qkv = rows(2, 28, 2, 16, seed=6)
    expected = attend(0, *qkv)
    (gradient,) = torch.autograd.grad(expected.sum(), qkv)
    gapped = torch.zeros(2, 30, 2, 40)[:, 2:, :, 3:19]
    for like in (torch.zeros(2, 28, 2, 16), torch.zeros(2, 28, 16, 2).mT, gapped):
        other = [torch.empty_strided(x.shape, like.stride()).copy_(x) for x in qkv]
        out = attend(0, *other)
        assert torch.equal(out, expected)
        assert torch.equal(torch.autograd.grad(out.sum(), qkv)[0], gradient)
    one = qkv[:, :, :, :1].detach().expand(-1, -1, -1, 2, -1).requires_grad_()  # heads that share their rows
    assert torch.equal(attend(0, *one)[:, :, 0], expected[:, :, 0])


def test_there_may_be_no_samples() -> None:
    qkv = rows(0, 28, 2, 16, seed=6)
    out = packed(12, 16, 4, 1)(0, *qkv)
    assert out.shape == (0, 28, 2, 16) and torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


def test_large_scores_stay_finite_and_what_is_not_finite_stays_so() -> None:
    attend, qkv = packed(12, 16, 4, 1), rows(1, 28, 1, 16, seed=7)
    qkv = (100 * qkv).detach().requires_grad_()
    agree_values = masked(seen(12, 16, 4, 1, None, None, 1))(0, *qkv.double())
    out = attend(0, *qkv)
    torch.testing.assert_close(out.double(), agree_values, rtol=1e-4, atol=1e-2)
    assert torch.autograd.grad(out.sum(), qkv)[0].isfinite().all()
    broken = qkv.detach().clone()
    broken[1, 0, 3] = torch.nan
    assert attend(0, *broken)[0, 4:12].isnan().all() and attend(0, *broken)[0, 12:16].isfinite().all()


def test_other_types_and_other_rows() -> None:
    attend, qkv = packed(12, 16, 4, 1), rows(1, 28, 1, 16, seed=8).detach()
    with library.switched_off():
        expected = attend(0, *qkv)
    torch.testing.assert_close(attend(0, *qkv.double()).float(), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(0, *qkv.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="12 clean latents and 1 copies of latents 0 to 16"):
        attend(0, *qkv[:, :, 1:])
    with pytest.raises(ValueError, match="are not those of"):
        packed(12, 16, 4, 1, history=torch.tensor([True, False]))(0, *qkv)


def test_a_gradient_of_the_gradient_is_refused() -> None:
    qkv = rows(1, 28, 1, 16, seed=9)
    (gradient,) = torch.autograd.grad(packed(12, 16, 4, 1)(0, *qkv).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
