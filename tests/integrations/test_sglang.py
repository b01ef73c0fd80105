"""The attention backend for SGLang.

Its parts on plain tensors, always. Where SGLang is installed also the backend itself on SGLang's pools, layers and
batches, and engines of SGLang on the CPU: they are compared with SGLang's own torch_native backend and, token by token
and logprob by logprob, with transformers.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import types
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from dense import assert_close, dense_attention

from tts_kernels import tree_attention
from tts_kernels.integrations import sglang as plugin

TESTS = Path(__file__).parents[1]
STUBS = TESTS / "sglang_stubs"
INSTALLED = importlib.util.find_spec("sglang") is not None
needs_sglang = pytest.mark.skipif(not INSTALLED, reason="sglang is not installed")
NOT_A_SLOT = 2_000_000_000
FP8 = torch.float8_e4m3fn


class Requests:
    """Requests in a pool of pages, as SGLang's radix cache lays them out: whole pages that two of them begin with are
    the same ones."""

    def __init__(self, rng: random.Random, page_size: int, lens: list[tuple[int, int]], *, share: float = 0.7):
        """lens: (tokens, rows) of each."""
        self.page_size, self.lens = page_size, lens
        pages = list(range(1, 1 + sum(-(-tokens // page_size) for tokens, _ in lens)))
        self.num_slots = (len(pages) + 2) * page_size  # page 0 is SGLang's padding
        rng.shuffle(pages)
        self.pages: list[list[int]] = []
        for tokens, rows in lens:
            cached = (tokens - rows) // page_size
            own: list[int] = []
            if self.pages and rng.random() < share:
                other = rng.randrange(len(self.pages))
                full = (lens[other][0] - lens[other][1]) // page_size
                own = self.pages[other][: rng.randint(0, min(cached, full))]
            own = own + [pages.pop() for _ in range(-(-tokens // page_size) - len(own))]
            self.pages.append(own)
        self.slots = [self.slots_of(own, tokens) for own, (tokens, _) in zip(self.pages, lens)]
        self.at = rng.sample(range(1, 3 * len(lens) + 1), len(lens))  # rows of req_to_token, in any order

    def slots_of(self, pages: list[int], tokens: int) -> list[int]:
        return [pages[t // self.page_size] * self.page_size + t % self.page_size for t in range(tokens)]

    @property
    def distinct(self) -> int:
        """What has to be read: shared slots once."""
        return len({slot for slots in self.slots for slot in slots})

    @property
    def new_slots(self) -> list[int]:
        return [slot for slots, (tokens, rows) in zip(self.slots, self.lens) for slot in slots[tokens - rows :]]

    @property
    def used(self) -> list[int]:
        return sorted({slot for slots in self.slots for slot in slots})

    def req_to_token(self, fill: int = NOT_A_SLOT) -> torch.Tensor:
        table = torch.full((3 * len(self.lens) + 1, max(t for t, _ in self.lens) + 5), fill, dtype=torch.int32)
        for row, slots in zip(self.at, self.slots):
            table[row, : len(slots)] = torch.tensor(slots)
        return table

    @property
    def seq_lens(self) -> torch.Tensor:
        return torch.tensor([tokens for tokens, _ in self.lens])

    @property
    def q_lens(self) -> torch.Tensor:
        return torch.tensor([rows for _, rows in self.lens], dtype=torch.int32)

    def plan(self, **options):
        return plugin.make_plan(
            self.req_to_token(), torch.tensor(self.at), self.seq_lens, page_size=self.page_size, **options
        )

    def dense(self, q, k, v, *, dtype, window=-1, scale=None, softcap=0.0, sinks=None, k_scale=None, v_scale=None):
        """One softmax for each request. q [R, Hq, D]; k, v [slots, Hkv, D]."""
        outs, row = [], 0
        for slots, (tokens, rows) in zip(self.slots, self.lens):
            at = torch.arange(tokens - rows, tokens)[:, None]
            token = torch.arange(tokens)
            visible = (token <= at) & ((token >= at - window) | (window < 0))
            out, _ = dense_attention(
                q[row : row + rows], k[slots], v[slots], visible, dtype=dtype, scale=scale or q.shape[-1] ** -0.5,
                softcap=softcap, sinks=sinks, k_scale=k_scale, v_scale=v_scale,
            )  # fmt: skip
            outs.append(out)
            row += rows
        return torch.cat(outs)


HQ, HKV, D = 6, 2, 32
LENS = {
    "decode": [(70, 1), (65, 1), (129, 1), (1, 1), (64, 1), (200, 1), (131, 1)],
    "extend": [(70, 3), (130, 130), (129, 65), (2, 2), (66, 1), (200, 7)],
    "one": [(90, 90)],
}


def tensors(requests: Requests, seed: int = 0, dtype=torch.float32):
    """Queries, and caches in which every slot that no request has is NaN."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.full((requests.num_slots, HKV, D), math.nan, dtype=dtype)
    v = k.clone()
    for cache in (k, v):
        cache[requests.used] = torch.randn((len(requests.used), HKV, D), generator=generator).to(dtype)
    q = torch.randn((sum(rows for _, rows in requests.lens), HQ, D), generator=generator).to(dtype)
    return q, k, v


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("kind", LENS)
def test_page_table(kind, page_size):
    requests = Requests(random.Random(0), page_size, LENS[kind])
    longest = max(tokens for tokens, _ in requests.lens)
    table = plugin.page_table(requests.req_to_token(), torch.tensor(requests.at), longest, page_size)
    assert table.shape == (len(requests.lens), -(-longest // page_size))
    assert table.dtype == torch.int32
    assert [row[: len(pages)].tolist() for row, pages in zip(table, requests.pages)] == requests.pages


@pytest.mark.parametrize("window", [-1, 0, 40])
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("kind", LENS)
def test_attention_over_the_page_tables(kind, page_size, window):
    """Decode, a prefill behind cached tokens, chunks of one: shared slots are read once, each request sees its own."""
    requests = Requests(random.Random(page_size), page_size, LENS[kind])
    q, k, v = tensors(requests)
    plan = requests.plan(q_lens=None if kind == "decode" else requests.q_lens)
    assert plan.num_rows == len(q)
    assert plan.num_tokens == requests.distinct
    caches = [plugin.as_pages(cache, page_size) for cache in (k, v)]
    out = tree_attention(q, *caches, plan, window=window, check=True)
    plain, exact = (requests.dense(q, k, v, dtype=dtype, window=window) for dtype in (torch.float32, torch.float64))
    assert_close("out", out, plain, exact, terms=max(requests.seq_lens))


def test_samples_of_a_prompt_are_read_once():
    """64 tokens in common by twos of 80, and all by 48: 48 + 2 * 16 + 4 * 16 tokens instead of 4 * 80."""
    table = torch.zeros((5, 90), dtype=torch.int32)
    pages = [[1, 2, 3, 4, 10], [1, 2, 3, 4, 11], [1, 2, 3, 5, 12], [1, 2, 3, 5, 13]]
    for row, own in enumerate(pages):
        table[row, :80] = torch.tensor([page * 16 + i for page in own for i in range(16)])
    plan = plugin.make_plan(table, torch.arange(4), torch.full((4,), 80), page_size=16)
    assert plan.num_tokens == 48 + 2 * 16 + 4 * 16
    assert plan.num_nodes == 7
    apart = plugin.make_plan(table, torch.arange(4), torch.full((4,), 80), page_size=16, least_saving=10**6)
    assert apart.num_tokens == 4 * 80


def test_longest_need_not_be_the_whole_table():
    """Columns behind the longest request are not looked at, with the length from the host or not."""
    requests = Requests(random.Random(3), 4, LENS["decode"])
    asked, told = requests.plan(), requests.plan(longest=200)
    assert torch.equal(asked.nodes, told.nodes)
    assert torch.equal(asked.pages, told.pages)


def test_rows_that_pad_a_batch():
    """Requests that pad a batch: row 0 of the table, one token, in slot 0."""
    table = torch.zeros((3, 8), dtype=torch.int32)
    table[2, :5] = torch.arange(4, 9)
    plan = plugin.make_plan(table, torch.tensor([2, 0, 0]), torch.tensor([5, 1, 1]), page_size=1)
    assert plan.num_rows == 3
    k = torch.randn(9, HKV, D)
    q = torch.randn(3, HQ, D)
    out = tree_attention(q, plugin.as_pages(k, 1), plugin.as_pages(k, 1), plan, check=True)
    alone = plugin.make_plan(table, torch.tensor([2]), torch.tensor([5]), page_size=1)
    assert torch.equal(out[:1], tree_attention(q[:1], plugin.as_pages(k, 1), plugin.as_pages(k, 1), alone))


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_pool_for_window_layers(page_size):
    """Its slots are others; those before every window are freed, marked by 0 or -1. Page 0 holds anything finite."""
    window = 20
    requests = Requests(random.Random(page_size), page_size, LENS["decode"])
    q, k, v = tensors(requests)
    needed = {
        slot // page_size for own, (tokens, _) in zip(requests.slots, requests.lens) for slot in own[-window - 1 :]
    }  # pages
    order = list(range(1, 1 + len(needed)))
    random.Random(1).shuffle(order)
    window_slots = torch.zeros(requests.num_slots + 1, dtype=torch.int64)
    window_slots[-1] = -1  # what SGLang appends
    window_slots[page_size : page_size * 4 : 2] = -1
    caches = [torch.zeros(((1 + len(needed)) * page_size, HKV, D)) for _ in range(2)]
    for to, page in zip(order, sorted(needed)):
        slots, targets = (torch.arange(number * page_size, (number + 1) * page_size) for number in (page, to))
        window_slots[slots] = targets
        for cache, full in zip(caches, (k, v)):
            cache[targets] = full[slots]
    options = {"page_size": page_size, "window_slots": window_slots}
    plan = plugin.make_plan(requests.req_to_token(fill=0), torch.tensor(requests.at), requests.seq_lens, **options)
    out = tree_attention(q, *(plugin.as_pages(cache, page_size) for cache in caches), plan, window=window, check=True)
    plain, exact = (requests.dense(q, k, v, dtype=dtype, window=window) for dtype in (torch.float32, torch.float64))
    assert_close("out", out, plain, exact, terms=max(requests.seq_lens))


def test_as_pages():
    buffer = torch.arange(10 * 2 * 3).view(10, 2, 3)
    pages = plugin.as_pages(buffer, 4)
    assert pages.shape == (2, 4, 2, 3)
    assert pages.data_ptr() == buffer.data_ptr()
    assert torch.equal(pages[1, 2], buffer[6])
    heads_first = torch.randn(5, 2, 4, 3)
    assert torch.equal(plugin.as_pages(heads_first, 4)[3, 1], heads_first[3, :, 1])


def test_scales_are_for_fp8_alone():
    scale = torch.tensor(0.5)
    assert plugin.scale_of(scale, FP8) is scale
    assert plugin.scale_of(scale, torch.bfloat16) is None
    assert plugin.scale_of(None, FP8) is None


GOOD_ARGUMENTS = {
    "speculative_algorithm": None, "dllm_algorithm": None, "dcp_size": 1, "attn_cp_size": 1, "kv_cache_dtype": "auto",
}  # fmt: skip


@pytest.mark.parametrize(
    "name, value",
    [
        ("speculative_algorithm", "EAGLE"),
        ("dllm_algorithm", "LowConfidence"),
        ("dcp_size", 2),
        ("attn_cp_size", 4),
        ("kv_cache_dtype", "fp8_e5m2"),
        ("kv_cache_dtype", "nvfp4"),
    ],
)
def test_refused_arguments(name, value):
    assert plugin.unsupported_arguments(types.SimpleNamespace(**GOOD_ARGUMENTS)) == []
    assert plugin.unsupported_arguments(types.SimpleNamespace()) == []
    reasons = plugin.unsupported_arguments(types.SimpleNamespace(**{**GOOD_ARGUMENTS, name: value}))
    assert len(reasons) == 1
    assert reasons[0].startswith(f"{name} {value}")
    with pytest.raises(ValueError, match=f"attention backend tts_kernels does not support {name} {value}"):
        plugin.refuse(reasons)


GOOD_LAYER = {
    "is_cross_attention": False, "attn_type": "decoder", "v_head_dim": 64, "qk_head_dim": 64,
    "pos_encoding_mode": "NONE", "logit_cap": 30.0, "logit_capping_method": "tanh", "xai_temperature_len": -1,
}  # fmt: skip


@pytest.mark.parametrize(
    "name, value, word",
    [
        ("is_cross_attention", True, "cross attention"),
        ("attn_type", "encoder_only", "attn_type encoder_only"),
        ("v_head_dim", 32, "v_head_dim 32"),
        ("pos_encoding_mode", "ALIBI", "pos_encoding_mode ALIBI"),
        ("logit_capping_method", "clip", "logit_capping_method clip"),
        ("xai_temperature_len", 1024, "xai_temperature_len 1024"),
    ],
)
def test_refused_layers(name, value, word):
    assert plugin.unsupported_layer(types.SimpleNamespace(**GOOD_LAYER)) == []
    assert plugin.unsupported_layer(types.SimpleNamespace(**{**GOOD_LAYER, "logit_cap": None})) == []
    reasons = plugin.unsupported_layer(types.SimpleNamespace(**{**GOOD_LAYER, name: value}))
    assert len(reasons) == 1
    assert word in reasons[0]


@pytest.mark.skipif(INSTALLED, reason="sglang is installed")
def test_without_sglang():
    with pytest.raises(ImportError, match="sglang"):
        plugin.register()


# The backend on SGLang's own classes.


@pytest.fixture(scope="module")
def sglang():
    """What the tests need of SGLang, whose CPU engine is asked for before anything is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_USE_CPU_ENGINE", "1")
        spec = importlib.util.spec_from_file_location("sglang_stubs", STUBS / "sitecustomize.py")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        from sglang.srt.layers import radix_attention
        from sglang.srt.layers.attention import attention_registry, torch_native_backend
        from sglang.srt.mem_cache import memory_pool
        from sglang.srt.model_executor import forward_batch_info

        from tts_kernels.integrations import sglang_backend

        yield types.SimpleNamespace(
            RadixAttention=radix_attention.RadixAttention,
            AttentionType=radix_attention.AttentionType,
            registry=attention_registry,
            Native=torch_native_backend.TorchNativeAttnBackend,
            Pool=memory_pool.MHATokenToKVPool,
            FP4Pool=memory_pool.MHATokenToKVPoolFP4,
            Requests=memory_pool.ReqToTokenPool,
            Batch=forward_batch_info.ForwardBatch,
            Mode=forward_batch_info.ForwardMode,
            backend=sglang_backend,
        )


def layer_of(sglang, **options):
    made = {"num_heads": HQ, "head_dim": D, "scaling": 0.17, "num_kv_heads": HKV, "layer_id": 0, **options}
    return sglang.RadixAttention(**made)


def runner_of(sglang, layers, requests, *, dtype=torch.float32, kv_dtype=None):
    """As much of a ModelRunner as a backend looks at, with the requests' slots in its pools."""
    table = requests.req_to_token(fill=0)
    req_pool = sglang.Requests(
        size=table.shape[0] - 1, max_context_len=table.shape[1], device="cpu", enable_memory_saver=False
    )
    req_pool.req_to_token.copy_(table)
    pool = sglang.Pool(
        size=requests.num_slots - requests.page_size, page_size=requests.page_size, dtype=kv_dtype or dtype,
        head_num=HKV, head_dim=D, layer_num=len(layers), device="cpu", enable_memory_saver=False,
    )  # fmt: skip
    return types.SimpleNamespace(
        model=torch.nn.ModuleList(layers), req_to_token_pool=req_pool, token_to_kv_pool=pool, device="cpu",
        page_size=requests.page_size, dtype=dtype, kv_cache_dtype=kv_dtype or dtype, use_mla_backend=False,
        model_config=types.SimpleNamespace(is_encoder_decoder=False, attention_chunk_size=None),
    )  # fmt: skip


def batch_of(sglang, requests, mode):
    seq_lens, q_lens = requests.seq_lens, requests.q_lens
    slots = torch.tensor(requests.new_slots)
    return sglang.Batch(
        forward_mode=sglang.Mode[mode], batch_size=len(seq_lens), input_ids=torch.zeros_like(slots),
        req_pool_indices=torch.tensor(requests.at), seq_lens=seq_lens, out_cache_loc=slots,
        seq_lens_sum=int(seq_lens.sum()), seq_lens_cpu=seq_lens, extend_seq_lens=q_lens,
        extend_prefix_lens=(seq_lens - q_lens).int(),
    )  # fmt: skip


def store(pool, requests, slots, k, v):
    """As if an earlier forward had."""
    at = torch.tensor(slots)
    for buffer, values in zip(pool.get_kv_buffer(0), (k, v)):
        paged = plugin.as_pages(buffer, requests.page_size)
        paged[at // requests.page_size, at % requests.page_size] = values[slots].to(buffer.dtype)


def earlier(requests) -> list[int]:
    """All but the new rows' slots, which a forward fills itself."""
    return sorted(set(requests.used) - set(requests.new_slots))


def forward(sglang, backend, layer, requests, mode, q, k, v, **options):
    batch = batch_of(sglang, requests, mode)
    backend.init_forward_metadata(batch)
    new = requests.new_slots
    return backend.forward(q.flatten(1), k[new].clone(), v[new].clone(), layer, batch, **options)


@needs_sglang
@pytest.mark.parametrize("window", [-1, 40])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("kind, mode", [("decode", "DECODE"), ("extend", "EXTEND"), ("extend", "MIXED")])
def test_as_torch_native(sglang, kind, mode, page_size, window):
    requests = Requests(random.Random(page_size), page_size, LENS[kind])
    q, k, v = tensors(requests)
    layer = layer_of(sglang, sliding_window_size=window)
    got = []
    for make in (sglang.backend.TreeAttentionBackend, sglang.Native):
        runner = runner_of(sglang, [layer], requests)
        store(runner.token_to_kv_pool, requests, earlier(requests), k, v)
        got.append(forward(sglang, make(runner), layer, requests, mode, q, k, v))
        assert torch.equal(runner.token_to_kv_pool.get_key_buffer(0)[requests.used], k[requests.used])
        assert torch.equal(runner.token_to_kv_pool.get_value_buffer(0)[requests.used], v[requests.used])
    torch.testing.assert_close(got[0], got[1], rtol=1e-5, atol=1e-5)
    exact = requests.dense(q, k, v, dtype=torch.float64, window=window, scale=0.17).flatten(1)
    torch.testing.assert_close(got[0].double(), exact, rtol=1e-5, atol=1e-5)


@needs_sglang
@pytest.mark.parametrize("layout", ["nhd", "hnd"])
def test_softcap_sinks_and_layouts(sglang, layout, monkeypatch):
    """What torch_native has not."""
    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1" if layout == "hnd" else "0")
    requests = Requests(random.Random(7), 16, LENS["decode"])
    q, k, v = tensors(requests)
    layer = layer_of(sglang, logit_cap=3.0)
    runner = runner_of(sglang, [layer], requests)
    assert runner.token_to_kv_pool.kv_cache_layout == layout
    store(runner.token_to_kv_pool, requests, requests.used, k, v)
    sinks = torch.randn(HQ)
    out = forward(
        sglang, sglang.backend.TreeAttentionBackend(runner), layer, requests, "DECODE", q, k, v, sinks=sinks,
        save_kv_cache=False,
    )  # fmt: skip
    exact = requests.dense(q, k, v, dtype=torch.float64, scale=0.17, softcap=3.0, sinks=sinks).flatten(1)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@needs_sglang
@pytest.mark.parametrize("scales", [(None, None), (0.25, 0.5)])
def test_fp8_cache(sglang, scales):
    """Divided by the layer's scales when they are stored, multiplied when they are read; the caller's k stays as is."""
    requests = Requests(random.Random(8), 16, LENS["decode"])
    q, k, v = tensors(requests)
    layer = layer_of(sglang)
    layer.k_scale, layer.v_scale = (None if scale is None else torch.tensor(scale) for scale in scales)
    runner = runner_of(sglang, [layer], requests, kv_dtype=FP8)
    backend = sglang.backend.TreeAttentionBackend(runner)
    k_div, v_div = (cache / (scale or 1.0) for cache, scale in zip((k, v), scales))
    store(runner.token_to_kv_pool, requests, earlier(requests), k_div, v_div)
    batch = batch_of(sglang, requests, "DECODE")
    backend.init_forward_metadata(batch)
    new_k, new_v = k[requests.new_slots], v[requests.new_slots]
    before = new_k.clone()
    out = backend.forward(q.flatten(1), new_k, new_v, layer, batch)
    assert torch.equal(new_k, before)
    stored = [plain.to(FP8).float() * (scale or 1.0) for plain, scale in zip((k_div, v_div), scales)]
    exact = requests.dense(q, *stored, dtype=torch.float64, scale=0.17).flatten(1)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)


@needs_sglang
def test_idle_and_other_modes(sglang):
    requests = Requests(random.Random(9), 16, LENS["decode"])
    q, k, v = tensors(requests)
    layer = layer_of(sglang)
    backend = sglang.backend.TreeAttentionBackend(runner_of(sglang, [layer], requests))
    idle = batch_of(sglang, requests, "IDLE")
    backend.init_forward_metadata(idle)
    assert backend.forward(q[:0].flatten(1), k[:0], v[:0], layer, idle).shape == (0, HQ * D)
    for mode in ("TARGET_VERIFY", "DRAFT_EXTEND_V2", "DLLM_EXTEND"):
        with pytest.raises(ValueError, match=f"does not support forward_mode {mode}"):
            backend.init_forward_metadata(batch_of(sglang, requests, mode))
    with pytest.raises(ValueError, match="does not support the option score_mod of a layer"):
        forward(sglang, backend, layer, requests, "DECODE", q, k, v, aux=None, score_mod=torch.ones(2))
    with pytest.raises(ValueError, match="does not support CUDA graphs"):
        backend.init_cuda_graph_state(8, 8)


@needs_sglang
def test_refused_models(sglang):
    """Every reason at once, by name, before the first forward."""
    requests = Requests(random.Random(10), 16, LENS["decode"])
    layers = [
        layer_of(sglang, layer_id=0),
        layer_of(sglang, layer_id=1, is_cross_attention=True),
        layer_of(sglang, layer_id=2, attn_type=sglang.AttentionType.ENCODER_ONLY),
        layer_of(sglang, layer_id=3, v_head_dim=16),
    ]
    runner = runner_of(sglang, layers, requests)
    runner.model_config = types.SimpleNamespace(is_encoder_decoder=True, attention_chunk_size=8192)
    runner.dtype = torch.bfloat16
    with pytest.raises(ValueError) as error:
        sglang.backend.TreeAttentionBackend(runner)
    for word in (
        "a KV cache of torch.float32 beside a model of torch.bfloat16", "encoder-decoder", "attention_chunk_size 8192",
        "cross attention (layer 1)", "attn_type encoder_only (layer 2)", "v_head_dim 16 beside", "(layer 3)",
    ):  # fmt: skip
        assert word in str(error.value)
    runner = runner_of(sglang, layers[:1], requests)
    runner.token_to_kv_pool = object.__new__(sglang.FP4Pool)
    assert "KV pool MHATokenToKVPoolFP4" in sglang.backend.unsupported_reasons(runner, [])[0]
    runner.use_mla_backend = True
    assert sglang.backend.unsupported_reasons(runner, []) == ["multi-head latent attention"]


@needs_sglang
def test_register_again(sglang):
    plugin.register()
    plugin.register()
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES

    assert ATTENTION_BACKEND_CHOICES.count(plugin.NAME) == 1
    assert plugin.NAME in sglang.registry.ATTENTION_BACKENDS


@needs_sglang
@pytest.mark.parametrize(
    "chosen, without",
    [
        ({"attention_backend": plugin.NAME}, {"prefill", "decode"}),
        ({"prefill_attention_backend": "triton", "decode_attention_backend": plugin.NAME}, {"decode"}),
        ({"attention_backend": "triton"}, set()),
    ],
)
def test_cuda_graphs_are_switched_off(sglang, chosen, without):
    from sglang.srt.arg_groups.overrides import declare_resolution, resolved_view
    from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig, Phase, with_phase
    from sglang.srt.server_args import ServerArgs

    plugin.register()
    graphs = CudaGraphConfig()
    for phase in Phase.ALL:
        graphs = with_phase(graphs, phase, backend=Backend.FULL)
    arguments = ServerArgs(model_path="none", device="cuda", **chosen)
    plugin._resolve(arguments, lambda given: declare_resolution(given, "test", cuda_graph_config=graphs))
    left = resolved_view(arguments).cuda_graph_config
    assert {phase for phase in Phase.ALL if getattr(left, phase).backend == Backend.DISABLED} == without


# Engines. They run in a process of their own, and their schedulers in others: a plugin is how the tests look inside.

PROMPT = [(i * 7 + 3) % 500 for i in range(100)]
PROMPTS = [[*PROMPT, k] for k in range(3)] + [[*PROMPT[:70], 9, 8, 7]]
CALLS = [
    {"input_ids": PROMPTS, "sampling_params": {"temperature": 0, "max_new_tokens": 24, "n": 3}},
    {"input_ids": PROMPTS, "sampling_params": {"temperature": 1.0, "max_new_tokens": 40, "n": 4}},
]
OURS = {"attention_backend": plugin.NAME}
WAYS = {
    "native": {"model": "qwen2", "attention_backend": "torch_native"},
    "slots": {"model": "qwen2", **OURS},
    "pages": {"model": "qwen2", **OURS, "page_size": 16, "enable_mixed_chunk": True},
    "decode only": {
        "model": "qwen2", "prefill_attention_backend": "torch_native", "decode_attention_backend": plugin.NAME,
        "page_size": 64,
    },
    "retracted": {"model": "qwen2", **OURS, "max_total_tokens": 256, "disable_overlap_schedule": True},
    "window, softcap": {"model": "gemma2", **OURS, "page_size": 16},
    "window pool, slots": {"model": "cohere2", **OURS},
    "window pool, pages": {"model": "cohere2", **OURS, "page_size": 16},
    "speculative": {"model": "qwen2", **OURS, "speculative_algorithm": "NGRAM"},
    "e5m2": {"model": "qwen2", **OURS, "kv_cache_dtype": "fp8_e5m2"},
}  # fmt: skip
RUNS = [name for name, way in WAYS.items() if plugin.NAME in way.values() and name not in ("speculative", "e5m2")]


def make_model(kind: str):
    """A model of random weights. gemma2 has layers with a window and a bound of the scores, cohere2 with a window; its
    config asks SGLang for a KV pool of their own."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096, "initializer_range": 0.2,
        "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if kind == "qwen2":
        config = transformers.Qwen2Config(num_hidden_layers=2, tie_word_embeddings=False, **sizes)
        return transformers.Qwen2ForCausalLM(config).float().eval()
    if kind == "gemma2":
        config = transformers.Gemma2Config(
            num_hidden_layers=4, query_pre_attn_scalar=16, sliding_window=24, attn_logit_softcapping=2.0,
            final_logit_softcapping=None, hidden_act="gelu_pytorch_tanh", **sizes,
        )  # fmt: skip
        return transformers.Gemma2ForCausalLM(config).float().eval()
    config = transformers.Cohere2Config(num_hidden_layers=4, sliding_window=24, logit_scale=1.0, **sizes)
    config.is_hybrid_swa = True
    config.hybrid_layer_pattern = [int(kind == "sliding_attention") for kind in config.layer_types]
    return transformers.Cohere2ForCausalLM(config).float().eval()


@pytest.fixture(scope="module")
def oracles(tmp_path_factory):
    """{kind: transformers' model}; they lie in `folder` for SGLang."""
    folder = tmp_path_factory.mktemp("models")
    models = {kind: make_model(kind) for kind in ("qwen2", "gemma2", "cohere2")}
    for kind, model in models.items():
        model.save_pretrained(folder / kind)
        model.set_attn_implementation("eager")
    models["cohere2"].config.sliding_window += 1  # SGLang's Cohere2 sees a token more than transformers'
    return types.SimpleNamespace(models=models, folder=folder)


@pytest.fixture(scope="module")
def runs(oracles, tmp_path_factory):
    """All of them, one after another: results by name, the plans that were made, and what was printed."""
    folder = tmp_path_factory.mktemp("runs")
    points = ["probe = sglang_probe:register"]
    if not any(point.name == plugin.NAME for point in entry_points(group="sglang.srt.plugins")):
        points.insert(0, f"{plugin.NAME} = tts_kernels.integrations.sglang:register")
    info = folder / "plugins" / "tts_kernels_probe-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tts-kernels-probe\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\n" + "\n".join(points) + "\n")

    jobs = []
    for name, way in WAYS.items():
        options = {**way, "model_path": str(oracles.folder / way["model"])}
        del options["model"]
        jobs.append({"name": name, "options": options, "calls": CALLS})
    jobs_file, results_file, probe = (folder / name for name in ("jobs.json", "results.json", "probe.jsonl"))
    jobs_file.write_text(json.dumps(jobs))
    path = [str(STUBS), str(info.parent), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(path), "TTS_KERNELS_PROBE": str(probe),
        "SGLANG_USE_CPU_ENGINE": "1",
    }  # fmt: skip
    environment.pop("TRITON_INTERPRET", None)  # SGLang on a CPU takes no Triton
    command = [sys.executable, str(TESTS / "sglang_run.py"), str(jobs_file), str(results_file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2400)
    printed = done.stdout + done.stderr
    assert results_file.exists(), printed[-6000:]
    results = json.loads(results_file.read_text())
    assert list(results) == list(WAYS), printed[-6000:]
    return types.SimpleNamespace(results=results, plans=[json.loads(line) for line in probe.read_text().splitlines()])


def calls_of(runs, name):
    assert "error" not in runs.results[name], runs.results[name]["error"]
    return runs.results[name]["calls"]


@torch.no_grad()
def logprobs_of(model, prompt, ids):
    """What transformers gives for each of the generated ids, and whether each was the most likely token."""
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0], logits.argmax(-1).tolist() == ids


@needs_sglang
@pytest.mark.parametrize("name", [name for name in RUNS if WAYS[name]["model"] == "qwen2"])
def test_engine_gives_the_tokens_of_torch_native(runs, name):
    got, native = (calls_of(runs, run)[0] for run in (name, "native"))
    assert [output["ids"] for output in got] == [output["ids"] for output in native]
    for output, other in zip(got, native):
        torch.testing.assert_close(torch.tensor(output["logprobs"]), torch.tensor(other["logprobs"]), rtol=0, atol=1e-4)
    assert any(output["cached"] for output in got)


@needs_sglang
@pytest.mark.parametrize("name", RUNS)
def test_engine_gives_the_logprobs_of_transformers(runs, oracles, name):
    """Of greedy tokens, which are transformers' own, and of sampled ones, where each sample is a branch of its own."""
    model = oracles.models[WAYS[name]["model"]]
    for outputs, call in zip(calls_of(runs, name), CALLS):
        samples = call["sampling_params"]["n"]
        assert len(outputs) == len(PROMPTS) * samples
        for i, output in enumerate(outputs):
            assert len(output["ids"]) == call["sampling_params"]["max_new_tokens"]
            expected, greedy = logprobs_of(model, PROMPTS[i // samples], output["ids"])
            torch.testing.assert_close(torch.tensor(output["logprobs"]), expected, rtol=0, atol=1e-4)
            assert greedy or call["sampling_params"]["temperature"]
    sampled = [tuple(output["ids"]) for output in calls_of(runs, name)[1]]
    assert len(set(sampled)) == len(sampled)


@needs_sglang
@pytest.mark.parametrize(
    "page_size, window_pool, at_least",
    [(1, False, 3.5), (16, False, 3.0), (64, False, 1.9), (1, True, 3.5), (16, True, 3.0)],
)
def test_engine_reads_prefixes_once(runs, page_size, window_pool, at_least):
    """In a decode step of 12 requests, three samples of each of four prompts with a common beginning."""
    asked = {"decode": True, "page_size": page_size, "requests": 12, "rows": 12, "window pool": window_pool}
    steps = [plan for plan in runs.plans if asked.items() <= plan.items()]
    assert steps
    assert min(step["tokens"] / step["read"] for step in steps) > at_least


@needs_sglang
def test_engine_retracts(runs):
    assert any(output["retractions"] for call in calls_of(runs, "retracted") for output in call)


@needs_sglang
def test_engine_refuses_arguments(runs):
    assert "speculative_algorithm NGRAM" in runs.results["speculative"]["error"]
    assert "kv_cache_dtype fp8_e5m2" in runs.results["e5m2"]["error"]
