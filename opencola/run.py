"""Running a recipe, stage by stage: tokenizer, starting weights, training, an exported model.

A stage's folder holds recipe.yaml, metrics.jsonl, checkpoints/, samples.jsonl (with `train.sample_every`), valid.json
(where the recipe has `valid`) and, once the stage is finished, its model in the public layout with a card. The last
stage's model is copied to the folder of the whole run.
"""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from opencola import checks
from opencola import recipe as recipes
from opencola.export import METRICS, MODEL, PARTS, RECIPE, VALID, export, facts_of
from opencola.interop import card, official
from opencola.models import build
from opencola.models.language_model import Sample
from opencola.recipe import Recipe
from opencola.text.corpus import Corpus
from opencola.text.shards import folder_of
from opencola.text.sources import one_pass
from opencola.text.tokenizer import FILE_NAME, Tokenizer
from opencola.train import distributed, trackers
from opencola.train.loop import train
from opencola.train.samples import Show
from opencola.train.tracker import Means

CHECKPOINTS = "checkpoints"
WRITTEN = (RECIPE, METRICS, "samples.jsonl", VALID, CHECKPOINTS, "tensorboard", "wandb", FILE_NAME, official.EXTRAS)
VALID_BATCHES = 50


def run(
    stages: Sequence[tuple[str, Recipe[Any]]],
    command: str,
    only: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Train a recipe's stages in order, or `only` one of them; returns the folder of the whole run.

    command: how the user asked for it, for the model's card; resume: pass over finished stages (exported, and their
    recipe unchanged) and go on from the last checkpoint of the others; overwrite: start anew. Raises FileExistsError
    where there is a run and neither is asked for, ValueError and FileNotFoundError for settings and files that do not
    fit each other, KeyboardInterrupt after Ctrl-C.
    """
    last = stages[-1][1].out
    root = last if len(stages) == 1 else last.parent
    ahead = plan(stages, only, resume, overwrite)
    if (root / MODEL).exists() and not resume and not overwrite:
        raise FileExistsError(f"{root} holds a model: choose another --out, or replace it with --overwrite")
    for number, (name, recipe) in enumerate(stages, 1):
        title = f"[{number}/{len(stages)}] {name}"
        if only not in (None, name):
            continue
        if recipe not in ahead:
            say(f"{title}: finished before, in {recipe.out}")
            continue
        stage = prepare(recipe, resume)
        distributed.barrier()  # all have looked at what is there
        if distributed.is_main():
            if overwrite:  # only now, when all that the stage needs has been found
                for other in ahead[ahead.index(recipe) :]:
                    clear(other.out, *WRITTEN)
            for folder in (root, recipe.out):
                clear(folder, MODEL, official.EXTRAS, VALID, card.FACTS, card.EVALUATION)
        distributed.barrier()
        say(f"{title}: {recipe.train.steps} steps, {num_trained(stage.model) / 1e6:.2f} M parameters to train")
        stage.train(resume, command)
        say(f"{title}: {summary(recipe.out)}; in {recipe.out}")
    if root != last and PARTS["vae"].is_in(last) and distributed.is_main():
        export(last, root)
    return root


def plan(
    stages: Sequence[tuple[str, Recipe[Any]]], only: str | None, resume: bool, overwrite: bool
) -> list[Recipe[Any]]:
    """The stages to train; errors that can be told before anything is done are raised here."""
    if only is not None and only not in dict(stages):
        raise ValueError(f"there is no stage {only!r}; the stages are: {', '.join(dict(stages))}")
    if resume and overwrite:
        raise ValueError("choose one of --resume and --overwrite")
    ahead: list[Recipe[Any]] = []
    for number, (name, recipe) in enumerate(stages):
        check_start(name, recipe, [earlier for _, earlier in stages[:number]])
        chosen = only in (None, name)
        begun = (recipe.out / RECIPE).exists()
        if begun and any(recipe.init == changed.out for changed in ahead) and not (chosen and overwrite):
            raise ValueError(f"{recipe.out} started from {recipe.init}, which would change: use --overwrite")
        if begun and chosen and not resume and not overwrite:
            raise FileExistsError(
                f"{recipe.out} holds a run: go on with --resume, replace it with --overwrite, or choose another --out"
            )
        if chosen and not (resume and is_finished(recipe)):
            trackers.check(recipe.train.trackers)
            checks.check(name, recipe, distributed.num_processes())
            ahead.append(recipe)
    return ahead


def check_start(name: str, recipe: Recipe[Any], earlier: Sequence[Recipe[Any]]) -> None:
    """Raise ValueError where a stage lacks the weights that it needs, or is sized unlike the stage it starts from."""
    for part, needed in build.starting_parts(recipe.model).items():
        if needed and recipe.init is None:
            title = PARTS[part].title
            raise ValueError(f"stage {name} needs a trained {title}: set init to an earlier stage or a model's folder")
        for other in earlier:
            if recipe.init == other.out and part in build.starting_parts(other.model):
                check_same(part, getattr(recipe.model, part), getattr(other.model, part), f"stage {other.out.name}")


def check_same(part: str, config: Any, found: Any, where: str) -> None:
    """Raise ValueError where the configuration of a part is another one than that of the weights to start from."""
    wanted, there = asdict(PARTS[part].essence(config)), asdict(PARTS[part].essence(found))
    for name, value in wanted.items():
        if there[name] != value:
            raise ValueError(
                f"model.{part}.{name} is {value}, but {there[name]} in {where}, where its weights are from"
            )


@dataclass
class Stage:
    """All that training a stage needs."""

    recipe: Recipe[Any]
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
            model = whole(self.model)
            for name, module in model.named_children() if model else ():
                if name in PARTS:
                    PARTS[name].save(module, out / PARTS[name].folder)
        if distributed.is_main():
            if valid is not None:
                (out / VALID).write_text(json.dumps(valid, indent=2) + "\n")
            card.write_facts(out, facts_of(out, recipe.init, command, num_trained(self.model)))
            official.save_sampling(recipe.sampling, out)
            card.write(out)
        distributed.barrier()  # a later stage starts from these files

    def show(self) -> Show:
        """What gives samples of the model, of the first texts to validate on or else to train on."""
        recipe = self.recipe
        data, seed = replace(recipe.data, verify=False), recipe.seed
        if recipe.valid:
            data, seed = replace(data, source=recipe.valid), seed + 1
        tokens = next(Corpus(data, self.tokenizer, seed)).tokens  # the same in every process

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
    return copy.to(build.device()).eval()


def num_trained(model: build.Model) -> int:
    """The number of parameters that training moves."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def prepare(recipe: Recipe[Any], resume: bool) -> Stage:
    """Tokenizer, corpora, and the model with its starting weights; writes nothing."""
    data, out, seed = recipe.data, recipe.out, recipe.seed
    if recipe.init is not None and not any(part.is_in(recipe.init) for part in PARTS.values()):
        raise FileNotFoundError(f"{recipe.init} holds no model ({MODEL}/): train it to its end, or name another init")
    source = recipe.tokenizer.path or recipe.init or folder_of(data.source)
    if source is None and resume and (out / FILE_NAME).exists():
        source = out
    if source is not None:
        tokenizer = Tokenizer.load(source)
    else:
        texts = itertools.islice(one_pass(data.source, seed, data.text_field), recipe.tokenizer.train_documents)
        tokenizer = Tokenizer.train(texts, recipe.tokenizer.vocab_size)
    place = (distributed.rank(), distributed.num_processes())
    corpus = Corpus(data, tokenizer, seed, *place)
    # Another seed: of the story world it gives other stories.
    valid = Corpus(replace(data, source=recipe.valid), tokenizer, seed + 1, *place) if recipe.valid else None
    torch.manual_seed(seed)
    vae = replace(recipe.model.vae, vocab_size=tokenizer.vocab_size)
    model = build.build(replace(recipe.model, vae=vae))
    if recipe.init is not None:
        load_parts(model, recipe.init, str(source))
    build.start(model)
    return Stage(recipe, tokenizer, model.to(build.device()), corpus, valid)


