"""The backend for vLLM: its parts on vLLM's tensors, against a plain softmax; vLLM itself, where it is installed."""

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
from vllm_batches import (
    BATCH,
    BLOCK,
    BLOCKS,
    FP8,
    HKV,
    HQ,
    D,
    builder_of,
    common_metadata,
    empty_cache,
    plain,
    slots_of,
)


@pytest.fixture
def plugin(monkeypatch):
    with vllm_fakes.imported(monkeypatch) as module:
        yield module


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
    "full graphs": {"dtype": "float32", "graphs": [1, 4, 8, 16, 21], "engine": {"max_num_seqs": 21}},
}  # fmt: skip
CASES["full graphs, windows and little memory"] = CASES["softcap"] | CASES["full graphs"]
CASES["full graphs, windows and little memory"]["engine"] = {"max_num_seqs": 21, "num_gpu_blocks_override": 80}

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def run_vllm(folder, case, registered_as=None):
    """What tests/vllm_run.py prints. registered_as: the name of our backend, where it is in the process."""
    config = folder / "case.json"
    config.write_text(json.dumps({"sizes": {}, "engine": {}, "temperature": 0.8, "base": SIZES, "graphs": []} | case))
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TTS_KERNELS_VLLM")}
    if registered_as:
        environment["TTS_KERNELS_VLLM"] = registered_as
    run = [sys.executable, str(Path(__file__).parents[1] / "vllm_run.py"), str(config), str(folder / "model")]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_same_samples(ours, theirs):
    assert ours["tokens"] == theirs["tokens"]
    torch.testing.assert_close(torch.tensor(ours["logprobs"]), torch.tensor(theirs["logprobs"]), rtol=1e-4, atol=1e-3)


@needs_vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM here is one for GPUs")
@pytest.mark.parametrize("name", CASES)
def test_vllm_samples_the_same_tokens(name, tmp_path):
    """Prompts that share, chunked prefills, several samples each, twice over, so that the second time finds prefixes in
    vLLM's cache: from one seed, equal tokens and log-probabilities with its own backend for CPUs and with ours. Full
    graphs: vLLM's runner on a CPU has none, vllm_graphs.py gives it what repeats a captured call of the model."""
    theirs, ours = run_vllm(tmp_path, CASES[name]), run_vllm(tmp_path, CASES[name], "CPU_ATTN")
    assert theirs["plans"] == 0 < ours["plans"]
    assert ours["read"] < 0.7 * ours["held"]  # sharing was found
    assert_same_samples(ours, theirs)
    graphs = CASES[name].get("graphs", [])
    assert ours["captured"] == graphs and set(ours["replayed"]) == set(graphs)
    if graphs:
        assert ours["groups"] == (2 if "architecture" in CASES[name] else 1)  # of layers, each with a builder


@pytest.mark.gpu
@needs_vllm
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["float32", "softcap"])
def test_vllm_on_a_gpu_samples_the_same_tokens_from_full_graphs(name, tmp_path):
    sizes = [1, 4, 8, 16, 21]
    engine = {"max_num_seqs": 21, "gpu_memory_utilization": 0.3, "attention_backend": "CUSTOM"}
    full = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
    theirs = run_vllm(tmp_path, CASES[name] | {"engine": engine | {"attention_backend": "TRITON_ATTN"}})
    eager = run_vllm(tmp_path, CASES[name] | {"engine": engine}, "CUSTOM")
    engine |= {"enforce_eager": False, "compilation_config": full}
    graphs = run_vllm(tmp_path, CASES[name] | {"engine": engine}, "CUSTOM")
    assert theirs["plans"] == 0 < eager["plans"] and not eager["captured"]
    assert graphs["captured"] == sizes and graphs["replayed"]
    assert_same_samples(eager, theirs)
    assert_same_samples(graphs, theirs)
