"""An attention backend for vLLM (tested with 0.32): every step reads once what its sequences share, in one call for
decode, chunked prefill and drafts. The sharing is found from the block table, whose leading block ids are equal where
vLLM's prefix caching has put samples of one prompt on the same blocks.

    vllm serve MODEL --attention-backend CUSTOM        LLM(MODEL, attention_backend="CUSTOM")

where this package is installed: it registers itself through vLLM's plugins. vLLM's CPU platform always takes CPU_ATTN,
whatever is asked for, so there TTS_KERNELS_VLLM=CPU_ATTN puts the backend into its place (any name of vLLM's
AttentionBackendEnum will do).

A plan is built in every step, for all layers of a KV cache group: on a GPU that waits for the device once. Where a full
CUDA graph is captured (decode of one token for each request), the plan has room for any batch of so many requests, and
is written before each replay. Prefills, mixed batches and drafts run outside of full graphs; piecewise ones are fine.

Refused, with vLLM's own list of reasons or by name: encoders, cross attention, ALiBi, MLA, fp8 other than e4m3, KV
quantised per head, context parallelism, fused output quantisation.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers

from tts_kernels.attention import api, tables
from tts_kernels.integrations.graph_plans import GraphPlans
from tts_kernels.tree.plan import TreePlan
from tts_kernels.tree.room import PlanWithRoom

FP8 = ("fp8", "fp8_e4m3")


def register() -> None:
    """What vLLM's plugin loader calls, in every process. TTS_KERNELS_VLLM: the name to register under, CUSTOM if unset.
    Raises ValueError for a name that vLLM does not know."""
    name = os.environ.get("TTS_KERNELS_VLLM", "CUSTOM")
    if name not in AttentionBackendEnum.__members__:
        known = ", ".join(AttentionBackendEnum.__members__)
        raise ValueError(f"TTS_KERNELS_VLLM: expected one of {known}, got {name!r}")
    register_backend(AttentionBackendEnum[name], f"{__name__}.{TreeBackend.__qualname__}")


class TreeBackend(AttentionBackend):
    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", *FP8]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[TreeImpl]:
        return TreeImpl

    @staticmethod
    def get_builder_cls() -> type[TreeBuilder]:
        return TreeBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 8 == 0 and head_size <= 256

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # the plan is made of the lengths on the CPU


@dataclass
class TreeMetadata:
    plan: TreePlan
    num_tokens: int  # rows of q that are meant; what is behind them is padding


class TreeBuilder(AttentionMetadataBuilder[TreeMetadata]):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        model, spec = vllm_config.model_config, kv_cache_spec
        num_heads = get_num_attention_heads_from_layers(vllm_config, layer_names)
        num_heads = num_heads or model.get_num_attention_heads(vllm_config.parallel_config)
        self.block_size = spec.block_size
        kv_dtype = torch.float8_e4m3fn if spec.dtype == torch.uint8 else spec.dtype  # vLLM keeps fp8 as bytes
        self.q = torch.empty(0, num_heads, spec.head_size, dtype=model.dtype, device=device)
        self.cache = torch.empty(0, spec.block_size, spec.num_kv_heads, spec.head_size, dtype=kv_dtype, device=device)
        self.least_saving = tables.least_saving(self.q, self.cache)
        self.graph_plans = GraphPlans(self.block_size, device, self.make_works)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> TreeMetadata:
        c, config = common_attn_metadata, self.vllm_config.compilation_config
        # Of what will be captured too: vLLM warms a size up with this before.
        full = config.cudagraph_mode is not None and config.cudagraph_mode.has_full_cudagraphs()
        captured = c.num_reqs in self.graph_plans.plans or (full and c.num_reqs in config.cudagraph_capture_sizes)
        return self.make(c, captured and c.max_query_len == 1)

    def build_for_cudagraph_capture(self, common_attn_metadata) -> TreeMetadata:
        longest = common_attn_metadata.max_query_len
        if longest != 1:
            raise NotImplementedError(f"max_query_len: expected 1 in a batch that is captured, got {longest}")
        return self.make(common_attn_metadata, True)

    def make(self, c, captured: bool) -> TreeMetadata:
        """Of vLLM's CommonAttentionMetadata. captured: by the plan that the graph for so many requests reads; those
        that pad a batch have no row of their own (out = 0)."""
        if not isinstance(c.causal, bool):
            raise NotImplementedError("causal: expected one value for the whole batch, got one for each request")
        table = c.block_table_tensor[: c.num_reqs]
        plan = TreePlan.from_block_table(
            table,
            c.seq_lens[: c.num_reqs],
            page_size=self.block_size,
            q_lens=c.query_start_loc[: c.num_reqs + 1].diff(),  # its host copy may still be under way
            causal=c.causal,
            least_saving=self.least_saving,
            into=self.graph_plans.plan_for(*table.shape, c.causal) if captured else None,
        )
        return TreeMetadata(plan, plan.num_rows)

    def make_works(self, plan: PlanWithRoom) -> None:
        backend = api.BACKENDS.choose("tree_attention", self.q, self.cache, self.cache)
        api.work_of(plan, self.q, self.cache, self.cache, backend)


class TreeImpl(AttentionImpl[TreeMetadata]):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        if alibi_slopes is not None:
            raise NotImplementedError("alibi_slopes: expected None, tree attention has no ALiBi")
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"attn_type: expected {AttentionType.DECODER.value}, got {attn_type}")
        if kv_cache_dtype not in TreeBackend.supported_kv_cache_dtypes:
            known = ", ".join(TreeBackend.supported_kv_cache_dtypes)
            raise NotImplementedError(f"kv_cache_dtype: expected one of {known}, got {kv_cache_dtype}")
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads or num_heads, head_size
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.scale, self.softcap, self.sinks = float(scale), float(logits_soft_cap or 0), sinks
        # vLLM's window counts the row's own position.
        self.window = -1 if sliding_window is None else sliding_window - 1

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ) -> Tensor:
        """query, output [tokens, Hq, D]; kv_cache [blocks, Hkv, block_size, 2 D], K before V, any strides; it holds the
        rows' own keys and values already (do_kv_cache_update)."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("output_scale: expected None, the output is not quantised here")
        if attn_metadata is None:  # vLLM measures memory
            return output.fill_(0)
        n = attn_metadata.num_tokens
        k_cache, v_cache = self.caches(kv_cache)
        k_scale, v_scale = (layer._k_scale, layer._v_scale) if self.kv_cache_dtype in FP8 else (None, None)
        api.tree_attention(
            query[:n], k_cache, v_cache, attn_metadata.plan, scale=self.scale, softcap=self.softcap,
            window=self.window, sinks=self.sinks, k_scale=k_scale, v_scale=v_scale, out=output[:n],
        )  # fmt: skip
        return output

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        """key, value [tokens, Hkv, D]; slot_mapping int64 [tokens], block * block_size + offset, -1 for padding."""
        n = slot_mapping.shape[0]
        key, value = key[:n], value[:n]
        if self.kv_cache_dtype in FP8:
            key, value = key / layer._k_scale, value / layer._v_scale
        api.append_kv(key, value, *self.caches(kv_cache), slot_mapping)

    def caches(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Views [blocks, block_size, Hkv, D]."""
        if self.kv_cache_dtype in FP8:
            kv_cache = kv_cache.view(torch.float8_e4m3fn)
        return kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
