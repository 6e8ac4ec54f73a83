"""What moves the parameters: Muon and AdamW, parameter groups, the learning-rate schedule, the moving average."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opencola.errors import UserError
from opencola.kernels.choice import precision
from opencola.layers.operations import product_of_stacks
from opencola.ranges import Decay, NotNegative, Share, Size, check
from opencola.train.distributed import full, like, local, num_processes, part_of, rank, repeated_blocks


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning rates, schedule and moving average."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the matrices of the repeated blocks, AdamW for the rest; adamw: AdamW for everything."""
    learning_rate: NotNegative = 2e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: NotNegative = 0.02
    """Peak learning rate of Muon."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay of matrices and embeddings; biases and norm gains have none."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's decay rates of the averages of gradients and of squared gradients."""
    warmup: Size = 50
    """Number of steps over which the learning rates rise linearly to their peaks."""
    start: Share = 0.0
    """Share of the peak learning rates that they rise from."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the learning rates fall in the last part of the run."""
    decay: Share = 1.0
    """Share of the run, at its end, over which they fall (linear with 0.2: warm-up, stable, decay)."""
    final: Share = 0.05
    """Share of the peak learning rates left at the end."""
    ema: Decay = 0.0
    """Decay of the moving average of the weights that is evaluated and exported; 0: none."""

    def __post_init__(self) -> None:
        check(self)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every update of a matrix has singular values near 1 (Jordan et al. 2024).

    Nesterov momentum 0.95, decoupled weight decay, and a scale sqrt(max(1, rows / columns)), so that one learning rate
    (about 0.02) suits all shapes. Matrices of one shape go through one batched iteration. Unlike torch.optim.Muon it
    computes in float32 on the CPU, unless products are in bfloat16 there (`layers.device.bfloat16`).
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.02, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        if any(matrix.ndim != 2 for group in self.param_groups for matrix in group["params"]):
            raise UserError("Muon is for matrices: give vectors and higher tensors to AdamW")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in shapes.items():
                self._move(matrices, math.sqrt(max(1.0, shape[0] / shape[1])), group)
        return loss

    def _move(self, matrices: list[Tensor], scale: float, group: dict[str, Any]) -> None:
        gradients = [local(matrix.grad) for matrix in matrices if matrix.grad is not None]
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        momenta = [local(self.state[matrix]["momentum"]) for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
        whole = [full(like(part, matrix)) for part, matrix in zip(ahead, matrices, strict=True)]
        moved = orthogonalise_together(torch.stack(whole)).to(matrices[0].dtype)
        updates = [part_of(update, matrix) for update, matrix in zip(moved, matrices, strict=True)]
        parts = [local(matrix) for matrix in matrices]
        torch._foreach_mul_(parts, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parts, updates, alpha=-group["lr"] * scale)


def orthogonalise_together(matrices: Tensor) -> Tensor:
    """`orthogonalise` of matrices (M, R, C) that all processes have: each does some of them."""
    processes = num_processes()
    if processes == 1:
        return orthogonalise(matrices)
    share = -(-len(matrices) // processes)
    mine = matrices[rank() * share : (rank() + 1) * share]
    done = matrices.new_zeros(share, *matrices.shape[1:])
    if len(mine):
        done[: len(mine)] = orthogonalise(mine)
    gathered = matrices.new_empty(processes * share, *matrices.shape[1:])
    dist.all_gather_single(gathered, done)
    return gathered[: len(matrices)]


def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices (M, R, C) -> the same with all singular values moved to about 1 (between 0.7 and 1.2).

    Five Newton-Schulz iterations X <- aX + b(XX')X + c(XX')²X with the coefficients of Jordan et al. 2024, whose slope
    at 0 is steepest; in bfloat16 on an accelerator and where products are, else in float32. The factors of X are
    polynomials of XX', so for long matrices they are multiplied up first, on the short side (in float32: bfloat16 would
    lose small values).
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    long = x.shape[-1] > 2 * x.shape[-2] and x.dtype == torch.float32 and precision() == "float32"
    gram = product_of_stacks(x, x)
    identity = torch.eye(gram.shape[-1], dtype=x.dtype, device=x.device)
    y = identity.expand_as(gram) if long else x
    for _ in range(5):
        factor = torch.add(-4.7750 * gram, product_of_stacks(gram, gram), alpha=2.0315) + 3.4445 * identity
        y = product_of_stacks(factor, y.mT)
        gram = product_of_stacks(product_of_stacks(factor, gram), factor) if long else product_of_stacks(y, y)
    x = product_of_stacks(y, x.mT) if long else y
    return x.mT if tall else x


def build(model: nn.Module, ratios: dict[str, float], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of the parameters that require gradients (one, or two with Muon), at their peak learning rates.

    `ratios` are factors on the learning rates by prefix of the parameters' names (1 elsewhere); of several prefixes
    that fit a name the longest counts. Raises UserError for a prefix that fits no parameter, and where nothing is left
    to train.
    """
    hidden = hidden_matrices(model) if config.optimizer == "muon" else set()
    groups: dict[bool, dict[tuple[float, float], list[Tensor]]] = {True: {}, False: {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ratio = ratios[max(fits, key=len)] if (fits := [p for p in ratios if name.startswith(p)]) else 1.0
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups[parameter in hidden].setdefault((ratio, decay), []).append(parameter)
    names = [name for name, _ in model.named_parameters()]
    if unused := [p for p in ratios if not any(name.startswith(p) for name in names)]:
        raise UserError(f"a learning-rate ratio is given for {unused[0]!r}, but no parameter's name begins so")
    if not groups[True] and not groups[False]:
        raise UserError("nothing to train: no parameter of the model requires a gradient")

    def with_options(muon: bool, peak: float) -> list[dict[str, Any]]:
        return [
            {"params": parameters, "lr": peak * ratio, "peak": peak * ratio, "weight_decay": decay}
            for (ratio, decay), parameters in groups[muon].items()
        ]

    optimizers: list[torch.optim.Optimizer] = []
    if groups[True]:
        optimizers.append(Muon(with_options(True, config.muon_learning_rate)))
    if groups[False]:
        optimizers.append(torch.optim.AdamW(with_options(False, config.learning_rate), betas=config.betas, fused=True))
    for optimizer in optimizers:
        allocate(optimizer)
    return optimizers


def allocate(optimizer: torch.optim.Optimizer) -> None:
    """Create the state of every parameter, all zeros: optimizers do so at a parameter's first gradient, which may come
    after the first checkpoint if the parameter is frozen until then. Leaves no gradients."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()


def hidden_matrices(model: nn.Module) -> set[Tensor]:
    """The weights of linear layers inside repeated blocks (elements of an nn.ModuleList).

    Embeddings, vocabulary heads, and the projections into and out of the latents stand outside them, and need AdamW. So
    do modulations: they see the few distinct times, not the stream, and are a third of Muon's cost.
    """
    named = {layer for block in repeated_blocks(model) for layer in block.named_modules(prefix="block")}
    layers = {layer for name, layer in named if isinstance(layer, nn.Linear) and not name.endswith("modulation")}
    return {layer.weight for layer in layers}


def learning_rate_factor(config: OptimizerConfig, step: int, progress: float) -> float:
    """Factor on the peak learning rates at a step (from 0) and a progress (0 at the start of the run, 1 at its end)."""
    rise = config.start + (1 - config.start) * min(1.0, (step + 1) / max(1, config.warmup))
    if config.schedule == "constant" or config.decay == 0:
        return rise
    gone = min(1.0, max(0.0, 1 - (1 - progress) / config.decay))
    left = 1 - gone if config.schedule == "linear" else (1 + math.cos(math.pi * gone)) / 2
    return rise * (config.final + (1 - config.final) * left)


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> dict[str, float]:
    """Set every group's learning rate to its peak times a factor; returns the largest one of each optimizer."""
    rates: dict[str, float] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        rates[type(optimizer).__name__.lower()] = max(group["lr"] for group in optimizer.param_groups)
    return rates


class EMA:
    """Exponential moving average of a model's trained parameters."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step (from 0); early steps weigh more: decay is at most (1 + n) / (10 + n)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        average, parameters = (
            [local(value) for value in values.values()] for values in (self.average, self.parameters)
        )
        torch._foreach_lerp_(average, parameters, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While it lasts, the model holds the average; afterwards its own weights again."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            own = parameter.clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(own)
