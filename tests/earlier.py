"""What files held before families had settings of generation of their own: those of all families, in every file."""

from typing import Any

SAMPLING: dict[str, Any] = {
    "max_new_tokens": 64, "steps": 16, "solver": "euler", "eta": 1.0, "tolerance": 1e-4, "guidance": 7.0,
    "guidance_from": 1.0, "guidance_until": 0.0, "guidance_every": 1, "shift": 1.0, "candidates": 1,
    "first_block": "clean", "repaint_repeats": 1, "repaint_fraction": 0.5, "block_length": 16,
    "remasking": "low_confidence", "temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "stop": [],
    "ignore_eos": False, "chat": False, "seed": 0, "compatibility": "none", "bf16_times": False,
}  # fmt: skip
