"""How the native module, which knows no tensors, is told of them."""

from __future__ import annotations

from torch import Tensor


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def strided(x: Tensor) -> tuple[int, ...]:
    """Address and strides, in elements, of all dimensions but the last, which is dense."""
    return (x.data_ptr(), *x.stride()[:-1])
