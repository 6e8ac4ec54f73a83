"""Kernels held to the plain formulas in float64: values, and gradients by autograd."""

from collections.abc import Callable

import torch
from torch import Tensor

Several = tuple[Tensor, ...]


def numbers(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Random tensors, the same at every call."""
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in shapes]


def close(actual: Tensor | None, expected: Tensor) -> None:
    """Equal up to a few units in float32's last place, of the largest number."""
    assert actual is not None and actual.dtype == torch.float32
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=3e-6 * (1 + largest))


def agree(kernel: Callable[..., Several], plain: Callable[..., Several], inputs: list[Tensor]) -> None:
    """Values with and without gradients, and the gradients of all inputs, of each alone, and from each output alone."""
    wide = [x.double().requires_grad_() for x in inputs]
    expected = plain(*wide)
    weights = [torch.randn(x.shape) for x in expected]
    for value, right in zip(kernel(*inputs), expected, strict=True):
        close(value, right.detach())
    narrow = [x.clone().requires_grad_() for x in inputs]
    out = kernel(*narrow)
    for value, right in zip(out, expected, strict=True):
        close(value.detach(), right.detach())

    def gradients(outputs: Several, of: list[Tensor], which: slice) -> Several:
        directions = [w.to(o.dtype) for w, o in zip(weights, outputs, strict=True)][which]
        return torch.autograd.grad(outputs[which], of, directions, retain_graph=True, allow_unused=True)

    for which in (slice(None), *(slice(i, i + 1) for i in range(len(out)))):
        for gradient, right, x in zip(
            gradients(out, narrow, which), gradients(expected, wide, which), wide, strict=True
        ):
            close(
                torch.zeros(x.shape) if gradient is None else gradient, torch.zeros_like(x) if right is None else right
            )
    every = gradients(expected, wide, slice(None))
    for i, right in enumerate(every):
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(narrow)]
        close(gradients(kernel(*alone), [alone[i]], slice(None))[0], right)
