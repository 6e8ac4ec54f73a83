"""What is counted without memory equals what real tensors take, and what can be worked out by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_batch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from opencola.data.batch import Batch
from opencola.flow.dit import DiTConfig
from opencola.kernels import library
from opencola.models.cola.model import Cola
from opencola.models.cola.parts import ColaConfig, PriorObjective
from opencola.models.cola.stage_one import StageOne, StageOneConfig
from opencola.models.language_model import Loss
from opencola.run.cost import Meter, gathered_bytes, of_pass, state_bytes, unreal
from opencola.train.loop import TrainConfig
from opencola.vae.text_vae import TextVAEConfig

VAE = TextVAEConfig(vocab_size=30, latent_dim=4, width=16, ffn_dim=24, num_heads=2, encoder_layers=2, decoder_layers=1)
DIT = DiTConfig(latent_dim=4, width=16, num_layers=2, num_heads=2, head_dim=8, rope_dim=6, block_size=4)


def stage_one() -> StageOne:
    torch.manual_seed(0)
    return StageOne(StageOneConfig(VAE))


def cola(**prior: Any) -> Cola:
    torch.manual_seed(0)
    model = Cola(ColaConfig(VAE, DIT, prior=PriorObjective(**prior)))
    for parameter in model.dit.parameters():  # zeros, which the DiT starts with, change no count, but this is no luck
        nn.init.normal_(parameter, std=0.1)
    model.freeze_parts()
    return model


class Perceptron(nn.Module):
    """Tokens of width 8 through two matrices to a square."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 32, bias=False), nn.Linear(32, 4, bias=False)])
        self.outside = nn.Parameter(torch.ones(5))

    def loss(self, batch: Batch) -> Loss:
        x = batch.tokens.new_zeros((*batch.tokens.shape, 8), dtype=torch.float32)
        for block in self.blocks:
            x = block(x)
        return Loss((x * x).sum(), {}, {})

    def learning_rate_ratios(self) -> dict[str, float]:
        return {}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "build",
    [
        stage_one,
        lambda: cola(strategy="joint"),
        lambda: cola(strategy="joint", recompute=True),
        lambda: cola(strategy="fixed", noisy_copies=1),
    ],
    ids=["stage_one", "joint", "recompute", "fixed"],
)
def test_without_memory_the_counts_are_those_of_real_tensors(build: Callable[[], Any], bf16: bool) -> None:
    with library.switched_off():  # whose work nobody counts
        real = of_pass(build(), tiny_batch(), bf16)
    ids = torch.arange(3)
    with torch.device("meta"):
        model = build()
    with unreal(model):
        assert of_pass(model, Batch(torch.zeros(3, 12, dtype=torch.long), ids, 5, 0), bf16) == real
    assert min(real.flops, real.moved_bytes, real.kernels, real.peak_bytes) > 0


def test_products_are_those_that_torch_counts() -> None:
    """Of attention torch counts the plain kind only on a CPU, whose backward pass has four products for the two of the
    forward pass; ours, like those of GPUs, keeps no scores and computes them a second time."""
    with library.switched_off(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        cola().loss(tiny_batch()).total.backward()
    with library.switched_off(), sdpa_kernel(SDPBackend.MATH):
        assert of_pass(cola(), tiny_batch(), False).flops == counter.get_total_flops()
    rows, layers = 2 * 3, VAE.encoder_layers + VAE.decoder_layers  # the masked view is computed, too
    again = layers * rows * 2 * 12 * 12 * VAE.width
    with library.switched_off():
        assert of_pass(cola(), tiny_batch(), False).flops == counter.get_total_flops() + again


def test_a_pass_by_hand() -> None:
    model, rows = Perceptron(), 3 * 12
    cost = of_pass(model, tiny_batch(), False)
    forward = 2 * rows * (8 * 32 + 32 * 4)
    assert cost.flops == 2 * forward + 2 * rows * 32 * 4  # gradients of both matrices, and of the hidden layer
    # when the hidden layer gets its gradient: input, hidden layer and output, the latter two's gradients but not the
    # output itself, which only the square needs; and two scalars, the loss and its gradient
    assert cost.peak_bytes == 4 * (rows * (8 + 32 + 32 + 4) + 2)
    assert model.blocks[0].weight.grad is not None


@pytest.mark.parametrize("build", [stage_one, cola])
def test_the_peak_holds_what_the_backward_pass_waits_for_and_little_more(build: Callable[[], Any]) -> None:
    model, saved = build(), dict[int, int]()
    kept: list[Tensor] = []  # so that no address is used twice
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in parameters:
            saved[place] = tensor.untyped_storage().nbytes()
            kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.loss(tiny_batch())
    peak = of_pass(build(), tiny_batch(), False).peak_bytes
    assert loss.total.requires_grad
    assert sum(saved.values()) < peak < 1.2 * sum(saved.values())


def test_recomputation_keeps_less_and_computes_more() -> None:
    plain, again = (of_pass(cola(recompute=recompute), tiny_batch(), False) for recompute in (False, True))
    assert again.peak_bytes < plain.peak_bytes and again.flops > plain.flops


def test_the_meter_sees_tensors_come_and_go() -> None:
    known = torch.zeros(1000)
    with Meter([known]) as meter:
        a = known[:100] + 1
        b = a.view(10, 10).exp()
        del a
        c = torch.zeros(70)
        c.add_(1)
        b.t()
    assert meter.peak_bytes([]) == 4 * 200
    assert meter.peak_bytes([b]) == 4 * 100
    assert meter.flops == 0
    assert meter.kernels >= 4
    filled = 4 * 70  # by torch.zeros
    assert meter.moved_bytes == 4 * (200 + 200 + 2 * 70) + filled


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("strategy", ["joint", "fixed"])
def test_state_is_what_training_keeps(optimizer: Any, strategy: str) -> None:
    config = TrainConfig(optimizer=optimizer, ema=0.5)
    model = cola(strategy=strategy)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = state_bytes(model, config)
    assert state["trained weights"] == state["gradients"] == state["moving average"] == 4 * trained
    assert sum(state.values()) == 12 * trained + state["frozen weights"] + state["optimizer"]
    frozen = model.vae if strategy == "fixed" else model.reference
    assert frozen is not None and state["frozen weights"] == 4 * sum(p.numel() for p in frozen.parameters())
    counts = len([p for p in model.parameters() if p.requires_grad])  # AdamW counts steps for each parameter
    if optimizer == "adamw":
        assert state["optimizer"] == 8 * trained + 4 * counts
    else:
        assert 4 * trained < state["optimizer"] < 8 * trained
    with torch.device("meta"):
        model = cola(strategy=strategy)
    with unreal(model):
        assert state_bytes(model, config) == state
    assert (
        "moving average" in state_bytes(model, TrainConfig())
        and not state_bytes(model, TrainConfig())["moving average"]
    )


def test_gathered_weights_by_hand() -> None:
    largest, other, outside = 8 * 32, 32 * 4, 5
    assert gathered_bytes(Perceptron()) == 4 * (outside + 2 * largest + max(outside, largest))
    assert sum(p.numel() for p in Perceptron().parameters()) == largest + other + outside
