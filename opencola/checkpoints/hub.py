"""Models by name: a folder, or a repository of the Hugging Face Hub (`OWNER/NAME`), to load from and to upload to."""

import hashlib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import HfApi, snapshot_download

from opencola.checkpoints import card, parts, settings
from opencola.checkpoints.files import CONFIG
from opencola.errors import UserError
from opencola.layers.device import device
from opencola.models.build import WholeModel
from opencola.models.cola.model import Cola
from opencola.models.sampling import Sampling
from opencola.paths import home
from opencola.text.tokenizer import CONFIG_NAME, FILE_NAME, Tokenizer

SHIPPED = Path(__file__).parent.parent / "shipped"
"""The model that comes with the package."""
PLACES = sorted({*parts.FOLDERS, *(part.folder.name for part in parts.PARTS.values())})
# What a model is made of, in a folder that may hold a whole run with its checkpoints.
FILES = [
    *(f"{place}/*{ending}" for place in PLACES for ending in (".json", ".safetensors")),
    # a Hugging Face Llama, which has no folder of its own
    *(CONFIG, "model*.safetensors", "model.safetensors.index.json"),
    FILE_NAME,
    CONFIG_NAME,
    settings.EXTRAS,
    card.FACTS,
    card.CARD,
]


class Pretrained(NamedTuple):
    """A model in evaluation mode, its tokenizer, and the sampling settings that it brings along."""

    model: WholeModel
    tokenizer: Tokenizer
    sampling: Sampling


def from_pretrained(
    name: str | Path, revision: str | None = None, dtype: torch.dtype = torch.float32, token: str | None = None
) -> Pretrained:
    """Load a model from a folder, or from a repository of the Hub, on the CPU with its parameters as `dtype`.

    revision: branch, tag or commit of the repository; token: of the Hub, where the one that `hf auth login` keeps is
    not wanted. Raises FileNotFoundError where there is none, OSError where the Hub does not answer, and UserError for
    damaged files, for models that our classes cannot be, and for a tokenizer of more ids than its model knows.
    """
    folder = locate(name, revision, token)
    loaded = Pretrained(parts.load(folder, dtype).eval(), Tokenizer.load(folder), settings.load_sampling(folder))
    check_vocabulary(loaded.tokenizer, loaded.model.vocab_size, name)
    return loaded


def locate(
    name: str | Path, revision: str | None = None, token: str | None = None, files: Sequence[str] = FILES
) -> Path:
    """The folder of a model: `name` itself, or where its repository's `files` are downloaded to. Errors as above."""
    folder, repo_id = home(name), Path(name).as_posix()
    if folder == SHIPPED and not folder.is_dir():
        raise FileNotFoundError(
            "no model comes with this installation: train one (opencola demo) and name it (--model)"
        )
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"{name} is a folder: it has no revision {revision}")
        return folder
    if not is_repo_id(repo_id):
        raise FileNotFoundError(f"no such folder: {name}")
    try:
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name} is no folder, and cannot be had from the Hugging Face Hub: {reason(error)}"
        ) from error


def load(model: Path) -> tuple[WholeModel, Tokenizer]:
    """A model and its tokenizer. Raises FileNotFoundError, with what to do, where there is none."""
    loaded = from_pretrained(model)
    return loaded.model.to(device()), loaded.tokenizer


def load_cola(model: Path) -> tuple[Cola, Tokenizer]:
    """The same, for what only a model with latents can do. Raises UserError for another one, too."""
    loaded, tokenizer = load(model)
    if not isinstance(loaded, Cola):
        raise UserError(f"{model} holds a model without latents ({type(loaded).__name__}): name a Cola DLM")
    return loaded, tokenizer


def check_vocabulary(tokenizer: Tokenizer, known: int, model: str | Path) -> None:
    """Raise UserError where a tokenizer has ids that the model beside it does not know."""
    if tokenizer.vocab_size > known:
        raise UserError(f"the tokenizer in {model} has {tokenizer.vocab_size} ids, but its model knows {known}")


def hash_model(folder: Path) -> str:
    """SHA-256 over the names and the SHA-256 of a model's files: weights, their configurations, the tokenizer."""
    told = {settings.EXTRAS, card.FACTS, card.CARD}  # settings are in the results, and words change nothing
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*")]
    kept = [name for name in names if name not in told and any(fnmatchcase(name, pattern) for pattern in FILES)]
    lines = []
    for name in sorted(kept):
        with (folder / name).open("rb") as content:
            lines.append(f"{name} {hashlib.file_digest(content, 'sha256').hexdigest()}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def title(model: Path) -> str:
    """The model's name in a report."""
    return "the shipped model" if model == SHIPPED else str(model)


def push_to_hub(folder: str | Path, repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Upload the model in a folder, and nothing else of it, to a repository, made if it is not there; returns its URL.

    Raises FileNotFoundError where there is no model, UserError for an impossible name, and OSError where the Hub
    refuses (`hf auth login` makes you known to it) or does not answer.
    """
    root = Path(folder)
    if not parts.has_model(root):
        raise FileNotFoundError(f"{root} holds no model: give the folder of a finished run")
    check_repo_id(repo_id)
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=root, allow_patterns=FILES, commit_message="Upload by OpenCola")
    except (OSError, ValueError) as error:
        raise OSError(f"cannot upload to {repo_id}: {reason(error)}") from error
    return str(url)


def check_repo_id(name: str) -> None:
    """Raise UserError for what cannot be the name of a repository."""
    if not is_repo_id(name):
        raise UserError(f"{name!r} is no name of a repository: write OWNER/NAME")


def is_repo_id(name: str) -> bool:
    """Whether a name may be that of a repository: OWNER/NAME."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def reason(error: Exception) -> str:
    """What the library says, on one line, without the advice below it."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
