"""The class behind SGLang's attention backend "tts_kernels"; sglang.py says how to switch it on. Imports SGLang."""

from __future__ import annotations

import functools
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
from ..tree.room import PlanWithRoom
from .graph_plans import GraphPlans
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
        self.layers = layers = [module for module in runner.model.modules() if isinstance(module, RadixAttention)]
        refuse(unsupported_reasons(runner, layers))
        self.req_to_token_pool, self.token_to_kv_pool = runner.req_to_token_pool, runner.token_to_kv_pool
        self.window_layers = set()  # those with a pool of their own
        if isinstance(self.token_to_kv_pool, SWAKVPool):
            layer_pools = self.token_to_kv_pool.layers_mapping.items()
            self.window_layers = {layer for layer, (_, in_window_pool) in layer_pools if in_window_pool}
        self.page_size = runner.page_size
        self.kv_cache_dtype = runner.kv_cache_dtype
        self.dtype, self.device = runner.dtype, runner.device
        self.least_saving = 0
        if layers:
            self.least_saving = tables.least_saving(self._rows(layers[0], 0), self._pages(layers[0])[0])

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Makes the plan: on a GPU it waits for the device once, and once more where window layers have a pool of their
        own."""
        mode, batch = forward_batch.forward_mode, forward_batch
        self.forward_metadata = None
        if mode.is_idle():
            return
        if mode not in MODES:
            refuse([f"forward_mode {mode.name}"])
        if self.window_layers:
            window_slots = self.token_to_kv_pool.full_to_swa_index_mapping
            new_rows = window_slots[batch.out_cache_loc]
            self.forward_metadata = Forward(self._plan(batch), self._plan(batch, window_slots), new_rows)
        else:
            self.forward_metadata = Forward(self._plan(batch))

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """For graphs of decode batches, a token for each request."""
        if max_num_tokens != max_bs:
            refuse([f"CUDA graphs of {max_num_tokens} tokens for {max_bs} requests"])
        longest = self.req_to_token_pool.req_to_token.shape[1]
        self.graph_pages = -(-longest // self.page_size)  # of a request, at most
        full = [layer for layer in self.layers if layer.layer_id not in self.window_layers]
        self.graph_plans = GraphPlans(self.page_size, self.device, functools.partial(self._attend, full))
        if self.window_layers:
            of_window = [layer for layer in self.layers if layer.layer_id in self.window_layers]
            self.graph_window_plans = GraphPlans(
                self.page_size, self.device, functools.partial(self._attend, of_window)
            )
            self.graph_window_slots = torch.zeros(max_bs, dtype=torch.int64, device=self.device)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Writes the plan of a decode batch for its graph, before that is captured and before each replay. It waits for
        the device as `init_forward_metadata` does; nothing in the graph does."""
        mode, batch = forward_batch.forward_mode, forward_batch
        if not mode.is_decode():
            refuse([f"a CUDA graph of forward_mode {mode.name}"])
        size = batch.batch_size
        plan = self.graph_plans.plan_for(size, self.graph_pages)
        self._plan(batch, into=plan)
        self.forward_metadata = Forward(plan)
        if self.window_layers:
            window_slots = self.token_to_kv_pool.full_to_swa_index_mapping
            window_plan = self.graph_window_plans.plan_for(size, self.graph_pages)
            self._plan(batch, window_slots, into=window_plan)
            new_rows, count = self.graph_window_slots[:size], len(batch.out_cache_loc)
            new_rows[:count].copy_(window_slots[batch.out_cache_loc])
            new_rows[count:].zero_()  # of requests that pad the batch: slot 0, as in the other pool
            self.forward_metadata = Forward(plan, window_plan, new_rows)

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

    def init_cpu_graph_state(self, max_bs: int, max_num_tokens: int) -> NoReturn:
        refuse(["CPU graphs: start without --enable-torch-compile"])

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Tokens of the requests that pad a batch, in a CUDA graph or under data parallel attention: the one in slot 0,
        which nothing else uses."""
        return 1

    get_cpu_graph_seq_len_fill_value = get_cuda_graph_seq_len_fill_value

    def _plan(
        self, batch: ForwardBatch, window_slots: Tensor | None = None, into: PlanWithRoom | None = None
    ) -> TreePlan:
        return make_plan(
            self.req_to_token_pool.req_to_token, batch.req_pool_indices, batch.seq_lens, page_size=self.page_size,
            q_lens=None if batch.forward_mode.is_decode() else batch.extend_seq_lens,
            longest=None if batch.seq_lens_cpu is None else int(batch.seq_lens_cpu.max()),
            window_slots=window_slots, least_saving=self.least_saving, into=into,
        )  # fmt: skip

    def _attend(self, layers: list[RadixAttention], plan: PlanWithRoom) -> None:
        for layer in layers:
            tree_attention(self._rows(layer, plan.num_rows), *self._pages(layer), plan)

    def _rows(self, layer: RadixAttention, count: int) -> Tensor:
        return torch.zeros((count, layer.tp_q_head_num, layer.head_dim), dtype=self.dtype, device=self.device)

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