def load_parts(model: build.Model, init: Path, tokenizer: str) -> None:
    """Give a model, which is as large as its tokenizer asks, the parts that a folder holds, of those it starts from."""
    for name, needed in build.starting_parts(model.config).items():
        part, module = PARTS[name], model.get_submodule(name)
        if part.is_in(init):
            stored = part.load(init)
            if name == "vae" and model.config.vae.vocab_size != stored.config.vocab_size:
                raise ValueError(
                    f"the tokenizer in {tokenizer} has {model.config.vae.vocab_size} ids, but the Text VAE in {init} "
                    f"knows {stored.config.vocab_size}: leave tokenizer.path out, or name the one it was trained with"
                )
            check_same(name, module.config, stored.config, str(init))
            module.load_state_dict(stored.state_dict())
        elif needed:
            raise FileNotFoundError(f"{init} holds no {part.title} ({part.folder}): name another init")


@torch.no_grad()
def validate(model: build.Model, corpus: Corpus) -> dict[str, Any]:
    """Loss, its terms and metrics, as in metrics.jsonl, over the first batches of a corpus."""
    means = Means()
    for batch in itertools.islice(corpus, VALID_BATCHES):
        batch = batch.to(build.device())
        loss = model.loss(replace(batch, counts=distributed.counts_of_step([model.counts(batch)])))
        means.add({"loss": loss.total, **{f"loss/{name}": term for name, term in loss.terms.items()}, **loss.metrics})
    return {"batches": VALID_BATCHES, **means.take()}


def say(text: str) -> None:
    """Print a line, on one of the processes."""
    if distributed.is_main():
        print(text, flush=True)


def is_finished(recipe: Recipe[Any]) -> bool:
    """Whether a stage was trained to its end by this very recipe."""
    if not (recipe.out / official.EXTRAS).exists():  # written last
        return False
    before = yaml.safe_load((recipe.out / RECIPE).read_text(encoding="utf-8"))
    return movable(recipes.values(recipe)) == movable(before)


def movable(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values without what changes when the run is moved to another folder."""
    start = values["init"] and os.path.relpath(values["init"], values["out"])
    return {name: value for name, value in values.items() if name != "out"} | {"init": start}


def summary(out: Path) -> str:
    """How a stage ended, in one line."""
    record = json.loads((out / METRICS).read_text().splitlines()[-1])
    names = ("loss", "reconstruction_accuracy", "vae_logsnr")
    figures = [(name.replace("_", " "), record[name]) for name in names if name in record]
    if (out / VALID).exists():
        figures.append(("validation loss", json.loads((out / VALID).read_text())["loss"]))
    took = f"{record['seconds']:.0f} s" if record["seconds"] < 120 else f"{record['seconds'] / 60:.1f} min"
    named = ", ".join(f"{name} {value:.4g}" for name, value in figures if value is not None)
    return f"{record['step']} steps in {took}, {named}"


def clear(folder: Path, *names: str) -> None:
    """Delete what a run wrote into a folder under these names, and nothing else."""
    for place in (folder / name for name in names):
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
