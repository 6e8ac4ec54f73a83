"""Models that judge texts: causal language models in Hugging Face's format, our own AR models among them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opencola.checkpoints import hub, llama
from opencola.checkpoints import parts as layout
from opencola.checkpoints.files import CONFIG, checked, read_json
from opencola.errors import NotFiniteError, UserError
from opencola.evaluation.quality.measures import Judgement
from opencola.layers.device import device
from opencola.text.tokenizer import Tokenizer

FILES = ["*.json", "*.safetensors"]
PASS_TOKENS = 4096
"""Tokens, padding included, that are judged at a time, which decides the memory."""

Logits = Callable[[Tensor], Tensor]
"""Tokens (B, R) int64 -> logits (B, R, V) of the token that follows each, in which those behind it have no part."""


@dataclass(frozen=True)
class Window:
    """Tokens of a text (its number) that are predicted, and as many tokens and more that they are predicted from."""

    text: int
    inputs: list[int]
    targets: list[int]


@dataclass(frozen=True)
class Judge:
    """A causal language model and its tokenizer."""

    name: str
    tokenizer: Tokenizer
    logits: Logits
    bos_id: int
    """The token that the first one of a text is predicted from."""
    context: int | None
    """Tokens that can be predicted from at a time; None: any number."""

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> list[Judgement]:
        """The judgement of each text after its prompt, maybe "".

        Prompt and text are tokenised as one; a token that holds the prompt's end and the text's beginning counts
        (`Tokenizer.encode_pair`). No end of text is judged. Where both are longer
        than the context, the window moves on by half of it, so that a token is predicted from at least so much. Sums
        are in float64.
        """
        pairs = [self.tokenizer.encode_pair(*pair, whole_tokens=True) for pair in zip(prompts, texts, strict=True)]
        wholes, firsts = [first + rest for first, rest in pairs], [len(first) for first, _ in pairs]
        nats = torch.zeros(len(texts), dtype=torch.float64)
        parts = (self.windows(i, whole, first) for i, (whole, first) in enumerate(zip(wholes, firsts, strict=True)))
        for batch in batches([window for part in parts for window in part]):
            width = len(batch[-1].inputs)
            rows = [window.inputs + [self.bos_id] * (width - len(window.inputs)) for window in batch]
            for window, logits in zip(batch, self.logits(torch.tensor(rows, device=device())), strict=True):
                end, targets = len(window.inputs), torch.tensor(window.targets, device=logits.device)
                log_p = logits[end - len(targets) : end].double().log_softmax(-1)
                nats[window.text] -= log_p.gather(-1, targets[:, None]).sum().cpu()
        if bad := [number for number, value in enumerate(nats.tolist()) if not math.isfinite(value)]:
            raise NotFiniteError(f"the judge {self.name} gives text {bad[0]} {nats[bad[0]].item()} nats: it is damaged")
        return [
            Judgement(self.name, value, len(whole) - first, len(text.encode()))
            for value, whole, first, text in zip(nats.tolist(), wholes, firsts, texts, strict=True)
        ]

    def windows(self, text: int, tokens: Sequence[int], first: int) -> Iterator[Window]:
        """Windows in which the tokens from `first` on are predicted, each once."""
        inputs = [self.bos_id, *tokens[:-1]]
        context = self.context or len(inputs)
        start = 0
        while first < len(tokens):
            end = min(start + context, len(tokens))
            if end > first:
                yield Window(text, inputs[start:end], [*tokens[first:end]])
                first = end
            start += max(1, context // 2)


def load(name: str | Path) -> Judge:
    """The judge in a folder (that of a run of our AR, too), or in a repository of the Hub (OWNER/NAME), in float32.

    A Llama that our AR model can be is one; for all others there must be `transformers`. Its tokenizer.json makes the
    tokens, of which none is added but config.json's bos_token_id (where there is none, eos_token_id) in front. Raises
    FileNotFoundError for what is missing, UserError for damaged files and for models that cannot judge.
    """
    root = hub.locate(name, files=FILES)
    folder = layout.PARTS["ar"].find(root) or root
    file = folder / CONFIG
    values = read_json(file)
    tokenizer = Tokenizer.load(root)
    known = checked(file, "vocab_size", values.get("vocab_size"), int)
    if tokenizer.vocab_size > known:
        raise UserError(f"the tokenizer in {root} has {tokenizer.vocab_size} ids, but {CONFIG} tells of {known}")
    bos_id, context = first_token(file, values), values.get("max_position_embeddings", values.get("n_positions"))
    try:
        llama.read_config(folder, bos_id)
    except ValueError:
        logits = transformers_logits(folder)
    else:
        logits = llama.load(folder, bos_id=bos_id).eval().to(device()).logits
    check_causal(folder, logits, bos_id, known)
    return Judge(str(name), tokenizer, logits, bos_id, context)


def first_token(file: Path, values: Mapping[str, Any]) -> int:
    """The token in front of a text. Raises UserError where config.json names none."""
    for key in ("bos_token_id", "eos_token_id"):
        value = values.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if value is not None:
            token: int = checked(file, key, value, int)
            return token
    raise UserError(f"{file} has no bos_token_id and no eos_token_id, which the first token is predicted from")


def transformers_logits(folder: Path) -> Logits:
    """Of any causal language model that transformers can load. Raises UserError where it cannot, or is not there."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError(f"{folder} is no Llama of ours to judge by: pip install 'opencola[hf]'") from None
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} holds no causal language model: {hub.reason(error)}") from error
    model = model.eval().to(device())

    def logits(tokens: Tensor) -> Tensor:
        predicted: Tensor = model(tokens, use_cache=False).logits
        return predicted

    return logits


@torch.no_grad()
def check_causal(folder: Path, logits: Logits, bos_id: int, vocab_size: int) -> None:
    """Raise UserError for a model that sees the tokens that it should predict, which would judge far too well."""
    rows = torch.tensor([[bos_id, 0], [bos_id, vocab_size - 1]], device=device())
    first, second = logits(rows)[:, 0]
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3):
        raise UserError(f"{folder} holds no causal language model: it sees the tokens behind the one that it predicts")


def batches(windows: Sequence[Window]) -> Iterator[list[Window]]:
    """Windows of about one length together, the longest last, at most PASS_TOKENS with padding or a single one."""
    batch: list[Window] = []
    for window in sorted(windows, key=lambda window: len(window.inputs)):
        if batch and (len(batch) + 1) * len(window.inputs) > PASS_TOKENS:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch
