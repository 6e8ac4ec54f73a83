"""A training stage: its tokenizer, corpora and starting weights, its training, and the model that comes out of it."""

import contextlib
import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opencola.checkpoints import card
from opencola.checkpoints import parts as layout
from opencola.checkpoints.parts import PARTS
from opencola.checkpoints.settings import save_sampling
from opencola.data.corpus import Corpus
from opencola.data.shards import folder_of
from opencola.errors import NotFiniteError, UserError
from opencola.layers.device import device
from opencola.models import build
from opencola.models.language_model import Sample
from opencola.run import recipe as recipes
from opencola.run.export import RECIPE, VALID, facts_of
from opencola.run.recipe import Recipe
from opencola.text.tokenizer import FILE_NAME, Tokenizer
from opencola.train import distributed
from opencola.train.loop import train
from opencola.train.samples import Show
from opencola.train.tracker import Means

VALID_BATCHES = 50


@dataclass
class Stage:
    """All that training a stage needs."""

    recipe: Recipe[Any, Any]
    tokenizer: Tokenizer
    model: build.Model
    corpus: Corpus
    valid: Corpus | None

    def train(self, resume: bool, command: str) -> None:
        """Train, measure on the validation corpus, and export; `command` is told in the model's card."""
        recipe, out = self.recipe, self.recipe.out
        if distributed.is_main():
            recipes.dump(recipe, out / RECIPE)
            self.tokenizer.save(out)
        show = self.show() if recipe.train.sample_every else None
        values = recipes.values(recipe)
        state = train(self.model, self.corpus, recipe.train, out, resume=resume, show=show, settings=values)
        with state.ema.averaged() if state.ema else contextlib.nullcontext():
            valid = None if self.valid is None else validate(self.model, self.valid)
            if model := whole(self.model):
                for part in (PARTS[name] for name in build.part_names(model.config)):
                    part.save(part.module(model), out / part.folder)
        if distributed.is_main():
            if valid is not None:
                (out / VALID).write_text(json.dumps(valid, indent=2) + "\n")
            card.write_facts(out, facts_of(out, recipe.init, command, num_trained(self.model)))
            save_sampling(recipe.sampling, out)
            card.write(out)
        distributed.barrier()  # a later stage starts from these files

    def warnings(self) -> list[str]:
        """What is not read of the data, and what that loses to its length, a line each, the same in all processes.

        Raises UserError, in all of them, for a corpus in which nothing counts.
        """
        said: list[str] = []
        fault = None
        if distributed.is_main():
            try:
                corpora = [corpus for corpus in (self.corpus, self.valid) if corpus]
                lines = [line for corpus in corpora for line in (corpus.skipped(), corpus.warning())]
                said = list(dict.fromkeys(filter(None, lines)))
            except UserError as error:
                fault = str(error)
        said, fault = distributed.gather((said, fault))[0]
        if fault is not None:
            raise UserError(fault)
        return said

    def show(self) -> Show:
        """What gives samples of the model, of the first texts to validate on or else to train on."""
        recipe = self.recipe
        data, seed = replace(recipe.data, verify=False), recipe.seed
        if recipe.valid:
            data, seed = replace(data, source=recipe.valid), seed + 1
        multiple = build.tokens_per_block(recipe.model)
        tokens = next(Corpus(data, self.tokenizer, seed, multiple=multiple)).tokens  # the same in every process

        def show() -> list[Sample]:
            model = whole(self.model)
            return build.samples(model, self.tokenizer, tokens, recipe.sampling) if model else []

        return show


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


def prepare(recipe: Recipe[Any, Any], resume: bool) -> Stage:
    """Tokenizer, corpora, and the model with its starting weights; writes nothing."""
    data, out, seed = recipe.data, recipe.out, recipe.seed
    if recipe.init is not None and not layout.has_model(recipe.init):
        raise FileNotFoundError(f"{recipe.init} holds no model: train it to its end, or name another init")
    source = recipe.tokenizer.path or recipe.init or folder_of(data.source)
    if source is None and resume and (out / FILE_NAME).exists():
        source = out
    if source is not None:
        tokenizer = Tokenizer.load(source)
    else:
        texts = itertools.islice(data.texts(seed), recipe.tokenizer.train_documents)
        tokenizer = Tokenizer.train(texts, recipe.tokenizer.vocab_size, recipe.tokenizer.special)
    place = (distributed.rank(), distributed.num_processes(), build.tokens_per_block(recipe.model))
    corpus = Corpus(data, tokenizer, seed, *place)
    # Another seed: of the story world it gives other stories.
    valid = Corpus(replace(data, source=recipe.valid), tokenizer, seed + 1, *place) if recipe.valid else None
    torch.manual_seed(seed)
    model = build.build(build.sized(recipe.model, tokenizer))
    if recipe.init is not None:
        load_parts(model, recipe.init, str(source))
    build.start(model)
    return Stage(recipe, tokenizer, model.to(device()), corpus, valid)


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
        terms = {f"loss/{name}": term for name, term in loss.terms.items()}
        for name, value in (*terms.items(), ("loss", loss.total)):
            if not value.isfinite():
                raise NotFiniteError(f"{name} is {value.item()} in batch {number} of the validation corpus")
        means.add({"loss": loss.total, **terms}, distributed.mean({"weight": batch.weight()})["weight"])
        means.add(loss.metrics, batch.weight())
    figures = means.take()
    if figures["loss"] is None:
        raise UserError(f"no token of {VALID_BATCHES} batches of the validation corpus counts: raise data.length")
    return {"batches": VALID_BATCHES, **figures}
