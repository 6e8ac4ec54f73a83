"""Generation speed: prompt of 64 tokens, 64 new ones, 16 Euler steps, guidance 7.

    .venv/bin/python -m benchmarks.generation [--size S|M] [--batch N] [--threads N] [--bf16] [--compile]

One JSON line a row; peak_bytes is the process's peak so far.
"""

import torch

from benchmarks.common import generation_flops, model, print_row, rows
from opencola.models.cola.sampling import ColaSampling


def main() -> None:
    """Time the rows that the command line asks for."""
    for options, size, batch in rows("Generation speed.", [1, 8]):
        cola = model(options, size).eval().to(torch.bfloat16 if options.bf16 else torch.float32)
        prompts = torch.randint(0, cola.vae.config.vocab_size, (batch, 64)).tolist()
        sampling = ColaSampling(max_new_tokens=64, steps=16, guidance=7.0)
        flops = generation_flops(cola, batch, prompt=64, new=64, steps=16)
        print_row("generate", size, batch, options, 64 * batch, flops, lambda: list(cola.generate(prompts, sampling)))  # noqa: B023


if __name__ == "__main__":
    main()
