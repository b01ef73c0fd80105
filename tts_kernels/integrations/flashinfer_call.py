"""What FlashInfer's wrappers share here: the options of plan(), read and checked, and the call of run()."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tts_kernels import attention
from tts_kernels.attention.checks import FLOATS, FP8, check_number
from tts_kernels.tree.checks import check_int, check_options, fail
from tts_kernels.tree.plan import TreePlan

LN2 = math.log(2.0)


@dataclass(frozen=True)
class Options:
    """What plan() has settled beside the tree. A captured run has all of it built in."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    causal: bool
    sm_scale: float
    window_left: int
    logits_soft_cap: float
    q_data_type: torch.dtype
    kv_data_type: torch.dtype


class Planned(NamedTuple):
    options: Options
    tree: TreePlan


def read_options(
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    causal: bool,
    pos_encoding_mode: str,
    sm_scale: float | None,
    window_left: int | None,
    logits_soft_cap: float | None,
    q_data_type: torch.dtype | str | None,
    kv_data_type: torch.dtype | str | None,
) -> Options:
    """The arguments of plan() by FlashInfer's names. TypeError and ValueError name what is wrong."""
    if pos_encoding_mode != "NONE":
        expected = "'NONE' (q and k with rotary embeddings applied before; no ALiBi)"
        fail("pos_encoding_mode", expected, repr(pos_encoding_mode))
    num_qo_heads = check_int("num_qo_heads", num_qo_heads, 1)
    num_kv_heads = check_int("num_kv_heads", num_kv_heads, 1)
    head_dim = check_int("head_dim", head_dim, 1)
    if num_qo_heads % num_kv_heads:
        fail("num_qo_heads", f"a multiple of num_kv_heads = {num_kv_heads}", num_qo_heads)
    check_options(page_size, causal)
    q_dtype, kv_dtype = read_dtypes(q_data_type, kv_data_type)
    return Options(
        num_qo_heads,
        num_kv_heads,
        head_dim,
        check_int("page_size", page_size, 1),
        causal,
        1.0 / math.sqrt(head_dim) if sm_scale is None else check_number("sm_scale", sm_scale),
        -1 if window_left is None else check_int("window_left", window_left, -1),
        0.0 if logits_soft_cap is None else max(0.0, check_number("logits_soft_cap", logits_soft_cap)),
        q_dtype,
        kv_dtype,
    )


