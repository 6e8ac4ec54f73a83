"""What scoring leaves out, and how it groups texts, changes no figure."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import tiny_cola
from torch import Tensor

from opencola.flow.likelihood import Density, Likelihood, draw_probes, log_density
from opencola.models.cola import score
from opencola.models.cola.model import Cola
from opencola.models.cola.score import Scoring, log_prior

FAST = Scoring(solver="euler", steps=2, samples=3, divergence="exact", rows=100)
TEXTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2]]
PROMPTS = [[1, 2, 3, 4, 5] * 4, [], [9, 8, 7, 6]]


def with_all_rows(cola: Cola, z_0: Tensor, keys: Any, settings: Likelihood, free: Tensor) -> Density:
    """`log_prior` with all rows, clean and noisy, in every evaluation."""
    size = cola.dit.config.block_size
    z, moves = (x.unflatten(1, (-1, size)) for x in (z_0, free[..., None].expand_as(z_0)))

    def velocity(z: Tensor, t: float) -> Tensor:
        times = z.new_full((len(z), 1, 1), t)
        v = cola.dit.packed(z_0, z.flatten(1, 2)[:, None], times, pinned=~free[:, None])
        return v[:, 0].unflatten(1, (-1, size))

    return log_density(velocity, z, settings, draw_probes(z, keys, settings), moves)


@pytest.mark.parametrize(
    ("fields", "dtype", "rtol"),
    [
        ({}, torch.float64, 1e-12),
        ({}, torch.float32, 1e-6),
        ({"divergence": "hutchinson", "probes": 2}, torch.float64, 1e-12),
        ({"divergence": "hutchinson", "solver": "dopri5"}, torch.float64, 1e-12),  # its steps amplify rounding
    ],
)
@pytest.mark.parametrize(("size", "length"), [(1, 12), (4, 12), (1, 140), (4, 144)])
def test_rows_that_are_left_out_change_nothing(
    size: int, length: int, fields: dict[str, Any], dtype: torch.dtype, rtol: float
) -> None:
    cola = tiny_cola(dit={"block_size": size})
    cola.dit.velocity_out.weight.data *= 0.1
    cola, z_0, keys = cola.to(dtype), torch.randn(3, length, 4).to(dtype), [(5, 0), (5, 1), (6, 0)]
    settings = replace(FAST, tolerance=0.1, **fields)
    for begin, end in ((0, 0), (2, 0), (6, 3), (length - 1, 0)):
        free = torch.zeros(3, length, dtype=torch.bool)
        free[:2, begin:], free[2, begin + (length - begin) // 2 : length - end] = True, True
        found, expected = (f(cola, z_0, keys, settings, free) for f in (log_prior, with_all_rows))
        assert found.evaluations == expected.evaluations
        for name in ("log_prob", "by_probe", "z_1"):
            ours, all_rows = getattr(found, name), getattr(expected, name)
            torch.testing.assert_close(ours, all_rows, rtol=rtol, atol=rtol * all_rows.abs().max().item())
        assert (found.log_prob[:, : begin // size] == 0).all() and (found.log_prob[:2, -1] != 0).all()


@pytest.mark.parametrize("conditional", ["joint", "blockwise", "first_block"])
def test_scores_are_those_with_all_rows(conditional: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cola, settings = tiny_cola(vae={"patch_size": 2}), replace(FAST, conditional=conditional)
    found = cola.score(PROMPTS, TEXTS, settings).total
    monkeypatch.setattr(score, "log_prior", with_all_rows)
    monkeypatch.setattr(score, "_batches", lambda jobs, chunk, most: [list(jobs)])
    torch.testing.assert_close(found, cola.score(PROMPTS, TEXTS, settings).total, rtol=1e-12, atol=0)


def test_texts_are_solved_together_where_that_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    cola, settings, batches = tiny_cola(), replace(FAST, samples=1), []
    lengths = [(100, 5), (0, 9), (100, 12), (0, 60), (101, 6), (0, 11), (200, 5)]  # of prompt and continuation

    def recorded(model: Cola, z_0: Tensor, keys: Any, settings: Likelihood, free: Tensor) -> Density:
        batches.append([id_ for id_, _ in keys])
        return log_prior(model, z_0, keys, settings, free)

    monkeypatch.setattr(score, "log_prior", recorded)
    prompts, texts = zip(*(([1] * prompt, [2] * text) for prompt, text in lengths), strict=True)
    cola.score(prompts, texts, settings)
    assert batches == [[1, 5], [3], [0, 4, 2], [6]]
    batches.clear()
    cola.score(prompts, texts, replace(settings, rows=2))
    assert batches == [[1, 5], [3], [0, 4], [2], [6]]
