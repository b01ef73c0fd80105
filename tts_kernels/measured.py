"""What was measured on a device (tts_kernels/configs), looked up once for each op and key."""

from __future__ import annotations

import functools

import torch

from tts_kernels.configs import KEYS, row_of


@functools.cache
def row_on(device: torch.device, op: str, *key: int) -> dict | None:
    """The row of the op's table for this device and the numbers of KEYS[op]; None where nothing was measured, as on
    everything but a GPU."""
    if device.type != "cuda":
        return None
    return row_of(op, torch.cuda.get_device_properties(device).name, **dict(zip(KEYS[op], key, strict=True)))
