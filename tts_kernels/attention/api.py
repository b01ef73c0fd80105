"""The public attention ops: check the arguments, pick the backend, call it through torch.library.

Shapes: R rows (query tokens of this call), Hq query heads, Hkv KV heads (Hkv divides Hq; query head h reads KV head
h // (Hq // Hkv)), D head_dim. Caches are [num_pages, page_size, Hkv, D] with any strides as long as the last dimension
is dense, so a view of an HND cache works. Nothing is written before every check has passed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tts_kernels.dispatch import Backends, metadata, register
from tts_kernels.tree.plan import TreePlan

from . import checks, tables, work
from .rope import Rope

BACKENDS = Backends(
    "attention",
    __package__,
    {"reference": ".reference", "cpu": ".cpu", "triton": ".triton", "cuda": ".cuda"},
    {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")},
    {
        "tree_attention": "tree_attention",
        "decode_attention": "tree_attention",
        "append_kv": "append_kv",
        "merge_states": "merge_states",
    },
    tables.fastest,
)


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: TreePlan,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = -1,
    sinks: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    check: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every row over its path in the tree: all tokens of the nodes above its own, and its own node up to
    and including its own token (the whole node when the plan is not causal). One op for decode (a leaf owns one row),
    verify (a node owns all its rows) and mixes of the two. The KV of the rows' own tokens is in the cache already.

        score = scale * k_scale[h] * (q . k);  softcap > 0: score = softcap * tanh(score / softcap)
        out = v_scale[h] * softmax(score over the visible keys, and the sink) v

    Args:
        q: [R, Hq, D], float32, float16 or bfloat16; rows in the caller's order (TreePlan says which).
        k_cache, v_cache: [num_pages, page_size, Hkv, D], dtype of q or torch.float8_e4m3fn.
        plan: a TreePlan with R rows and the caches' page_size, on the device of q. On a GPU it holds partial results:
            calls that run on two streams at the same time need a plan each, else their results are wrong.
        scale: multiplies q . k; default 1 / sqrt(D).
        softcap: bound of the scores; 0 switches it off.
        window: a row sees the keys at most this many positions before its own (`window + 1` with its own); -1: all.
        sinks: [Hq]; a logit for each query head that joins the softmax's denominator once. It is not part of `lse`.
        k_scale, v_scale: what stored keys and values are multiplied by: a number, or a tensor [], [1] or [Hkv].
        out: [R, Hq, D] like q, dense in the last dimension: written in place and returned. Shares memory with no input.
        return_lse: also return the natural logarithm of the sum of exp(score), [R, Hq] float32.
        backend: "reference", "cpu", "triton" or "cuda": runs there or raises, never elsewhere. Default: what was
            measured fastest for the geometry on this device (`tts-kernels tune`), else by device.
        check: also look at values, at the cost of a pass over the plan and a synchronisation: page ids in the cache's
            range, and no NaN in tensors on a device (Python numbers and CPU tensors are always looked at).

    Returns:
        out, or (out, lse). A row that sees no key has out = 0 and lse = -inf, with or without a sink.

    Raises:
        TypeError, ValueError: a wrong argument, by its name, with what was expected and what came.
        RuntimeError: an explicit `backend` cannot run this call; lists every reason.

    There is no backward: tensors that need a gradient are refused while grad mode is on. Under torch.compile the op is
    opaque and needs no graph break.
    """
    call = kept_call(plan, backend, q, k_cache, v_cache, out)
    if call is None:
        checks.check_attention(q, k_cache, v_cache, plan)
        if out is not None:
            checks.check_out(out, q)
        name = BACKENDS.check(backend)
    num_rows, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else checks.check_number("scale", scale)
    softcap = checks.check_number("softcap", softcap)
    if softcap < 0:
        checks.fail("softcap", "0 (off) or a positive number", softcap)
    window = checks.check_window(window)
    sinks = checks.check_sinks(sinks, num_q_heads, q.device)
    k_scale = checks.per_head("k_scale", k_scale, num_kv_heads, q.device)
    v_scale = checks.per_head("v_scale", v_scale, num_kv_heads, q.device)
    given, out = out, torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    lse = torch.empty((num_rows, num_q_heads), dtype=torch.float32, device=q.device) if return_lse else None
    # Pages held in reserve may lie outside the cache, pages in use may not: where the plan's largest id does, look.
    check = check or plan.max_page >= k_cache.shape[0]
    tensors = out, lse, q, k_cache, v_cache, plan.nodes, plan.pages, plan.rows
    numbers = scale, softcap, window, sinks, k_scale, v_scale
    if call is not None:
        check_values(*tensors, plan.page_size, sinks, k_scale, v_scale, check)
        call(*tensors, plan.causal, *numbers)
    else:
        table, scratch, tile = work_of(plan, q, k_cache, v_cache, name)
        torch.ops.tts_kernels.tree_attention.default(
            *tensors, plan.page_size, plan.causal, *numbers, table, scratch, tile, name, check
        )
        keep_call(plan, backend, (q, k_cache, v_cache, given), out, table)
    return out if lse is None else (out, lse)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    *,
    plan: TreePlan | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = -1,
    sinks: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    check: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A paged decode call in its usual form: one row for each sequence, [B, Hq, D]. What the sequences share is found
    from equal leading pages of `block_table` and read once, except where that was measured to be slower on this device.

    Args:
        q: [B, Hq, D]; the KV of each row's token is in the cache already.
        block_table: int32 [B, max_pages]; only the entries that seq_lens covers are read.
        seq_lens: int32 [B], tokens of each sequence, the row's own included; 0 is padding (out = 0, lse = -inf).
        plan: a ready TreePlan.from_block_table(...), built once and used for every layer and, with advance_, for every
            step. block_table and seq_lens are then not read and may be None. Without it the plan is built here in every
            call, which waits for the device: fine for a trial, slow in a loop, and a graph break under torch.compile.

    The other arguments, the result and the errors are those of `tree_attention`.
    """
    if plan is None:
        checks.check_caches("q", q, k_cache, v_cache, heads="Hq")
        if not isinstance(block_table, Tensor):
            checks.fail("block_table", "a tensor [B, max_pages]", type(block_table).__name__, TypeError)
        if block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
            checks.fail("block_table", f"shape [{q.shape[0]}, max_pages] for the rows of q", tuple(block_table.shape))
        if block_table.device != q.device:
            checks.fail("block_table", f"a tensor on {q.device} like q", f"one on {block_table.device}")
        least = tables.least_saving(q, k_cache)
        plan = TreePlan.from_block_table(block_table, seq_lens, page_size=k_cache.shape[1], least_saving=least)
    return tree_attention(
        q, k_cache, v_cache, plan, scale=scale, softcap=softcap, window=window, sinks=sinks, k_scale=k_scale,
        v_scale=v_scale, out=out, return_lse=return_lse, backend=backend, check=check,
    )  # fmt: skip


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    cos_sin_cache: Tensor | None = None,
    positions: Tensor | None = None,
    is_neox: bool = True,
    q: Tensor | None = None,
    backend: str | None = None,
    check: bool = False,
) -> Tensor | None:
    """Write new keys and values into the cache, in place; with `cos_sin_cache`, keys turned by their positions (RoPE).

    Args:
        k, v: [R, Hkv, D], dtype of the caches; also float32, float16 or bfloat16 where the caches are
            torch.float8_e4m3fn: rounded as they are (divide by k_scale and v_scale before), beyond +-448 to +-448.
        k_cache, v_cache: [num_pages, page_size, Hkv, D].
        slots: int64 [R], page * page_size + offset for each row; -1 skips the row. No slot stands twice.
        cos_sin_cache: [max_position, rotary_dim], float32, float16 or bfloat16, in the layout of vLLM and FlashInfer:
            cosines of the rotary_dim / 2 angles of a position, then their sines. The first rotary_dim dimensions of k
            are turned in fp32 and rounded once, to the cache's dtype; the others are stored as they are.
        positions: int64 or int32 [R], rows of cos_sin_cache. With q every row's is read, else those of rows that are
            written.
        is_neox: dimension i is turned with i + rotary_dim / 2; if False, 2 i with 2 i + 1.
        q: [R, Hq, D], dtype of k: the rows' queries, to be turned too. They are left as they are.
        backend: as in `tree_attention`.
        check: raise if a slot is neither -1 nor in [0, num_pages * page_size), or a position that is read is not in
            [0, max_position), at the cost of a pass and a synchronisation. Without it such numbers are undefined
            behaviour.

    Returns:
        None; with q, the turned queries, [R, Hq, D] in q's dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as in `tree_attention`.
    """
    tensors = k, v, k_cache, v_cache, slots
    call = metadata((*tensors, cos_sin_cache, positions, q), "append_kv", backend, type(is_neox))
    ran_by = call and BACKENDS.checked.get(call)
    if not ran_by:
        checks.check_append(*tensors)
        checks.check_rope(k, cos_sin_cache, positions, is_neox, q)
        name = BACKENDS.check(backend)
    q_out = None if q is None else torch.empty_like(q, memory_format=torch.contiguous_format)
    positions = None if positions is None else checks.as_int64(positions)
    arguments = k, v, k_cache, v_cache, slots.contiguous()
    rope = cos_sin_cache, positions, is_neox, q, q_out
    if ran_by:
        append(BACKENDS.load(ran_by), *arguments, check, *rope)
    else:
        torch.ops.tts_kernels.append_kv.default(*arguments, name, check, *rope)
        BACKENDS.keep(call, "append_kv", name, *tensors)
    return q_out


def merge_states(out: Tensor, lse: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Merge attention over S disjoint sets of keys into attention over their union.

        lse = log(sum_s exp(lse_s));  out = sum_s exp(lse_s - lse) out_s

    Args:
        out: [S, R, H, D], float32, float16 or bfloat16. S is at least 1.
        lse: [S, R, H] float32, natural logarithm; -inf marks a state that saw no key: its `out` is not looked at.
        backend: as in `tree_attention`.

    Returns:
        (out [R, H, D] in the dtype given, lse [R, H] float32), computed in float32. Where all S saw nothing 0 and -inf.

    Raises:
        TypeError, ValueError, RuntimeError: as in `tree_attention`.
    """
    call = metadata((out, lse), "merge_states", backend)
    ran_by = call and BACKENDS.checked.get(call)
    if ran_by:
        return BACKENDS.load(ran_by).merge_states(out, lse)
    checks.check_states(out, lse)
    name = BACKENDS.check(backend)
    merged = torch.ops.tts_kernels.merge_states.default(out, lse, name)
    BACKENDS.keep(call, "merge_states", name, out, lse)
    return merged


