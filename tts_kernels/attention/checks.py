"""What the attention ops accept. Everything here runs before anything is written.

The checks of the first half look at types, shapes and strides only: they cost a few microseconds and are traced away by
torch.compile. Those of the second half read tensor values: the registered ops call them at run time.
"""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from tts_kernels.tree import plan as tree_plan

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn
FLOAT32_MAX = torch.finfo(torch.float32).max


def fail(argument: str, expected: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{argument}: expected {expected}, got {got}")


def check_tensor(name: str, tensor: Tensor, shape: str, device: torch.device | None = None) -> None:
    """`tensor` is a tensor with as many dimensions as `shape` names, the last one with unit stride, on `device`."""
    if not isinstance(tensor, Tensor):
        fail(name, f"a tensor {shape}", type(tensor).__name__, TypeError)
    if tensor.dim() != shape.count(",") + 1:
        fail(name, f"a tensor {shape}", f"shape {tuple(tensor.shape)}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        fail(name, f"{shape} with unit stride in the last dimension", f"strides {tensor.stride()}")
    if device is not None and tensor.device != device:
        fail(name, f"a tensor on {device}", f"one on {tensor.device}")
    if tensor.requires_grad and torch.is_grad_enabled():
        fail(name, "a tensor that needs no gradient (the op has no backward: call it under torch.no_grad() or detach)",
             "one with requires_grad=True")  # fmt: skip


def check_caches(name: str, rows: Tensor, k_cache: Tensor, v_cache: Tensor, *, heads: str) -> None:
    """`rows` (called `name`: q or k) [R, heads, D] fits the caches [num_pages, page_size, Hkv, D]."""
    check_tensor(name, rows, f"[R, {heads}, D]")
    device = rows.device
    check_tensor("k_cache", k_cache, "[num_pages, page_size, Hkv, D]", device)
    check_tensor("v_cache", v_cache, "[num_pages, page_size, Hkv, D]", device)
    if rows.dtype not in FLOATS and not (heads == "Hkv" and rows.dtype == FP8):
        fail(name, "dtype float32, float16 or bfloat16", rows.dtype, TypeError)
    if k_cache.dtype != rows.dtype and k_cache.dtype != FP8:
        fail("k_cache", f"dtype {rows.dtype} like {name}, or {FP8}", k_cache.dtype, TypeError)
    if v_cache.dtype != k_cache.dtype:
        fail("v_cache", f"dtype {k_cache.dtype} like k_cache", v_cache.dtype, TypeError)
    if v_cache.shape != k_cache.shape:
        fail("v_cache", f"shape {tuple(k_cache.shape)} like k_cache", tuple(v_cache.shape))
    _, page_size, num_kv_heads, head_dim = k_cache.shape
    if page_size < 1 or num_kv_heads < 1 or head_dim < 1:
        fail("k_cache", "page_size, Hkv and D of at least 1 in [num_pages, page_size, Hkv, D]", tuple(k_cache.shape))
    if rows.shape[2] != head_dim:
        fail(name, f"head_dim {head_dim} like k_cache", f"shape {tuple(rows.shape)}")


def check_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: tree_plan.TreePlan) -> None:
    check_caches("q", q, k_cache, v_cache, heads="Hq")
    num_rows, num_q_heads, _ = q.shape
    _, page_size, num_kv_heads, _ = k_cache.shape
    if num_q_heads < 1 or num_q_heads % num_kv_heads:
        fail("q", f"Hq to be a positive multiple of the {num_kv_heads} KV heads", f"shape {tuple(q.shape)}")
    if not isinstance(plan, tree_plan.TreePlan):
        fail("plan", "a TreePlan", type(plan).__name__, TypeError)
    if plan.page_size != page_size:
        fail("plan", f"page_size {page_size} like k_cache", plan.page_size)
    if plan.num_rows != num_rows:
        fail("q", f"the {plan.num_rows} rows of plan", f"{num_rows} rows")
    if plan.nodes.device != q.device:
        fail("plan", f"a plan on {q.device} like q", f"one on {plan.nodes.device}")


def check_out(out: Tensor, q: Tensor) -> None:
    check_tensor("out", out, "[R, Hq, D]", q.device)
    if out.dtype != q.dtype:
        fail("out", f"dtype {q.dtype} like q", out.dtype, TypeError)
    if out.shape != q.shape:
        fail("out", f"shape {tuple(q.shape)} like q", tuple(out.shape))
    if (out.stride(0) == 0 and out.shape[0] > 1) or (out.stride(1) == 0 and out.shape[1] > 1):
        fail("out", "memory of its own for each element", f"strides {out.stride()} (an expanded tensor)")


def check_number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(name, "a number", type(value).__name__, TypeError)
    if not abs(value) <= FLOAT32_MAX:  # nan too
        fail(name, "a finite float32 number", value)
    return float(value)


def check_window(window: int) -> int:
    if isinstance(window, bool) or not isinstance(window, int):
        fail("window", "an int", type(window).__name__, TypeError)
    if window < -1:
        fail("window", "-1 (no window) or the number of earlier positions a row sees, at least 0", window)
    return min(window, 2**31 - 1)  # positions are int32


def per_head(name: str, value: float | Tensor | None, count: int, device: torch.device) -> Tensor | None:
    """A float, or a tensor [], [1] or [count], as contiguous fp32 [count]."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return torch.full((count,), check_number(name, value), dtype=torch.float32, device=device)
    if value.dtype not in FLOATS:
        fail(name, "dtype float32, float16 or bfloat16", value.dtype, TypeError)
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] not in (1, count)):
        fail(name, f"a number, or a tensor of shape [], [1] or [{count}]", f"shape {tuple(value.shape)}")
    if value.device != device:
        fail(name, f"a tensor on {device}", f"one on {value.device}")
    if value.requires_grad and torch.is_grad_enabled():
        fail(name, "a tensor that needs no gradient (the op has no backward)", "one with requires_grad=True")
    if value.dim() == 1 and value.shape[0] == count and value.dtype == torch.float32:
        return value.contiguous()
    return value.to(torch.float32).expand(count).contiguous()


def check_sinks(sinks: Tensor | None, num_q_heads: int, device: torch.device) -> Tensor | None:
    if sinks is None:
        return None
    if not isinstance(sinks, Tensor):
        fail("sinks", f"a tensor [{num_q_heads}]", type(sinks).__name__, TypeError)
    if tuple(sinks.shape) != (num_q_heads,):
        fail("sinks", f"shape [{num_q_heads}], one logit for each query head", f"shape {tuple(sinks.shape)}")
    return per_head("sinks", sinks, num_q_heads, device)


def check_append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    check_caches("k", k, k_cache, v_cache, heads="Hkv")
    check_tensor("v", v, "[R, Hkv, D]", k.device)
    if k.shape[1] != k_cache.shape[2]:
        fail("k", f"the {k_cache.shape[2]} KV heads of k_cache", f"shape {tuple(k.shape)}")
    if v.shape != k.shape:
        fail("v", f"shape {tuple(k.shape)} like k", tuple(v.shape))
    if v.dtype != k.dtype:
        fail("v", f"dtype {k.dtype} like k", v.dtype, TypeError)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if any(stride == 0 and size > 1 for stride, size in zip(cache.stride(), cache.shape)):
            fail(name, "memory of its own for each element", f"strides {cache.stride()} (an expanded tensor)")
    check_slots(slots, k.shape[0], k.device)


def check_slots(slots: Tensor, num_rows: int, device: torch.device) -> None:
    if not isinstance(slots, Tensor):
        fail("slots", "a tensor [R]", type(slots).__name__, TypeError)
    if slots.dtype != torch.int64:
        fail("slots", "dtype torch.int64", slots.dtype, TypeError)
    if tuple(slots.shape) != (num_rows,):
        fail("slots", f"shape [{num_rows}], one slot for each row of k", f"shape {tuple(slots.shape)}")
    if slots.device != device:
        fail("slots", f"a tensor on {device}", f"one on {slots.device}")


def check_rope(k: Tensor, cos_sin: Tensor | None, positions: Tensor | None, is_neox: bool, q: Tensor | None) -> None:
    if cos_sin is None:
        for name, given in (("positions", positions), ("q", q)):
            if given is not None:
                fail(name, "None without cos_sin_cache", type(given).__name__, TypeError)
        return
    check_tensor("cos_sin_cache", cos_sin, "[max_position, rotary_dim]", k.device)
    if cos_sin.dtype not in FLOATS:
        fail("cos_sin_cache", "dtype float32, float16 or bfloat16", cos_sin.dtype, TypeError)
    if not 2 <= cos_sin.shape[1] <= k.shape[2] or cos_sin.shape[1] % 2:
        fail("cos_sin_cache", f"an even rotary_dim in [2, {k.shape[2]}]", f"shape {tuple(cos_sin.shape)}")
    if k.dtype not in FLOATS:
        fail("k", "dtype float32, float16 or bfloat16 with cos_sin_cache", k.dtype, TypeError)
    if not isinstance(is_neox, bool):
        fail("is_neox", "a bool", type(is_neox).__name__, TypeError)
    if q is not None:
        check_tensor("q", q, "[R, Hq, D]", k.device)
        if q.dtype != k.dtype:
            fail("q", f"dtype {k.dtype} like k", q.dtype, TypeError)
        if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
            fail("q", f"shape [{k.shape[0]}, Hq, {k.shape[2]}] for the rows of k", f"shape {tuple(q.shape)}")
    if not isinstance(positions, Tensor):
        fail("positions", "a tensor [R] beside cos_sin_cache", type(positions).__name__, TypeError)
    if positions.dtype not in (torch.int64, torch.int32):
        fail("positions", "dtype int64 or int32", positions.dtype, TypeError)
    if tuple(positions.shape) != (k.shape[0],):
        fail("positions", f"shape [{k.shape[0]}], one for each row of k", f"shape {tuple(positions.shape)}")
    if positions.device != k.device:
        fail("positions", f"a tensor on {k.device}", f"one on {positions.device}")


def as_int64(x: Tensor) -> Tensor:
    """Contiguous, as the backends take integers."""
    return (x if x.dtype == torch.int64 else x.to(torch.int64)).contiguous()


def check_states(out: Tensor, lse: Tensor) -> None:
    check_tensor("out", out, "[S, R, H, D]")
    check_tensor("lse", lse, "[S, R, H]", out.device)
    if out.dtype not in FLOATS:
        fail("out", "dtype float32, float16 or bfloat16", out.dtype, TypeError)
    if lse.dtype != torch.float32:
        fail("lse", "dtype torch.float32", lse.dtype, TypeError)
    if lse.shape != out.shape[:3]:
        fail("lse", f"shape {tuple(out.shape[:3])} like out without its last dimension", tuple(lse.shape))
    if out.shape[0] < 1:
        fail("out", "at least one state to merge in [S, R, H, D]", f"shape {tuple(out.shape)}")


# Checks of values.


def check_no_nan(name: str, value: Tensor | None, check: bool) -> None:
    """Always on the CPU; on a device, where looking costs a synchronisation, with `check` only."""
    if value is None or not (check or value.device.type == "cpu"):
        return
    for head, number in enumerate(value.tolist()):
        if number != number or number == math.inf:
            fail(name, "numbers below infinity", f"{number} at head {head}")


def check_pages(nodes: Tensor, pages: Tensor, page_size: int, num_pages: int) -> None:
    """Every page in use is a page of the cache. Pages held in reserve are not looked at."""
    length, begin = nodes[tree_plan.LENGTH].long(), nodes[tree_plan.PAGE_BEGIN].long()
    used = (length + page_size - 1) // page_size
    past_end = (used > 0) & ((begin < 0) | (begin + used > pages.numel()))
    if past_end.any():
        node = int(past_end.nonzero()[0])
        fail("plan", f"pages enough for the {int(length[node])} tokens of node {node}", f"{pages.numel()} pages in all")
    node = torch.repeat_interleave(used)
    index = torch.arange(node.numel(), device=node.device) - (used.cumsum(0) - used)[node]
    page = pages[begin[node] + index]
    wrong = (page < 0) | (page >= num_pages)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        fail("plan", f"page ids in [0, {num_pages})", f"{int(page[i])} as page {int(index[i])} of node {int(node[i])}")


def check_slot_range(slots: Tensor, num_slots: int) -> None:
    wrong = (slots < -1) | (slots >= num_slots)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        fail("slots", f"-1 or a slot in [0, {num_slots})", f"{int(slots[i])} for row {i}")


def check_positions(positions: Tensor, slots: Tensor, max_position: int, every_row: bool) -> None:
    wrong = (positions < 0) | (positions >= max_position)
    if not every_row:
        wrong &= slots >= 0
    if wrong.any():
        i = int(wrong.nonzero()[0])
        fail("positions", f"rows of cos_sin_cache, in [0, {max_position})", f"{int(positions[i])} for row {i}")
