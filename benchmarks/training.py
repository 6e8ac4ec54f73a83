"""Training speed of the prior: forward and backward of the packed flow-matching loss, frozen VAE not counted.

    .venv/bin/python -m benchmarks.training [--size S|M] [--batch N] [--threads N]

256 latents a sample, one noisy copy. One JSON line a row; peak_bytes is the process's peak so far.
"""

import torch

from benchmarks.common import model, report, rows, training_flops
from opencola.text.corpus import Batch


def main() -> None:
    """Time the rows that the command line asks for."""
    for options, size, batch in rows("Training speed.", [8]):
        cola = model(options, size)
        z_0 = torch.randn(batch, 256, cola.dit.config.latent_dim)
        data = Batch(tokens=torch.zeros(batch, 256, dtype=torch.long), ids=torch.arange(batch), seed=0, step=0)

        def step() -> None:
            cola.dit.zero_grad()  # noqa: B023
            cola.flow_matching(z_0, data).backward()  # noqa: B023

        report("train", size, batch, options, 256 * batch, training_flops(cola, batch, 256), step)


if __name__ == "__main__":
    main()
