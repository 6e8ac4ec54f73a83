"""Progressive distillation: one Euler step of a student learns to do what two of its teacher do (arXiv 2202.00512)."""

from collections.abc import Callable

import torch
from torch import Tensor

from opencola.flow.ode import guide


def grid_times(drawn: Tensor, steps: int) -> Tensor:
    """Standard normal draws -> times at which a solver of so many equal steps asks: 1 / steps .. 1, equally likely."""
    return (torch.special.ndtr(drawn) * steps).ceil().clamp(min=1) / steps


@torch.no_grad()
def two_steps(
    velocity: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    z: Tensor,
    t: Tensor,
    pinned: Tensor,
    step: float,
    guidance: float,
) -> Tensor:
    """Mean velocity (B, copies, M, d) of two Euler steps from latents z like it at times t (B, copies, G).

    velocity(z, t, history): of the teacher, history (B,) bool as in `BlockCausalDiT.packed`; pinned (B, copies, M)
    bool: rows that do not move; guidance: scale of the classifier-free guidance of both steps, 1 for none.
    """

    def guided(z: Tensor, t: Tensor) -> Tensor:
        conditional = velocity(z, t, None)
        if guidance == 1:
            return conditional
        alone = velocity(z, t, torch.zeros(len(z), dtype=torch.bool, device=z.device))
        return guide(conditional, alone, guidance)

    first = guided(z, t)
    second = guided(torch.where(pinned[..., None], z, z - step * first), t - step)
    return (first + second) / 2
