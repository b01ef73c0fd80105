"""What was measured on a device for a call (tts_kernels/configs): the backend that was fastest there, and what a shared
run of a block table has to save."""

from __future__ import annotations

from torch import Tensor

from tts_kernels.configs import block_dim
from tts_kernels.measured import row_on


def row(q: Tensor, k_cache: Tensor) -> dict | None:
    """Of tree_attention; None where nothing was measured."""
    if q.device.type != "cuda":
        return None
    heads = q.shape[1], k_cache.shape[2], block_dim(q.shape[2])
    return row_on(q.device, "tree_attention", *heads, q.element_size(), k_cache.element_size())


def row_of_call(op: str, *tensors: Tensor) -> dict | None:
    """By the op's leading tensors, as backends get them."""
    first = tensors[0]
    if op == "tree_attention":
        return row(*tensors[:2]) if len(tensors) > 1 else None
    if first.device.type != "cuda":
        return None
    if op == "append_kv" and len(tensors) > 2:
        k_cache = tensors[2]
        return row_on(first.device, op, *first.shape[1:], first.element_size(), k_cache.element_size())
    if op == "merge_states":
        return row_on(first.device, op, *first.shape[2:], first.element_size())
    return None


def fastest(op: str, *tensors: Tensor) -> str | None:
    """For `Backends.measured`."""
    found = row_of_call(op, *tensors)
    return found and found["backend"]


def least_saving(q: Tensor, k_cache: Tensor) -> int:
    """Tokens; 0, all whole pages that are equal are shared, where nothing was measured."""
    found = row(q, k_cache)
    return found["least_saving"] if found else 0
