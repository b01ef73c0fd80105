"""What was measured on a device for a geometry (tts_kernels/configs): the backend that was fastest there, and what a
shared run of a block table has to save."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tts_kernels.configs import measured_row


def row(q: Tensor, k_cache: Tensor) -> dict | None:
    """None where nothing was measured."""
    if q.device.type != "cuda":
        return None
    return _row(q.device, q.shape[1], k_cache.shape[2], q.shape[2], q.element_size(), k_cache.element_size())


@functools.cache
def _row(device: torch.device, *geometry: int) -> dict | None:
    return measured_row("tree_attention", torch.cuda.get_device_properties(device).name, *geometry)


def fastest(op: str, *tensors: Tensor) -> str | None:
    """For `Backends.measured`."""
    if op != "tree_attention" or len(tensors) < 2:
        return None
    found = row(*tensors[:2])
    return found and found["backend"]


def least_saving(q: Tensor, k_cache: Tensor) -> int:
    """Tokens; 0, all whole pages that are equal are shared, where nothing was measured."""
    found = row(q, k_cache)
    return found["least_saving"] if found else 0
