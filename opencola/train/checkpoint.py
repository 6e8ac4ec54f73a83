"""Saving and resuming a run: all that decides its next step, in one folder per checkpoint.

`step-000100/` holds tensors as torch.distributed.checkpoint writes them, `run.json` with the plain values, and
`SHA256SUMS` of all these (`sha256sum -c` reads it). It is written under another name and renamed when complete, so a
folder of that name is always whole. A checkpoint of any number of processes can be read by any other.
"""

import json
import re
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from opencola.data.batch import Batch
from opencola.data.corpus import merge_states
from opencola.data.shards import checksum
from opencola.errors import UserError
from opencola.storage import shortage, to_disk
from opencola.train import distributed
from opencola.train.optimizer import EMA

CHECKPOINTS, SUMS, RUN = "checkpoints", "SHA256SUMS", "run.json"
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # of one process, said at every checkpoint


class Batches(Protocol):
    """An endless corpus whose position can be saved (`opencola.data.corpus.Corpus`)."""

    def __next__(self) -> Batch:
        """The rows of the next batch that this process works on."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values; of several processes each knows its own part (`corpus.merge_states`)."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a whole position."""


@dataclass
class TrainState:
    """A run between two steps."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    ema: EMA | None
    corpus: Batches
    step: int = 0
    """Steps taken."""
    num_tokens: int = 0
    """Tokens seen, by all processes."""
    seconds: float = 0.0
    """Time spent training, over all sessions of the run."""


class Saver:
    """Writes checkpoints into a folder while training goes on, one at a time; a context manager that waits for it.

    What is saved is copied first, so the next step may change it.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        """keep: complete checkpoints that remain, the newest ones."""
        self.folder, self.keep = folder, keep
        self._thread = ThreadPoolExecutor(1)
        self._unfinished: Future[None] | None = None
        # its own group, because its messages would otherwise mix with the training's
        self._group = dist.new_group(backend="gloo") if distributed.num_processes() > 1 else None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()
        self._thread.shutdown()

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"step-{step:06d}"

    def check_space(self, state: TrainState) -> None:
        """Raise OSError where the disk has no room for a checkpoint more: better before the work than after it."""
        if shortage := self._shortage(state):
            raise OSError(f"no room for a checkpoint in {self.folder}: {shortage}")

    def save(self, state: TrainState) -> None:
        """Begin to write `folder/step-NNNNNN`; raises OSError when the one before could not be written."""
        self.wait()
        path = self.path(state.step)
        if path.exists():
            return
        draft = self.folder / f"unfinished-{path.name}"
        positions = distributed.gather(state.corpus.state_dict())
        run = {
            "step": state.step,
            "num_tokens": state.num_tokens,
            "seconds": state.seconds,
            "corpus": positions[0] if len(positions) == 1 else merge_states(positions),
            "processes": distributed.num_processes(),
        }
        if distributed.is_main():
            for left_over in self.folder.glob("unfinished-*"):
                shutil.rmtree(left_over)
            draft.mkdir(parents=True)
        distributed.barrier()
        written = dcp.async_save(
            _tensors(state, distributed.rank()),
            checkpoint_id=draft,
            process_group=self._group,
            no_dist=self._group is None,
        )
        assert isinstance(written, Future)
        self._state = state
        self._unfinished = self._thread.submit(self._finish, written, run, draft, path)

    def wait(self) -> None:
        """Return when the last checkpoint is complete. Raises OSError, naming it, when it could not be written."""
        if self._unfinished is None:
            return
        unfinished, self._unfinished = self._unfinished, None
        try:
            unfinished.result()
        except (Exception, CheckpointException) as error:  # not all of what DCP raises are Exceptions
            last = latest(self.folder)
            kept = f"go on from {last} (--resume)" if last else "there is no complete one yet"
            cause = self._shortage(self._state) or _cause(error)
            raise OSError(f"could not write a checkpoint into {self.folder}: {cause}; {kept}") from error

    def _shortage(self, state: TrainState) -> str | None:
        return shortage(self.folder, num_bytes(state))

    def _finish(self, written: "Future[Any]", run: dict[str, Any], draft: Path, path: Path) -> None:
        written.result()  # on the main process this is when all of them have written
        if distributed.is_main():
            (draft / RUN).write_text(json.dumps(run, indent=2))
            files = sorted(file for file in draft.iterdir() if file.name != SUMS)
            with (draft / SUMS).open("w") as sums:
                sums.writelines(f"{checksum(file)}  {file.name}\n" for file in files)
                to_disk(sums)
            draft.rename(path)
            for old in checkpoints(self.folder)[: -self.keep]:
                shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder (which need not exist), oldest first."""
    complete = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder, or None."""
    return complete[-1] if (complete := checkpoints(folder)) else None


def damage(path: Path) -> str | None:
    """How a checkpoint is not what was written, with the file's name and what to do; None where it is."""
    advice = f"delete {path} to go on from the checkpoint before it"
    if not (path / SUMS).is_file():
        return f"{path / SUMS} is missing: {advice}"
    for line in (path / SUMS).read_text(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if not (path / name).is_file():
            return f"{path / name} is missing: {advice}"
        if checksum(path / name) != digest:
            return f"{path / name} is damaged (its checksum is another one): {advice}"
    return None


def load(state: TrainState, path: Path) -> None:
    """Put a checkpoint into `state`, whose optimizers keep their own learning rates, weight decay and the like.

    Raises UserError, naming file or folder, when the checkpoint is damaged or of a model with other parameters.
    """
    options = [[_options(group) for group in optimizer.param_groups] for optimizer in state.optimizers]
    (fault, *_) = distributed.gather(damage(path) if distributed.is_main() else None)
    if fault:
        raise UserError(fault)
    try:
        run = json.loads((path / RUN).read_text())
        tensors = _tensors(state, distributed.rank() % run["processes"])
        dcp.load(tensors, checkpoint_id=path, no_dist=distributed.num_processes() == 1)
        set_state_dict(
            state.model, state.optimizers, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizers"]
        )
        state.step, state.num_tokens, state.seconds = run["step"], run["num_tokens"], run["seconds"]
        state.corpus.load_state_dict(run["corpus"])
    except (Exception, CheckpointException) as error:  # what DCP raises depends on the damage; not all are Exceptions
        raise UserError(f"{path} does not fit this recipe, or is damaged: {_cause(error)}") from error
    for optimizer, saved in zip(state.optimizers, options, strict=True):
        for group, values in zip(optimizer.param_groups, saved, strict=True):
            group.update(values)
    (random,) = tensors["random"].values()
    torch.set_rng_state(random["cpu"])
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"])


def _tensors(state: TrainState, rank: int) -> dict[str, Any]:
    """All tensors of a run. Our models draw from seeds; torch's own generators are here for those that do not."""
    model, optimizers = get_state_dict(state.model, state.optimizers)
    random: dict[str, Tensor] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    ema = state.ema.average if state.ema else {}
    return {"model": model, "optimizers": optimizers, "ema": ema, "random": {str(rank): random}}


def num_bytes(state: TrainState) -> int:
    """What a checkpoint takes on disk, but for its plain values."""
    return _num_bytes(_tensors(state, 0))


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(_num_bytes(part) for part in parts)


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _cause(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
