"""Several processes that train one model: started by torchrun, laid out as a mesh replicate x shard, sharded by FSDP2.

A single process has no process group, and everything here then does nothing.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")


@contextmanager
def connected(device: torch.device) -> Iterator[None]:
    """While it lasts, the processes that torchrun started are connected: by gloo for the CPU and NCCL for GPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_processes() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and reports."""
    return rank() == 0


def mesh(replicate: int, shard: int, device: torch.device) -> DeviceMesh | None:
    """The mesh replicate x shard of all processes (shard 0: as many as are left); None for one process.

    That the two make the number of processes is `opencola.run.checks`' to say, before anything is loaded.
    """
    if num_processes() == 1:
        return None
    shape = (replicate, shard or num_processes() // replicate)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model is a stack of: the elements of its module lists."""
    return [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]


def shard(model: nn.Module, mesh: DeviceMesh | None) -> None:
    """Shard a model's parameters over the mesh, in place: block by block, and what is outside of blocks together.

    The batch is divided among all processes; gradients are their means.
    """
    if mesh is None:
        return
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for block in repeated_blocks(model):
        for name, child in block.named_children():
            if name == "modulation":  # called for all blocks at once, before the blocks are
                fully_shard(child, mesh=mesh)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor as it is. Writing to it writes to the whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every process; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, whole: Tensor) -> Tensor:
    """A sharded tensor whose part on this process is `part`, laid out like `whole`; `part` if that is not sharded."""
    if not isinstance(whole, DTensor):
        return part
    layout: dict[str, Any] = {"shape": whole.shape, "stride": whole.stride()}
    return DTensor.from_local(part, whole.device_mesh, whole.placements, run_check=False, **layout)


def part_of(value: Tensor, whole: Tensor) -> Tensor:
    """This process's part of a value that all have, cut like `whole`; all of it if that is not sharded."""
    if not isinstance(whole, DTensor):
        return value
    return local(distribute_tensor(value, whole.device_mesh, whole.placements, src_data_rank=None))


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's whole state, on the CPU of the main process; nothing on the others, which must take part."""
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        value = full(tensor)
        if is_main():
            weights[name] = value.detach().to("cpu", copy=True)
    return weights


def mean(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Means over the processes of scalars or vectors that all of them have."""
    if num_processes() == 1 or not values:
        return dict(values)
    flat = torch.cat([value.detach().double().flatten() for value in values.values()])
    dist.all_reduce(flat)
    parts = (flat / num_processes()).split([value.numel() for value in values.values()])
    return {
        name: part.view_as(value).to(value.dtype) for (name, value), part in zip(values.items(), parts, strict=True)
    }


def largest(*values: float) -> list[float]:
    """The largest value that any process has, of each."""
    if num_processes() == 1:
        return list(values)
    both = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return both.tolist()


def gather(value: T) -> list[T]:
    """What each process has of a plain value, by rank."""
    if num_processes() == 1:
        return [value]
    values: list[Any] = [None] * num_processes()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all processes."""
    if num_processes() > 1:
        dist.barrier()


def counts_of_step(counts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What each of several parts of a batch scores (`Trainable.counts`), as means over all parts of all processes."""
    return mean({name: torch.stack([part[name].double() for part in counts]).mean(0) for name in counts[0]})
