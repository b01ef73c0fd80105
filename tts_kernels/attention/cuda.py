"""The cuda backend: CUDA C++ kernels in csrc/cuda, on NVIDIA GPUs since sm_80.

A call of any op is one launch on the current stream. Nothing synchronises, and nothing is allocated but results: the
work list, the partial states and the counters of tree_attention belong to the plan (work.py), and are made by the first
call with a geometry. A row's result depends, bit for bit, on its own path alone.

`native` is the compiled module. Tests put the module of tests/emulation in its place, which runs the same kernels on
CPU tensors.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tts_kernels import nvidia
from tts_kernels.addresses import address, strided
from tts_kernels.configs import WARPGROUP_TOKENS, TreeConfig, cuda_tree_config
from tts_kernels.nvidia import place
from tts_kernels.tree.plan import LENGTH, OWN_BEGIN, OWN_END, ROWS_END, TreePlan

from .counts import WorkCounts
from .device_work import make_device_work
from .work import Work, key_of, most_chunks, num_chunks, refuse_capture, tiles, work_of_call

try:
    from tts_kernels import _C as native
except ImportError:
    native = None

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float8_e4m3fn: 3}
HALVES = (torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn
DIMS = (64, 96, 128, 192, 256)  # that kernels are made for: csrc/cuda/head_dim
TILE_ROWS = (16, 64, 128)  # packed rows of an item's tile: narrow, wide, tall
ALIGNMENT = 16  # bytes that a thread copies at a time


def unsupported_reasons(op: str, *tensors: Tensor) -> list[str]:
    reasons = nvidia.reasons_of(native, "cuda_tree_attention", *tensors)
    if op == "tree_attention" and tensors:
        reasons = reasons + attention_reasons(*tensors)
    return reasons


def attention_reasons(q: Tensor, *caches: Tensor) -> list[str]:
    reasons = []
    head_dim = q.shape[-1]
    if q.dtype not in HALVES:
        reasons.append(f"q is {q.dtype}: its kernels multiply float16 and bfloat16")
    if head_dim > DIMS[-1]:
        reasons.append(f"head_dim {head_dim} is larger than {DIMS[-1]}")
    if not caches:
        if head_dim % 8:
            reasons.append(f"head_dim {head_dim} is not a multiple of 8")
        return reasons
    item = caches[0].element_size()
    if head_dim * item % ALIGNMENT:
        reasons.append(f"head_dim {head_dim} of {caches[0].dtype} is not a multiple of {ALIGNMENT} bytes")
    for name, cache in zip(("k_cache", "v_cache"), caches):
        strides = cache.stride()[:-1]
        if cache.data_ptr() % ALIGNMENT or any(s * item % ALIGNMENT for s, n in zip(strides, cache.shape) if n > 1):
            reasons.append(f"the rows of {name} do not lie at multiples of {ALIGNMENT} bytes")
    return reasons


def prepare(plan: TreePlan, q: Tensor, k_cache: Tensor) -> Work:
    """The work list of the plan for this geometry."""
    refuse_capture(q)
    num_q_heads, head_dim = q.shape[1:]
    return make_device_work(plan, num_q_heads, k_cache.shape[2], head_dim, config_of(q, k_cache), native)


def config_of(q: Tensor, k_cache: Tensor) -> TreeConfig:
    name, shared_bytes = device_kind(q.device)
    head_dim, fp8 = q.shape[2], k_cache.dtype == FP8

    def fits(stages: int, warpgroups: int) -> bool:
        if warpgroups:
            return native.cuda_tree_hopper_shared_bytes(head_dim, stages) <= shared_bytes
        return native.cuda_tree_attention_shared_bytes(head_dim, stages, fp8) <= shared_bytes

    def has_warpgroups() -> bool:
        return runs_warpgroups(q.device) and native.cuda_tree_hopper_shared_bytes(head_dim, 2) > 0

    return cuda_tree_config(name, head_dim, k_cache.shape[2], k_cache.element_size(), q.shape[1], fits, has_warpgroups)


@functools.cache
def runs_warpgroups(device: torch.device) -> bool:
    """Whether kernels of csrc/cuda/hopper run there: on sm_90, which alone has their instructions."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def device_kind(device: torch.device) -> tuple[str, int]:
    """Its name, and the shared memory that a block of threads can have."""
    if device.type == "cpu":
        return "emulation", 227 << 10
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.shared_memory_per_block_optin


def tree_attention(
    out, lse, q, k_cache, v_cache, nodes, pages, rows, page_size, causal,
    scale, softcap, window, sinks, k_scale, v_scale, work,
):  # fmt: skip
    num_counters = q.shape[0] * q.shape[1]
    work = work_of_call(work, "cuda", nodes, q, k_cache, config_of, num_counters)
    call = TreeCall(out, q, k_cache, v_cache, nodes, page_size, work)
    call(out, lse, q, k_cache, v_cache, nodes, pages, rows, causal, scale, softcap, window, sinks, k_scale, v_scale)


