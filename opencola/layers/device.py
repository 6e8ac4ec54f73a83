"""The device to compute on."""

import torch


def device() -> torch.device:
    """Where models are put to train and to write: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
