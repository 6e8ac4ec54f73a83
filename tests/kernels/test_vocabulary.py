"""Cross-entropy by chunks of rows, and its gradients, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opencola.kernels import vocabulary
from opencola.kernels.choice import Precision, products_in
from opencola.layers.operations import Linear, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("need_kernels")


def exact(h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, slopes: Tensor) -> list[Tensor]:
    """Losses, then the gradients of h, weight and bias."""
    given = [x.detach().double().requires_grad_() for x in (h, weight, bias) if x is not None]
    losses = F.cross_entropy(F.linear(*given), targets, reduction="none")
    return [losses.detach(), *torch.autograd.grad(losses, given, slopes.double())]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("rows", "width", "vocabulary_size"), [(1, 3, 1), (5, 8, 16), (23, 9, 37), (64, 40, 300)])
def test_losses_and_gradients(
    rows: int,
    width: int,
    vocabulary_size: int,
    with_bias: bool,
    kind: Precision,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vocabulary, "ROWS", 7)
    monkeypatch.setattr(vocabulary, "CHUNK", 1)
    monkeypatch.setattr("opencola.kernels.matmul.LEAST", 0)
    monkeypatch.setattr("opencola.kernels.elementwise.SMALL", 0)  # few numbers are shared among threads, too
    h, weight = torch.randn(rows, width), torch.randn(vocabulary_size, width)
    bias = torch.randn(vocabulary_size) if with_bias else None
    targets, slopes = torch.randint(vocabulary_size, (rows,)), torch.randn(rows)
    given = [x.requires_grad_() for x in (h, weight, bias) if x is not None]
    torch.set_num_threads(threads)
    try:
        with products_in(kind):
            losses, best = linear_cross_entropy(h, weight, bias, targets)
        gradients = torch.autograd.grad(losses, given, slopes)
    finally:
        torch.set_num_threads(1)
    tolerance = 1e-5 if kind == "float32" else 0.05
    for found, right in zip((losses, *gradients), exact(h, weight, bias, targets, slopes), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), right, rtol=0, atol=tolerance * float(1 + right.abs().max()))
    if kind == "float32":
        assert torch.equal(best, F.linear(h, weight, bias).argmax(-1))


def test_of_equal_logits_the_first_is_the_best_and_large_ones_are_no_trouble() -> None:
    h = torch.eye(4)
    weight = torch.zeros(40, 4)
    weight[[7, 23, 39], 0] = 3e4  # equal, in different lanes and in the rest
    weight[[39], 1] = 1.0
    weight[:, 2] = -1e30
    losses, best = linear_cross_entropy(h, weight, None, torch.tensor([23, 0, 5, 5]))
    assert best.tolist() == [7, 39, 0, 0]
    right = F.cross_entropy(F.linear(h, weight).double(), torch.tensor([23, 0, 5, 5]), reduction="none")
    torch.testing.assert_close(losses.double(), right, rtol=1e-6, atol=1e-6)


def test_rows_are_independent_to_the_bit_and_nan_stays_its_own_rows() -> None:
    h, weight, targets = torch.randn(9, 8), torch.randn(33, 8), torch.randint(33, (9,))
    losses, _ = linear_cross_entropy(h, weight, None, targets)
    spoilt = h.clone()
    spoilt[4, 2] = torch.nan
    others, _ = linear_cross_entropy(spoilt, weight, None, targets)
    kept = [row for row in range(9) if row != 4]
    assert others[4].isnan() and torch.equal(others[kept], losses[kept])


def test_no_rows_frozen_weights_and_targets_that_do_not_exist() -> None:
    weight = torch.randn(5, 3)
    h = torch.randn(0, 3, requires_grad=True)
    losses, best = linear_cross_entropy(h, weight, None, torch.zeros(0).long())
    losses.sum().backward()
    assert losses.shape == best.shape == (0,) and h.grad is not None and h.grad.shape == (0, 3)
    h = torch.randn(2, 3, requires_grad=True)
    linear_cross_entropy(h, weight, None, torch.tensor([0, 4]))[0].sum().backward()
    assert h.grad is not None and weight.grad is None
    for wrong in (5, -1):
        with pytest.raises(IndexError, match="0..4|out of bounds"):
            linear_cross_entropy(h, weight, None, torch.tensor([0, wrong]))


def test_a_head_keeps_the_shape_of_its_targets() -> None:
    head, h, targets = Linear(6, 11), torch.randn(2, 3, 6), torch.randint(11, (2, 3))
    losses, best = head.cross_entropy(h, targets)
    logits = head(h)
    torch.testing.assert_close(losses, F.cross_entropy(logits.mT, targets, reduction="none"))
    assert torch.equal(best, logits.argmax(-1))
    wide, _ = head.double().cross_entropy(h.double(), targets)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(losses.double(), wide, rtol=1e-5, atol=1e-5)
