"""What notebooks and scripts call: load, generate, stream, score, train_recipe.

They are the commands' own functions with few arguments, and a seed means what it means there: the texts and figures are
those of `opencola generate` and `opencola score`.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opencola.checkpoints import hub
from opencola.checkpoints.hub import Pretrained
from opencola.errors import UserError
from opencola.evaluation.likelihood import Pair, score_pairs, together
from opencola.layers.device import device
from opencola.models import build
from opencola.models.text_stream import generate_text, whole_texts
from opencola.run import flags, start
from opencola.run.flags import RunFlags
from opencola.text.conversations import Message

Prompt = str | Sequence[Message]
Model = Pretrained | str | Path


def load(model: str | Path = hub.SHIPPED) -> Pretrained:
    """Load the model in a folder or in a repository of the Hub (OWNER/NAME), the shipped one if none is named.

    It comes in evaluation mode, on a GPU if there is one, as (model, tokenizer, sampling). Raises FileNotFoundError
    where there is none, OSError where the Hub does not answer, and UserError for damaged files.
    """
    pretrained = hub.from_pretrained(model)
    return pretrained._replace(model=pretrained.model.to(device()))


def generate(model: Model, prompts: Sequence[Prompt], batch_size: int = 16, **settings: Any) -> list[str]:
    """Continue prompts: a text for each, of which `settings`, fields of Sampling, and the prompt's place decide all.

    model: what `load` gives, or a name for it; settings: over those that the model brings along. With chat=True
    prompts are what a user says, or lists of Message, and the texts are answers. Prompts are continued batch_size at a
    time, on which no text depends. Raises UserError for impossible settings, and TypeError for unknown ones.
    """
    if isinstance(prompts, str):
        raise UserError("prompts is a single string: give a list of them, [prompt]")
    pretrained = _loaded(model, settings)
    places = [range(first, min(first + batch_size, len(prompts))) for first in range(0, len(prompts), batch_size)]
    batches = [whole_texts(*pretrained[:2], [prompts[i] for i in ids], pretrained.sampling, ids) for ids in places]
    return [text for batch in batches for text in batch]


def stream(model: Model, prompt: Prompt, **settings: Any) -> Iterator[str]:
    """Continue a prompt, and yield the pieces of its text as they are written. Arguments and errors as `generate`."""
    pretrained = _loaded(model, settings)
    for (piece,) in generate_text(*pretrained[:2], [prompt], pretrained.sampling):
        yield piece.text


def score(
    model: Model, texts: Sequence[str | tuple[str, str]], end_of_text: bool = True, **settings: Any
) -> list[dict[str, Any]]:
    """Log-probabilities of texts, or of continuations given as (prompt, continuation): a record for each.

    A record has `log_probability` and its `standard_error` in nats, `kind` (exact, bound or estimate), `estimator`,
    `num_tokens`, `perplexity`, `bits_per_byte` and `parts`. end_of_text: score that token behind each text, too;
    settings: of the model's family, such as samples=16. Raises UserError for impossible settings and empty texts, and
    TypeError for unknown settings.
    """
    if isinstance(texts, str):
        raise UserError("texts is a single string: give a list of them, [text]")
    network, tokenizer, _ = _loaded(model, {})
    scoring: Any = build.scoring_class(build.family(network.config))(**settings)
    pairs = [Pair("", text) if isinstance(text, str) else Pair(*text) for text in texts]
    if not all(pair.continuation for pair in pairs):
        raise UserError("an empty text has no log-probability: leave it out")
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.requires_grad_(False)  # a graph of the latents only
    try:
        return [
            record
            for ids in together(pairs, scoring.texts_at_a_time)
            for record in score_pairs(network, tokenizer, [pairs[i] for i in ids], ids, scoring, end_of_text)
        ]
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def train_recipe(
    recipe: str | Path, stage: str | None = None, resume: bool = False, overwrite: bool = False, **settings: Any
) -> Path:
    """Train by a recipe file, or one that comes with the package; returns the folder of the run, for `load`.

    settings: the recipe's own keys, nested as in its file: out="runs/mine", data={"source": "my.txt"},
    train={"steps": 500}. They count in every stage that has them. stage: train only this one; resume: go on where the
    run stopped; overwrite: delete the run that is there. Raises FileExistsError where there is one and neither is
    asked for, FileNotFoundError and UserError for files and settings that do not fit each other.
    """
    words = flags.words_of(settings)
    asked = [f"--stage={stage}"] * (stage is not None) + ["--resume"] * resume + ["--overwrite"] * overwrite
    command = shlex.join(
        ["opencola", "train", str(recipe), *(word.removeprefix(flags.VALUE) for word in words), *asked]
    )
    return start.train(str(recipe), words, RunFlags(resume, overwrite), command, stage)


def _loaded(model: Model, settings: dict[str, Any]) -> Pretrained:
    """A model, loaded if it is named, with sampling settings over its own."""
    pretrained = model if isinstance(model, Pretrained) else load(model)
    return pretrained._replace(sampling=replace(pretrained.sampling, **settings))