def attend(
    planned: Planned | None,
    kv_layout: str,
    q: Tensor,
    paged_kv_cache: Tensor | tuple[Tensor, Tensor],
    *,
    q_scale: float = 1.0,
    out: Tensor | None,
    return_lse: bool,
    k_scale: float | Tensor | None,
    v_scale: float | Tensor | None,
    sinks: Tensor | None,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """run(): `tree_attention` with the planned options, lse in base 2. Raises what run() raises."""
    if planned is None:
        raise RuntimeError("run: plan() has to be called before")
    options, tree = planned
    check_tensor(
        "q", q, "[rows, num_qo_heads, head_dim]", (tree.num_rows, options.num_qo_heads, options.head_dim),
        (options.q_data_type,), tree.device,
    )  # fmt: skip
    k_cache, v_cache = read_caches(
        paged_kv_cache, kv_layout, options.page_size, options.num_kv_heads, options.head_dim, (options.kv_data_type,),
        tree.device,
    )  # fmt: skip
    result = attention.tree_attention(
        q, k_cache, v_cache, tree, scale=options.sm_scale * q_scale, softcap=options.logits_soft_cap,
        window=options.window_left, sinks=sinks, k_scale=k_scale, v_scale=v_scale, out=out, return_lse=return_lse,
        backend=backend,
    )  # fmt: skip
    return (result[0], result[1] / LN2) if return_lse else result


def read_caches(
    paged_kv_cache: Tensor | tuple[Tensor, Tensor],
    kv_layout: str,
    page_size: int | None,
    num_kv_heads: int,
    head_dim: int,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """K and V as views [num_pages, page_size, num_kv_heads, head_dim]. page_size None: any, the same of both."""
    if isinstance(paged_kv_cache, Tensor):
        if paged_kv_cache.dim() != 5 or paged_kv_cache.shape[1] != 2:
            shape = f"shape {tuple(paged_kv_cache.shape)}"
            fail("paged_kv_cache", "(k_cache, v_cache) or a tensor [num_pages, 2, ...] of 5 dimensions", shape)
        caches = paged_kv_cache.unbind(1)
    elif isinstance(paged_kv_cache, (tuple, list)) and len(paged_kv_cache) == 2:
        caches = tuple(paged_kv_cache)
    else:
        came = f"{len(paged_kv_cache)} of them" if isinstance(paged_kv_cache, (tuple, list)) else paged_kv_cache
        fail("paged_kv_cache", "(k_cache, v_cache) or a tensor [num_pages, 2, ...]", came, TypeError)
    nhd = kv_layout == "NHD"
    axes = f"[num_pages, {'page_size, num_kv_heads' if nhd else 'num_kv_heads, page_size'}, head_dim]"
    for name, cache in zip(("k_cache of paged_kv_cache", "v_cache of paged_kv_cache"), caches):
        num_pages = cache.shape[0] if isinstance(cache, Tensor) and cache.dim() else 0
        if page_size is None and isinstance(cache, Tensor) and cache.dim() == 4:
            page_size = cache.shape[1 if nhd else 2]
        page = (page_size, num_kv_heads) if nhd else (num_kv_heads, page_size)
        check_tensor(name, cache, axes, (num_pages, *page, head_dim), dtypes, device)
    return caches if nhd else tuple(cache.transpose(1, 2) for cache in caches)


def check_layout(kv_layout: str) -> str:
    if kv_layout not in ("NHD", "HND"):
        fail("kv_layout", "'NHD' or 'HND'", repr(kv_layout))
    return kv_layout


def check_tensor(
    name: str,
    tensor: Tensor,
    axes: str,
    shape: tuple[int, ...] | None,
    dtypes: tuple,
    device: torch.device | None = None,
) -> None:
    if not isinstance(tensor, Tensor):
        fail(name, f"a tensor {axes}", type(tensor).__name__, TypeError)
    if tensor.dtype not in dtypes:
        fail(name, "dtype " + " or ".join(map(str, dtypes)), tensor.dtype, TypeError)
    if tensor.dim() != axes.count(",") + 1 or (shape is not None and tensor.shape != shape):
        expected = f"a tensor {axes}" + (f" of shape {tuple(shape)}" if shape is not None else "")
        fail(name, expected, f"shape {tuple(tensor.shape)}")
    if device is not None and tensor.device != device:
        fail(name, f"a tensor on {device}", f"one on {tensor.device}")
    if tensor.requires_grad and torch.is_grad_enabled():
        fail(name, "a tensor that needs no gradient (there is no backward)", "one with requires_grad=True")


def device_of(name: str, tensor: Tensor) -> torch.device:
    if not isinstance(tensor, Tensor):
        fail(name, "a tensor", type(tensor).__name__, TypeError)
    return tensor.device


def read_dtypes(q_data_type: object, kv_data_type: object) -> tuple[torch.dtype, torch.dtype]:
    q_dtype = read_dtype("q_data_type", torch.float16 if q_data_type is None else q_data_type, FLOATS)
    if kv_data_type is None:
        return q_dtype, q_dtype
    return q_dtype, read_dtype("kv_data_type", kv_data_type, (q_dtype, FP8))


def read_dtype(name: str, value: object, allowed: tuple[torch.dtype, ...]) -> torch.dtype:
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if dtype not in allowed:
        error = ValueError if isinstance(value, (str, torch.dtype)) else TypeError
        fail(name, "one of " + ", ".join(map(str, allowed)), repr(value), error)
    return dtype
