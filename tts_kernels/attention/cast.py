"""How new keys and values are rounded to the dtype of a cache: shared by the backends."""

from __future__ import annotations

import torch
from torch import Tensor


def to_cache_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers beyond fp8's range become its largest one; NaN stays NaN. (Versions of torch differ in this cast.)"""
    if dtype == torch.float8_e4m3fn and x.dtype != dtype:
        x = x.to(torch.float32).clamp(-448.0, 448.0)
    return x.to(dtype)
