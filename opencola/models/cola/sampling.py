"""The settings of generation of a Cola DLM (model.md §5)."""

from dataclasses import dataclass
from typing import Literal

from opencola.errors import UserError
from opencola.flow.ode import Solver
from opencola.models.sampling import Sampling
from opencola.ranges import Count, Finite, NotNegative, Positive, Share

Rank = Literal["round_trip", "trunk"]
Verify = Literal["off", "greedy", "lossless", "typical"]
FirstBlock = Literal["clean", "partial", "left_pad", "right_pad"]


@dataclass(frozen=True)
class ColaSampling(Sampling):
    """Settings of generation."""

    owner = "a Cola DLM"

    steps: Count = 16
    """Number of solver steps for a block."""
    solver: Solver = "euler"
    """Solver of the flow; stochastic puts fresh noise in at every step, adaptive is dopri5."""
    eta: Share = 1.0
    """Share of fresh noise of the stochastic solver, from 0 (which is Euler) to 1."""
    tolerance: Positive = 1e-4
    """Relative and absolute tolerance of the adaptive solver."""
    shift: Positive = 1.0
    """Time grid: t becomes shift t / (1 + (shift - 1) t), so that above 1 more steps are near the noise."""
    guidance: Finite = 7.0
    """Scale of classifier-free guidance; 1: no guidance, which leaves the unconditional pass out."""
    guidance_from: Share = 1.0
    """Largest time t, from 0 to 1, at which to guide; above it the unconditional pass is left out."""
    guidance_until: Share = 0.0
    """Smallest time t, from 0 to 1, at which to guide; below it the unconditional pass is left out."""
    guidance_every: Count = 1
    """Make the unconditional pass at every n-th evaluation only; in between, its last difference is used again."""
    candidates: Count = 1
    """Number of candidates for a block, of which the best is kept (rank)."""
    rank: Rank = "round_trip"
    """The best candidate. round_trip: that with the smallest error |z - mu(encode(decode(z)))|²; trunk: that whose
    tokens are the most probable ones under the trunk (for a prior with a trunk that predicts)."""
    verify: Verify = "off"
    """Have the trunk check each block's tokens and keep those before the first that it refuses (for a prior with a
    trunk that predicts). greedy: the text is the trunk's own, most probable token by token; lossless: it is distributed
    as the trunk's at this temperature, top_k and top_p; typical: only surprising tokens are refused."""
    typical_epsilon: Share = 0.3
    """Probability of a token under the trunk from which on it never surprises (verify typical)."""
    typical_delta: NotNegative = 0.6
    """Nor does a token surprise from this many times exp(-entropy of the trunk's distribution) on (verify typical)."""
    first_block: FirstBlock = "clean"
    """A prompt that ends inside a block: pin its latents clean, re-noise them along, or pad the prompt."""
    repaint_repeats: Count = 1
    """Number of times that `partial` does each step while it re-noises the known latents."""
    repaint_fraction: Share = 0.5
    """Share of the steps, the first ones, that `partial` repeats (repaint_repeats)."""
    compatibility: Literal["none", "release"] = "none"
    """Only to repeat the public release: `release` has its prompt padding, seeds, budget and stopping (official-format
    §5, §9), but no stop strings."""
    bf16_times: bool = False
    """Only to repeat the public release on a GPU: round the times that the DiT sees to bfloat16 (official-format
    §8)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.release and self.stop:
            raise UserError("the public release knows no stop strings: leave out either stop or compatibility release")
        for field, without in (("candidates", 1), ("repetition_penalty", 1), ("compatibility", "none")):
            if self.verify != "off" and getattr(self, field) != without:
                raise UserError(f"verify {self.verify} excludes {field} {getattr(self, field)}: leave out one")

    @property
    def greedy(self) -> bool:
        """As in the base class: also where the trunk's greedy text is wanted."""
        return self.verify == "greedy" or super().greedy

    @property
    def work(self) -> int:
        """As in the base class: of `adaptive`, which finds its own steps, the fewest."""
        return self.steps * self.candidates * (self.repaint_repeats if self.first_block == "partial" else 1)

    @property
    def release(self) -> bool:
        """Whether to do as the public release does."""
        return self.compatibility == "release"

    @property
    def shows_padding(self) -> bool:
        """As in the base class."""
        return self.release or self.first_block in ("left_pad", "right_pad")

    @property
    def ends_together(self) -> bool:
        """As in the base class: by the release's rule."""
        return self.release
