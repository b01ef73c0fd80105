"""What was measured on a device for a call (tts_kernels/configs): the backend that was fastest there."""

from __future__ import annotations

from torch import Tensor

from tts_kernels.measured import row_on


def row_of_call(op: str, *tensors: Tensor) -> dict | None:
    """By the op's leading tensors, as backends get them; None where nothing was measured. verify goes by the row of
    step_scores, which it is but for the choice."""
    first = tensors[0]
    if first.device.type != "cuda":
        return None
    if op == "step_scores":
        return row_on(first.device, op, first.shape[1], first.element_size())
    if op == "token_logprobs" and len(tensors) > 1:
        return row_on(first.device, op, first.shape[1], tensors[1].shape[0], product_bytes(first, tensors[1]))
    return None


def product_bytes(hidden: Tensor, weight: Tensor) -> int:
    """Of the operands that are multiplied: other pairs of dtypes are widened."""
    return hidden.element_size() if hidden.dtype == weight.dtype else 4


def fastest(op: str, *tensors: Tensor) -> str | None:
    """For `Backends.measured`."""
    found = row_of_call(op, *tensors)
    return found and found["backend"]
