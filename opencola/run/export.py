"""What a run gives away: its model, and what is to be told of its training."""

import json
import platform
import subprocess
from pathlib import Path

import torch
import yaml

from opencola.checkpoints import card, parts, settings
from opencola.text.lines import last_object
from opencola.text.tokenizer import Tokenizer
from opencola.version import __version__

RECIPE, METRICS, VALID = "recipe.yaml", "metrics.jsonl", "valid.json"


def export(source: Path, to: Path, dtype: torch.dtype = torch.float32, license_id: str = card.LICENSE) -> None:
    """Write the model in a folder, with its tokenizer, sampling settings, facts and card, to another one.

    Raises FileNotFoundError when there is none.
    """
    if not parts.has_model(source):
        raise FileNotFoundError(f"{source} holds no model: give the folder of a finished run")
    tokenizer, sampling, facts = Tokenizer.load(source), settings.load_sampling(source), card.read_facts(source)
    parts.copy(source, to, dtype)
    tokenizer.save(to)
    card.write_facts(to, facts)
    settings.save_sampling(sampling, to)
    card.write(to, license_id)


def facts_of(stage: Path, init: Path | None, command: str, num_parameters: int) -> card.Facts:
    """What is to be told of the training of the model in a stage's folder, and before, of that in `init`."""
    valid = stage / VALID
    last = {
        "name": stage.name,
        "command": command,
        "recipe": yaml.safe_load((stage / RECIPE).read_text(encoding="utf-8")),
        "final": last_object(stage / METRICS),
        "validation": json.loads(valid.read_text(encoding="utf-8")) if valid.exists() else None,
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
