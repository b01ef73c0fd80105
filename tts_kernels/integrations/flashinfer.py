"""FlashInfer's paged decode and cascade attention, by its names, on one tree.

    from tts_kernels.integrations import flashinfer   # in place of `import flashinfer`

`BatchDecodeWithPagedKVCacheWrapper`, `MultiLevelCascadeAttentionWrapper`, `append_paged_kv_cache`, `merge_state`,
`merge_state_in_place` and `merge_states` take what FlashInfer's take; FlashInfer itself is not needed. Its prefill
wrappers are not here. A decode batch reads pages that its requests share once: they are found from equal leading page
ids. All levels of a cascade are one `tree_attention` call instead of a call and a merge for each, and nothing is
rounded between them.

Where the results differ from FlashInfer's, on purpose:

- `window_left` counts absolute positions: a row's own is the number of tokens of all its levels before it. FlashInfer
  counts from the beginning of each level.
- `merge_state_in_place` updates `s` and `v` whatever their dtype and strides. FlashInfer's update of an `s` that is not
  float32 goes to a copy.
- A state is empty where s is -inf or +inf. Two empty ones merge to v = 0, s = -inf, not to NaN.
- A segment or a request without pages has no tokens, whatever its last_page_len says.

Log-sum-exps have base 2 in this module, as in FlashInfer: s = log2(sum of exp(score)). The rest of the package takes
and returns natural logarithms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tts_kernels import attention
from tts_kernels.attention.checks import FLOATS
from tts_kernels.tree.checks import check_int, fail

from .flashinfer_call import LN2, Planned, attend, check_layout, check_tensor, device_of, read_options
from .flashinfer_decode import BatchDecodeWithPagedKVCacheWrapper
from .flashinfer_page import append_paged_kv_cache
from .flashinfer_plan import (
    GraphBuffers,
    check_same_options,
    check_tensors,
    copy_into,
    plan_levels,
    read_levels,
    reserve_pages,
)

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "MultiLevelCascadeAttentionWrapper",
    "append_paged_kv_cache",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
]

STATE_FLOATS = (*FLOATS, torch.float64)


def merge_state(
    v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, merged into attention over their union.

        s = log2(2^s_a + 2^s_b);  v = 2^(s_a - s) v_a + 2^(s_b - s) v_b

    Args:
        v_a, v_b: [n, H, D], float32, float16 or bfloat16, any strides.
        s_a, s_b: [n, H], base-2 log-sum-exps of any float dtype. -inf or +inf: saw no key, v is not looked at.
        backend: see `tts_kernels.merge_states`.

    Returns:
        (v [n, H, D] in the dtype given, s [n, H] float32), computed in float32. Where one state is empty, the other
        one exactly; where both are, 0 and -inf.

    Raises:
        TypeError, ValueError: a wrong argument, by its name.
        RuntimeError: `backend` cannot run the call.
    """
    check_pair(("v_a", v_a), ("s_a", s_a), ("v_b", v_b), ("s_b", s_b))
    return merge(torch.stack((v_a, v_b)), torch.stack((s_a.float(), s_b.float())), backend)


def merge_state_in_place(
    v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None, *, backend: str | None = None
) -> None:
    """`merge_state` of (v, s) and (v_other, s_other), written to v and s: in their dtypes, whatever their strides.

    Args:
        v, v_other: [n, H, D], float32, float16 or bfloat16.
        s, s_other: [n, H], base-2 log-sum-exps of any float dtype.
        mask: bool [n]; rows where it is False stay as they are. Default: all rows are merged.
        backend: see `tts_kernels.merge_states`.

    Raises:
        TypeError, ValueError, RuntimeError: as `merge_state`; nothing is written then.
    """
    check_pair(("v", v), ("s", s), ("v_other", v_other), ("s_other", s_other))
    for name, tensor in (("v", v), ("s", s)):
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape)):
            fail(name, "memory of its own for each element", f"strides {tensor.stride()} (an expanded tensor)")
    if mask is not None:
        check_tensor("mask", mask, "[n]", v.shape[:1], (torch.bool,), v.device)
    merged_v, merged_s = merge(torch.stack((v, v_other)), torch.stack((s.float(), s_other.float())), backend)
    merged_s = merged_s.to(s.dtype)
    if mask is not None:
        merged_v = torch.where(mask[:, None, None], merged_v, v)
        merged_s = torch.where(mask[:, None], merged_s, s)
    v.copy_(merged_v)
    s.copy_(merged_s)


