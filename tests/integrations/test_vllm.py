"""The backend for vLLM: its parts on vLLM's tensors, against a plain softmax; vLLM itself, where it is installed."""

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm_fakes

HQ, HKV, D, BLOCK, BLOCKS = 6, 2, 32, 4, 40
FP8 = torch.float8_e4m3fn

# (blocks, tokens, rows): four that share a prompt of three blocks, two of them a block more; a chunk of a prefill whose
# prompt is shared too; a whole prefill; padding behind them.
BATCH = [
    ([7, 3, 5, 1], 14, 1),
    ([7, 3, 5, 2], 13, 1),
    ([20, 21], 8, 8),
    ([7, 3, 5, 8, 9], 19, 1),
    ([7, 3, 5, 8, 10], 17, 1),
    ([7, 3, 5, 30, 31, 32], 22, 9),
    ([33], 0, 0),
]


@pytest.fixture
def plugin(monkeypatch):
    vllm_fakes.install(monkeypatch)
    monkeypatch.delitem(sys.modules, "tts_kernels.integrations.vllm", raising=False)
    yield importlib.import_module("tts_kernels.integrations.vllm")
    sys.modules.pop("tts_kernels.integrations.vllm", None)


def empty_cache(dtype, layout):
    """[blocks, Hkv, block, 2 D], as vLLM lays it out, NaN in it."""
    shape = (BLOCKS, HKV, BLOCK, 2 * D) if layout == "heads first" else (BLOCKS, BLOCK, HKV, 2 * D)
    raw = torch.full(shape, math.nan).to(dtype)
    raw = raw.view(torch.uint8) if dtype == FP8 else raw  # vLLM keeps fp8 as bytes
    return raw if layout == "heads first" else raw.transpose(1, 2)


