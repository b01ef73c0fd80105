"""The attention ops in plain torch: the specification that the other backends are held to. Any device, fp32 inside."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tts_kernels.tree.plan import LENGTH, OWN_BEGIN, OWN_END, PAGE_BEGIN, POSITION, ROWS_END, TreePlan

from .cast import to_cache_dtype
from .counts import WorkCounts
from .rope import Rope, rotate_queries, rotated

# Scores held at a time, so that a long prompt with many rows of its own does not ask for the square of its length.
MAX_SCORES = 1 << 24


def unsupported_reasons(op: str, *tensors: Tensor) -> list[str]:
    return []


def tree_attention(
    out: Tensor,  # [R, Hq, D], written
    lse: Tensor | None,  # [R, Hq] fp32, written
    q: Tensor,  # [R, Hq, D]
    k_cache: Tensor,  # [num_pages, page_size, Hkv, D]
    v_cache: Tensor,
    nodes: Tensor,
    pages: Tensor,
    rows: Tensor,
    page_size: int,
    causal: bool,
    scale: float,
    softcap: float,
    window: int,
    sinks: Tensor | None,  # [Hq]
    k_scale: Tensor | None,  # [Hkv]
    v_scale: Tensor | None,
    work: tuple | None = None,  # for GPU backends
) -> None:
    num_rows, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    group = num_q_heads // num_kv_heads
    order = rows[0].long()
    state = OnlineSoftmax(num_rows, num_kv_heads, group, head_dim, q.device)

    # Autocast would round the products below to its own dtype.
    with torch.autocast(q.device.type, enabled=False):
        # Depth-first: the rows that a node serves lie side by side, its own first, then those of its descendants.
        q = q[order].to(torch.float32).view(num_rows, num_kv_heads, group, head_dim) * scale
        if k_scale is not None:
            q = q * k_scale[:, None, None]
        owner = nodes[:, rows[1].long()]
        row_position = owner[POSITION] + owner[LENGTH] - owner[OWN_END] + torch.arange(num_rows, device=q.device)

        for node in nodes.t().tolist():
            length, own_begin, own_end, rows_end = (node[i] for i in (LENGTH, OWN_BEGIN, OWN_END, ROWS_END))
            if length == 0 or own_begin == rows_end:
                continue
            token = torch.arange(length, device=q.device)
            page = pages[node[PAGE_BEGIN] + token // page_size].long()
            k = k_cache[page, token % page_size].to(torch.float32)  # [T, Hkv, D]
            v = v_cache[page, token % page_size].to(torch.float32)

            block = row_block(num_q_heads, length)
            for begin in range(own_begin, rows_end, block):
                row = torch.arange(begin, min(begin + block, rows_end), device=q.device)
                scores = torch.einsum("rhgd,thd->rhgt", q[row], k)
                if softcap > 0:
                    scores = softcap * torch.tanh(scores / softcap)
                visible = torch.ones(len(row), length, dtype=torch.bool, device=q.device)
                if causal:
                    # Own row j of c sees the first length - c + j + 1 tokens. This lets descendants' rows see them all.
                    visible = token < length - own_end + row[:, None] + 1
                if window >= 0:
                    visible &= node[POSITION] + token >= row_position[row][:, None] - window
                scores = scores.masked_fill(~visible[:, None, None], -math.inf)
                state.update(row, scores, v)

        result = state.output(None if sinks is None else sinks.view(num_kv_heads, group))
        if v_scale is not None:
            result = result * v_scale[:, None, None]
    out.index_copy_(0, order, result.view(num_rows, num_q_heads, head_dim).to(out.dtype))
    if lse is not None:
        lse.index_copy_(0, order, state.lse().view(num_rows, num_q_heads))


def row_block(num_q_heads: int, length: int) -> int:
    """Rows that take a node's tokens at a time."""
    return max(1, MAX_SCORES // (num_q_heads * length))


def count_work(plan: TreePlan, q: Tensor, k_cache: Tensor, nodes: list[list[int]]) -> WorkCounts:
    """A node's KV is gathered once for all its rows; the running state of each of them is read and written."""
    num_q_heads, head_dim = q.shape[1:]
    served = [(t, e - b) for t, b, e in zip(nodes[LENGTH], nodes[OWN_BEGIN], nodes[ROWS_END]) if t > 0 and e > b]
    return WorkCounts(
        config="plain torch",
        work_items=sum(-(-rows // row_block(num_q_heads, length)) for length, rows in served),
        launches=None,
        kv_loads=k_cache.shape[2] * sum(length for length, _ in served),
        states=num_q_heads * sum(rows for _, rows in served),
        flops=4 * num_q_heads * head_dim * sum(length * rows for length, rows in served),
    )


class OnlineSoftmax:
    """Softmax-weighted sums over keys that arrive piece by piece: for each row and query head the largest score, the
    sum of exp(score - largest) and the sum of exp(score - largest) * v."""

    def __init__(self, num_rows: int, num_kv_heads: int, group: int, head_dim: int, device: torch.device) -> None:
        shape = (num_rows, num_kv_heads, group)
        self.largest = torch.full(shape, -math.inf, dtype=torch.float32, device=device)
        self.total = torch.zeros(shape, dtype=torch.float32, device=device)
        self.weighted = torch.zeros((*shape, head_dim), dtype=torch.float32, device=device)

    def update(self, row: Tensor, scores: Tensor, v: Tensor) -> None:
        """`scores` [rows, Hkv, G, T], -inf where masked; `v` [T, Hkv, D]."""
        largest = torch.maximum(self.largest[row], scores.amax(-1))
        # A row that has seen no key yet: -inf - 0 stays -inf, and exp of it is 0.
        base = torch.where(largest == -math.inf, 0.0, largest)
        weight = torch.exp(scores - base[..., None])
        rescale = torch.exp(self.largest[row] - base)
        self.largest[row] = largest
        self.total[row] = self.total[row] * rescale + weight.sum(-1)
        self.weighted[row] = self.weighted[row] * rescale[..., None] + torch.einsum("rhgt,thd->rhgd", weight, v)

    def output(self, sinks: Tensor | None) -> Tensor:
        """`sinks` [Hkv, G] join the denominator, once."""
        if sinks is None:
            total = torch.where(self.total == 0, 1.0, self.total)
            return self.weighted / total[..., None]
        largest = torch.maximum(self.largest, sinks)
        largest = torch.where(largest == -math.inf, 0.0, largest)
        rescale = torch.exp(self.largest - largest)
        total = self.total * rescale + torch.exp(sinks - largest)
        total = torch.where(total == 0, 1.0, total)
        return self.weighted * (rescale / total)[..., None]

    def lse(self) -> Tensor:
        return self.largest + torch.log(self.total)


def append_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, rope: Rope | None = None) -> None:
    page_size = k_cache.shape[1]
    kept = slots >= 0
    page, offset = slots[kept] // page_size, slots[kept] % page_size
    k, v = k[kept], v[kept]
    if rope is not None:
        k = rotated(k, rope, rope.positions[kept])
        rotate_queries(rope)
    for new, cache in ((k, k_cache), (v, v_cache)):
        cache[page, offset] = to_cache_dtype(new, cache.dtype)


def merge_states(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    largest = lse.amax(0)
    largest = torch.where(largest == -math.inf, 0.0, largest)
    weight = torch.exp(lse - largest)  # [S, R, H]
    total = weight.sum(0)
    # A state that saw nothing (lse -inf) counts for nothing, whatever its `out` holds.
    weighted = torch.where(weight[..., None] > 0, out.to(torch.float32) * weight[..., None], 0.0).sum(0)
    merged = weighted / torch.where(total == 0, 1.0, total)[..., None]
    return merged.to(out.dtype), largest + torch.log(total)
