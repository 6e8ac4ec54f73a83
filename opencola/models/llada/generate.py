"""Writing by unmasking, block by block (arXiv 2502.09992, section 2.4 and appendix B).

As there, a sample is its prompt and a mask for each of its max_new_tokens from the start, so what a block becomes
depends on how many follow. Blocks are unmasked from left to right, the tokens of a block in any order.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from opencola.kernels.choice import invariant
from opencola.layers import randomness
from opencola.models.finite import check_logits
from opencola.models.inputs import check_held, checked_prompts
from opencola.models.llada.network import LLaDANetwork
from opencola.models.llada.sampling import LLaDASampling
from opencola.models.sampling import penalise, probabilities
from opencola.models.stopping import StopRule, Text, TokenBlock
from opencola.models.writing import begun, write

Predict = Callable[[Tensor], Tensor]
"""Tokens (B, R), some of them masked -> logits (B, R, V) of what stands at every place."""
Propose = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Step, tokens (B, R), logits (B, S, V) of a block -> a token and the priority of keeping it, for each place (B, S)."""


@invariant
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
    if texts := begun(prompts, sampling, eos_ids, ids, stop):
        yield from write(begin(model, texts, pad_id))


def begin(model: LLaDANetwork, texts: Sequence[Text], pad_id: int = 0) -> "LLaDAWriting":
    """Texts to write. Arguments and errors as those of `generate`."""
    for text in texts:
        check_held(text)
    checked_prompts([text.prompt for text in texts], model.mask_id)
    return LLaDAWriting(model, texts, pad_id)


class LLaDAWriting:
    """Texts that grow by a block at a time (`Writing`)."""

    def __init__(self, model: LLaDANetwork, texts: Sequence[Text], pad_id: int) -> None:
        self.model, self.texts, self.pad_id = model, texts, pad_id

    @torch.inference_mode()
    def step(self) -> list[TokenBlock]:
        """As in the protocol."""
        widths = [min(text.sampling.block_length, text.sampling.max_new_tokens - len(text.new)) for text in self.texts]
        new: dict[int, list[int]] = {}
        for width in set(widths):
            rows = [row for row, own in enumerate(widths) if own == width]
            new |= zip(rows, self._blocks([self.texts[row] for row in rows], width), strict=True)
        return [text.take(new[row]) for row, text in enumerate(self.texts)]

    def _blocks(self, texts: Sequence[Text], width: int) -> list[list[int]]:
        """The next so many tokens of texts."""
        model, mask = self.model, self.model.mask_id
        canvas = [text.tokens + [mask] * (text.sampling.max_new_tokens - len(text.new)) for text in texts]
        longest = max(map(len, canvas))
        padded = [row + [self.pad_id] * (longest - len(row)) for row in canvas]
        tokens, prompts, written, lengths = (
            torch.tensor(values, device=model.head.weight.device)
            for values in (
                padded,
                [len(text.prompt) for text in texts],
                [len(text.tokens) for text in texts],
                [len(row) for row in canvas],
            )
        )
        block = written[:, None] + torch.arange(width, device=tokens.device)
        in_prompt = torch.arange(longest, device=tokens.device) < prompts[:, None]
        shared: LLaDASampling = texts[0].sampling
        predict = guided(model.within(lengths), in_prompt, shared.guidance, mask)
        propose = proposer(texts, mask)
        unmask(predict, tokens, block, shared.steps, propose)
        found: list[list[int]] = tokens.gather(1, block).tolist()
        return found

    def select(self, rows: Sequence[int]) -> "LLaDAWriting":
        """As in the protocol."""
        return LLaDAWriting(self.model, [self.texts[row] for row in rows], self.pad_id)

    def join(self, other: "LLaDAWriting") -> "LLaDAWriting":
        """As in the protocol."""
        return LLaDAWriting(self.model, [*self.texts, *other.texts], self.pad_id)


def cache_bytes(model: LLaDANetwork, text: Text) -> int:
    """There is no cache: bytes of the logits of a text, the largest of what is computed for it."""
    return 8 * (len(text.prompt) + text.sampling.max_new_tokens) * model.config.vocab_size


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


def proposer(texts: Sequence[Text], mask_id: int) -> Propose:
    """Draw tokens as the texts' settings say.

    A token's priority is its probability before temperature, or random. Tokens are drawn by Gumbel noise in float64,
    which in float32 would thin out the improbable ones.
    """
    samplings: list[LLaDASampling] = [text.sampling for text in texts]
    lengths = [len(text.prompt) + text.sampling.max_new_tokens for text in texts]
    draws = [(text.sampling.seed, text.id, text.blocks) for text in texts]

    def noise(purpose: str, step: int, shape: Sequence[int]) -> Tensor:
        """Exponential float64 (B, *shape), every row from its own generator."""
        generators = [randomness.generator(seed, purpose, *key, step) for seed, *key in draws]
        return torch.stack([torch.empty(*shape, dtype=torch.float64).exponential_(generator=g) for g in generators])

    def propose(step: int, tokens: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        rows = (row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True))
        seen = [[token for token in row if token != mask_id] for row in rows]
        check_logits(logits, [text.id for text in texts], f", block {texts[0].blocks + 1}, step {step + 1}")
        logits = penalise(logits.double(), seen, [sampling.repetition_penalty for sampling in samplings])
        chosen = logits.argmax(-1)
        if not all(sampling.greedy for sampling in samplings):
            # minus the log of an exponential is Gumbel
            gumbel = -noise("unmask token", step, logits.shape[1:]).log().to(logits)
            for row, sampling in enumerate(samplings):
                if not sampling.greedy:
                    chosen[row] = (probabilities(logits[row], sampling).log() + gumbel[row]).argmax(-1)
        if samplings[0].remasking == "random":
            return chosen, noise("unmask order", step, logits.shape[1:2]).to(logits)
        return chosen, logits.softmax(-1).gather(-1, chosen[..., None])[..., 0]

    return propose