def common_metadata(batch, causal=True):
    table = torch.full((len(batch), 8), 2_000_000_000, dtype=torch.int32)
    for row, (blocks, tokens, _) in enumerate(batch):
        used = -(-tokens // BLOCK)
        table[row, :used] = torch.tensor(blocks[:used], dtype=torch.int32)
    starts = [0]
    for *_, rows in batch:
        starts.append(starts[-1] + rows)
    return SimpleNamespace(
        num_reqs=len(batch), num_actual_tokens=starts[-1], causal=causal, block_table_tensor=table,
        query_start_loc_cpu=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor([tokens for _, tokens, _ in batch], dtype=torch.int32),
    )  # fmt: skip


def builder_of(plugin, dtype=torch.float32, kv_dtype=None):
    spec = SimpleNamespace(block_size=BLOCK, head_size=D, num_kv_heads=HKV, dtype=kv_dtype or dtype)
    model = SimpleNamespace(dtype=dtype, get_num_attention_heads=lambda parallel: HQ)
    config = SimpleNamespace(model_config=model, parallel_config=None)
    return plugin.TreeBuilder(spec, ["layer"], config, torch.device("cpu"))


def slots_of(blocks, first, last):
    return [blocks[i // BLOCK] * BLOCK + i % BLOCK for i in range(first, last)]


def plain(q, k, v, batch, *, scale, causal, window, softcap, sinks):
    """One softmax for each row, in float64. k, v: by slot, [BLOCKS * BLOCK, Hkv, D]."""
    out, row = torch.zeros(q.shape, dtype=torch.float64), 0
    for blocks, tokens, rows in batch:
        slots = slots_of(blocks, 0, tokens)
        keys = k[slots].double().repeat_interleave(HQ // HKV, 1)
        values = v[slots].double().repeat_interleave(HQ // HKV, 1)
        for position in range(tokens - rows, tokens):
            score = torch.einsum("hd,thd->ht", q[row].double(), keys) * scale
            if softcap:
                score = softcap * torch.tanh(score / softcap)
            at = torch.arange(tokens)
            hidden = (at > position) & causal
            if window:
                hidden |= at <= position - window
            score[:, hidden] = -math.inf
            if sinks is not None:
                score = torch.cat([score, sinks.double()[:, None]], 1)
            weight = score.softmax(1)[:, :tokens]
            out[row] = torch.einsum("ht,thd->hd", weight, values)
            row += 1
    return out


@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 6},
        {"logits_soft_cap": 2.5},
        {"sinks": True},
        {"kv_cache_dtype": "fp8_e4m3"},
        {"causal": False},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_a_mixed_batch_is_what_a_plain_softmax_gives(plugin, options, layout):
    gen = torch.Generator().manual_seed(1)
    options = dict(options)
    causal = options.pop("causal", True)
    fp8 = options.get("kv_cache_dtype") == "fp8_e4m3"
    sinks = torch.randn(HQ, generator=gen) if options.pop("sinks", False) else None
    scales = (0.5, 2.0) if fp8 else (1.0, 1.0)
    layer = SimpleNamespace(_k_scale=torch.tensor(scales[0]), _v_scale=torch.tensor(scales[1]))
    cache = empty_cache(FP8 if fp8 else torch.float32, layout)
    impl = plugin.TreeImpl(HQ, D, 0.2, HKV, sinks=sinks, **options)

    used = sorted({slot for blocks, tokens, _ in BATCH for slot in slots_of(blocks, 0, tokens)})
    slots = torch.tensor([*used, -1, -1])  # padding behind them
    new_k, new_v = torch.randn(2, len(slots) + 3, HKV, D, generator=gen)
    new_k[len(used) :] = new_v[len(used) :] = math.nan
    impl.do_kv_cache_update(layer, new_k, new_v, cache, slots)
    k, v = torch.zeros(2, BLOCKS * BLOCK, HKV, D)
    for stored, new, scale in ((k, new_k, scales[0]), (v, new_v, scales[1])):
        new = new[: len(used)]
        stored[used] = (new / scale).to(FP8).float() * scale if fp8 else new

    metadata = builder_of(plugin, kv_dtype=FP8 if fp8 else None).build(0, common_metadata(BATCH, causal))
    num_rows = sum(rows for *_, rows in BATCH)
    assert metadata.num_tokens == num_rows
    q = torch.randn(num_rows + 2, HQ, D, generator=gen)
    out = torch.full((num_rows + 2, HQ, D), 7.0)
    assert impl.forward(layer, q, None, None, cache, metadata, out) is out
    window = options.get("sliding_window", 0)
    exact = plain(
        q, k, v, BATCH, scale=0.2, causal=causal, window=window, softcap=options.get("logits_soft_cap", 0), sinks=sinks
    )
    torch.testing.assert_close(out[:num_rows].double(), exact[:num_rows], rtol=2e-5, atol=2e-5)
    assert (out[num_rows:] == 7).all()


def test_shared_blocks_are_read_once(plugin):
    plan = builder_of(plugin).build(0, common_metadata(BATCH)).plan
    # Three blocks of the prompt, a fourth of two of them, and what each has of its own.
    assert plan.num_tokens == 12 + 4 + (14 - 12) + (13 - 12) + 8 + (19 - 16) + (17 - 16) + (22 - 12)


def test_without_metadata_the_output_is_zero(plugin):
    out = torch.full((3, HQ, D), 7.0)
    impl = plugin.TreeImpl(HQ, D, 0.2, HKV)
    assert impl.forward(None, None, None, None, None, None, out) is out
    assert (out == 0).all()


def test_heads_default_to_as_many_kv_heads(plugin):
    assert plugin.TreeImpl(HQ, D, 0.2).num_kv_heads == HQ


@pytest.mark.parametrize(
    "argument, value",
    [("alibi_slopes", [0.5] * HQ), ("attn_type", "encoder_only"), ("kv_cache_dtype", "fp8_e5m2")],
)
def test_what_is_refused_is_named(plugin, argument, value):
    with pytest.raises(NotImplementedError, match=argument):
        plugin.TreeImpl(HQ, D, 0.2, HKV, **{argument: value})


def test_quantised_output_and_a_mask_for_each_request_are_refused(plugin):
    impl = plugin.TreeImpl(HQ, D, 0.2, HKV)
    with pytest.raises(NotImplementedError, match="output_scale"):
        impl.forward(None, None, None, None, None, None, torch.empty(1), output_scale=torch.ones(1))
    with pytest.raises(NotImplementedError, match="causal"):
        builder_of(plugin).build(0, common_metadata(BATCH, torch.ones(len(BATCH), dtype=torch.bool)))


@pytest.mark.parametrize("name", [None, "CPU_ATTN"])
def test_it_registers_under_the_name_that_is_asked_for(plugin, monkeypatch, name):
    monkeypatch.delenv("TTS_KERNELS_VLLM", raising=False)
    if name:
        monkeypatch.setenv("TTS_KERNELS_VLLM", name)
    for _ in range(2):  # in every process, and maybe twice
        plugin.register()
    path = "tts_kernels.integrations.vllm.TreeBackend"
    assert list(vllm_fakes.REGISTERED.items()) == [(vllm_fakes.AttentionBackendEnum[name or "CUSTOM"], path)]


def test_a_name_that_vllm_does_not_know_is_an_error(plugin, monkeypatch):
    monkeypatch.setenv("TTS_KERNELS_VLLM", "FASTEST")
    with pytest.raises(ValueError, match=r"TTS_KERNELS_VLLM: expected one of .*CPU_ATTN.*, got 'FASTEST'"):
        plugin.register()


# --- vLLM itself -----------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": None,
    "tie_word_embeddings": False,
}  # fmt: skip
CASES = {
    "float32": {"dtype": "float32"},
    "sliding window": {"dtype": "float32", "architecture": "Mistral", "sizes": {"sliding_window": 48, "head_dim": 64}},
    "softcap": {
        "dtype": "float32", "architecture": "Gemma2",
        "sizes": {
            "head_dim": 64, "sliding_window": 48, "query_pre_attn_scalar": 64, "pad_token_id": 0,
            "tie_word_embeddings": True,
        },
    },
    "little memory": {"dtype": "float32", "engine": {"num_gpu_blocks_override": 40}},
    "drafts": {
        "dtype": "float32",
        "engine": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}},
        "temperature": 0.0,
    },
}  # fmt: skip

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@needs_vllm
@pytest.mark.parametrize("name", CASES)
def test_vllm_samples_the_same_tokens(name, tmp_path):
    """Prompts that share, chunked prefills, several samples each, twice over, so that the second time finds prefixes in
    vLLM's cache: from one seed, equal tokens and log-probabilities with its own backend for CPUs and with ours."""
    config = tmp_path / "case.json"
    config.write_text(json.dumps({"sizes": {}, "engine": {}, "temperature": 0.8, "base": SIZES} | CASES[name]))
    told = {}
    for backend in ("vLLM's", "ours"):
        environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TTS_KERNELS_VLLM")}
        if backend == "ours":
            environment["TTS_KERNELS_VLLM"] = "CPU_ATTN"
        run = [sys.executable, str(Path(__file__).parents[1] / "vllm_run.py"), str(config), str(tmp_path / "model")]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        told[backend] = json.loads(done.stdout.splitlines()[-1])
    assert told["vLLM's"]["plans"] == 0 < told["ours"]["plans"]
    assert told["ours"]["read"] < 0.7 * told["ours"]["held"]  # sharing was found
    assert told["ours"]["tokens"] == told["vLLM's"]["tokens"]
    torch.testing.assert_close(
        torch.tensor(told["ours"]["logprobs"]), torch.tensor(told["vLLM's"]["logprobs"]), rtol=1e-4, atol=1e-3
    )
