"""FlashInfer's decode attention over a paged KV cache, by its names: pages that requests share are read once."""

from __future__ import annotations

import functools
from itertools import pairwise

import torch
from torch import Tensor

from tts_kernels.attention.checks import check_number
from tts_kernels.tree.checks import check_integers, fail
from tts_kernels.tree.plan import TreePlan, int_tensor
from tts_kernels.tree.room import Room

from .flashinfer_call import Planned, attend, check_layout, check_tensor, device_of, read_options
from .flashinfer_plan import as_level_tensor, check_same_options, lengths, read_indptr

KERNELS = ("auto", "fa2", "fa3")  # FlashInfer's, which give the same
DEPTH = 8  # of sharing within sharing that a captured graph follows; what is shared deeper is read by each request


class BatchDecodeWithPagedKVCacheWrapper:
    """Attention of a decode batch, a row of q for each request, over its pages in one paged table.

    Requests whose first pages are the same, page id by page id, share them: any number of groups, nested to any depth,
    their members anywhere in the batch. plan() finds them, and run() reads the pages of a group once. A request's last
    token is never in a page that is taken for shared.

        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace_buffer, "NHD")
        wrapper.plan(indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
                     q_data_type=torch.bfloat16)
        for layer in layers:
            out = wrapper.run(q[layer], kv_cache[layer])

    FlashInfer's deprecated forward, forward_return_lse, begin_forward and end_forward are not there.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
        jit_args: list | None = None,
    ) -> None:
        """
        Args:
            float_workspace_buffer: says by its device where q and the caches will be. It is not used otherwise.
            kv_layout: "NHD" or "HND", order of a page's dimensions.
            use_cuda_graph: run() may be captured, and a replay of it follows a later plan(), whatever its requests
                share. Every plan() then has the same number of requests, the same heads, dtypes, page_size and options.
            use_tensor_cores: of FlashInfer's choice between kernels; without effect.
            paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer: with use_cuda_graph,
                [requests + 1], [most pages] and [requests], int32 or int64. plan() fills them as FlashInfer does; run()
                reads tables of its own. Capacity for page ids is the length of the second; on a GPU it has to hold
                the requests' number times the pages of the longest. Not looked at without use_cuda_graph.
            backend: FlashInfer's kernels "auto", "fa2" or "fa3", without effect: run(backend=) names one of ours.
            jit_args: None; there are no kernels of the caller's.

        Raises:
            TypeError, ValueError: a wrong argument, by its name.
        """
        self._device = device_of("float_workspace_buffer", float_workspace_buffer)
        self._kv_layout = check_layout(kv_layout)
        self._use_tensor_cores = use_tensor_cores
        if backend not in KERNELS:
            fail("backend", f"one of {', '.join(KERNELS)}; run() takes the name of one of ours", repr(backend))
        refuse_others(None, jit_args=jit_args)
        self._buffers = None
        if use_cuda_graph:
            self._buffers = paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer
            check_buffers(*self._buffers)
        self._planned: Planned | None = None

    @property
    def use_tensor_cores(self) -> bool:
        return self._use_tensor_cores

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._buffers is not None

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        """From the next plan() on, q and the caches are on the device of `float_workspace_buffer`. Neither it nor
        `int_workspace_buffer` is used otherwise."""
        device_of("int_workspace_buffer", int_workspace_buffer)
        self._device = device_of("float_workspace_buffer", float_workspace_buffer)

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int | None = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype | str | None = "float16",
        kv_data_type: torch.dtype | str | None = None,
        o_data_type: torch.dtype | str | None = None,
        data_type: torch.dtype | str | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: Tensor | None = None,
        seq_lens: Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """Makes the tables for any number of run() calls, one for each layer. `indptr` and `last_page_len` are read on
        the host, as FlashInfer reads the first. Page ids are compared where the caches are, on a GPU by Triton kernels,
        without a copy to the host.

        Args:
            indptr: [requests + 1], int32 or int64, begins with 0: the pages of request b are indices
                [indptr[b], indptr[b + 1]).
            indices: page ids, at least as many as the last entry of indptr says.
            last_page_len: [requests]: tokens in a request's last page, 1 to page_size; the row of q is the last token.
                Not looked at for requests without pages, which see nothing.
            num_qo_heads, num_kv_heads, head_dim, page_size: of q and of the caches.
            pos_encoding_mode: "NONE". Rotary embeddings are applied to q and k before; there are no ALiBi biases.
            window_left: a row sees the tokens at most this many positions before its own; -1 or None: all.
            logits_soft_cap: bound of the scores; None or a number that is not positive: off.
            q_data_type: of q: float32, float16 or bfloat16, by name or as a torch.dtype. None: `data_type`, or float16.
            kv_data_type: of the caches: q_data_type or float8_e4m3fn. None: `data_type`, or q_data_type.
            o_data_type: None or q_data_type.
            sm_scale: multiplies q . k; default 1 / sqrt(head_dim).
            rope_scale, rope_theta: of the other encoding modes; without effect.
            non_blocking, fixed_split_size, disable_split_kv: of how FlashInfer runs; without effect.
            block_tables, seq_lens: say what indptr, indices and last_page_len say; not looked at.

        Raises:
            TypeError, ValueError: a wrong argument, by its name; with use_cuda_graph also one that a captured run could
                not follow. The plan before it, if there is one, stays in force then.
            RuntimeError: on a GPU where triton cannot be imported.
        """
        options = read_options(
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            causal=True,
            pos_encoding_mode=pos_encoding_mode,
            sm_scale=sm_scale,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            q_data_type=data_type if q_data_type is None else q_data_type,
            kv_data_type=data_type if kv_data_type is None else kv_data_type,
        )
        dtype = options.q_data_type
        if o_data_type not in (None, dtype, str(dtype).removeprefix("torch.")):
            fail("o_data_type", f"None or {dtype} like q_data_type", repr(o_data_type))
        begins = read_indptr("indptr", as_level_tensor("indptr", indptr))
        last = as_level_tensor("last_page_len", last_page_len)
        if len(last) != len(begins) - 1:
            fail("last_page_len", f"{len(begins) - 1} entries, one for each request of indptr", len(last))
        tokens = lengths("last_page_len", begins, last.tolist(), page_size)
        check_integers("indices", indices, "[entries]")
        if len(indices) < begins[-1]:
            fail("indices", f"at least {begins[-1]} page ids, as the last entry of indptr says", len(indices))
        room = into = None
        if self._buffers is not None:
            arrays = indptr, indices, last_page_len
            check_fits(self._buffers, arrays)
            if self._planned is None:
                requests, pages = len(last), len(self._buffers[1])
                room = Room(2 * requests, requests, max(pages, 1), DEPTH)
            else:
                check_same_options(self._planned.options, options)
                into = self._planned.tree
                if into.device != self._device:
                    fail("float_workspace_buffer", f"one on {into.device}, where captured runs are", self._device)
        table = block_table(begins, indices.to(self._device))
        try:
            tree = TreePlan.from_block_table(
                table, int_tensor(tokens, torch.int64), page_size=options.page_size, room=room, into=into
            )
        except ValueError as error:
            raise ValueError(f"indices: {error}") from None
        self._planned = Planned(options, tree)
        if self._buffers is not None:
            for buffer, array in zip(self._buffers, arrays):
                buffer[: len(array)].copy_(array)

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Tensor | tuple[Tensor, Tensor],
        *,
        q_scale: float | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        q_len_per_req: int | None = 1,
        skip_softmax_threshold_scale_factor: float | None = None,
        backend: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of each request's row over its pages.

        Args:
            q: [requests, num_qo_heads, head_dim], as planned.
            paged_kv_cache: (k_cache, v_cache), each [num_pages, page_size, num_kv_heads, head_dim] ("NHD") or
                [num_pages, num_kv_heads, page_size, head_dim] ("HND"); or one tensor [num_pages, 2, ...] of both.
            q_scale: multiplies the scores.
            out, k_scale, v_scale, sinks, backend: as in `tts_kernels.tree_attention`.
            return_lse: also return the base-2 logarithm of the sum of exp(score), [requests, num_qo_heads] float32.
            lse: where that is written; default a new tensor.
            enable_pdl: without effect.
            window_left: None or that of plan().
            q_len_per_req, skip_softmax_threshold_scale_factor: 1 and None.

        Returns:
            out [requests, num_qo_heads, head_dim] in q's dtype, or (out, lse). A row that sees no key: 0 and -inf.

        Raises:
            RuntimeError: plan() has not been called; or `backend` cannot run the call.
            TypeError, ValueError: a wrong argument, by its name, or a q or cache that is not as planned.
        """
        refuse_others(1, q_len_per_req=q_len_per_req)
        refuse_others(None, skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor)
        if self._planned is not None:
            options, tree = self._planned
            if window_left not in (None, options.window_left):
                fail("window_left", f"None or {options.window_left} as in plan()", window_left)
            if lse is not None:
                shape = (tree.num_rows, options.num_qo_heads)
                check_tensor("lse", lse, "[requests, num_qo_heads]", shape, (torch.float32,), tree.device)
        result = attend(
            self._planned, self._kv_layout, q, paged_kv_cache, out=out, return_lse=return_lse or lse is not None,
            q_scale=1.0 if q_scale is None else check_number("q_scale", q_scale), k_scale=k_scale, v_scale=v_scale,
            sinks=sinks, backend=backend,
        )  # fmt: skip
        if lse is None:
            return result
        lse.copy_(result[1])
        return (result[0], lse) if return_lse else result[0]

    run_return_lse = functools.partialmethod(run, return_lse=True)


