"""The triton backend: NVIDIA and AMD GPUs; CPU tensors where TRITON_INTERPRET=1 was set before its import.

A call of tree_attention is two launches, merge_states and append_kv are one. Nothing synchronises, and nothing is
allocated but results: the work list and the partial states belong to the plan (work.py), and are made by the first call
with a geometry. Under the interpreter, whose bfloat16 arithmetic is wrong, bfloat16 is widened to fp32 where it is
loaded; on a GPU it goes into the products as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tts_kernels.configs import TreeConfig, block_dim, tree_config
from tts_kernels.tree.plan import LENGTH, OWN_BEGIN, OWN_END, ROWS_END, TreePlan

from . import triton_states, triton_tree
from .counts import WorkCounts
from .work import Work, key_of, make_work, most_chunks, num_chunks, refuse_capture, work_of_call

INTERPRETED = not isinstance(triton_tree.tree_tiles, triton.JITFunction)
FP8 = torch.float8_e4m3fn
DOT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
BITS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", FP8: "fp8"}
MAX_HEAD_DIM = 256
CUDA_FIELDS = ("tall_rows", "warpgroups")  # of a TreeConfig
MERGE_STATES = 4 if INTERPRETED else 16  # states that a merging program holds at a time


def unsupported_reasons(op: str, *tensors: Tensor) -> list[str]:
    reasons = []
    device = tensors[0].device.type if tensors else ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and not INTERPRETED:
        reasons.append("it runs on CPU tensors only if TRITON_INTERPRET=1 is set before the backend is first used")
    elif device not in ("cpu", "cuda"):
        reasons.append(f"it runs on CUDA and ROCm tensors, got one on {tensors[0].device}")
    elif device == "cuda" and INTERPRETED:
        reasons.append("TRITON_INTERPRET=1 is set, which runs Triton kernels on CPU tensors")
    if op == "tree_attention" and tensors and tensors[0].shape[-1] > MAX_HEAD_DIM:
        reasons.append(f"head_dim {tensors[0].shape[-1]} is larger than {MAX_HEAD_DIM}")
    return reasons


def prepare(plan: TreePlan, q: Tensor, k_cache: Tensor) -> Work:
    """The work list of the plan for this geometry."""
    refuse_capture(q)
    num_q_heads, head_dim = q.shape[1:]
    num_kv_heads = k_cache.shape[2]
    return make_work(plan, num_q_heads, num_kv_heads, head_dim, config_of(q, k_cache))


def config_of(q: Tensor, k_cache: Tensor) -> TreeConfig:
    name, arch = device_kind(q.device)
    return tree_config(name, arch, q.shape[2], k_cache.shape[2], q.element_size(), k_cache.element_size(), q.shape[1])


@functools.cache
def device_kind(device: torch.device) -> tuple[str, str]:
    """(name, architecture)"""
    if INTERPRETED:
        return "interpreter", "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:  # CUDA builds of torch have gcnArchName too: the device's name
        return properties.name, properties.gcnArchName.partition(":")[0]
    return properties.name, f"sm_{properties.major}{properties.minor}"


def tree_attention(
    out, lse, q, k_cache, v_cache, nodes, pages, rows, page_size, causal,
    scale, softcap, window, sinks, k_scale, v_scale, work,
):  # fmt: skip
    num_rows, num_q_heads, head_dim = q.shape
    num_kv_heads, num_nodes = k_cache.shape[2], nodes.shape[1]
    group = num_q_heads // num_kv_heads
    work = work_of_call(work, "triton", nodes, q, k_cache, config_of)
    config, num_items, num_states = work.config, work.num_items, work.num_states
    items, path_chunks, first_state, _ = work.table.split_with_sizes([4 * num_items, num_nodes, num_rows, 1])
    states, sums = work.scratch.split_with_sizes([num_states * num_q_heads * head_dim, num_states * num_q_heads * 2])
    fp8_bits = needs_fp8_bits(k_cache)
    if fp8_bits:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    dim = block_dim(head_dim)
    heads = merge_heads(num_q_heads)
    with on(q.device):
        if num_items:
            triton_tree.tree_tiles[(num_items * num_kv_heads,)](
                q, q.stride(0), q.stride(1), k_cache, *k_cache.stride()[:3], v_cache, *v_cache.stride()[:3], k_scale,
                nodes, num_nodes, pages, rows, num_rows, items, path_chunks, first_state, states, sums,
                float(scale), float(softcap), window,
                GROUP=group, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_DIM=dim, PAGE_SIZE=page_size,
                CAUSAL=causal, WINDOW=window >= 0, SOFTCAP=softcap > 0, FP8_BITS=fp8_bits, DOT=dot_type(q.dtype),
                WIDE_ROWS=config.wide_rows, WIDE_TOKENS=config.wide_tokens,
                NARROW_ROWS=config.narrow_rows, NARROW_TOKENS=config.narrow_tokens,
                MIN_CHUNK=config.min_chunk, MAX_CHUNKS=config.max_chunks,
                num_warps=config.num_warps, num_stages=config.num_stages,
                # Contracted, masked and unmasked blocks round differently, and which a row meets depends on siblings.
                enable_fp_fusion=config.narrow_rows > 0,
            )  # fmt: skip
        with rounded(out) as result:
            triton_tree.merge_tree[(num_rows, triton.cdiv(num_q_heads, heads))](
                result, result.stride(0), result.stride(1), lse, nodes, num_nodes, rows, num_rows,
                path_chunks, first_state, states, sums, sinks, v_scale,
                NUM_Q_HEADS=num_q_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_DIM=dim,
                BLOCK_HEADS=heads, BLOCK_STATES=MERGE_STATES, WIDE_ROWS=config.wide_rows,
                MIN_CHUNK=config.min_chunk, MAX_CHUNKS=config.max_chunks, num_warps=4,
            )  # fmt: skip


def count_work(plan: TreePlan, q: Tensor, k_cache: Tensor, nodes: list[list[int]]) -> WorkCounts:
    """By the rules of the work list (work.py) at the lengths in `nodes`, with the config of the list that the plan has,
    if it has one."""
    num_rows, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    kept = plan.works.get(key_of(q, k_cache, "triton"))
    config = kept.config if kept else config_of(q, k_cache)
    items = kv_loads = states = products = 0
    group = num_q_heads // num_kv_heads
    for length, begin, own_end, end in zip(*(nodes[i] for i in (LENGTH, OWN_BEGIN, OWN_END, ROWS_END))):
        chunks = num_chunks(length, most_chunks(own_end - begin, group, config), config)
        packed = (end - begin) * group
        rows, tokens = config.wide_rows, config.wide_tokens
        if packed <= config.narrow_rows:
            rows, tokens = config.narrow_rows, config.narrow_tokens
        tiles = triton.cdiv(packed, rows) if packed else 0
        items += tiles * chunks
        kv_loads += tiles * length
        states += chunks * packed
        # Chunks are whole blocks, but for the last of a node.
        products += tiles * rows * triton.cdiv(length, tokens) * tokens
    tiles_launched = items > 0 or plan.most_tokens is not None
    return WorkCounts(
        config=", ".join(f"{k}={value}" for k, value in dataclasses.asdict(config).items() if k not in CUDA_FIELDS),
        work_items=items * num_kv_heads,
        launches=1 + tiles_launched if num_rows else 0,
        kv_loads=kv_loads * num_kv_heads,
        states=states * num_kv_heads,
        flops=4 * block_dim(head_dim) * products * num_kv_heads,
    )


def append_kv(k, v, k_cache, v_cache, slots, rope=None):
    num_rows, num_kv_heads, head_dim = k.shape
    v_to = "fp8" if k_cache.dtype == FP8 and k.dtype != FP8 else ""
    k_to, q_to = v_to if rope is None else BITS[k_cache.dtype], BITS[k.dtype]
    cos_sin, positions, neox, q, q_out = (None, None, True, None, None) if rope is None else rope
    num_q_heads = 0 if q is None else q.shape[1]
    if not num_q_heads:
        q = q_out = None
    page_size = k_cache.shape[1]
    k_cache, v_cache = as_integers(k_cache), as_integers(v_cache)
    k, v = k if k_to else as_integers(k), v if v_to else as_integers(v)
    heads, dim = triton.next_power_of_2(num_kv_heads), triton.next_power_of_2(head_dim)
    q_heads = triton.next_power_of_2(max(num_q_heads, 1))
    with on(k.device):
        triton_states.append_kv[(num_rows,)](
            k, k.stride(0), k.stride(1), v, v.stride(0), v.stride(1),
            k_cache, *k_cache.stride()[:3], v_cache, *v_cache.stride()[:3], slots,
            cos_sin, 0 if cos_sin is None else cos_sin.stride(0), positions,
            q, *((0, 0) if q is None else q.stride()[:2]),
            None if q is None else as_integers(q_out), *((0, 0) if q is None else q_out.stride()[:2]),
            NUM_KV_HEADS=num_kv_heads, NUM_Q_HEADS=num_q_heads, HEAD_DIM=head_dim, PAGE_SIZE=page_size,
            K_TO=k_to, V_TO=v_to, Q_TO=q_to, ROTARY_DIM=0 if cos_sin is None else cos_sin.shape[1], NEOX=neox,
            BLOCK_HEADS=heads, BLOCK_Q_HEADS=q_heads, BLOCK_DIM=dim,
            num_warps=warps_for(max(heads, num_q_heads and q_heads) * dim * k.element_size()),
            enable_fp_fusion=False,  # RoPE's products and sums are rounded one by one
        )  # fmt: skip


def merge_states(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    num_states, num_rows, num_heads, head_dim = out.shape
    merged_out = out.new_empty(num_rows, num_heads, head_dim)
    merged_lse = lse.new_empty(num_rows, num_heads)
    if merged_lse.numel():
        with on(out.device), rounded(merged_out) as result:
            pairs, dim = 64 if INTERPRETED else 4, triton.next_power_of_2(head_dim)
            triton_states.merge_states[(triton.cdiv(num_rows * num_heads, pairs),)](
                out, *out.stride()[:3], lse, *lse.stride(), result, merged_lse,
                num_states, num_heads, num_rows * num_heads,
                HEAD_DIM=head_dim, BLOCK_PAIRS=pairs, BLOCK_DIM=dim,
                num_warps=warps_for(pairs * dim * out.element_size()),
            )  # fmt: skip
    return merged_out, merged_lse


def merge_heads(num_q_heads: int) -> int:
    """Query heads of a merging program: on a GPU one, since rows and heads are many; the interpreter runs programs one
    after the other."""
    return triton.next_power_of_2(num_q_heads) if INTERPRETED else 1


def warps_for(block_bytes: int) -> int:
    """So that a thread loads 16 bytes of a block at a time."""
    return min(max(block_bytes // (32 * 16), 1), 8)


def as_integers(x: Tensor) -> Tensor:
    return x.view(INTEGERS[x.element_size()])


def dot_type(dtype: torch.dtype) -> tl.dtype:
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else DOT_TYPES[dtype]


def needs_fp8_bits(cache: Tensor) -> bool:
    """Whether e4m3 is widened by integer arithmetic: under the interpreter, on NVIDIA before sm_89 and on AMD."""
    arch = device_kind(cache.device)[1]
    return cache.dtype == FP8 and not (arch.startswith("sm_") and int(arch[3:]) >= 89)


def on(device: torch.device):
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def rounded(out: Tensor):
    """Where a kernel writes `out`; under the interpreter bfloat16 by way of fp32, since it rounds wrongly."""
    if INTERPRETED and out.dtype == torch.bfloat16:
        wide = torch.empty(out.shape, dtype=torch.float32)
        yield wide
        out.copy_(wide)
    else:
        yield out
