"""Packed flow-matching training gives the official velocities, loss and gradients."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from opencola.checkpoints import names
from opencola.flow.dit import BlockCausalDiT
from opencola.flow.path import interpolate, target_velocity
from opencola.layers import masks
from opencola.layers.attention import masked
from opencola.models.cola.model import masked_mean_square

TOLERANCE: dict[str, Any] = {"atol": 2e-5, "rtol": 0}


def with_block_size(dit: BlockCausalDiT, block_size: int) -> BlockCausalDiT:
    """The same parameters, cut into other blocks."""
    other = copy.copy(dit)
    other.config = replace(dit.config, block_size=block_size)
    return other


def samples(dit: BlockCausalDiT, meta: dict[str, Any], expected: dict[str, Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Velocity, target and scored rows of each sample, batch and copies leading."""
    for i, sample in enumerate(meta["train_2l"]["samples"]):
        z_0, z_1, t = expected[f"z0_{i}"][None], expected[f"z1_{i}"][None], expected[f"t_{i}"].view(1, 1, 1)
        pinned = (expected[f"ts_noisy_{i}"] == 0)[None, None]
        z_t = torch.where(pinned[..., None], z_0, interpolate(z_0, z_1, t))
        assert_close(z_t[0, 0], expected[f"z_noisy_{i}"], **TOLERANCE)
        part = with_block_size(dit, sample["block_size"])
        yield (
            part.packed(z_0, z_t, t, pinned),
            target_velocity(z_0, z_1)[None],
            expected[f"loss_mask_{i}"].bool()[None, None],
        )


def test_velocity(dit, meta, stored) -> None:
    expected = stored("train_2l")
    for i, (velocity, target, scored) in enumerate(samples(dit, meta, expected)):
        assert_close(velocity[0, 0], expected[f"v_noisy_{i}"], **TOLERANCE)
        assert_close(target[0, 0], expected[f"target_{i}"], **TOLERANCE)
        assert not bool((scored[0, 0] & (expected[f"ts_noisy_{i}"] == 0)).any())


def test_several_copies_in_one_pass(dit, meta, stored) -> None:
    """Noisy copies beside each other do not see each other, with a time per copy."""
    expected = stored("train_2l")
    for i, sample in enumerate(meta["train_2l"]["samples"]):
        z_0, z_t, t = expected[f"z0_{i}"][None], expected[f"z_noisy_{i}"], expected[f"t_{i}"]
        copies = torch.stack((torch.randn_like(z_t), z_t))[None]
        given = expected[f"ts_noisy_{i}"] == 0
        pinned = torch.stack((torch.zeros_like(given), given))[None]
        times = torch.stack((torch.full_like(t, 0.3), t)).view(1, 2, 1)
        velocity = with_block_size(dit, sample["block_size"]).packed(z_0, copies, times, pinned)
        assert_close(velocity[0, 1], expected[f"v_noisy_{i}"], **TOLERANCE)


def test_all_rows_under_the_dense_mask(dit, meta, stored) -> None:
    """The mask is the official one, and under it the clean rows come out right, too."""
    expected = stored("train_2l")
    all_masks = []
    for i, sample in enumerate(meta["train_2l"]["samples"]):
        length = sample["L"]
        rows = torch.cat((expected[f"z0_{i}"], expected[f"z_noisy_{i}"]))[None]
        rule = masks.clean_beside_noisy(length, length, sample["block_size"])
        mask = masks.dense(rule, 2 * length, 2 * length, rows.device)
        all_masks.append(mask)
        noisy = expected[f"ts_noisy_{i}"]
        t, place = torch.cat((torch.zeros_like(noisy), noisy)), torch.arange(length, device=rows.device)
        times, index = (t.double() / 1000).unique(return_inverse=True)
        velocity = dit(rows, dit.modulation(times), index[None], dit.turns(place.repeat(2)), masked(mask))[0]
        assert_close(velocity[:length], expected[f"v_clean_{i}"], **TOLERANCE)
        assert_close(velocity[length:], expected[f"v_noisy_{i}"], **TOLERANCE)
    assert torch.equal(torch.block_diag(*all_masks), expected["packed_allowed_mask"].bool())


def test_loss_and_gradients(dit, meta, stored) -> None:
    """The loss is one mean over the scored rows of all samples, whatever their lengths."""
    expected, gradients = stored("train_2l"), stored("train_2l_grads")
    parts = list(samples(dit, meta, expected))
    velocity, target, scored = (torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))
    loss = masked_mean_square(velocity, target, scored)
    assert loss.item() == pytest.approx(expected["loss"].item(), abs=1e-5)
    assert loss.item() == pytest.approx(meta["train_2l"].get("loss", loss.item()), abs=1e-5)
    loss.backward()
    found: dict[str, Tensor] = {}
    for name, parameter in dit.named_parameters():
        assert parameter.grad is not None, name
        found |= names.release_views(names.DIT, name, parameter.grad)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        largest = gradient.abs().max().item()
        assert largest > 0, name
        assert_close(found[name], gradient, atol=2e-4 * largest, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
