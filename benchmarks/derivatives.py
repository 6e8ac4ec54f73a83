"""Which derivative of the velocity costs less: vector-Jacobian or Jacobian-vector product, of a probe e with itself.

    .venv/bin/python -m benchmarks.derivatives [--threads N] [--repeats N]

A DiT of width 128, 4 layers. Three ways to e . (dv/dz) e: backward through the packed attention, as
`flow/likelihood.py` has it; backward, and forward-mode, through attention under a dense mask, which both can
differentiate (the packed one has no forward-mode derivative). One JSON line a size.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from benchmarks.common import without_zeros
from benchmarks.floor import best_seconds
from opencola.flow.dit import BlockCausalDiT, DiTConfig
from opencola.layers.attention import Attend
from opencola.layers.masks import clean_beside_noisy, dense
from opencola.layers.packed import packed
from opencola.text.lines import dump

SIZES = ((32, 4, 1), (128, 4, 1), (512, 1, 1), (128, 4, 16))
"""Latents, samples, block size."""


def under_mask(mask: Tensor) -> Attend:
    """Attention in operations that have derivatives of both kinds; `mask` (rows, rows), the last rows for fewer."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        return (scores.masked_fill(~mask[-q.shape[2] :], -torch.inf).softmax(-1) @ v).transpose(1, 2)

    return attend


def backward(velocity: Callable[[Tensor], Tensor], z: Tensor, probe: Tensor) -> Tensor:
    """e . (dv/dz) e by a vector-Jacobian product."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        v = velocity(z)
    (product,) = torch.autograd.grad(v, z, probe)
    return (product * probe).sum()


def forward(velocity: Callable[[Tensor], Tensor], z: Tensor, probe: Tensor) -> Tensor:
    """The same by a Jacobian-vector product."""
    with forward_ad.dual_level():
        product = forward_ad.unpack_dual(velocity(forward_ad.make_dual(z, probe))).tangent
    return (product * probe).sum()


def ways(num_latents: int, samples: int, block_size: int) -> dict[str, Callable[[], Tensor]]:
    """The three of them, of the same random weights, latents and probe."""
    torch.manual_seed(0)
    dit = BlockCausalDiT(DiTConfig(block_size=block_size, num_heads=8, head_dim=16, rope_dim=12)).requires_grad_(False)
    without_zeros(dit)
    z = torch.randn(samples, num_latents, dit.config.latent_dim)
    probe = torch.randn_like(z).sign()
    num_clean = num_latents - block_size
    place = torch.arange(num_latents)
    turn = dit.turns(torch.cat((place[:num_clean], place)))
    index = torch.cat((place.new_zeros(num_clean), place.new_ones(num_latents))).expand(samples, -1)
    modulation = dit.modulation(torch.tensor([0.0, 0.4]))
    rows = num_clean + num_latents
    mask = dense(clean_beside_noisy(num_clean, num_latents, block_size), rows, rows)

    def velocity(attend: Attend) -> Callable[[Tensor], Tensor]:
        return lambda z_t: dit(torch.cat((z[:, :num_clean], z_t), 1), modulation, index, turn, attend, num_clean)

    fast = velocity(packed(num_clean, num_latents, block_size, 1))
    plain = velocity(under_mask(mask))
    return {
        "backward, packed": lambda: backward(fast, z, probe),
        "backward, dense": lambda: backward(plain, z, probe),
        "forward, dense": lambda: forward(plain, z, probe),
    }


def main() -> None:
    """Time every size."""
    parser = argparse.ArgumentParser(description="Derivatives of the velocity.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=7, help="runs, of which the best counts")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for num_latents, samples, block_size in SIZES:
        line: dict[str, Any] = {"num_latents": num_latents, "samples": samples, "block_size": block_size}
        for name, way in ways(num_latents, samples, block_size).items():
            way()
            line[f"{name}, ms"] = round(1e3 * best_seconds(way, options.repeats), 2)
        print(dump(line), flush=True)


if __name__ == "__main__":
    main()
