"""When a loss that is still finite has gone wrong, and which checkpoint is from before that."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from opencola.errors import NotFiniteError
from opencola.train.checkpoint import checkpoints, latest
from opencola.train.distributed import is_main

PATIENCE = 2  # records in a row: a single bad batch makes one
FLOOR = 0.1  # nats per token, or squared velocity: a rise that is never one


class Divergence:
    """Watches a run's records, each a mean of the loss over some steps.

    A record is bad when its loss lies above the lowest one so far by more than `factor` - 1 times that one's size, more
    than half of what had been gained since the first record, and more than FLOOR. Records are compared by the terms
    that both have: in `interval` the VAE's come and go. So neither a loss that begins near
    its end stops a run, nor one that has become tiny, as a Text VAE's does, or negative. Two bad records in a row are a
    divergence.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.good_until = 0
        """Step of the last record that was not bad."""
        self._first: Mapping[str, Any] = {}
        self._best: Mapping[str, Any] = {}
        self._num_bad = 0

    @property
    def suspected(self) -> bool:
        """Whether the last record was bad, so that a checkpoint made now may hold a spoilt model."""
        return self._num_bad > 0

    def take(self, record: Mapping[str, Any]) -> str | None:
        """Take in the next record of metrics.jsonl; what has gone wrong, with the term that rose most, if it has."""
        if not terms(record):
            return None
        first, best = self._first, self._best = self._first or record, self._best or record
        common = [term for term in terms(record) if term in terms(best)]
        rise, lowest = (sum(values) for values in ((record[t] - best[t] for t in common), (best[t] for t in common)))
        gained = sum(first[term] - best[term] for term in common if term in terms(first))
        if self.factor and rise > max((self.factor - 1) * abs(lowest), gained / 2, FLOOR):
            self._num_bad += 1
            return self._fault(record) if self._num_bad >= PATIENCE else None
        self._num_bad, self.good_until = 0, record["step"]
        if rise < 0:
            self._best = record
        return None

    def _fault(self, record: Mapping[str, Any]) -> str:
        best = self._best
        worst = max((term for term in terms(record) if term in terms(best)), key=lambda term: record[term] - best[term])
        return (
            f"the loss diverged: {record['loss']:.4g} at step {record['step']}, after {best['loss']:.4g} at step "
            f"{best['step']}; term {worst.removeprefix('loss/')} rose most, from {best[worst]:.4g} to "
            f"{record[worst]:.4g}"
        )

    def stop(self, fault: str, folder: Path) -> NoReturn:
        """Raise NotFiniteError with the fault and how to go on, from the last good checkpoint in `folder`."""
        last = set_aside(folder, self.good_until) if self.suspected else latest(folder)
        where = last or "the start, as there is no checkpoint yet"
        raise NotFiniteError(
            f"{fault}; lower train.learning_rate and train.muon_learning_rate, and go on with --resume from {where}"
        )


def terms(record: Mapping[str, Any]) -> list[str]:
    """The terms that a record's loss is the sum of."""
    return [name for name, value in record.items() if name.startswith("loss/") and value is not None]


def set_aside(folder: Path, good_until: int) -> Path | None:
    """The newest checkpoint of which a later record was good; newer ones are renamed to `suspect-step-NNNNNN`.

    Where there is no such checkpoint all stay as they are, and the newest is returned, or None. Of several processes
    the main one renames.
    """
    saved = checkpoints(folder)
    good = [path for path in saved if int(path.name.removeprefix("step-")) < good_until]
    if not good:
        return latest(folder)
    for path in saved[len(good) :] if is_main() else []:
        suspect = path.with_name(f"suspect-{path.name}")
        shutil.rmtree(suspect, ignore_errors=True)
        path.rename(suspect)
    return good[-1]
