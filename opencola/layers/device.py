"""The device to compute on, and in which precision."""

from typing import Any

import torch

from opencola.kernels.choice import products_in


def device() -> torch.device:
    """Where models are put to train and to write: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def bfloat16(place: torch.device, enabled: bool, compiled: bool = False) -> Any:
    """A context for a loss, and for the steps of an optimizer, in bfloat16, over weights of float32.

    On a CPU that is products of linear layers alone (kernels/matmul.py), where nothing else gains; elsewhere, and under
    torch.compile, autocast.
    """
    if place.type == "cpu" and not compiled:
        return products_in("bfloat16" if enabled else "float32")
    return torch.autocast(place.type, torch.bfloat16, enabled=enabled)
