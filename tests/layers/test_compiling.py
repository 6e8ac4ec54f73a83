"""Blocks compiled by torch.compile: the same numbers, few graphs, and none made again from step to step."""

import copy
import functools
from collections.abc import Iterator

import pytest
import torch
from tiny import tiny_dit
from torch import Tensor
from torch._dynamo.utils import counters

from opencola.flow.dit import BlockCausalDiT
from opencola.layers import packed, randomness
from opencola.layers.compiling import compile_blocks


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What compiling changes in modules is for this process, and here for one test."""
    monkeypatch.setattr(packed, "packed_attention", packed.packed_attention)
    for name in ("normal", "uniform"):
        monkeypatch.setattr(randomness, name, getattr(randomness, name))
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def step(dit: BlockCausalDiT, number: int) -> list[Tensor]:
    """Velocity and gradients of random rows, others at every step."""
    torch.manual_seed(number)
    z_0, z_t, t = torch.randn(2, 64, 4), torch.randn(2, 1, 64, 4), torch.rand(2, 1, 16)
    velocity = dit.packed(z_0, z_t, t, history=torch.rand(2) < 0.5)
    gradients = torch.autograd.grad(velocity.square().mean(), [*dit.parameters()])
    return [velocity, *gradients]


def compare(backend: str, layers: int) -> None:
    dit = tiny_dit(num_layers=layers, head_dim=16).float()
    compiled = copy.deepcopy(dit)
    compile_blocks(compiled.blocks, backend)
    graphs = []
    for number in range(2):
        for found, expected in zip(step(compiled, number), step(dit, number), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    # before and behind the attention: of the first block, whose number is a constant there, of others, and of the last
    assert 2 <= graphs[0] <= 6 and graphs[1] == graphs[0]


def test_blocks_are_a_few_graphs_however_many_and_however_often() -> None:
    compare("eager", layers=4)


@pytest.mark.slow
def test_blocks_compiled_to_machine_code_are_the_blocks() -> None:
    compare("inductor", layers=2)


def attend_as_on_cuda(monkeypatch: pytest.MonkeyPatch, backend: str, steps: int) -> list[int]:
    """Graphs that FlexAttention has been compiled to after steps that each have rows of their own; no gradients."""
    graphs = []
    monkeypatch.setattr(packed, "_compiled", functools.cache(functools.partial(torch.compile, backend=backend)))
    for _ in range(steps):
        q, k, v = torch.randn(3, 2, 380, 2, 16)
        rows = packed.PackedRows(124, 128, 4, 2, history=torch.rand(2) < 0.5)
        for start in (0, 124):  # the clean rows do not ask in the last layer
            expected = packed.flexible(q[:, start:], k, v, None, packed.Shared(rows))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.Tensor, "is_cuda", True)
                found = packed.flexible(q[:, start:], k, v, None, packed.Shared(rows))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


def test_flex_attention_is_not_compiled_anew_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = attend_as_on_cuda(monkeypatch, "eager", steps=4)
    assert 1 <= graphs[1] <= 4 and graphs[2:] == graphs[1:2] * 2


@pytest.mark.slow
def test_flex_attention_compiled_to_machine_code_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    attend_as_on_cuda(monkeypatch, "inductor", steps=1)