class TreeCall:
    """What calls of tree_attention with a work list have in common that are equal in shapes, strides and dtypes."""

    def __init__(self, out, q, k_cache, v_cache, nodes, page_size, work: Work) -> None:
        config, (num_rows, num_q_heads, head_dim) = work.config, q.shape
        self.out, self.q, self.k, self.v = (x.stride()[:-1] for x in (out, q, k_cache, v_cache))
        self.shape = num_rows, num_q_heads, k_cache.shape[2], head_dim, nodes.shape[1], page_size, len(k_cache)
        self.dtypes = DTYPES[q.dtype], DTYPES[k_cache.dtype]
        self.work = work.table.data_ptr(), work.num_items, work.scratch.data_ptr(), work.num_states
        self.config = config.wide_rows, config.min_chunk, config.max_chunks, config.num_stages, config.warpgroups

    def __call__(
        self, out, lse, q, k_cache, v_cache, nodes, pages, rows, causal, scale, softcap, window, sinks, k_scale, v_scale
    ) -> None:
        native.cuda_tree_attention(
            place(q.device),
            (out.data_ptr(), *self.out),
            address(lse),
            (q.data_ptr(), *self.q),
            (k_cache.data_ptr(), *self.k),
            (v_cache.data_ptr(), *self.v),
            (nodes.data_ptr(), pages.data_ptr(), rows.data_ptr()),
            self.shape,
            address(sinks),
            address(k_scale),
            address(v_scale),
            window,
            causal,
            scale,
            softcap,
            *self.dtypes,
            self.work,
            self.config,
        )


def count_work(plan: TreePlan, q: Tensor, k_cache: Tensor, nodes: list[list[int]]) -> WorkCounts:
    """By the rules of the work list (work.py) at the lengths in `nodes`, with the config of the list that the plan has,
    if it has one. A row with one state writes none: its result is written at once."""
    num_rows, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    kept = plan.works.get(key_of(q, k_cache, "cuda"))
    config = kept.config if kept else config_of(q, k_cache)
    group = num_q_heads // num_kv_heads
    tokens = WARPGROUP_TOKENS if config.warpgroups else config.wide_tokens
    items = kv_loads = states = products = 0
    parents, above = nodes[0], []
    for node, (length, begin, own_end, end) in enumerate(
        zip(*(nodes[i] for i in (LENGTH, OWN_BEGIN, OWN_END, ROWS_END)))
    ):
        chunks = num_chunks(length, most_chunks(own_end - begin, group, config), config)
        above.append(chunks + (above[parents[node]] if parents[node] >= 0 else 0))
        of_chunk = tiles((end - begin) * group, config)
        items += len(of_chunk) * chunks
        kv_loads += len(of_chunk) * length
        if above[node] > 1:
            states += above[node] * (own_end - begin) * group
        # Chunks are whole blocks, but for the last of a node.
        rows = sum(max(TILE_ROWS[tile], 64 if config.warpgroups else 0) for _, tile in of_chunk)
        products += rows * -(-length // tokens) * tokens
    dim = next(dim for dim in DIMS if dim >= head_dim)
    sizes = "/".join(str(rows) for rows in (config.tall_rows, config.wide_rows, config.narrow_rows) if rows)
    of_warpgroups = " by warpgroups" if config.warpgroups else ""
    return WorkCounts(
        config=f"tiles of {sizes} rows x {tokens} tokens{of_warpgroups}, head_dim {dim}, chunks of "
        f"{config.min_chunk} at least, at most {config.max_chunks}, {config.num_stages} stages, {config.source}",
        work_items=items * num_kv_heads,
        launches=1 if num_rows else 0,
        kv_loads=kv_loads * num_kv_heads,
        states=states * num_kv_heads,
        flops=4 * dim * products * num_kv_heads,
    )


def append_kv(k, v, k_cache, v_cache, slots, rope=None):
    num_rows, num_kv_heads, head_dim = k.shape
    none = (0, 0, 0)
    turned = none, 0, 0, True, none, none, 0
    if rope is not None:
        cos_sin = rope.cos_sin.data_ptr(), rope.cos_sin.stride(0), DTYPES[rope.cos_sin.dtype]
        turned = cos_sin, rope.positions.data_ptr(), rope.cos_sin.shape[1], rope.is_neox, none, none, 0
        if rope.q is not None and rope.q.numel():
            turned = *turned[:4], strided(rope.q), strided(rope.q_out), rope.q.shape[1]
    native.cuda_append_kv(
        place(k.device), strided(k), strided(v), strided(k_cache), strided(v_cache), slots.data_ptr(),
        (num_rows, num_kv_heads, k_cache.shape[1], head_dim, k_cache.element_size()),
        (DTYPES[k.dtype], DTYPES[k_cache.dtype]), *turned,
    )  # fmt: skip


def merge_states(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    num_states, num_rows, num_heads, head_dim = out.shape
    out = out if out.stride(-1) == 1 else out.contiguous()
    merged_out = out.new_empty(num_rows, num_heads, head_dim)
    merged_lse = lse.new_empty(num_rows, num_heads)
    native.cuda_merge_states(
        place(out.device), merged_out.data_ptr(), merged_lse.data_ptr(), strided(out),
        (lse.data_ptr(), *lse.stride()), (num_states, num_rows, num_heads, head_dim), DTYPES[out.dtype],
    )  # fmt: skip
    return merged_out, merged_lse
