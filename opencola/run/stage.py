"""A training stage: its tokenizer, corpora and starting weights, its training, and the model that comes out of it."""

import contextlib
import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opencola.checkpoints import parts as layout
from opencola.checkpoints.parts import PARTS
from opencola.data.corpus import Corpus
from opencola.data.shards import folder_of
from opencola.errors import NotFiniteError, UserError
from opencola.layers.device import device
from opencola.models import build
from opencola.models.language_model import Sample
from opencola.run import recipe as recipes
from opencola.run import resuming
from opencola.run.export import METRICS, OBSOLETE, RECIPE, UNFINISHED, VALID, facts_of, write_beside
from opencola.run.recipe import Recipe
from opencola.storage import check_space, replacing
from opencola.text.tokenizer import FILE_NAME, Tokenizer
from opencola.train import distributed
from opencola.train.checkpoint import CHECKPOINTS, TrainState, latest, num_bytes
from opencola.train.loop import proceed, start
from opencola.train.means import Means, named
from opencola.train.samples import Show

VALID_BATCHES = 50
OF_RUN = (RECIPE, METRICS, "samples.jsonl", CHECKPOINTS, "tensorboard", "wandb")
"""What training leaves in a folder, beside the model."""
MEANING = "Training by recipe.yaml has not come to its end. A model that is here is that of an earlier training.\n"


@dataclass
class Stage:
    """All that training a stage needs."""

    recipe: Recipe[Any, Any]
    tokenizer: Tokenizer
    model: build.Model
    corpus: Corpus
    valid: Corpus | None
    show: Show | None
    """What gives samples of the model, if any are wanted."""
    state: TrainState
    """Where training goes on from."""

    def begin(self, overwrite: bool) -> None:
        """Leave what this training is by in its folder; overwrite: in place of the run that is there.

        The model of an earlier training stays, marked as such by the file `unfinished`.
        """
        recipe, out = self.recipe, self.recipe.out
        if overwrite:
            invalidate(out, recipe, self.tokenizer)
            return
        self.tokenizer.save(out / CHECKPOINTS / FILE_NAME)
        with replacing(out) as draft:
            recipes.dump(recipe, draft / RECIPE)
            (draft / UNFINISHED).write_text(MEANING)

    def train(self, command: str) -> None:
        """Train, measure on the validation corpus, and export; `command` is told in the model's card."""
        recipe, out, state = self.recipe, self.recipe.out, self.state
        proceed(state, recipe.train, out, show=self.show, settings=recipes.values(recipe))
        with state.ema.averaged() if state.ema else contextlib.nullcontext():
            valid = None if self.valid is None else validate(self.model, self.valid)
            if model := whole(self.model):
                self.export(model, command, valid)
        distributed.barrier()  # a later stage starts from these files

    def export(self, model: build.Model, command: str, valid: dict[str, Any] | None) -> None:
        """Put the model in the place of the one that is in the folder, with all that tells of it, at once."""
        recipe, out = self.recipe, self.recipe.out
        facts = facts_of(out, recipe.init, command, num_trained(self.model), valid)
        check_space(out, exported_bytes(model))
        with replacing(out, *OBSOLETE) as draft:
            for part in (PARTS[name] for name in build.part_names(model.config)):
                part.save(part.module(model), draft / part.folder)
            if valid is not None:
                (draft / VALID).write_text(json.dumps(valid, indent=2) + "\n")
            write_beside(draft, out, self.tokenizer, recipe.sampling, facts)

    def start(self) -> str:
        """Where the weights come from that training begins with, in words."""
        step = self.state.step
        return f"goes on after step {step}" if step else f"starts from {origin(self.recipe)}"

    def warnings(self) -> list[str]:
        """What is not read of the data, and what that loses to its length, a line each, the same in all processes.

        Raises UserError, in all of them, for a corpus in which nothing counts.
        """
        said: list[str] = []
        fault = None
        if distributed.is_main():
            try:
                corpora = [corpus for corpus in (self.corpus, self.valid) if corpus]
                lines = [line for corpus in corpora for line in (*corpus.skipped(), corpus.warning())]
                said = list(dict.fromkeys(filter(None, lines)))
            except UserError as error:
                fault = str(error)
        said, fault = distributed.gather((said, fault))[0]
        if fault is not None:
            raise UserError(fault)
        return said


def invalidate(out: Path, recipe: Recipe[Any, Any] | None = None, tokenizer: Tokenizer | None = None) -> None:
    """Take the run out of a folder, and put a new one in, as far as it is known; its model stays, marked as earlier."""
    with replacing(out, *OF_RUN) as draft:
        (draft / CHECKPOINTS).mkdir()
        (draft / UNFINISHED).write_text(MEANING)
        if recipe is not None:
            recipes.dump(recipe, draft / RECIPE)
        if tokenizer is not None:
            tokenizer.save(draft / CHECKPOINTS / FILE_NAME)


def show(recipe: Recipe[Any, Any], tokenizer: Tokenizer, trained: build.Model) -> Show:
    """What gives samples of the model, of the first texts to validate on or else to train on."""
    data, seed = replace(recipe.data, verify=False), recipe.seed
    if recipe.valid:
        data, seed = replace(data, source=recipe.valid), seed + 1
    multiple = build.tokens_per_block(recipe.model)
    tokens = next(Corpus(data, tokenizer, seed, multiple=multiple)).tokens  # the same in every process

    def samples() -> list[Sample]:
        model = whole(trained)
        return build.samples(model, tokenizer, tokens, recipe.sampling) if model else []

    return samples


