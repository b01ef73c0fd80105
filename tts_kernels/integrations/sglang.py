"""The attention backend "tts_kernels" for SGLang (tested with 0.5.23): what requests share is read once in a step.

SGLang's radix cache gives requests with a common prefix, such as the n samples of a prompt, the same KV slots. They are
found as equal leading pages of the requests' page tables, once in a forward, and every layer attends over that tree.

    pip install --no-deps .       # of this package, where SGLang is installed: it finds the plugin by its entry point
    sglang serve --model-path MODEL --attention-backend tts_kernels --page-size 16
    sglang.Engine(model_path=MODEL, attention_backend="tts_kernels", page_size=16)

`--decode-attention-backend tts_kernels` takes it for decode alone. Decode runs in SGLang's CUDA graphs, prefill without
them; a GPU is waited for once in a forward, before a graph is replayed. Refused at the start, by name: speculative
decoding, multi-head latent attention, encoders and cross attention, values of another head_dim than keys, chunked local
attention, context parallelism, and KV caches but those of the model's dtype and fp8_e4m3. For some models, such as
gpt-oss, SGLang itself takes none but backends of its own. Images of Gemma 3, whose tokens see one another both ways
with SGLang's triton backend, are causal here, as with its others.

Nothing here needs SGLang but `register`; sglang_backend.py is the backend itself, graph_plans.py has what its decode
graphs read.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..tree.plan import TreePlan
from ..tree.room import PlanWithRoom

NAME = "tts_kernels"
logger = logging.getLogger(__name__)


def register() -> None:
    """Makes the backend known to SGLang in this process. SGLang calls it in each of its processes, as the plugin of the
    entry point group `sglang.srt.plugins`. Called again it does nothing. Raises ImportError without SGLang."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
    from sglang.srt.server_args import add_attention_backend_choices
    from sglang.srt.utils import is_cpu

    if NAME in ATTENTION_BACKENDS:
        return
    register_attention_backend(NAME)(_create)
    add_attention_backend_choices([NAME])
    register_resolution_hook("handle_attention_backend_compatibility")(_resolve)
    if is_cpu():
        from sglang.srt.mem_cache import allocation
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        # SGLang takes a Triton kernel here for every backend whose name it does not know, on a CPU too.
        target = "sglang.srt.mem_cache.allocation.get_last_loc"
        HookRegistry.register(target, allocation.get_last_loc_torch, HookType.REPLACE)


def _create(runner: Any) -> Any:
    from .sglang_backend import TreeAttentionBackend

    return TreeAttentionBackend(runner)


def _resolve(server_args: Any, previous: Any) -> None:
    """A step of SGLang's resolution of arguments: where the backend was chosen, those that it does not support are
    refused; where it was chosen for prefill, prefill's CUDA graphs are switched off."""
    from sglang.srt.arg_groups.overrides import attention_backends_of, declare_resolution, resolved_view
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    previous(server_args)
    for_prefill, for_decode = attention_backends_of(resolved_view(server_args))
    if NAME not in (for_prefill, for_decode):
        return
    refuse(unsupported_arguments(resolved_view(server_args)))
    graphs = resolved_view(server_args).cuda_graph_config
    if for_prefill == NAME and graphs.prefill.backend != Backend.DISABLED:
        logger.warning("prefill runs without CUDA graphs: the attention backend %s has none for it", NAME)
        without = with_phase(graphs, Phase.PREFILL, backend=Backend.DISABLED)
        declare_resolution(server_args, NAME, cuda_graph_config=without)


def refuse(reasons: list[str]) -> None:
    if reasons:
        raise ValueError(f"attention backend {NAME} does not support " + "; ".join(reasons))
    return


def unsupported_arguments(arguments: Any) -> list[str]:
    """Every reason why the backend cannot run with these server arguments; empty if it can.

    arguments: has SGLang's ServerArgs as attributes; those that are missing are not looked at.
    """
    reasons = []
    if getattr(arguments, "speculative_algorithm", None) is not None:
        reasons.append(f"speculative_algorithm {arguments.speculative_algorithm}: drafts may be trees with a mask")
    if getattr(arguments, "dllm_algorithm", None) is not None:
        reasons.append(f"dllm_algorithm {arguments.dllm_algorithm}: attention within a block is not causal")
    for name in ("dcp_size", "attn_cp_size"):
        size = getattr(arguments, name, None) or 1
        if size > 1:
            reasons.append(f"{name} {size}: partial results of several ranks are not merged")
    if getattr(arguments, "kv_cache_dtype", None) not in (None, "auto", "bf16", "bfloat16", "fp8_e4m3"):
        reasons.append(f"kv_cache_dtype {arguments.kv_cache_dtype}: take auto, bfloat16 or fp8_e4m3")
    return reasons


