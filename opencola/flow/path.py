"""The linear path between data (t = 0) and noise (t = 1), and the laws that training times follow (model.md §3)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opencola.ranges import Finite, NotNegative, check


@dataclass(frozen=True)
class TimestepLaw:
    """Distribution of training times."""

    kind: Literal["logit_normal", "uniform"] = "logit_normal"
    """t = sigmoid(N(loc, scale²)), or uniform on [0, 1]."""
    loc: Finite = 1.0
    """Location of the logit-normal law; the best one grows with the latent dimension."""
    scale: NotNegative = 1.0
    """Scale of the logit-normal law."""
    per: Literal["sequence", "block"] = "sequence"
    """Draw one time for a whole sequence or for each of its blocks."""

    def __post_init__(self) -> None:
        check(self)

    def times(self, normal: Tensor) -> Tensor:
        """Map standard normal draws of any shape to times in [0, 1]."""
        if self.kind == "uniform":
            return torch.special.ndtr(normal)
        return torch.sigmoid(self.loc + self.scale * normal)


def interpolate(z_0: Tensor, z_1: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) z_0 + t z_1; t broadcasts."""
    return (1 - t) * z_0 + t * z_1


def target_velocity(z_0: Tensor, z_1: Tensor) -> Tensor:
    """dz_t/dt = z_1 - z_0."""
    return z_1 - z_0
