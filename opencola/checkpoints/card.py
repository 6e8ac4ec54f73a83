"""The model card: README.md of a model's folder, rendered from `training.json` and the model's own files.

`training.json` holds what is known of the training: {"stages": [...], "evaluation": {...}}. A stage has `name`,
`command`, `recipe` (its values), `final` (its last record in metrics.jsonl), `validation` (valid.json),
`num_parameters` (trained) and `made_with` (versions and git hash); `evaluation` is the figures of the demo's
metrics.json.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from opencola.checkpoints import parts as layout
from opencola.checkpoints.files import read_json, write_json
from opencola.checkpoints.settings import load_sampling
from opencola.flow.dit import DiTConfig
from opencola.models.sampling import Sampling
from opencola.storage import write_text
from opencola.vae.text_vae import TextVAEConfig

FACTS, CARD, EVALUATION = "training.json", "README.md", "metrics.json"
LIBRARY, TAGS = "opencola", ["cola-dlm", "diffusion-language-model", "latent-diffusion", "flow-matching"]
LICENSE = "apache-2.0"
Facts = dict[str, Any]


def read_facts(root: Path) -> Facts:
    """What is known of how the model in a folder was trained; a demo's metrics.json beside it counts, too."""
    facts = read_json(root / FACTS) if (root / FACTS).is_file() else {"stages": []}
    if (root / EVALUATION).is_file():
        metrics = read_json(root / EVALUATION)
        facts["evaluation"] = {
            name: {"value": metrics[name], "cases": count, "interval": metrics["intervals"].get(name)}
            for name, count in metrics["counts"].items()
        }
    return facts


def write_facts(root: Path, facts: Facts) -> None:
    """Write `training.json`."""
    write_json(root / FACTS, facts)


def write(root: Path, license_id: str = LICENSE, home: Path | None = None) -> None:
    """Write the card of the model in a folder; a README.md that is no card of ours stays as it is.

    home: where the folder's entries are going to be, if not in it.
    """
    home = home or root
    file = home / CARD
    if file.exists() and f"\nlibrary_name: {LIBRARY}\n" not in file.read_text(encoding="utf-8"):
        return
    write_text(root / CARD, render(root, license_id, home.resolve().name))


def render(root: Path, license_id: str = LICENSE, title: str = "") -> str:
    """The card's text; title: without it the folder's name."""
    facts, writes = read_facts(root), layout.has_whole_model(root)
    data = ModelCardData(
        license=license_id,
        library_name=LIBRARY,
        tags=["language-model"] if whole_part(root) else TAGS,
        pipeline_tag="text-generation" if writes else None,
        datasets=sorted({name for stage in facts["stages"] for name in hub_datasets(stage["recipe"])}) or None,
    )
    sections = [
        f"# {title or root.resolve().name}",
        introduction(root),
        "## Use",
        USE if writes else USE_VAE,
        "## Model",
        table(("part", "parameters", "shape"), describe_parts(root)),
    ]
    if facts["stages"]:
        sections += ["## Training", *training(facts["stages"])]
    if "evaluation" in facts:
        sections += ["## Evaluation", "On held-out stories of the story world.", evaluation(facts["evaluation"])]
    if writes:
        sections += ["## Sampling", "Its settings in `opencola.json`:", sampling(load_sampling(root))]
    sections += ["## Limits", LIMITS]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def introduction(root: Path) -> str:
    """What the model is."""
    part = whole_part(root)
    return part.about if part else COLA if layout.has_whole_model(root) else VAE


def whole_part(root: Path) -> layout.Part | None:
    """The part that is the whole model, where one is: not of a Cola DLM."""
    part = layout.PARTS.get(layout.family_in(root))
    return part if part is not None and not part.field else None


VAE = (
    "The Text VAE of a [Cola DLM](https://arxiv.org/abs/2605.06548): it turns tokens into continuous latents "
    "and back. It writes nothing by itself: a prior over its latents does."
)
COLA = (
    "A [Cola DLM](https://arxiv.org/abs/2605.06548), a continuous latent diffusion language model: a Text VAE "
    "turns tokens into latents and back, and a block-causal diffusion transformer, the prior, carries noise to the "
    "next block of latents, given the blocks before it."
)
USE = """```
opencola generate --model FOLDER_OR_REPO_ID --prompt "Once upon a time"
```

```python
from opencola.checkpoints.hub import from_pretrained
from opencola.models.text_stream import generate_text

model, tokenizer, sampling = from_pretrained("FOLDER_OR_REPO_ID")
for pieces in generate_text(model, tokenizer, ["Once upon a time"], sampling):
    print(pieces[0].text, end="", flush=True)
```"""
USE_VAE = """```python
from opencola.checkpoints import official

vae = official.load_vae("FOLDER")
```"""
LIMITS = """It goes on in the manner of the texts that it was trained on: it follows no instructions, what it writes may
be wrong or offensive, and nothing in it filters that. The licence above is that of the weights; the texts have their
own."""


