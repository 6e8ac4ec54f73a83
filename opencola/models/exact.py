"""Exact log-probabilities of texts under what predicts token by token: an AR model, the trunk of a Cola's prior."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from opencola.layers.cache import whole_steps
from opencola.models.language_model import Score


def exact_score(
    texts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    features: Callable[[list[int], int], Tensor],
    logits: Callable[[Tensor], Tensor],
    rows: int,
    label: str,
) -> Score:
    """log p of continuations that end the texts (token ids). rows: texts to compute at a time.

    features(places, width): of the texts at these places, padded to a width: (B, width or more, D), row i what token i
    is predicted from; logits: of such rows (R, D), (R, V). Sums are in float64; what comes out does not depend on what
    else is scored, but for rounding.
    """
    by_width: dict[int, list[int]] = {}
    for place, text in enumerate(texts):
        by_width.setdefault(whole_steps(len(text)), []).append(place)
    total = torch.zeros(len(texts), dtype=torch.float64)
    for width, places in by_width.items():
        for first in range(0, len(places), rows):
            batch = places[first : first + rows]
            for place, h in zip(batch, features(batch, width), strict=True):
                targets = torch.tensor(continuations[place], device=h.device)
                log_p = last(h[: len(texts[place])], len(targets), logits)
                total[place] = log_p.gather(-1, targets[:, None]).sum()
    counts = torch.tensor([len(continuation) for continuation in continuations])
    return Score(total, torch.zeros_like(total), counts, "exact", label, {})


def last(h: Tensor, count: int, logits: Callable[[Tensor], Tensor]) -> Tensor:
    """log p (count, V), float64, of what may stand in the place of each of a text's last tokens, from features (L, D)
    that its tokens are predicted from."""
    return logits(h[len(h) - count :]).double().log_softmax(-1)
