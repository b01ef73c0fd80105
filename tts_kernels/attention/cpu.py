"""The cpu backend: C++ kernels in csrc/cpu, called with addresses and strides.

The code path (portable, avx2, avx512, amx) is picked by what the CPU has; TTS_KERNELS_CPU_ISA forces one. Work runs on
torch.get_num_threads() threads of the OpenMP pool that torch uses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tts_kernels import _C
from tts_kernels.addresses import address, strided
from tts_kernels.tree.plan import TreePlan

from .cast import to_cache_dtype
from .counts import WorkCounts
from .rope import rotate_queries, rotated

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float8_e4m3fn: 3}
MAX_HEAD_DIM = 256
MAX_GROUP = 512  # query heads per KV head: one row's heads stay in one work item
LANES = {"portable": 4, "avx2": 8}  # packed rows of a vector: TTS_VECTOR_WIDTH in csrc/cpu/isa; 16 in the others


def isas() -> list[str]:
    """Names of the code paths that run on this machine."""
    return [name for name, why_not in _C.cpu_code_paths() if not why_not]


def isa_report() -> dict[str, str]:
    """Every code path, and why it cannot run here ("" where it can)."""
    return dict(_C.cpu_code_paths())


def active_isa() -> str:
    """The code path that the next call takes. ValueError if TTS_KERNELS_CPU_ISA asks for one that cannot run here."""
    return _C.cpu_active_code_path()


def unsupported_reasons(op: str, *tensors: Tensor) -> list[str]:
    reasons = [f"it runs on CPU tensors, got one on {t.device}" for t in tensors if t.device.type != "cpu"][:1]
    if tensors and tensors[0].shape[-1] > MAX_HEAD_DIM:
        reasons.append(f"head_dim {tensors[0].shape[-1]} is larger than {MAX_HEAD_DIM}")
    if op == "tree_attention" and len(tensors) > 1 and tensors[0].shape[1] > MAX_GROUP * tensors[1].shape[2]:
        reasons.append(f"more than {MAX_GROUP} query heads share a KV head")
    return reasons


def tree_attention(
    out, lse, q, k_cache, v_cache, nodes, pages, rows, page_size, causal,
    scale, softcap, window, sinks, k_scale, v_scale, work=None,
):  # fmt: skip
    num_rows, num_heads, head_dim = q.shape
    _C.cpu_tree_attention(
        strided(out),
        address(lse),
        strided(q),
        strided(k_cache),
        strided(v_cache),
        (nodes.data_ptr(), pages.data_ptr(), rows.data_ptr()),
        (num_rows, num_heads, k_cache.shape[2], head_dim, nodes.shape[1], page_size),
        address(sinks),
        address(k_scale),
        address(v_scale),
        window,
        causal,
        scale,
        softcap,
        DTYPES[q.dtype],
        DTYPES[k_cache.dtype],
        torch.get_num_threads(),
    )


def count_work(plan: TreePlan, q: Tensor, k_cache: Tensor, nodes: list[list[int]]) -> WorkCounts:
    """The schedule that the next call would make, with as many threads as torch has now."""
    num_rows, num_heads, head_dim = q.shape
    isa = active_isa()
    tiles = isa.startswith("amx") and q.dtype == torch.bfloat16  # as run_amx in csrc/cpu/amx_path.h
    shape = (num_rows, num_heads, k_cache.shape[2], head_dim, plan.num_nodes)
    threads, states, items = _C.cpu_count_work(plan.nodes.data_ptr(), shape, torch.get_num_threads())
    return WorkCounts(
        config=f"{isa}{'' if tiles or not isa.startswith('amx') else ' (FMA items: q is not bfloat16)'}, "
        f"{threads} thread{'s' * (threads != 1)}",
        work_items=len(items),
        launches=None,
        kv_loads=sum(kv_heads * tokens for kv_heads, _, tokens in items),
        states=states,
        flops=sum(h * issued_flops(packed, t, head_dim, LANES.get(isa, 16), tiles) for h, packed, t in items),
    )


def issued_flops(packed: int, tokens: int, head_dim: int, lanes: int, tiles: bool) -> int:
    """Of an item, for one KV head. FMA items pad rows to a vector in the first product and head_dim in the second. AMX
    tiles pad head_dim to 32, rows to 16, tokens to 32; in the first product, for a rest of 16 rows, to 16."""
    rows = up(packed, lanes)
    if not tiles:
        return 2 * tokens * (rows * head_dim + packed * up(head_dim, lanes))
    single = rows % 32
    scores = (rows - single) * up(tokens, 32) + single * up(tokens, 16)
    return 2 * up(head_dim, 32) * (scores + rows * up(tokens, 32))


def up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def append_kv(k, v, k_cache, v_cache, slots, rope=None):
    """Rows are few: torch turns and rounds them, and one thread copies."""
    if rope is not None:
        # Of rows that are skipped the positions may be anything.
        k = rotated(k, rope, torch.where(slots >= 0, rope.positions, 0))
        rotate_queries(rope)
    k, v = to_cache_dtype(k, k_cache.dtype), to_cache_dtype(v, v_cache.dtype)
    element = k_cache.element_size()
    shape = (k.shape[0], k.shape[1], k_cache.shape[1], k.shape[2] * element, element)
    _C.cpu_append_kv(strided(k), strided(v), strided(k_cache), strided(v_cache), slots.data_ptr(), shape)


def merge_states(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    num_states, *rest, head_dim = out.shape
    out, lse = out.contiguous(), lse.contiguous()
    merged_out, merged_lse = out.new_empty(*rest, head_dim), lse.new_empty(rest)
    shape = (num_states, merged_lse.numel(), head_dim)
    _C.cpu_merge_states(
        merged_out.data_ptr(), merged_lse.data_ptr(), out.data_ptr(), lse.data_ptr(), shape, DTYPES[out.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return merged_out, merged_lse
