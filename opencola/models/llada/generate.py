"""Writing by unmasking, block by block (arXiv 2502.09992, section 2.4 and appendix B).

As there, a sample is its prompt and a mask for each of its max_new_tokens from the start, so what a block becomes
depends on how many follow. Blocks are unmasked from left to right, the tokens of a block in any order.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opencola.kernels.choice import invariant
from opencola.layers import randomness
from opencola.models.finite import check_logits
from opencola.models.inputs import checked_prompts, sample_ids
from opencola.models.llada.network import LLaDANetwork
from opencola.models.llada.sampling import LLaDASampling
from opencola.models.sampling import penalise, probabilities
from opencola.models.stopping import OwnStop, StopRule, TokenBlock, unfinished

Predict = Callable[[Tensor], Tensor]
"""Tokens (B, R), some of them masked -> logits (B, R, V) of what stands at every place."""
Propose = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Step, tokens (B, R), logits (B, S, V) of a block -> a token and the priority of keeping it, for each place (B, S)."""


@dataclass(frozen=True)
class Canvas:
    """B samples of different lengths, padded at the end to R tokens."""

    tokens: Tensor  # (B, R) prompts, then [MASK] for all that is to be written, then padding
    prompts: Tensor  # (B,) tokens of each prompt
    lengths: Tensor  # (B,) tokens of prompt and text; what stands behind is never seen
    known: list[list[int]]  # of every sample none: blocks begin behind the prompt

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], new: int, mask_id: int, pad_id: int, device: torch.device
    ) -> "Canvas":
        """Prompts, each with `new` masks. Raises ValueError for ids beyond the vocabulary."""
        prompts = checked_prompts(prompts, mask_id)
        longest = max(map(len, prompts))
        rows = [[*prompt] + [mask_id] * new + [pad_id] * (longest - len(prompt)) for prompt in prompts]
        count = torch.tensor([len(prompt) for prompt in prompts], device=device)
        return cls(torch.tensor(rows, device=device), count, count + new, [[] for _ in prompts])

    def select(self, rows: Sequence[int]) -> "Canvas":
        """The samples `rows`, copied."""
        place = torch.tensor(rows, device=self.tokens.device)
        known = [self.known[row] for row in rows]
        return Canvas(self.tokens[place], self.prompts[place], self.lengths[place], known)


@invariant
@torch.inference_mode()
def generate(
    model: LLaDANetwork,
    prompts: Sequence[Sequence[int]],
    sampling: LLaDASampling,
    *,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
    ids: Sequence[int] | None = None,
    stop: StopRule = lambda sample, tokens: None,
) -> Iterator[list[TokenBlock]]:
    """Yield the new tokens of every unfinished sample, blocks of sampling.block_length tokens each.

    prompts: token ids, maybe none; eos_ids end a sample and are not given out; ids: the samples' ids, which decide
    their draws (their place in the batch when not given); stop(sample, new tokens) -> how many of these to keep, or
    None to go on. A block takes sampling.steps steps, at most one a token. What a sample becomes does not depend on the
    others. Raises ValueError for prompts with ids beyond the vocabulary.
    """
    if not prompts:
        return
    ids = sample_ids(prompts, ids)
    budget, size, mask = sampling.max_new_tokens, sampling.block_length, model.mask_id
    canvas = Canvas.of(prompts, budget, mask, pad_id, model.head.weight.device)
    policy = OwnStop(canvas.known, sampling, eos_ids, stop)
    active = list(range(len(prompts)))
    for number in range(-(-budget // size)):
        width = min(size, budget - number * size)
        block = canvas.prompts[:, None] + number * size + torch.arange(width, device=canvas.tokens.device)
        in_prompt = torch.arange(canvas.tokens.shape[1], device=block.device) < canvas.prompts[:, None]
        predict = guided(model.within(canvas.lengths), in_prompt, sampling.guidance, mask)
        propose = proposer(sampling, [(ids[i], number) for i in active], canvas.lengths.tolist(), mask)
        unmask(predict, canvas.tokens, block, sampling.steps, propose)
        blocks = policy.cut(active, canvas.tokens.gather(1, block).tolist(), number)
        yield blocks
        still = unfinished(blocks)
        if not still:
            return
        if len(still) < len(active):
            canvas, active = canvas.select(still), [active[row] for row in still]


def guided(predict: Predict, prompt: Tensor, scale: float, mask_id: int) -> Predict:
    """Classifier-free guidance, free + scale (conditional - free); free: with the prompt (B, R) bool masked, too.

    The paper's scale w is scale - 1: 1 means no guidance, and leaves the second pass out.
    """
    if scale == 1:
        return predict

    def both(tokens: Tensor) -> Tensor:
        conditional, free = predict(torch.cat((tokens, tokens.masked_fill(prompt, mask_id)))).chunk(2)
        return free + scale * (conditional - free)

    return both


def unmask(predict: Predict, tokens: Tensor, block: Tensor, steps: int, propose: Propose) -> None:
    """Write the places block (B, S) of tokens (B, R), in place, all of them masked at first.

    In each of `steps` steps, at most S, every masked place is proposed a token, and those of the highest priority are
    kept: of S tokens S / steps, the first steps one more where that is no whole number.
    """
    size = block.shape[1]
    steps = min(steps, size)
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    done = torch.zeros_like(block, dtype=torch.bool)
    for step in range(steps):
        count = size // steps + (step < size % steps)
        chosen, priority = propose(step, tokens, predict(tokens)[rows, block])
        # stable, so that ties fall to the first place at any batch size
        order = priority.masked_fill(done, -torch.inf).argsort(dim=-1, descending=True, stable=True)[:, :count]
        tokens[rows, block[rows, order]] = chosen[rows, order]
        done[rows, order] = True


def proposer(sampling: LLaDASampling, keys: Sequence[tuple[int, int]], lengths: Sequence[int], mask_id: int) -> Propose:
    """Draw tokens as `sampling` says. keys: of every row (sample id, block), for its draws; lengths: without padding.

    A token's priority is its probability before temperature, or random. Tokens are drawn by Gumbel noise in float64,
    which in float32 would thin out the improbable ones.
    """

    def propose(step: int, tokens: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        texts = (row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True))
        seen = [[token for token in text if token != mask_id] for text in texts]
        check_logits(logits, [i for i, _ in keys], f", block {keys[0][1] + 1}, step {step + 1}")
        logits = penalise(logits.double(), seen, sampling.repetition_penalty)
        chosen = logits.argmax(-1)
        if not sampling.greedy:
            # minus the log of an exponential is Gumbel
            noise = -_draws(sampling.seed, "unmask token", keys, step, logits.shape[1:]).log().to(logits)
            chosen = (probabilities(logits, sampling).log() + noise).argmax(-1)
        if sampling.remasking == "random":
            return chosen, _draws(sampling.seed, "unmask order", keys, step, logits.shape[1:2]).to(logits)
        return chosen, logits.softmax(-1).gather(-1, chosen[..., None])[..., 0]

    return propose


def _draws(seed: int, purpose: str, keys: Sequence[tuple[int, int]], step: int, shape: Sequence[int]) -> Tensor:
    """Exponential float64 (len(keys), *shape), every row from its own generator."""
    generators = [randomness.generator(seed, purpose, *key, step) for key in keys]
    return torch.stack([torch.empty(*shape, dtype=torch.float64).exponential_(generator=g) for g in generators])
