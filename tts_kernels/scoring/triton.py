"""The triton backend: NVIDIA and AMD GPUs; CPU tensors where TRITON_INTERPRET=1 was set before the import.

A call of step_scores is two launches, three with a hidden layer; select is one, two for the votes; token_logprobs is
two. Nothing synchronises. Under the interpreter, whose bfloat16 arithmetic is wrong, bfloat16 is widened where it is
loaded.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tts_kernels.configs import LogprobConfig, logprob_config

from . import triton_kernels as kernels
from .results import one_group

INTERPRETED = not isinstance(kernels.reduce_steps, triton.JITFunction)
DOT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
STEPS = 64  # of a candidate at a time
CANDIDATES = 128  # of a group that count at a time
VOTE_BLOCKS = 16  # programs of a group: no size of a group is known here, and most may be small
SELECTED_FROM = 1024  # candidates of a group at a time


def unsupported_reasons(op: str, *tensors: Tensor) -> list[str]:
    device = tensors[0].device.type if tensors else ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and not INTERPRETED:
        return ["it runs on CPU tensors only if TRITON_INTERPRET=1 is set before the backend is first used"]
    if device not in ("cpu", "cuda"):
        return [f"it runs on CUDA and ROCm tensors, got one on {tensors[0].device}"]
    if device == "cuda" and INTERPRETED:
        return ["TRITON_INTERPRET=1 is set, which runs Triton kernels on CPU tensors"]
    return []


def logits(
    hidden: Tensor, positions: Tensor, w1: Tensor | None, b1: Tensor | None, act: str, w2: Tensor, b2: Tensor | None,
    norm_weight: Tensor | None, norm_eps: float,
) -> Tensor:  # fmt: skip
    num_rows, dim = positions.shape[0], hidden.shape[1]
    num_columns = w2.shape[0]
    out = hidden.new_empty((num_rows, num_columns), dtype=torch.float32)
    if not num_rows:
        return out
    b1, b2, norm_weight = (None if x is None else x.contiguous() for x in (b1, b2, norm_weight))
    with on(hidden.device):
        if w1 is None:
            columns = min(triton.next_power_of_2(num_columns), 8)
            kernels.linear_logits[(num_rows, triton.cdiv(num_columns, columns))](
                hidden, hidden.stride(0), positions, w2, w2.stride(0), b2, norm_weight, norm_eps,
                out, num_columns, dim,
                BLOCK_COLUMNS=columns, BLOCK_DIM=min(triton.next_power_of_2(dim), 1024), num_warps=4,
            )  # fmt: skip
            return out
        dot = dot_type(hidden, w1) if norm_weight is None else tl.float32
        rows, units, lanes, warps = (64, 64, 64, 4) if dot != tl.float32 else (32, 64, 32, 4)
        tiles = triton.cdiv(w1.shape[0], units)
        parts = out.new_empty(tiles, num_rows, num_columns)
        kernels.mlp_tiles[(triton.cdiv(num_rows, rows), tiles)](
            hidden, hidden.stride(0), positions, num_rows, w1, w1.stride(0), b1, w2, w2.stride(0),
            norm_weight, norm_eps, parts, w1.shape[0], num_columns, dim,
            DOT=dot, GELU=act == "gelu", BLOCK_ROWS=rows, BLOCK_HIDDEN=units, BLOCK_DIM=lanes,
            num_warps=warps, num_stages=3,
        )  # fmt: skip
        kernels.sum_parts[(triton.cdiv(out.numel(), 128),)](
            parts, b2, out, num_rows, num_columns, tiles, BLOCK=128, num_warps=4
        )
    return out


def reduce(logits: Tensor, offsets: Tensor, activation: str, positive: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_steps, num_columns = logits.shape
    num_candidates = offsets.shape[0] - 1
    margin, prob = logits.new_empty(num_steps), logits.new_empty(num_steps)
    stats = logits.new_empty(6, num_candidates)
    count = offsets.new_empty(num_candidates, dtype=torch.int32)
    if num_candidates:
        with on(logits.device):
            kernels.reduce_steps[(num_candidates,)](
                logits, offsets, margin, prob, stats, count, num_columns, num_candidates,
                POSITIVE=positive, ACTIVATION=activation, BLOCK=STEPS, num_warps=1,
            )  # fmt: skip
    return margin, prob, stats, count


def select(
    scores: Tensor, group_offsets: Tensor | None, answers: Tensor | None, method: str, k: int
) -> tuple[Tensor, Tensor]:
    group_offsets = one_group(scores) if group_offsets is None else group_offsets
    num_groups, num_candidates = group_offsets.shape[0] - 1, scores.shape[0]
    indices = group_offsets.new_empty(num_groups, k)
    selected = scores.new_empty(num_groups, k)
    if not num_groups:
        return indices, selected
    nominees = None
    scores = scores.contiguous()
    with on(scores.device):
        if answers is not None and num_candidates:
            totals, nominees = torch.empty_like(scores), torch.empty_like(answers)
            blocks = min(triton.cdiv(num_candidates, CANDIDATES), VOTE_BLOCKS)
            kernels.count_votes[(num_groups, blocks)](
                scores, answers, group_offsets, totals, nominees,
                WEIGHTED=method == "weighted_vote", BLOCK=CANDIDATES, num_warps=4,
            )  # fmt: skip
            scores = totals
        kernels.select_best[(num_groups,)](
            scores, group_offsets, nominees, indices, selected, k, BLOCK=SELECTED_FROM, num_warps=4
        )
    return indices, selected


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    (num_rows, dim), num_tokens = hidden.shape, weight.shape[0]
    out = hidden.new_empty(num_rows, dtype=torch.float32)
    if not num_rows:
        return out
    bias = None if bias is None else bias.contiguous()
    dot = dot_type(hidden, weight)
    c = config_of(hidden.device, dim, num_tokens, 4 if dot == tl.float32 else hidden.element_size())
    tiles = triton.cdiv(num_tokens, c.tile_tokens)
    parts = out.new_empty(3, tiles, num_rows)
    with on(hidden.device):
        kernels.vocabulary_tiles[(triton.cdiv(num_rows, c.rows), tiles)](
            hidden, hidden.stride(0), weight, weight.stride(0), bias, targets, parts, num_rows, num_tokens, dim,
            DOT=dot, TILE_TOKENS=c.tile_tokens, BLOCK_ROWS=c.rows, BLOCK_TOKENS=c.tokens, BLOCK_DIM=c.lanes,
            num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
        kernels.join_vocabulary[(triton.cdiv(num_rows, 128),)](
            parts, targets, out, num_rows, num_tokens, tiles, BLOCK=128, num_warps=4
        )
    return out


@functools.cache
def config_of(device: torch.device, dim: int, num_tokens: int, num_bytes: int) -> LogprobConfig:
    """Of token_logprobs: its products' operands have so many bytes."""
    name = torch.cuda.get_device_properties(device).name if device.type == "cuda" else "interpreter"
    return logprob_config(name, dim, num_tokens, num_bytes)


def dot_type(x: Tensor, w: Tensor) -> tl.dtype:
    """Half precision where both have it: its products are exact in fp32."""
    if x.dtype != w.dtype or (INTERPRETED and x.dtype == torch.bfloat16):
        return tl.float32
    return DOT_TYPES[x.dtype]


def on(device: torch.device):
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
