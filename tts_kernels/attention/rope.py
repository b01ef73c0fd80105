"""Rotary position embedding of new keys, and of the queries of the same rows: shared by the backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rope(NamedTuple):
    cos_sin: Tensor  # [max_position, rotary_dim]: cosines, then sines
    positions: Tensor  # int64 [R]
    is_neox: bool
    q: Tensor | None  # [R, Hq, D]
    q_out: Tensor | None  # like q, written


def rotated(x: Tensor, rope: Rope, positions: Tensor) -> Tensor:
    """x [rows, heads, D] in fp32, its first rotary_dim dimensions turned: dimension i with i + rotary_dim / 2, or 2 i
    with 2 i + 1 where not is_neox. Products and sums are rounded one by one."""
    rotary_dim = rope.cos_sin.shape[1]
    cos, sin = rope.cos_sin[positions].to(torch.float32)[:, None].chunk(2, -1)
    out = x.to(torch.float32, copy=True)
    if rope.is_neox:
        first, second = out[..., : rotary_dim // 2], out[..., rotary_dim // 2 : rotary_dim]
    else:
        first, second = out[..., 0:rotary_dim:2], out[..., 1:rotary_dim:2]
    turned = first * cos - second * sin, second * cos + first * sin
    first.copy_(turned[0])
    second.copy_(turned[1])
    return out


def rotate_queries(rope: Rope) -> None:
    if rope.q is not None:
        rope.q_out.copy_(rotated(rope.q, rope, rope.positions))
