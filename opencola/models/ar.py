"""The autoregressive baseline: a LLaMA that predicts each token from those before it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencola.layers import masks, randomness
from opencola.layers.attention import masked
from opencola.layers.cache import ROUND, KVCache
from opencola.layers.llama import Llama, LlamaConfig
from opencola.layers.transformer import Linear
from opencola.models.inputs import checked_prompts, checked_texts, sample_ids
from opencola.models.language_model import Loss, Score
from opencola.models.sampling import Sampling, choose, penalise
from opencola.models.stopping import OwnStop, StopRule, TokenBlock
from opencola.text.corpus import Batch


@dataclass(frozen=True)
class ARConfig:
    """An autoregressive language model."""

    vocab_size: int = 1024
    """Tokens; set from the tokenizer when training."""
    trunk: LlamaConfig = field(default_factory=LlamaConfig)
    """The transformer."""
    tied: bool = False
    """Use the embedding as the output matrix, too."""
    bos_id: int = 0
    """Token that the first token of a text is predicted from, such as the end-of-text token of the text before."""

    def __post_init__(self) -> None:
        if not 0 <= self.bos_id < self.vocab_size:
            raise ValueError(f"bos_id {self.bos_id} is outside 0..{self.vocab_size - 1}, the vocabulary")


@dataclass(frozen=True)
class ARScoring:
    """How texts are scored: exactly."""

    rows: int = 32
    """Texts to compute at a time: memory."""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, not {self.rows}")

    @classmethod
    def quick(cls) -> "ARScoring":
        """The same: it is exact."""
        return cls()

    @property
    def texts_at_a_time(self) -> int:
        """How many to score together."""
        return self.rows


class AR(nn.Module):
    """p(x) = prod_i p(x_i | bos, x_1 .. x_(i-1)). Shapes: tokens (B, L), logits (B, L, V)."""

    def __init__(self, config: ARConfig) -> None:
        super().__init__()
        self.config = config
        width = config.trunk.width
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.trunk = Llama(config.trunk)
        self.head = None if config.tied else Linear(width, config.vocab_size, bias=False)
        # as the output matrix, an embedding of unit size would start training with logits of size sqrt(width)
        nn.init.normal_(self.embedding.weight, std=0.02 if config.tied else 1.0)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)

    @property
    def vocab_size(self) -> int:
        """Tokens."""
        return self.config.vocab_size

    def features(self, inputs: Tensor, documents: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Normalised features (B, R, D) of inputs (B, R) int64, each seeing itself and those before it.

        documents (B, R) int64: each input's, beyond which it sees nothing; cache: holds what stands before the inputs.
        """
        rows = inputs.shape[1]
        h = self.embedding(inputs)
        if cache is not None:
            return self.trunk(h, cache.positions(rows), cache.attend(rows, 1))
        mask = masks.dense(masks.block_causal(1), rows, rows, inputs.device)
        if documents is not None:
            mask = mask & masks.same_document(documents)
        return self.trunk(h, torch.arange(rows, device=inputs.device), masked(mask))

    def project(self, h: Tensor) -> Tensor:
        """Logits (..., V) of features h (..., D)."""
        if self.head is not None:
            return self.head(h)
        return F.linear(h.to(self.embedding.weight.dtype), self.embedding.weight)

    def logits(self, inputs: Tensor, documents: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits (B, R, V) of the token that follows each of inputs (B, R); the rest as in `features`."""
        return self.project(self.features(inputs, documents, cache))

    def loss(self, batch: Batch) -> Loss:
        """Mean cross-entropy of the scored tokens in nats, the first of a text (or document) included."""
        tokens, documents = batch.tokens, batch.documents
        counts = batch.counts or self.counts(batch)
        inputs = F.pad(tokens[:, :-1], (1, 0), value=self.config.bos_id)
        if documents is not None:
            starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
            inputs = inputs.masked_fill(starts, self.config.bos_id)
        # a row predicts a token of its own document, so it is numbered as that token
        logits = self.logits(inputs, documents)
        losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
        right = (logits.detach().argmax(-1) == tokens).to(losses.dtype)
        accuracy = right.mean()
        if batch.scored is not None:
            losses = losses * batch.scored
            accuracy = (right * batch.scored).sum() / batch.scored.sum().clamp(min=1)
        total = losses.sum() / counts["tokens"].clamp(min=1)
        return Loss(total, {"cross_entropy": total}, {"token_accuracy": accuracy})

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Scored tokens."""
        return {"tokens": batch.is_scored().sum()}

    def learning_rate_ratios(self) -> dict[str, float]:
        """All parameters learn at the same rate."""
        return {}

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        eos_ids: Sequence[int] = (),
        pad_id: int = 0,
        ids: Sequence[int] | None = None,
        stop: StopRule = lambda sample, tokens: None,
    ) -> Iterator[list[TokenBlock]]:
        """Yield the next token of every unfinished sample.

        prompts: token ids, maybe none; eos_ids end a sample and are not given out; pad_id: fills short prompts up, and
        is never seen; ids: the samples' ids (their place in the batch when not given); stop(sample, new tokens) -> how
        many of these to keep, or None to go on. A token's draw depends on the seed, the sample's id and the token's
        place in the text alone: going on from a text that was written gives what would have followed it. Of the
        settings, those of the token's choice and of the end count. Raises ValueError for ids beyond the vocabulary.
        """
        if not prompts:
            return
        texts = checked_prompts(prompts, self.config.vocab_size)
        ids = sample_ids(texts, ids)
        policy = OwnStop([[] for _ in texts], sampling, eos_ids, stop)
        cache = self._prefill(texts, sampling.max_new_tokens, pad_id)
        active = list(range(len(texts)))
        while active:
            last = [[texts[i][-1] if texts[i] else self.config.bos_id] for i in active]
            logits = self.logits(torch.tensor(last, device=self.embedding.weight.device), cache=cache)
            logits = penalise(logits, [texts[i] for i in active], sampling.repetition_penalty)
            generators = [randomness.generator(sampling.seed, "token", ids[i], len(texts[i])) for i in active]
            new = choose(logits, sampling, generators).tolist()
            for i, token in zip(active, new, strict=True):
                texts[i] += token
            blocks = policy.cut(active, new, 0)
            yield blocks
            cache = cache.append(1)
            still = [row for row, block in enumerate(blocks) if not block.finished]
            if still and len(still) < len(active):
                cache = cache.select(torch.tensor(still, device=cache.lengths.device))
            active = [active[row] for row in still]

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        settings: ARScoring,
        *,
        pad_id: int = 0,
        ids: Sequence[int] | None = None,
    ) -> Score:
        """log p(continuation | prompt) of token ids, with the end-of-text id where that is meant to be scored.

        Sums are in float64; nothing is drawn, so that ids change nothing, nor does pad_id, which is never seen. What
        comes out does not depend on what else is scored, but for rounding. Raises ValueError for empty continuations
        and ids beyond the vocabulary.
        """
        texts = checked_texts(prompts, continuations, self.config.vocab_size)
        by_width: dict[int, list[int]] = {}
        for place, text in enumerate(texts):
            by_width.setdefault(_round(len(text)), []).append(place)
        total = torch.zeros(len(texts), dtype=torch.float64)
        device = self.embedding.weight.device
        for width, places in by_width.items():
            for first in range(0, len(places), settings.rows):
                some = places[first : first + settings.rows]
                inputs = [[self.config.bos_id, *texts[place][:-1]] for place in some]
                features = self.features(self._padded(inputs, width, pad_id))
                for place, h in zip(some, features, strict=True):
                    targets = torch.tensor(continuations[place], device=device)
                    log_p = self.project(h[len(prompts[place]) : len(texts[place])]).double().log_softmax(-1)
                    total[place] = log_p.gather(-1, targets[:, None]).sum()
        counts = torch.tensor([len(continuation) for continuation in continuations])
        return Score(total, torch.zeros_like(total), counts, "exact", "autoregressive", {})

    def _prefill(self, texts: Sequence[list[int]], room: int, pad_id: int) -> KVCache:
        """A cache with all inputs but the last of every text, and room for so many more."""
        counts = [len(text) for text in texts]
        cache = self.trunk.empty_cache(len(texts), max(counts) + room)
        if max(counts):
            inputs = [[self.config.bos_id, *text[:-1]] if text else [] for text in texts]
            rows = self._padded(inputs, _round(max(counts)), pad_id)
            self.features(rows, cache=cache)
        return cache.append(torch.tensor(counts, device=cache.lengths.device))

    def _padded(self, inputs: Sequence[list[int]], width: int, pad_id: int) -> Tensor:
        rows = [row + [pad_id] * (width - len(row)) for row in inputs]
        return torch.tensor(rows, device=self.embedding.weight.device)


def _round(length: int) -> int:
    """Rows to compute: whole steps of matrix kernels, so that padding never changes the order of a sum."""
    return -(-length // ROUND) * ROUND