def describe_parts(root: Path) -> Iterable[tuple[str, str, str]]:
    """Name, number of parameters, and shape of the parts in a folder."""
    for part in layout.PARTS.values():
        if place := part.find(root):
            config = part.read_config(place)
            with torch.device("meta"):
                yield part.title, count(part.build(config)), shape(config)


def shape(config: Any) -> str:
    """A part's sizes, for people."""
    match config:
        case TextVAEConfig():
            return (
                f"{config.encoder_layers} + {config.decoder_layers} layers of width {config.width}, vocabulary "
                f"{config.vocab_size:,}, {config.latent_dim} latent channels for {config.patch_size} token"
                + "s"
                * (config.patch_size > 1)
            )
        case DiTConfig():
            return f"{config.num_layers} layers of width {config.width}, block size {config.block_size}"
        case _:
            trunk = config.trunk
            return f"{trunk.num_layers} layers of width {trunk.width}, vocabulary {config.vocab_size:,}"


def count(module: torch.nn.Module) -> str:
    """The number of parameters, for people."""
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:,.2f} M"


def training(stages: Sequence[Facts]) -> Iterable[str]:
    """Stages, what their losses were in the end, and how to do it again."""
    rows, losses = [], []
    for stage in stages:
        final, valid, recipe = stage["final"], stage["validation"] or {}, stage["recipe"]
        text = " ".join(str(recipe["data"]["source"]).split())
        took = f"{final['seconds']:,.0f} s"
        trained = f"{stage['num_parameters'] / 1e6:,.2f} M"
        rows.append((stage["name"], f"`{text}`", f"{final['step']:,}", f"{final['tokens']:,}", took, trained))
        for name, value in final.items():
            if name.startswith("loss") or name in ("reconstruction_accuracy", "vae_logsnr"):
                losses.append((stage["name"], name.removeprefix("loss/").replace("_", " "), value, valid.get(name)))
    yield table(("stage", "text", "steps", "tokens", "time", "parameters trained"), rows)
    yield "Loss terms are weighted, in nats per token and, for flow matching, squared error of the velocity:"
    yield table(("stage", "figure", "in the last steps of training", "on validation text"), losses)
    commands = dict.fromkeys(stage["command"] for stage in stages)
    yield "```\n" + "\n".join(commands) + "\n```"
    versions = dict.fromkeys(made_with(**stage["made_with"]) for stage in stages)
    yield f"Made with {'; '.join(versions)}. Every setting is in `{FACTS}`."


def made_with(opencola: str, git: str | None, torch: str, python: str) -> str:
    """Versions, for people."""
    return f"opencola {opencola}{f' at commit {git}' if git else ''}, torch {torch}, Python {python}"


def evaluation(measures: Mapping[str, Any]) -> str:
    """The demo's figures."""
    rows = [
        (
            name.replace("_", " "),
            measure["value"],
            "–".join(f"{end:.4g}" for end in measure["interval"] or ()),
            f"{measure['cases']:,}",
        )
        for name, measure in measures.items()
    ]
    return table(("measure", "value", "95 % interval", "cases"), rows)


def sampling(settings: Sampling) -> str:
    """Those settings that are not the defaults."""
    plain = asdict(type(settings)())
    changed = {name: value for name, value in asdict(settings).items() if value != plain[name]}
    return ", ".join(f"`{name} {json.dumps(value)}`" for name, value in changed.items()) or "the defaults"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; None is an empty cell."""
    lines = [head, ["---"] * len(head), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """A value in a table."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def hub_datasets(values: Any) -> Iterable[str]:
    """The datasets of the Hub that a recipe's values name: NAME of `hf:NAME[:CONFIG][@SPLIT]`, wherever it stands."""
    if isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from hub_datasets(value)
    elif isinstance(values, str) and values.startswith("hf:"):
        yield values.removeprefix("hf:").partition("@")[0].partition(":")[0]
