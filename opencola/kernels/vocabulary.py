"""Cross-entropy with the product that gives the logits, in chunks of rows: no tensor of all logits is ever there."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opencola.kernels import matmul
from opencola.kernels.choice import Precision, precision
from opencola.kernels.elementwise import threads_for
from opencola.kernels.library import function

CHUNK = 1 << 19
"""Logits of a chunk; ROWS a chunk at least, so that products stay large."""
ROWS = 256


def linear_cross_entropy(h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of targets (...) int64 under the logits h weightᵀ + bias, h (..., D), and their argmax (...)."""
    losses, best = _LinearCrossEntropy.apply(h.flatten(0, -2), weight, bias, targets.flatten(), precision())
    return losses.view_as(targets), best.view_as(targets)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the logits again in the backward pass: cheaper than to write them down and read them."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kind: Precision
    ) -> tuple[Tensor, Tensor]:
        h, targets, width = h.contiguous(), targets.contiguous(), len(weight)
        if bool(((targets < 0) | (targets >= width)).any()):
            raise IndexError(f"a target is not in 0..{width - 1}")
        sums, losses = h.new_empty(len(h), 2), h.new_empty(len(h))
        best = torch.empty_like(targets)
        for rows in _chunks(len(h), width):
            logits = matmul.product(h[rows], weight, bias, "forward", kind)
            of_rows = (targets[rows], sums[rows], losses[rows], best[rows])
            function("softmax_losses", "ttttt lll")(logits, *of_rows, len(logits), width, threads_for(logits))
        ctx.save_for_backward(h, weight, bias, targets, sums)
        ctx.precision = kind
        ctx.mark_non_differentiable(best)
        return losses, best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, bias, targets, sums = ctx.saved_tensors
        (of_h, of_weight, of_bias, *_), slopes, width = ctx.needs_input_grad, slopes.contiguous(), len(weight)
        dh = torch.empty_like(h) if of_h else None
        dweight = torch.zeros_like(weight) if of_weight else None
        dbias = torch.zeros_like(bias) if of_bias else None
        for rows in _chunks(len(h), width):
            logits = matmul.product(h[rows], weight, bias, "forward", ctx.precision)
            of_rows = (targets[rows], sums[rows], slopes[rows])
            function("softmax_gradient", "tttt lll")(logits, *of_rows, len(logits), width, threads_for(logits))
            if dh is not None:
                dh[rows] = matmul.product(logits, weight.T, None, "input", ctx.precision)
            if dweight is not None:
                dweight += matmul.product(logits.T, h[rows].T, None, "weight", ctx.precision)
            if dbias is not None:
                dbias += logits.sum(0)
        return dh, dweight, dbias, None, None


def _chunks(rows: int, width: int) -> Iterator[slice]:
    step = max(ROWS, CHUNK // width)
    yield from (slice(first, first + step) for first in range(0, rows, step))
