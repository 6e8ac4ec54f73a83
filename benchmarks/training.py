"""Training speed of the prior: forward and backward of the packed flow-matching loss, frozen VAE not counted.

    .venv/bin/python -m benchmarks.training [--size S|M] [--batch N] [--threads N] [--bf16] [--recompute] [--compile]

256 latents a sample, one noisy copy. One JSON line a row; peak_bytes is the process's peak so far.
"""

from benchmarks.common import model, print_row, rows, training_flops, training_step
from opencola.train.memory import keep_freed


def main() -> None:
    """Time the rows that the command line asks for."""
    keep_freed()
    for options, size, batch in rows("Training speed.", [8]):
        cola = model(options, size)
        step = training_step(cola, batch, 256, options.bf16, options.compile)
        print_row("train", size, batch, options, 256 * batch, training_flops(cola, batch, 256), step)


if __name__ == "__main__":
    main()