def whole(model: build.Model) -> build.Model | None:
    """The model as a single process has it; of several, the main one gets a copy, and the others None."""
    if distributed.num_processes() == 1:
        return model
    weights = distributed.whole_weights(model)
    if not distributed.is_main():
        return None
    with torch.device("meta"):
        copy = build.build(model.config)
    copy.load_state_dict({name: weights[name] for name in copy.state_dict()}, assign=True)
    return copy.to(device()).eval()


def num_trained(model: build.Model) -> int:
    """The number of parameters that training moves."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def exported_bytes(model: build.Model) -> int:
    """What a model takes on disk, but for its settings."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def prepare(recipe: Recipe[Any, Any], resume: bool) -> Stage:
    """All that training needs: tokenizer, corpora, and the model with its starting weights or in its last checkpoint.

    Writes nothing. Raises UserError and FileNotFoundError for what is damaged or does not fit, and OSError where the
    disk has no room for a checkpoint and the model.
    """
    data, out, seed = recipe.data, recipe.out, recipe.seed
    if recipe.init is not None and not layout.has_model(recipe.init):
        raise FileNotFoundError(f"{recipe.init} holds no model: train it to its end, or name another init")
    last = latest(out / CHECKPOINTS) if resume else None
    source = recipe.tokenizer.path or recipe.init or folder_of(data.source)
    if (file := source or (resuming.tokenizer_of_run(out) if last else None)) is not None:
        tokenizer = Tokenizer.load(file)
    else:
        texts = itertools.islice(data.texts(seed), recipe.tokenizer.train_documents)
        tokenizer = Tokenizer.train(texts, recipe.tokenizer.vocab_size, recipe.tokenizer.special)
    if last:
        resuming.check_settings(recipe, tokenizer, source, last)
    place = (distributed.rank(), distributed.num_processes(), build.tokens_per_block(recipe.model))
    corpus = Corpus(data, tokenizer, seed, *place)
    # Another seed: of the story world it gives other stories.
    valid = Corpus(replace(data, source=recipe.valid), tokenizer, seed + 1, *place) if recipe.valid else None
    torch.manual_seed(seed)
    model = build.build(build.sized(recipe.model, tokenizer))
    if recipe.init is not None:
        load_parts(model, recipe.init, str(source))
    build.start(model)
    model = model.to(device())
    size = exported_bytes(model)
    samples = show(recipe, tokenizer, model) if recipe.train.sample_every else None
    state = start(model, corpus, recipe.train, last)
    freed = 0 if resume else sum(file.stat().st_size for file in (out / CHECKPOINTS).rglob("*"))
    check_space(out, num_bytes(state) + size - freed)
    return Stage(recipe, tokenizer, model, corpus, valid, samples, state)


def origin(recipe: Recipe[Any, Any]) -> str:
    """What a stage starts from, and which of its parts has random weights all the same."""
    if recipe.init is None:
        return "random weights"
    if not layout.has_model(recipe.init):  # an earlier stage's, which is still to come
        return str(recipe.init)
    taken = {name for name, place in layout.starting(recipe.model, recipe.init).items() if place}
    own = [PARTS[name].title for name in build.part_names(recipe.model) if name not in taken]
    return f"{recipe.init}" + (f"; {' and '.join(own)}: random weights" if own else "")


def load_parts(model: build.Model, init: Path, tokenizer: str) -> None:
    """Give a model, which is as large as its tokenizer asks, the parts that a folder holds, of those it starts from."""
    for name, place in layout.starting(model.config, init).items():
        part = PARTS[name]
        if place:
            stored, config = part.load(place), part.config(model.config)
            if part.has_vocabulary and config.vocab_size != stored.config.vocab_size:
                raise UserError(
                    f"the tokenizer in {tokenizer} has {config.vocab_size} ids, but the {part.title} in {init} "
                    f"knows {stored.config.vocab_size}: leave tokenizer.path out, or name the one it was trained with"
                )
            part.check_same(config, stored.config, str(init))
            part.module(model).load_state_dict(stored.state_dict())


@torch.no_grad()
def validate(model: build.Model, corpus: Corpus) -> dict[str, Any]:
    """Loss, its terms and metrics, as in metrics.jsonl, over the first batches of a corpus.

    Raises NotFiniteError, with batch and term, for what is not finite, and UserError where nothing counts.
    """
    means = Means()
    for number, batch in enumerate(itertools.islice(corpus, VALID_BATCHES), 1):
        batch = batch.to(device())
        loss = model.loss(replace(batch, counts=distributed.counts_of_step([model.counts(batch)])))
        for name, value in (*named(loss.terms).items(), ("loss", loss.total)):
            if not value.isfinite():
                raise NotFiniteError(f"{name} is {value.item()} in batch {number} of the validation corpus")
        means.add_loss(loss)
    figures = means.take()
    if figures["loss"] is None:
        raise UserError(f"no token of {VALID_BATCHES} batches of the validation corpus counts: raise data.length")
    return {"batches": VALID_BATCHES, **figures}