def merge_states(v: Tensor, s: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """`merge_state` of any number of states.

    Args:
        v: [n, S, H, D], float32, float16 or bfloat16, any strides. S is at least 1.
        s: [n, S, H], base-2 log-sum-exps of any float dtype.
        backend: see `tts_kernels.merge_states`.

    Returns and raises what `merge_state` does: (v [n, H, D], s [n, H] float32).
    """
    check_tensor("v", v, "[n, S, H, D]", None, FLOATS)
    if v.shape[1] < 1:
        fail("v", "at least one state to merge in [n, S, H, D]", f"shape {tuple(v.shape)}")
    check_tensor("s", s, "[n, S, H]", v.shape[:3], STATE_FLOATS, v.device)
    return merge(v.transpose(0, 1), s.float().transpose(0, 1), backend)


def merge(v: Tensor, s: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    """v [S, n, H, D], s [S, n, H] float32 in base 2."""
    s = s.masked_fill(s == math.inf, -math.inf)
    # Only differences from the largest are converted: a state alone keeps its s to the last bit.
    largest = s.amax(0)
    largest = torch.where(largest == -math.inf, 0.0, largest)
    if v.stride(-1) != 1:
        v = v.contiguous()
    v, rest = attention.merge_states(v, (s - largest) * LN2, backend=backend)
    return v, largest + rest / LN2


def check_pair(v_a: tuple, s_a: tuple, v_b: tuple, s_b: tuple) -> None:
    """(name, tensor) of two states that fit each other."""
    check_tensor(*v_a, "[n, H, D]", None, FLOATS)
    like = v_a[1]
    check_tensor(*v_b, "[n, H, D]", like.shape, (like.dtype,), like.device)
    for s in (s_a, s_b):
        check_tensor(*s, "[n, H]", like.shape[:2], STATE_FLOATS, like.device)


class MultiLevelCascadeAttentionWrapper:
    """Attention of a batch over KV that its requests share level by level, all in one paged table.

    Level 0 is shared most widely; a segment of a level is a run of KV and the rows of q that see it. Segments need not
    nest: one that crosses a border of the level above is read once on each side.

        wrapper = MultiLevelCascadeAttentionWrapper(2, workspace_buffer, "NHD")
        wrapper.plan(
            [torch.tensor([0, 7]), torch.arange(8)],           # one prefix for 7 requests, one suffix for each
            [shared_page_indptr, unique_page_indptr],
            [shared_page_indices, unique_page_indices],
            [shared_last_page_len, unique_last_page_len],
            num_qo_heads, num_kv_heads, head_dim, page_size, q_data_type=torch.bfloat16,
        )
        for layer in layers:
            out = wrapper.run(q[layer], kv_cache[layer])
    """

    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: list[Tensor] | None = None,
        paged_kv_indptr_buf_arr: list[Tensor] | None = None,
        paged_kv_indices_buf_arr: list[Tensor] | None = None,
        paged_kv_last_page_len_buf_arr: list[Tensor] | None = None,
    ) -> None:
        """
        Args:
            num_levels: levels of the cascade, at least 1.
            float_workspace_buffer: says by its device where q and the caches will be. It is not used otherwise.
            kv_layout: "NHD" or "HND", order of a page's dimensions.
            use_cuda_graph: run() may be captured, and a replay of it follows a later plan(). Every plan() then has the
                same number of segments on each level, of rows, and of nodes (the segments and their cuts), the same
                heads, dtypes, page_size and options; only page ids and lengths change, and what rows a segment has.
            qo_indptr_buf_arr, paged_kv_indptr_buf_arr, paged_kv_indices_buf_arr, paged_kv_last_page_len_buf_arr: with
                use_cuda_graph, lists of a tensor for each level: [segments + 1], [segments + 1], [most pages] and
                [segments], int32 or int64. plan() fills them as FlashInfer does and takes the capacity for page ids
                from the lengths of the third; run() reads tables of its own. Not looked at without use_cuda_graph.

        Raises:
            TypeError, ValueError: a wrong argument, by its name.
        """
        self._num_levels = check_int("num_levels", num_levels, 1)
        self._device = device_of("float_workspace_buffer", float_workspace_buffer)
        self._kv_layout = check_layout(kv_layout)
        self._buffers = None
        if use_cuda_graph:
            self._buffers = GraphBuffers(
                qo_indptr_buf_arr, paged_kv_indptr_buf_arr, paged_kv_indices_buf_arr, paged_kv_last_page_len_buf_arr
            )
            self._buffers.check(num_levels)
        self._planned: Planned | None = None

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._buffers is not None

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffers: list[Tensor]) -> None:
        """From the next plan() on, q and the caches are on the device of `float_workspace_buffer`. Neither it nor
        `int_workspace_buffers`, one tensor for each level, is used otherwise."""
        check_tensors("int_workspace_buffers", int_workspace_buffers, self._num_levels)
        self._device = device_of("float_workspace_buffer", float_workspace_buffer)

    def plan(
        self,
        qo_indptr_arr: list[Tensor],
        paged_kv_indptr_arr: list[Tensor],
        paged_kv_indices_arr: list[Tensor],
        paged_kv_last_page_len: list[Tensor],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int | None = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: torch.dtype | str | None = "float16",
        kv_data_type: torch.dtype | str | None = None,
    ) -> None:
        """Makes the tables for any number of run() calls, one for each layer. The four lists have a tensor for each
        level, int32 or int64 on any device. They are read on the host: tensors on another device are copied there,
        which waits for that device.

        Args:
            qo_indptr_arr: [segments + 1] each: segment j serves the rows [qo_indptr[j], qo_indptr[j + 1]) of q. Begins
                with 0, ends on all levels with the number of rows. Segments without rows are skipped.
            paged_kv_indptr_arr: [segments + 1] each: the pages of segment j are indices [indptr[j], indptr[j + 1]).
            paged_kv_indices_arr: page ids each, at least as many as the last entry of indptr says.
            paged_kv_last_page_len: [segments] each: tokens in a segment's last page, 1 to page_size. Not looked at for
                segments without pages, which have no tokens.
            num_qo_heads, num_kv_heads, head_dim, page_size: of q and of the caches.
            causal: rows of a segment of the last level are its last tokens, and none sees what comes after its own.
                Rows see all of the other levels. A segment may have more rows than tokens: the first see none of it.
            pos_encoding_mode: "NONE". Rotary embeddings are applied to q and k before; there are no ALiBi biases.
            use_fp16_qk_reduction: allows scores in fp16; they are fp32 here all the same.
            sm_scale: multiplies q . k; default 1 / sqrt(head_dim).
            window_left: a row sees the tokens at most this many positions before its own, across levels; -1 or None:
                all.
            logits_soft_cap: bound of the scores; None or a number that is not positive: off.
            rope_scale, rope_theta: of the other encoding modes; without effect.
            q_data_type: of q: float32, float16 or bfloat16, by name or as a torch.dtype. None: float16.
            kv_data_type: of the caches: q_data_type (the default) or float8_e4m3fn.

        Raises:
            TypeError, ValueError: a wrong argument, by its name; with use_cuda_graph also one that a captured run could
                not follow. The plan before it, if there is one, stays in force then.
        """
        arrays = (qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len)
        options = read_options(
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            causal=causal,
            pos_encoding_mode=pos_encoding_mode,
            sm_scale=sm_scale,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
        )
        levels = read_levels(self._num_levels, page_size, *arrays)
        if self._buffers is not None:
            self._buffers.check_fits(arrays)
        tree = plan_levels(levels, page_size=page_size, causal=causal, window=options.window_left, device=self._device)
        if self._buffers is None:
            self._planned = Planned(options, tree)
            return
        if self._planned is None:
            reserve_pages(tree, sum(map(len, self._buffers.paged_kv_indices_buf_arr)))
            self._planned = Planned(options, tree)
        else:
            check_same_options(self._planned.options, options)
            copy_into(self._planned.tree, tree)
        self._buffers.fill(arrays)

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Tensor | tuple[Tensor, Tensor],
        *,
        out: Tensor | None = None,
        return_lse: bool = False,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        sinks: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of all rows over all levels.

        Args:
            q: [rows, num_qo_heads, head_dim], as planned.
            paged_kv_cache: (k_cache, v_cache), each [num_pages, page_size, num_kv_heads, head_dim] ("NHD") or
                [num_pages, num_kv_heads, page_size, head_dim] ("HND"); or one tensor [num_pages, 2, ...] of both.
            out, k_scale, v_scale, sinks, backend: as in `tts_kernels.tree_attention`; FlashInfer's wrapper has none.
            return_lse: also return the base-2 logarithm of the sum of exp(score), [rows, num_qo_heads] float32.

        Returns:
            out [rows, num_qo_heads, head_dim] in q's dtype, or (out, lse). A row that sees no key: 0 and -inf.

        Raises:
            RuntimeError: plan() has not been called; or `backend` cannot run the call.
            TypeError, ValueError: a wrong argument, by its name, or a q or cache that is not as planned.
        """
        return attend(
            self._planned, self._kv_layout, q, paged_kv_cache, out=out, return_lse=return_lse, k_scale=k_scale,
            v_scale=v_scale, sinks=sinks, backend=backend,
        )  # fmt: skip

    forward = run

    def end_forward(self) -> None:
        """Nothing: FlashInfer's programs call it after the last run() of a plan."""
