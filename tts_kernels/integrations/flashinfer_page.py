"""FlashInfer's append to a paged KV cache, by its name."""

from __future__ import annotations

import torch
from torch import Tensor

from tts_kernels import attention
from tts_kernels.attention.checks import FLOATS, FP8
from tts_kernels.tree.checks import fail

from .flashinfer_call import check_layout, check_tensor, read_caches
from .flashinfer_plan import read_indptr


def append_paged_kv_cache(
    append_key: Tensor,
    append_value: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    paged_kv_cache: Tensor | tuple[Tensor, Tensor],
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
    kv_layout: str = "NHD",
    *,
    backend: str | None = None,
) -> None:
    """Writes new keys and values to their places in the pages of a batch, which has room for them already.

    Args:
        append_key, append_value: [n, num_kv_heads, head_dim], dtype of the caches; also float32, float16 or bfloat16
            where the caches are float8_e4m3fn.
        batch_indices, positions: [n], the request of each and its position there. No place is named twice.
        paged_kv_cache: as in `BatchDecodeWithPagedKVCacheWrapper.run`.
        kv_indices, kv_indptr, kv_last_page_len: as plan() of that wrapper takes them, the new tokens included. All
            integers are int32 or int64, on the device of the caches.
        kv_layout: "NHD" or "HND".
        backend: see `tts_kernels.append_kv`.

    Raises:
        TypeError, ValueError: a wrong argument, by its name; a place that the request has not on CPU tensors alone,
            since it is not waited for a GPU. Nothing is written then.
        RuntimeError: `backend` cannot run the call.
    """
    check_layout(kv_layout)
    integers = (torch.int32, torch.int64)
    check_tensor("append_key", append_key, "[n, num_kv_heads, head_dim]", None, (*FLOATS, FP8))
    like, device = append_key.shape, append_key.device
    check_tensor("append_value", append_value, "[n, num_kv_heads, head_dim]", like, (append_key.dtype,), device)
    check_tensor("batch_indices", batch_indices, "[n]", like[:1], integers, device)
    check_tensor("positions", positions, "[n]", like[:1], integers, device)
    k_cache, v_cache = read_caches(paged_kv_cache, kv_layout, None, *like[1:], (append_key.dtype, FP8), device)
    check_tensor("kv_indices", kv_indices, "[entries]", None, integers, device)
    check_tensor("kv_indptr", kv_indptr, "[requests + 1]", None, integers, device)
    requests = max(len(kv_indptr) - 1, 0)
    check_tensor("kv_last_page_len", kv_last_page_len, "[requests]", (requests,), integers, device)
    page_size = k_cache.shape[1]
    if device.type == "cpu":
        read_indptr("kv_indptr", kv_indptr)
        if len(kv_indices) < kv_indptr[-1]:
            expected = f"at least {int(kv_indptr[-1])} page ids, as the last entry of kv_indptr says"
            fail("kv_indices", expected, len(kv_indices))
        check_below("kv_indices", kv_indices[: kv_indptr[-1]], len(k_cache), f"one of {len(k_cache)} pages")
        check_below("batch_indices", batch_indices, requests, f"one of {requests} requests")
        most = kv_indptr.diff()[batch_indices] * page_size
        check_below("positions", positions, most, f"one in its request's pages of {page_size} tokens")
    page = kv_indices[kv_indptr[batch_indices] + positions // page_size].long()
    slots = page * page_size + positions % page_size
    attention.append_kv(append_key, append_value, k_cache, v_cache, slots, backend=backend)


def check_below(name: str, values: Tensor, most: int | Tensor, expected: str) -> None:
    wrong = ((values < 0) | (values >= most)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        fail(f"{name}[{first}]", expected, int(values[first]))
