"""The class behind SGLang's attention backend "tts_kernels"; sglang.py says how to switch it on. Imports SGLang."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from torch import Tensor

from ..attention import tables, tree_attention
from ..tree.plan import TreePlan
from .sglang import as_pages, make_plan, refuse, scale_of, unsupported_layer

MODES = (ForwardMode.EXTEND, ForwardMode.MIXED, ForwardMode.SPLIT_PREFILL, ForwardMode.DECODE)


@dataclass(frozen=True)
class Forward:
    """What the layers of one forward share; the second half for those whose KV lies in a pool for window layers."""

    plan: TreePlan
    window_plan: TreePlan | None = None
    window_slots: Tensor | None = None  # of the new rows


class TreeAttentionBackend(AttentionBackend):
    """Attention over the tree that the page tables of a batch's requests form."""

    def __init__(self, runner: Any):
        """
        Args:
            runner: SGLang's ModelRunner, its model loaded and its pools made.

        Raises:
            ValueError: every option of the model and of its KV cache that is not supported, by its name.
        """
        super().__init__()
        layers = [module for module in runner.model.modules() if isinstance(module, RadixAttention)]
        refuse(unsupported_reasons(runner, layers))
        self.req_to_token_pool, self.token_to_kv_pool = runner.req_to_token_pool, runner.token_to_kv_pool
        self.window_layers = set()  # those with a pool of their own
        if isinstance(self.token_to_kv_pool, SWAKVPool):
            layer_pools = self.token_to_kv_pool.layers_mapping.items()
            self.window_layers = {layer for layer, (_, in_window_pool) in layer_pools if in_window_pool}
        self.page_size = runner.page_size
        self.kv_cache_dtype = runner.kv_cache_dtype
        self.least_saving = 0
        if layers:
            heads, head_dim = layers[0].tp_q_head_num, layers[0].head_dim
            q = torch.empty((0, heads, head_dim), dtype=runner.dtype, device=runner.device)
            self.least_saving = tables.least_saving(q, self._pages(layers[0])[0])

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Makes the plan: on a GPU it waits for the device once, and once more where window layers have a pool of their
        own."""
        mode, batch = forward_batch.forward_mode, forward_batch
        self.forward_metadata = None
        if mode.is_idle():
            return
        if mode not in MODES:
            refuse([f"forward_mode {mode.name}"])

        def plan(window_slots: Tensor | None) -> TreePlan:
            return make_plan(
                self.req_to_token_pool.req_to_token, batch.req_pool_indices, batch.seq_lens, page_size=self.page_size,
                q_lens=None if mode.is_decode() else batch.extend_seq_lens,
                longest=None if batch.seq_lens_cpu is None else int(batch.seq_lens_cpu.max()),
                window_slots=window_slots, least_saving=self.least_saving,
            )  # fmt: skip

        if self.window_layers:
            window_slots = self.token_to_kv_pool.full_to_swa_index_mapping
            self.forward_metadata = Forward(plan(None), plan(window_slots), window_slots[batch.out_cache_loc])
        else:
            self.forward_metadata = Forward(plan(None))

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """q [R, Hq * D] or [R, Hq, D], one row for each request; k, v [R, Hkv, D], stored first, or None: they are
        stored already -> [R, Hq * D]."""
        used = [name for name, value in options.items() if value is not None and value is not False]
        refuse([f"the option {name} of a layer" for name in used])
        if save_kv_cache and k is not None:
            self._store(k, v, layer, forward_batch)
        k_cache, v_cache = self._pages(layer)
        made = self.forward_metadata
        out = tree_attention(
            q.reshape(-1, layer.tp_q_head_num, layer.head_dim), k_cache, v_cache,
            made.window_plan if layer.layer_id in self.window_layers else made.plan,
            scale=layer.scaling, softcap=layer.logit_cap or 0.0, window=layer.sliding_window_size, sinks=sinks,
            k_scale=scale_of(layer.k_scale, k_cache.dtype), v_scale=scale_of(layer.v_scale, v_cache.dtype),
        )  # fmt: skip
        return out.flatten(1)

    # Prefill, in one piece or in chunks, behind a cached prefix or not: the plan says what the rows are.
    forward_extend = forward_decode

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> NoReturn:
        refuse(["CUDA graphs: start with --disable-cuda-graph"])

    def init_cpu_graph_state(self, max_bs: int, max_num_tokens: int) -> NoReturn:
        refuse(["CPU graphs: start without --enable-torch-compile"])

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Tokens of the requests that pad a batch under data parallel attention: the one in slot 0, which nothing else
        uses."""
        return 1

    get_cpu_graph_seq_len_fill_value = get_cuda_graph_seq_len_fill_value

    def _store(self, k: Tensor, v: Tensor, layer: RadixAttention, forward_batch: ForwardBatch) -> None:
        scales = scale_of(layer.k_scale, self.kv_cache_dtype), scale_of(layer.v_scale, self.kv_cache_dtype)
        if scales != (None, None):
            k, v = k.clone(), v.clone()  # the pool divides in place
        slots = KVWriteLoc.for_batch(forward_batch, swa_loc=self.forward_metadata.window_slots)
        self.token_to_kv_pool.set_kv_buffer(layer, slots, k, v, *scales)

    def _pages(self, layer: RadixAttention) -> tuple[Tensor, Tensor]:
        keys, values = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        return as_pages(keys, self.page_size), as_pages(values, self.page_size)


def unsupported_reasons(runner: Any, layers: list[RadixAttention]) -> list[str]:
    """Every reason why this ModelRunner cannot run with the backend; empty if it can."""
    reasons = []
    pool, config = runner.token_to_kv_pool, runner.model_config
    if runner.use_mla_backend:
        reasons.append("multi-head latent attention")
    else:
        for part in (pool.full_kv_pool, pool.swa_kv_pool) if type(pool) is SWAKVPool else (pool,):
            layout = getattr(part, "kv_cache_layout", None)
            if type(part) is not MHATokenToKVPool or layout not in ("nhd", "hnd"):
                reasons.append(f"the KV pool {type(part).__name__} with layout {layout}")
    if runner.kv_cache_dtype not in (runner.dtype, torch.float8_e4m3fn):
        reasons.append(f"a KV cache of {runner.kv_cache_dtype} beside a model of {runner.dtype}")
    if config.is_encoder_decoder:
        reasons.append("encoder-decoder models")
    if config.attention_chunk_size is not None:
        reasons.append(f"chunked local attention (attention_chunk_size {config.attention_chunk_size})")
    for layer in layers:
        reasons += [f"{reason} (layer {layer.layer_id})" for reason in unsupported_layer(layer)]
    return reasons
