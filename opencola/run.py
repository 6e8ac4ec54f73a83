"""Running a recipe, stage by stage: tokenizer, starting weights, training, an exported model.

A stage's folder holds recipe.yaml, metrics.jsonl, checkpoints/, valid.json (where the recipe has `valid`) and, once the
stage is finished, its model in the public layout. The last stage's model is copied to the folder of the whole run.
"""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from opencola import checks
from opencola import recipe as recipes
from opencola.flow.dit import DiTConfig
from opencola.interop import official
from opencola.models import build
from opencola.recipe import Recipe
from opencola.text.corpus import Corpus
from opencola.text.sources import documents
from opencola.text.tokenizer import FILE_NAME, Tokenizer
from opencola.train.loop import train
from opencola.train.tracker import Means
from opencola.vae.text_vae import TextVAEConfig

RECIPE, METRICS, VALID, CHECKPOINTS = "recipe.yaml", "metrics.jsonl", "valid.json", "checkpoints"
MODEL = official.VAE_FOLDER.parts[0]
VALID_BATCHES = 50


@dataclass(frozen=True)
class Part:
    """A part of a model that is stored in a folder of its own."""

    title: str
    folder: Path
    load: Callable[..., Any]
    save: Callable[..., None]
    essence: Callable[[Any], Any]
    """A configuration without what may change while the weights stay the same."""

    def is_in(self, root: Path) -> bool:
        """Whether a model's folder has this part."""
        return any((root / place).is_dir() for place in (self.folder, self.folder.name))


def vae_essence(config: TextVAEConfig) -> TextVAEConfig:
    """Without the treatment of latents, and without a block size that has no effect."""
    return replace(config, block_size=config.visible_block, latent_shift=0.0, latent_scale=1.0, fixed_logsnr=None)


def dit_essence(config: DiTConfig) -> DiTConfig:
    """Without the block size, which may grow from stage to stage."""
    return replace(config, block_size=1)


PARTS = {
    "vae": Part("Text VAE", official.VAE_FOLDER, official.load_vae, official.save_vae, vae_essence),
    "dit": Part("prior", official.DIT_FOLDER, official.load_dit, official.save_dit, dit_essence),
}