def kept_call(plan: TreePlan, backend: str | None, *tensors: Tensor | None) -> Callable | None:
    """What a backend has kept of an earlier call of tree_attention with this plan: of q, k_cache, v_cache and out there
    is nothing left to check but values, and nothing to choose."""
    if torch.compiler.is_compiling() or not isinstance(plan, TreePlan) or not plan.works:
        return None
    call = metadata(tensors, backend)
    for made in plan.works.values() if call else ():
        if found := made.calls.get(call):
            return found
    return None


def keep_call(
    plan: TreePlan, backend: str | None, tensors: tuple[Tensor | None, ...], out: Tensor, table: Tensor | None
) -> None:
    """For `kept_call`, after a call with this table of a work list that went well."""
    if torch.compiler.is_compiling() or table is None or not plan.num_rows:
        return
    call = metadata(tensors, backend)
    for (*_, name), made in plan.works.items() if call else ():
        module = BACKENDS.load(name)
        if made.table is table and hasattr(module, "TreeCall"):
            made.calls.keep(call, module.TreeCall(out, *tensors[:3], plan.nodes, plan.page_size, made))


def work_of(
    plan: TreePlan, q: Tensor, k_cache: Tensor, v_cache: Tensor, backend: str
) -> tuple[Tensor | None, Tensor | None, list[int]]:
    """The work list of a GPU backend for this geometry: made by the first call and kept with the plan."""
    if backend in ("reference", "cpu") or (q.device.type == "cpu" and not backend):
        return None, None, []
    # A compiled function asks no backend: it takes the list that an earlier call has left, or the op makes one.
    compiling = torch.compiler.is_compiling()
    if not backend and not compiling:
        backend = BACKENDS.choose("tree_attention", q, k_cache, v_cache)
    for name in (backend,) if backend else ("cuda", "triton"):
        if name not in work.WITH_WORK_LISTS:
            continue
        key = work.key_of(q, k_cache, name)
        kept = plan.works.get(key)
        if kept is None and not compiling:
            if backend and BACKENDS.unsupported_reasons("tree_attention", name, q, k_cache, v_cache):
                continue  # the op says why
            kept = plan.works[key] = BACKENDS.load(name).prepare(plan, q, k_cache)
        if kept is not None:
            return work.argument(kept, name)
    return None, None, []


