"""Logged means are those over everything that the steps had: of one batch that holds all rows, by brute force."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, randomise, tiny_batch, tiny_cola, tiny_llada, vae_config

from opencola.data.batch import Batch
from opencola.layers.llama import LlamaConfig
from opencola.models.ar.model import AR
from opencola.models.ar.network import ARConfig
from opencola.models.cola.stage_one import StageOne, StageOneConfig
from opencola.models.language_model import Loss
from opencola.models.plaid.model import Plaid
from opencola.models.plaid.network import PlaidConfig
from opencola.train.checkpoint import TrainState
from opencola.train.loop import TrainConfig, backward
from opencola.train.tracker import RunLog
from opencola.vae.objective import VAEObjective

TRUNK = LlamaConfig(width=16, num_layers=1, num_heads=2, ffn_dim=24)
OBJECTIVE = {"beta": 0.3, "lambda_mask": 0.6, "mask_ratio": 0.4}
MODELS = {
    "ar": lambda: randomise(AR(ARConfig(vocab_size=VOCABULARY, trunk=TRUNK))),
    "llada": tiny_llada,
    "plaid": lambda: Plaid(PlaidConfig(vocab_size=VOCABULARY, embedding_dim=4, trunk=TRUNK)).double(),
    "vae": lambda: randomise(StageOne(StageOneConfig(vae_config(), VAEObjective(**OBJECTIVE)))),
    "cola": lambda: tiny_cola(dit={"block_size": 2}, objective=OBJECTIVE, prompt_in_block=0.5),
    "fixed": lambda: tiny_cola(dit={"block_size": 2}, strategy="fixed", prompt_in_block=0.5),
}
SIZE, LENGTH = 4, 12
COUNTED = (1, 48, 5, 20)
"""Scored tokens of the batches."""


def whole_batch() -> Batch:
    """The rows of all batches; those of one have another number of scored tokens than those of another."""
    rows = SIZE * len(COUNTED)
    tokens = torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(2))
    scored = [torch.randperm(SIZE * LENGTH, generator=torch.Generator().manual_seed(n)) < n for n in COUNTED]
    return Batch(tokens, torch.arange(rows), 5, 0, scored=torch.cat(scored).view(-1, LENGTH))


def logged(model: Any, batches: list[Batch], folder: Path, accumulate: int = 1) -> dict[str, Any]:
    """The record of steps on these batches."""
    state = TrainState(torch.nn.Linear(1, 1), [], None, iter(()))  # type: ignore[arg-type]
    config, record = TrainConfig(accumulate=accumulate), None
    with RunLog(folder, state, len(batches), display=False) as report:
        for batch in batches:
            state.step, state.seconds = state.step + 1, state.seconds + 1
            loss = backward(model, batch, config)
            record = report.step(state, 0.5, loss, torch.tensor(0.0), {}, batch)
    assert record is not None
    return record


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_every_mean_is_over_what_it_counts(name: str, accumulate: int, tmp_path: Path) -> None:
    model, whole = MODELS[name](), whole_batch()
    if name == "fixed":
        model.freeze_parts()
    batches = [whole.rows(slice(first, first + SIZE)) for first in range(0, len(whole.ids), SIZE)]
    assert [int(batch.is_scored().sum()) for batch in batches] == [*COUNTED]
    record = logged(model, batches, tmp_path, accumulate)
    torch.manual_seed(0)
    loss = model.loss(whole).detach()
    found = {name: record[f"loss/{name}"] for name in loss.terms}
    assert found == pytest.approx({name: term.item() for name, term in loss.terms.items()}, rel=1e-9)
    assert record["loss"] == pytest.approx(loss.total.item(), rel=1e-9)
    for metric in loss.metrics.keys() & {"token_accuracy", "masked_accuracy", "reconstruction_accuracy"}:
        assert record[metric] == pytest.approx(loss.metrics[metric].item(), rel=1e-6)
    assert record["scored"] == pytest.approx(sum(COUNTED) / whole.tokens.numel())


def test_terms_that_come_and_go_are_in_the_loss_as_often_as_they_were_there(tmp_path: Path) -> None:
    model = tiny_cola(dit={"block_size": 2}, objective=OBJECTIVE, strategy="interval", joint_steps=1, frozen_steps=2)
    model.freeze_parts()
    whole = replace(whole_batch(), scored=None)
    batches = [replace(whole.rows(slice(4 * step, 4 * step + 4)), step=step) for step in range(3)]
    record = logged(model, batches, tmp_path)
    losses = [model.loss(batch).detach() for batch in batches]
    assert record["loss/cross_entropy"] == pytest.approx(losses[0].terms["cross_entropy"].item(), rel=1e-12)
    assert [len(loss.terms) for loss in losses] == [5, 1, 1]
    terms = list(itertools.chain.from_iterable(loss.terms for loss in losses))
    shares = {name: terms.count(name) / 3 for name in terms}
    assert record["loss"] == pytest.approx(sum(share * record[f"loss/{name}"] for name, share in shares.items()))
    flow = sum(loss.terms["flow_matching"] * loss.counts["flow_matching"] for loss in losses)
    count = sum(int(loss.counts["flow_matching"]) for loss in losses)
    assert record["loss/flow_matching"] == pytest.approx(float(flow) / count, rel=1e-12)


def test_a_term_that_counts_nothing_has_no_mean(tmp_path: Path) -> None:
    state = TrainState(torch.nn.Linear(1, 1), [], None, iter(()))  # type: ignore[arg-type]
    terms = {"ce": torch.tensor(2.0), "mask": torch.tensor(0.0), "kl": torch.tensor(0.5)}
    counts = {"ce": torch.tensor(3), "mask": torch.tensor(0)}
    with RunLog(tmp_path, state, 1, display=False) as report:
        state.step, state.seconds = 1, 1.0
        loss = Loss(torch.tensor(2.5), terms, {}, counts)
        record = report.step(state, 0.5, loss, torch.tensor(0.0), {}, tiny_batch())
    assert record is not None and record["loss/mask"] is None
    assert math.isclose(record["loss"], 2.5) and record["loss/kl"] == 0.5  # type: ignore[arg-type]
