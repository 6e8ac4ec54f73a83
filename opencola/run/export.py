"""What a run gives away: its model, and what is to be told of its training."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import yaml

from opencola.checkpoints import card, parts, settings
from opencola.models.sampling import Sampling
from opencola.storage import check_space, locked, replacing
from opencola.text.lines import last_object
from opencola.text.tokenizer import CONFIG_NAME, Tokenizer
from opencola.version import __version__

RECIPE, METRICS, VALID, UNFINISHED = "recipe.yaml", "metrics.jsonl", "valid.json", "unfinished"
OF_DEMO = (card.EVALUATION, "evaluation.jsonl", "report.html")
OBSOLETE = (*parts.FOLDERS, CONFIG_NAME, VALID, *OF_DEMO, UNFINISHED)
"""What tells of an earlier model in a folder, and goes when another one takes its place."""


def export(source: Path, to: Path, dtype: torch.dtype = torch.float32, license_id: str = card.LICENSE) -> None:
    """Write the model in a folder, with its tokenizer, sampling settings, facts and card, to another one.

    Whole or not at all. Raises FileNotFoundError when there is none, UserError where another process writes there, and
    OSError where the disk has no room.
    """
    if not parts.has_model(source):
        raise FileNotFoundError(f"{source} holds no model: give the folder of a finished run")
    tokenizer, sampling, facts = Tokenizer.load(source), settings.load_sampling(source), card.read_facts(source)
    with locked(to):
        check_space(to, parts.num_bytes(source, dtype))
        with replacing(to, *OBSOLETE) as draft:
            parts.copy(source, draft, dtype)
            write_beside(draft, to, tokenizer, sampling, facts, license_id)


def write_beside(
    draft: Path, to: Path, tokenizer: Tokenizer, sampling: Sampling, facts: card.Facts, license_id: str = card.LICENSE
) -> None:
    """Write what goes with a model's weights to them in a draft of the folder `to`."""
    tokenizer.save(draft)
    card.write_facts(draft, facts)
    settings.save_sampling(sampling, draft)
    card.write(draft, license_id, to)


def facts_of(
    stage: Path, init: Path | None, command: str, num_parameters: int, validation: dict[str, Any] | None
) -> card.Facts:
    """What is to be told of the training of the model in a stage's folder, and before, of that in `init`."""
    last = {
        "name": stage.name,
        "command": command,
        "recipe": yaml.safe_load((stage / RECIPE).read_text(encoding="utf-8")),
        "final": last_object(stage / METRICS),
        "validation": validation,
        "num_parameters": num_parameters,
        "made_with": made_with(),
    }
    return {"stages": [*(card.read_facts(init)["stages"] if init else []), last]}


def made_with() -> dict[str, str | None]:
    """Versions, and the commit of this code (marked where files differ from it) if it lies in a checkout."""
    root = Path(__file__).parent.parent.parent
    commit = None
    if (root / ".git").exists():
        ask = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        try:
            commit = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # no git here, or a checkout that it does not trust
            commit = None
    return {
        "opencola": __version__,
        "git": commit,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
