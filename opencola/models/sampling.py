"""How to sample: the settings of generation, and the choice of tokens from logits (model.md §5, official-format §6)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opencola.errors import UserError
from opencola.flow.ode import Solver

FirstBlock = Literal["clean", "partial", "left_pad", "right_pad"]


@dataclass(frozen=True)
class Sampling:
    """Settings of generation."""

    max_new_tokens: int = 64
    """Largest number of tokens to write, the prompt not counted."""
    steps: int = 16
    """Number of solver steps for a block; of LLaDA, steps of unmasking, of which a block has at most one a token."""
    solver: Solver = "euler"
    """Solver of the flow; stochastic puts fresh noise in at every step, adaptive is dopri5."""
    eta: float = 1.0
    """Share of fresh noise of the stochastic solver, from 0 (which is Euler) to 1."""
    tolerance: float = 1e-4
    """Relative and absolute tolerance of the adaptive solver."""
    guidance: float = 7.0
    """Scale of classifier-free guidance; 1: no guidance, which leaves the unconditional pass out."""
    guidance_from: float = 1.0
    """Largest time t, from 0 to 1, at which to guide; above it the unconditional pass is left out."""
    guidance_until: float = 0.0
    """Smallest time t, from 0 to 1, at which to guide; below it the unconditional pass is left out."""
    guidance_every: int = 1
    """Make the unconditional pass at every n-th evaluation only; in between, its last difference is used again."""
    shift: float = 1.0
    """Time grid: t becomes shift t / (1 + (shift - 1) t), so that above 1 more steps are near the noise."""
    candidates: int = 1
    """Number of candidates for a block; the one with the smallest round-trip error |z - mu(encode(decode(z)))|² is
    kept."""
    first_block: FirstBlock = "clean"
    """A prompt that ends inside a block: pin its latents clean, re-noise them along, or pad the prompt."""
    repaint_repeats: int = 1
    """Number of times that `partial` does each step while it re-noises the known latents."""
    repaint_fraction: float = 0.5
    """Share of the steps, the first ones, that `partial` repeats (repaint_repeats)."""
    block_length: int = 16
    """Number of tokens in a block of LLaDA, whose blocks are unmasked from left to right."""
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    """Which of the tokens that LLaDA proposes stay masked: the least probable ones, or any."""
    temperature: float = 0.0
    """Temperature of the token choice; 0 takes the most probable token."""
    top_k: int = 0
    """Number of most probable tokens to choose among; 0: all."""
    top_p: float = 1.0
    """Choose among the most probable tokens that together reach this probability, above 0 and at most 1 (all)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens already written; 1: none."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are cut off."""
    ignore_eos: bool = False
    """Go on after the end-of-text token."""
    chat: bool = False
    """A prompt is what a user says, and the text an assistant's answer, up to its end (for models of conversations)."""
    seed: int = 0
    """Seed of all noise, which depends on it, the sample's id and the block alone."""
    compatibility: Literal["none", "release"] = "none"
    """`release` repeats the public release's prompt padding, seeds, budget and stopping (official-format §5, §9)."""
    bf16_times: bool = False
    """Round the times that the DiT sees to bfloat16, as the public release does on a GPU (official-format §8)."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "steps", "candidates", "repaint_repeats", "guidance_every", "block_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be a number of at least 0, not {self.temperature}")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not self.repetition_penalty > 0:
            raise UserError("top_k must be at least 0, top_p in (0, 1], repetition_penalty above 0")
        if self.shift <= 0:
            raise UserError(f"shift must be above 0, not {self.shift}")
        if not 0 <= self.eta <= 1 or not 0 <= self.repaint_fraction <= 1:
            raise UserError("eta and repaint_fraction must lie in [0, 1]")


def penalise(logits: Tensor, seen: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits (B, R, V) with every token of seen[b] made less likely, once however often it was seen."""
    logits = torch.nan_to_num(logits, nan=0.0, posinf=1e4, neginf=-1e4)
    if penalty == 1:
        return logits
    before = torch.zeros(logits.shape[0], 1, logits.shape[-1], dtype=torch.bool, device=logits.device)
    for row, tokens in zip(before, seen, strict=True):
        row[:, list(tokens)] = True
    return torch.where(before, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Distribution (..., V) that tokens are drawn from: temperature (not 0), then top-k, then top-p."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass = ordered.softmax(-1)
        beyond = mass.cumsum(-1) - mass > sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return logits.softmax(-1)


def choose(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Token ids (B, R) from logits (B, R, V), every sample with its own generator.

    Drawn in float64, so that no improbable token is lost to rounding; in the logits' own type where the release does.
    """
    if sampling.temperature < 1e-5:
        return logits.argmax(-1)
    wide = logits if sampling.compatibility == "release" else logits.double()
    weights = probabilities(wide, sampling).cpu()
    drawn = [torch.multinomial(w, 1, generator=g)[:, 0] for w, g in zip(weights, generators, strict=True)]
    return torch.stack(drawn).to(logits.device)