# The registered ops. What reads tensor values (checks, the choice of a backend) happens in here, where torch.compile
# does not look.


def _tree_attention(
    out, lse, q, k_cache, v_cache, nodes, pages, rows, page_size, causal,
    scale, softcap, window, sinks, k_scale, v_scale, table, scratch, tile, backend, check,
):  # fmt: skip
    check_values(out, lse, q, k_cache, v_cache, nodes, pages, rows, page_size, sinks, k_scale, v_scale, check)
    module = BACKENDS.pick("tree_attention", backend, q, k_cache, v_cache)
    if q.shape[0]:
        module.tree_attention(
            out, lse, q, k_cache, v_cache, nodes, pages, rows, page_size, causal,
            scale, softcap, window, sinks, k_scale, v_scale, (table, scratch, tile),
        )  # fmt: skip


def check_values(out, lse, q, k_cache, v_cache, nodes, pages, rows, page_size, sinks, k_scale, v_scale, check) -> None:
    checks.check_no_nan("sinks", sinks, check)
    checks.check_no_nan("k_scale", k_scale, check)
    checks.check_no_nan("v_scale", v_scale, check)
    if out.numel() and out.data_ptr() == q.data_ptr():
        checks.fail("out", "memory of its own", "the memory of q")
    if check:
        checks.check_pages(nodes, pages, page_size, k_cache.shape[0])


