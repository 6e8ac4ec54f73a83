"""Whether tensors are finite, in one pass over memory and without a copy."""

import torch
from torch import Tensor

PIECE = 1 << 22
"""Numbers to look at together: what types without a smallest and a largest number are copied for."""


def is_finite(values: Tensor) -> bool:
    """Whether a tensor of any floating type and shape has neither NaN nor infinities; an empty one has none."""
    for piece in values.detach().reshape(-1).split(PIECE):
        if piece.numel():
            wide = piece.float() if piece.dtype.itemsize == 1 else piece
            low, high = torch.aminmax(wide)  # both are NaN where anything is
            if not (low.isfinite() and high.isfinite()):
                return False
    return True


def bad_rows(values: Tensor) -> list[int]:
    """The rows of a tensor (B, ...) that are not finite."""
    return (~values.isfinite()).flatten(1).any(1).nonzero()[:, 0].tolist()


def has_nan(values: Tensor) -> bool:
    """Whether anything is NaN; infinities may be there."""
    return values.numel() > 0 and bool(values.detach().amax().isnan())