def run(
    stages: Sequence[tuple[str, Recipe[Any]]], only: str | None = None, resume: bool = False, overwrite: bool = False
) -> Path:
    """Train a recipe's stages in order, or `only` one of them; returns the folder of the whole run.

    resume: pass over finished stages (exported, and their recipe unchanged) and go on from the last checkpoint of the
    others; overwrite: start anew. Raises FileExistsError where there is a run and neither is asked for, ValueError and
    FileNotFoundError for settings and files that do not fit each other, KeyboardInterrupt after Ctrl-C.
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
            print(f"{title}: finished before, in {recipe.out}", flush=True)
            continue
        stage = prepare(recipe, resume)
        if overwrite:  # only now, when all that the stage needs has been found
            for other in ahead[ahead.index(recipe) :]:
                clear(other.out, RECIPE, METRICS, VALID, CHECKPOINTS, FILE_NAME, official.EXTRAS)
        for folder in (root, recipe.out):
            clear(folder, MODEL, official.EXTRAS, VALID)
        count = sum(parameter.numel() for parameter in stage.model.parameters() if parameter.requires_grad)
        print(f"{title}: {recipe.train.steps} steps, {count / 1e6:.2f} M parameters to train", flush=True)
        stage.train(resume)
        print(f"{title}: {summary(recipe.out)}; in {recipe.out}", flush=True)
    if root != last and PARTS["vae"].is_in(last):
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
            checks.check(name, recipe, checks.world_size())
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

    def train(self, resume: bool) -> None:
        """Train, measure on the validation corpus, and export."""
        recipe, out = self.recipe, self.recipe.out
        recipes.dump(recipe, out / RECIPE)
        self.tokenizer.save(out)
        state = train(self.model, self.corpus, recipe.train, out, resume=resume)
        with state.ema.averaged() if state.ema else contextlib.nullcontext():
            if self.valid is not None:
                (out / VALID).write_text(json.dumps(validate(self.model, self.valid), indent=2) + "\n")
            for name, module in self.model.named_children():
                if name in PARTS:
                    PARTS[name].save(module, out / PARTS[name].folder)
        official.save_sampling(recipe.sampling, out)


def prepare(recipe: Recipe[Any], resume: bool) -> Stage:
    """Tokenizer, corpora, and the model with its starting weights; writes nothing."""
    data, out, seed = recipe.data, recipe.out, recipe.seed
    if recipe.init is not None and not any(part.is_in(recipe.init) for part in PARTS.values()):
        raise FileNotFoundError(f"{recipe.init} holds no model ({MODEL}/): train it to its end, or name another init")
    source = recipe.tokenizer.path or recipe.init
    if source is None and resume and (out / FILE_NAME).exists():
        source = out
    if source is not None:
        tokenizer = Tokenizer.load(source)
    else:
        texts = documents(data.source, seed, data.text_field).one_pass()
        texts = itertools.islice(texts, recipe.tokenizer.train_documents)
        tokenizer = Tokenizer.train(texts, recipe.tokenizer.vocab_size)
    corpus = Corpus(data, tokenizer, seed)
    # Another seed: of the story world it gives other stories.
    valid = Corpus(replace(data, source=recipe.valid), tokenizer, seed + 1) if recipe.valid else None
    torch.manual_seed(seed)
    vae = replace(recipe.model.vae, vocab_size=tokenizer.vocab_size)
    model = build.build(replace(recipe.model, vae=vae))
    if recipe.init is not None:
        load_parts(model, recipe.init)
    build.start(model)
    return Stage(recipe, tokenizer, model.to(build.device()), corpus, valid)


def load_parts(model: build.Model, init: Path) -> None:
    """Give a model the parts that a folder holds, of those that it starts from."""
    for name, needed in build.starting_parts(model.config).items():
        part, module = PARTS[name], model.get_submodule(name)
        if part.is_in(init):
            stored = part.load(init)
            check_same(name, module.config, stored.config, str(init))
            module.load_state_dict(stored.state_dict())
        elif needed:
            raise FileNotFoundError(f"{init} holds no {part.title} ({part.folder}): name another init")


@torch.no_grad()
def validate(model: build.Model, corpus: Corpus) -> dict[str, Any]:
    """Loss, its terms and metrics, as in metrics.jsonl, over the first batches of a corpus."""
    means = Means()
    for batch in itertools.islice(corpus, VALID_BATCHES):
        loss = model.loss(batch.to(build.device()))
        means.add({"loss": loss.total, **{f"loss/{name}": term for name, term in loss.terms.items()}, **loss.metrics})
    return {"batches": VALID_BATCHES, **means.take()}


def is_finished(recipe: Recipe[Any]) -> bool:
    """Whether a stage was trained to its end by this very recipe."""
    if not (recipe.out / official.EXTRAS).exists():  # written last
        return False
    with tempfile.TemporaryDirectory() as folder:
        recipes.dump(recipe, Path(folder, RECIPE))
        return settings(Path(folder, RECIPE)) == settings(recipe.out / RECIPE)


def settings(file: Path) -> dict[str, Any]:
    """A stage's recipe as plain values, those that moving the run to another folder changes made relative."""
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    out = values.pop("out")
    return values | {"init": values["init"] and os.path.relpath(values["init"], out)}


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


def export(source: Path, to: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the model in a folder, with its tokenizer and sampling settings, to another one.

    Raises FileNotFoundError when there is none.
    """
    if not any(part.is_in(source) for part in PARTS.values()):
        raise FileNotFoundError(f"{source} holds no model ({MODEL}/): give the folder of a finished run")
    tokenizer, sampling = Tokenizer.load(source), official.load_sampling(source)
    for part in PARTS.values():
        if part.is_in(source):
            part.save(part.load(source), to / part.folder, dtype=dtype)
    tokenizer.save(to)
    official.save_sampling(sampling, to)


def clear(folder: Path, *names: str) -> None:
    """Delete what a run wrote into a folder under these names, and nothing else."""
    for place in (folder / name for name in names):
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
