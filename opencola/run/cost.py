"""What training costs, counted by doing it: operations and bytes, on tensors that need not have any memory.

Inside `unreal()` every tensor has a shape, a type and a device, but no contents: a step of a model of billions of
parameters then takes seconds and a few megabytes, and its counts are those of the real step.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from opencola.data.batch import Batch
from opencola.models.language_model import Trainable
from opencola.train.distributed import repeated_blocks
from opencola.train.loop import TrainConfig
from opencola.train.optimizer import EMA, build

SAVED = ("trained weights", "frozen weights", "optimizer", "moving average")
"""Parts of `state_bytes` that a checkpoint holds."""
ATEN = torch.ops.aten
# torch's formulas, by operation; it has none for its CPU kernels of attention, whose arguments begin like the others'.
FORMULAS: dict[Any, Any] = {
    **flop_registry,
    ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[ATEN._scaled_dot_product_flash_attention],
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        ATEN._scaled_dot_product_flash_attention_backward
    ],
}


@contextmanager
def unreal(*models: nn.Module) -> Iterator[None]:
    """While it lasts, new tensors are meta tensors that pass for tensors of the CPU; real ones may be mixed in.

    models: built under `torch.device("meta")`, all but their first pass; they pass for models on the CPU from then on.
    Not to be built in here: what copies parameters (copy.deepcopy) copies torch's bookkeeping, which crashes it later.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        for model in models:
            model.to_empty(device="cpu")
        yield


@dataclass(frozen=True)
class PassCost:
    """A forward and a backward pass."""

    flops: int
    """Multiplications and additions of matrix products, attention included; what is computed again counts again."""
    moved_bytes: int
    """What all other operations read and write, each on its own, as without a compiler that fuses them."""
    kernels: int
    """Operations that compute or copy something."""
    peak_bytes: int
    """Most that lives at once beside the parameters and their gradients: what the backward pass waits for, and what is
    being worked on. Under autocast the low-precision copies of the weights are among it."""


def of_pass(model: Trainable, batch: Batch, bf16: bool) -> PassCost:
    """Cost of one pass, as the training loop makes it; the model, without gradients before, has them afterwards."""
    assert isinstance(model, nn.Module)
    device = batch.tokens.device.type
    with Meter([*model.parameters(), *model.buffers()]) as meter:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = model.loss(batch)
        loss.total.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return PassCost(meter.flops, meter.moved_bytes, meter.kernels, meter.peak_bytes(gradients))


def state_bytes(model: Trainable, config: TrainConfig) -> dict[str, int]:
    """Bytes of all that outlives a step, by part: made as the training loop makes it, and then measured."""
    assert isinstance(model, nn.Module)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
    optimizers = build(model, model.learning_rate_ratios(), config)
    return {
        "trained weights": size(trained),
        "frozen weights": size(frozen),
        "optimizer": sum(size(state.values()) for optimizer in optimizers for state in optimizer.state.values()),
        "moving average": size(EMA(model, config.ema).average.values()) if config.ema else 0,
        "gradients": size(trained),
    }


def gathered_bytes(model: nn.Module) -> int:
    """Bytes that a process holds of weights which are not its own, where they are sharded (a rule, not a count).

    A block's weights are gathered when it computes, and the next one's beside it; what stands outside blocks (elements
    of an nn.ModuleList) stays gathered. Gradients are whole until they are handed out: those of the larger of both.
    """
    blocks = repeated_blocks(model)
    largest = max((size(block.parameters()) for block in blocks), default=0)
    rest = size(model.parameters()) - sum(size(block.parameters()) for block in blocks)
    return rest + 2 * largest + max(rest, largest)


def size(tensors: Iterable[Tensor]) -> int:
    """Their bytes together."""
    return sum(tensor.nbytes for tensor in tensors)


class Meter(TorchDispatchMode):
    """While it lasts, counts operations, and the bytes of the tensors that appear and vanish."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        """`known`: tensors that are there already, and do not count."""
        super().__init__()
        self.flops = self.moved_bytes = self.kernels = 0
        self._numbers: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        self._changes: list[tuple[int, int]] = []  # a storage's number, and its bytes: negative when they are freed
        for number, tensor in enumerate(known):
            self._numbers[tensor.untyped_storage()] = -1 - number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        works = func._schema.is_mutable
        is_view = any(returned.alias_info for returned in func._schema.returns)
        for tensor in () if is_view else out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._numbers:
                works = True
                self._numbers[storage] = number = len(self._changes)
                self._changes.append((number, storage.nbytes()))
                weakref.finalize(storage, self._changes.append, (number, -storage.nbytes()))
        if works:
            self.kernels += 1
            if formula := FORMULAS.get(func._overloadpacket):
                self.flops += formula(*args, **kwargs, out_val=out)
            else:
                moved = (t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
                self.moved_bytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in moved)
        return out

    def peak_bytes(self, ignored: Iterable[Tensor]) -> int:
        """Most bytes that lived at once, without those of some tensors that are still there."""
        numbers = {self._numbers.get(tensor.untyped_storage()) for tensor in ignored}
        now = peak = 0
        for number, change in self._changes:
            now += change if number not in numbers else 0
            peak = max(peak, now)
        return peak
