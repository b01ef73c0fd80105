"""The attention backend on SGLang's own pools, layers and batches, beside SGLang's torch_native backend, where SGLang
is installed."""

from __future__ import annotations

import importlib.util
import random
import types
from pathlib import Path

import pytest
import torch
from sglang_requests import FP8, HKV, HQ, LENS, D, Requests, tensors

from tts_kernels.integrations import sglang as plugin

TESTS = Path(__file__).parents[1]
STUBS = TESTS / "sglang_stubs"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed")


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
    with pytest.raises(ValueError, match="does not support CUDA graphs of 16 tokens for 8 requests"):
        backend.init_cuda_graph_state(8, 16)
    backend.init_cuda_graph_state(8, 8)
    for mode in ("EXTEND", "TARGET_VERIFY", "DLLM_EXTEND"):
        with pytest.raises(ValueError, match=f"does not support a CUDA graph of forward_mode {mode}"):
            backend.init_forward_metadata_out_graph(batch_of(sglang, requests, mode))


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


def test_register_again(sglang):
    plugin.register()
    plugin.register()
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES

    assert ATTENTION_BACKEND_CHOICES.count(plugin.NAME) == 1
    assert plugin.NAME in sglang.registry.ATTENTION_BACKENDS


@pytest.mark.parametrize(
    "chosen, without",
    [
        ({"attention_backend": plugin.NAME}, {"prefill"}),
        ({"prefill_attention_backend": plugin.NAME, "decode_attention_backend": "triton"}, {"prefill"}),
        ({"prefill_attention_backend": "triton", "decode_attention_backend": plugin.NAME}, set()),
        ({"attention_backend": "triton"}, set()),
    ],
)
def test_prefill_graphs_are_switched_off(sglang, chosen, without):
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