def unsupported_layer(layer: Any) -> list[str]:
    """Every reason why the backend cannot run this RadixAttention layer; empty if it can."""
    reasons = []
    if layer.is_cross_attention:
        reasons.append("cross attention")
    attn_type = getattr(layer.attn_type, "value", layer.attn_type)
    if attn_type != "decoder":
        reasons.append(f"attn_type {attn_type}")
    if layer.v_head_dim != layer.qk_head_dim:
        reasons.append(f"v_head_dim {layer.v_head_dim} beside qk_head_dim {layer.qk_head_dim}")
    if layer.pos_encoding_mode != "NONE":
        reasons.append(f"pos_encoding_mode {layer.pos_encoding_mode}")
    if (layer.logit_cap or 0) > 0 and layer.logit_capping_method != "tanh":
        reasons.append(f"logit_capping_method {layer.logit_capping_method}")
    if layer.xai_temperature_len is not None and layer.xai_temperature_len > 0:
        reasons.append(f"xai_temperature_len {layer.xai_temperature_len}")
    return reasons


def page_table(
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    longest: int,
    page_size: int,
    window_slots: Tensor | None = None,
) -> Tensor:
    """Page ids of requests, [B, ceil(longest / page_size)] in the dtype of `req_to_token` or of `window_slots`.

    Args:
        req_to_token: [requests, max_context] slots, int32 or int64: token t of a request lies at offset t % page_size
            of its page, so the slots of a page are known from its first.
        req_pool_indices: [B] rows of it, int32 or int64.
        longest: tokens of the longest of these requests.
        page_size: tokens per page.
        window_slots: [slots], where each slot lies in a pool of its own for layers with a window, int32 or int64. What
            is outside of every window has been freed there, and has 0 or less: page 0, whatever it holds, then stands
            for it.
    """
    slots = req_to_token[req_pool_indices, :longest:page_size]
    if window_slots is not None:
        slots = window_slots[slots].clamp_min(0)
    return slots if page_size == 1 else slots // page_size


def make_plan(
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    *,
    page_size: int,
    q_lens: Tensor | None = None,
    longest: int | None = None,
    window_slots: Tensor | None = None,
    least_saving: int = 0,
    into: PlanWithRoom | None = None,
) -> TreePlan:
    """The plan of one forward, on the device of `req_to_token`.

    Args:
        req_to_token, req_pool_indices, page_size, window_slots: as in `page_table`.
        seq_lens: [B] tokens of each request, those of its new rows included.
        q_lens: [B] rows of each request, its last tokens; None: one each, as in decode.
        longest: the largest of `seq_lens`, where the host knows it; else it is asked for, which waits for the device.
        least_saving, into: as in `TreePlan.from_block_table`.

    Raises TypeError and ValueError as `TreePlan.from_block_table` does.
    """
    if longest is None:
        longest = int(seq_lens.max())
    table = page_table(req_to_token, req_pool_indices, longest, page_size, window_slots)
    return TreePlan.from_block_table(
        table, seq_lens, page_size=page_size, q_lens=q_lens, least_saving=least_saving, into=into
    )


def as_pages(buffer: Tensor, page_size: int) -> Tensor:
    """A view [num_pages, page_size, Hkv, D] of one layer's keys or values: [slots, Hkv, D], or, with
    SGLANG_USE_HND_KVCACHE, [num_pages, Hkv, page_size, D]. Slots behind the last whole page are left out."""
    if buffer.dim() == 4:
        return buffer.transpose(1, 2)
    num_pages = buffer.shape[0] // page_size
    return buffer[: num_pages * page_size].unflatten(0, (num_pages, page_size))


def scale_of(scale: Tensor | float | None, kv_dtype: torch.dtype) -> Tensor | float | None:
    """What stored keys or values are multiplied by: a layer's scale where KV is stored as fp8. A checkpoint may bring
    scales that a cache of another dtype does not use."""
    return scale if kv_dtype == torch.float8_e4m3fn else None