def refuse_others(value: object, **given: object) -> None:
    for name, came in given.items():
        if came is not None and came != value:
            fail(name, f"{value}; FlashInfer's others are not there", repr(came))


def block_table(begins: list[int], indices: Tensor) -> Tensor:
    """[requests, most pages of one] on the device of `indices`. What lies behind a request's pages is of others."""
    width = max((end - begin for begin, end in pairwise(begins)), default=0)
    first = torch.tensor(begins[:-1], dtype=torch.int64, device=indices.device)
    return indices[(first[:, None] + torch.arange(width, device=indices.device)).clamp_(max=begins[-1] - 1)]


def check_buffers(indptr: Tensor, indices: Tensor, last_page_len: Tensor) -> None:
    buffers = {
        "paged_kv_indptr_buffer": indptr,
        "paged_kv_indices_buffer": indices,
        "paged_kv_last_page_len_buffer": last_page_len,
    }
    for name, buffer in buffers.items():
        check_tensor(name, buffer, "[entries]", None, (torch.int32, torch.int64))
    if not len(last_page_len):
        fail("paged_kv_last_page_len_buffer", "at least 1 entry", 0)
    if len(indptr) != len(last_page_len) + 1:
        expected = f"{len(last_page_len) + 1} entries for the {len(last_page_len)} of paged_kv_last_page_len_buffer"
        fail("paged_kv_indptr_buffer", expected, len(indptr))


def check_fits(buffers: tuple[Tensor, ...], arrays: tuple[Tensor, ...]) -> None:
    for name, buffer, array in zip(("indptr", "indices", "last_page_len"), buffers, arrays):
        if name == "indices":
            if len(array) > len(buffer):
                fail(name, f"at most the {len(buffer)} page ids of paged_kv_indices_buffer", len(array))
        elif len(array) != len(buffer):
            fail(name, f"{len(buffer)} entries like paged_kv_{name}_buffer", len(array))
