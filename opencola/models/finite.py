"""Numbers that a model writes from and scores by: the first that is not finite is named."""

from collections.abc import Sequence

from torch import Tensor

from opencola.errors import NotFiniteError
from opencola.layers.finite import bad_rows, has_nan, is_finite

CAUSES = "the weights are damaged or diverged, or a setting is far beyond what they were made for"


def check_states(states: Sequence[Tensor], ids: Sequence[int], where: str = "") -> None:
    """Raise NotFiniteError where the last of a solver's states (B, ...) is not finite, naming sample and first step.

    What is not finite once remains so: the others are looked at only then. ids (B,): of the samples.
    """
    if not states or is_finite(states[-1]):
        return
    step, rows = next((step, rows) for step, state in enumerate(states, 1) if (rows := bad_rows(state)))
    raise NotFiniteError(f"sample {ids[rows[0]]}{where}: the latents are not finite at step {step}: {CAUSES}")


def check_logits(logits: Tensor, ids: Sequence[int], where: str = "") -> None:
    """Raise NotFiniteError where any of logits (B, R, V) is NaN, naming the sample; infinities are left as they are.

    ids (B,): of the samples; where: what comes behind the sample's id.
    """
    if has_nan(logits):
        row = int(logits.isnan().flatten(1).any(1).int().argmax())
        raise NotFiniteError(f"sample {ids[row]}{where}: the logits are not finite: {CAUSES}")
