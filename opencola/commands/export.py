"""Write a trained model, with tokenizer, sampling settings and a model card, into a folder of its own.

The folder has the layout of the public Cola DLM release, which `opencola generate --model` reads.

examples:
  opencola export --model runs/demo --to models/stories --dtype bf16
  opencola export --model runs/demo --to models/stories --push OWNER/stories --private
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from opencola.checkpoints import hub
from opencola.run import flags
from opencola.run.export import export
from opencola.storage import OURS, locked


@dataclass(frozen=True)
class ExportFlags:
    """Which model to write, and how."""

    model: Path
    """Folder of a finished run or of a model, or a repository of the Hugging Face Hub (OWNER/NAME)."""
    to: Path
    """Folder to write the model to."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the stored weights; bf16 halves their size."""
    license: str = "apache-2.0"
    """Licence of the weights, by the name that the Hub has for it, for the model card."""
    push: str | None = None
    """Repository of the Hugging Face Hub (OWNER/NAME) to upload to, too; it is made if it is not there."""
    private: bool = False
    """Make that repository a private one."""


def command(argv: Sequence[str]) -> None:
    """Run `opencola export`."""
    options: ExportFlags = flags.parse(ExportFlags, argv, prog="opencola export", description=__doc__)
    if options.push is not None:
        hub.check_repo_id(options.push)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    with locked(options.to):
        if any(place.name not in OURS for place in options.to.iterdir()):
            raise FileExistsError(f"{options.to} is not empty: choose another folder")
        export(hub.locate(options.model), options.to, dtype, options.license)
    print(f"The model is in {options.to}.")
    if options.push is not None:
        print(f"It is at {hub.push_to_hub(options.to, options.push, options.private)}, too.")