def _append_kv(
    k, v, k_cache, v_cache, slots, backend, check,
    cos_sin_cache=None, positions=None, is_neox=True, q=None, q_out=None,
):  # fmt: skip
    module = BACKENDS.pick("append_kv", backend, k, v, k_cache, v_cache, slots)
    append(module, k, v, k_cache, v_cache, slots, check, cos_sin_cache, positions, is_neox, q, q_out)


def append(module, k, v, k_cache, v_cache, slots, check, cos_sin_cache, positions, is_neox, q, q_out) -> None:
    rope = None if cos_sin_cache is None else Rope(cos_sin_cache, positions, is_neox, q, q_out)
    if check:
        checks.check_slot_range(slots, k_cache.shape[0] * k_cache.shape[1])
        if rope is not None:
            checks.check_positions(positions, slots, cos_sin_cache.shape[0], q is not None)
    if k.shape[0]:
        module.append_kv(k, v, k_cache, v_cache, slots, rope)


def _merge_states(out, lse, backend):
    return BACKENDS.pick("merge_states", backend, out, lse).merge_states(out, lse)


def _fake_merge_states(out, lse, backend):
    return out.new_empty(out.shape[1:]), lse.new_empty(lse.shape[1:])


register(
    "tree_attention(Tensor(a!) out, Tensor(b!)? lse, Tensor q, Tensor k_cache, Tensor v_cache, "
    "Tensor nodes, Tensor pages, Tensor rows, int page_size, bool causal, float scale, float softcap, int window, "
    "Tensor? sinks, Tensor? k_scale, Tensor? v_scale, Tensor? table, Tensor(c!)? scratch, int[] tile, "
    "str backend, bool check) -> ()",
    _tree_attention,
    lambda *arguments: None,
)
register(
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, "
    "str backend, bool check, Tensor? cos_sin_cache=None, Tensor? positions=None, bool is_neox=True, Tensor? q=None, "
    "Tensor(c!)? q_out=None) -> ()",
    _append_kv,
    lambda *arguments: None,
)
register("merge_states(Tensor out, Tensor lse, str backend) -> (Tensor, Tensor)", _merge_states, _fake_merge_states)
