"""The head by which a trunk predicts tokens: an autoregressive language model inside the prior."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencola.layers.operations import Linear, layer_norm


class NextToken(nn.Module):
    """The trunk's head: logits of the token after each clean latent, and of a text's first."""

    def __init__(self, width: int, vocab_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.start = nn.Parameter(torch.zeros(width))
        self.out = Linear(width, vocab_size, bias=False)

    def features(self, h: Tensor, documents: Tensor | None = None) -> Tensor:
        """What predicts each of 1 + R tokens: the trunk's features h (B, R, D) of the latents before, normalised, and
        a beginning's own; (B, 1 + R, D).

        documents (B, 1 + R) int64: the tokens', each of which begins anew.
        """
        start = self.start.to(h.dtype).expand(len(h), 1, -1)
        rows = torch.cat((start, h), dim=1)
        if documents is not None:
            first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
            rows = torch.where(first[..., None], start, rows)
        return layer_norm(rows, self.eps)

    def forward(self, h: Tensor) -> Tensor:
        """Logits (..., V) of the token after each latent, of the trunk's features h (..., D), or of `start`."""
        return self.out(layer_norm(h, self.eps))
