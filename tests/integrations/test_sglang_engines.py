"""Engines of SGLang on the CPU with the attention backend, where SGLang is installed: compared with its torch_native
backend and, token by token and logprob by logprob, with transformers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from tts_kernels.integrations import sglang as plugin

TESTS = Path(__file__).parents[1]
STUBS = TESTS / "sglang_stubs"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed")


# They run in a process of their own, and their schedulers in others: a plugin is how the tests look inside.

PROMPT = [(i * 7 + 3) % 500 for i in range(100)]
PROMPTS = [[*PROMPT, k] for k in range(3)] + [[*PROMPT[:70], 9, 8, 7]]
CALLS = [
    {"input_ids": PROMPTS, "sampling_params": {"temperature": 0, "max_new_tokens": 24, "n": 3}},
    {"input_ids": PROMPTS, "sampling_params": {"temperature": 1.0, "max_new_tokens": 40, "n": 4}},
]
# Of graphs alone: requests that end one after another, so that batches of many sizes are replayed. Greedy, as the first
# of CALLS.
ENDS = [4, 9, 15, 24]
LEAVING = {
    "input_ids": PROMPTS, "sampling_params": [{"temperature": 0, "max_new_tokens": end, "n": 3} for end in ENDS]
}  # fmt: skip
OURS = {"attention_backend": plugin.NAME}
GRAPHS = {**OURS, "graphs": [1, 2, 4, 8, 16]}  # SGLang's runner of decode graphs, for these batch sizes
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
    "graphs": {"model": "qwen2", **GRAPHS, "enable_mixed_chunk": True},
    "graphs, decode only": {
        "model": "qwen2", "prefill_attention_backend": "torch_native", "decode_attention_backend": plugin.NAME,
        "page_size": 16, "graphs": GRAPHS["graphs"],
    },
    "graphs, retracted": {"model": "qwen2", **GRAPHS, "max_total_tokens": 256, "disable_overlap_schedule": True},
    "graphs, window pool": {"model": "cohere2", **GRAPHS, "page_size": 16},
    "speculative": {"model": "qwen2", **OURS, "speculative_algorithm": "NGRAM"},
    "e5m2": {"model": "qwen2", **OURS, "kv_cache_dtype": "fp8_e5m2"},
}  # fmt: skip
GRAPH_RUNS = [name for name, way in WAYS.items() if "graphs" in way]
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
    return run_engines(WAYS, oracles.folder, tmp_path_factory.mktemp("runs"), {"SGLANG_USE_CPU_ENGINE": "1"})


def run_engines(ways, models, folder, variables):
    """One after another: results by name, and what was seen inside, plans and replays."""
    points = ["probe = sglang_probe:register", "graphs = sglang_cpu_graphs:register"]
    if not any(point.name == plugin.NAME for point in entry_points(group="sglang.srt.plugins")):
        points.insert(0, f"{plugin.NAME} = tts_kernels.integrations.sglang:register")
    info = folder / "plugins" / "tts_kernels_probe-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tts-kernels-probe\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\n" + "\n".join(points) + "\n")

    jobs = []
    for name, way in ways.items():
        options = {**way, "model_path": str(models / way["model"])}
        del options["model"]
        graphs = options.pop("graphs", [])
        environment = {"TTS_KERNELS_PROBE": str(folder / f"{name}.jsonl")}
        if graphs:
            environment["TTS_KERNELS_CPU_GRAPHS"] = ",".join(map(str, graphs))
        calls = [*CALLS, LEAVING] if graphs else CALLS
        jobs.append({"name": name, "options": options, "environment": environment, "calls": calls})
    jobs_file, results_file = folder / "jobs.json", folder / "results.json"
    jobs_file.write_text(json.dumps(jobs))
    path = [str(STUBS), str(info.parent), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), **variables}
    environment.pop("TRITON_INTERPRET", None)  # SGLang on a CPU takes no Triton
    command = [sys.executable, str(TESTS / "sglang_run.py"), str(jobs_file), str(results_file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2400)
    printed = done.stdout + done.stderr
    assert results_file.exists(), printed[-6000:]
    results = json.loads(results_file.read_text())
    assert list(results) == list(ways), printed[-6000:]
    facts = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("*.jsonl")}
    return types.SimpleNamespace(results=results, facts=facts)


def calls_of(runs, name):
    assert "error" not in runs.results[name], runs.results[name]["error"]
    return runs.results[name]["calls"]


@torch.no_grad()
def logprobs_of(model, prompt, ids):
    """What transformers gives for each of the generated ids, and whether each was the most likely token."""
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0], logits.argmax(-1).tolist() == ids


@pytest.mark.parametrize("name", [name for name in RUNS if WAYS[name]["model"] == "qwen2"])
def test_engine_gives_the_tokens_of_torch_native(runs, name):
    got, native = (calls_of(runs, run)[0] for run in (name, "native"))
    assert [output["ids"] for output in got] == [output["ids"] for output in native]
    for output, other in zip(got, native):
        torch.testing.assert_close(torch.tensor(output["logprobs"]), torch.tensor(other["logprobs"]), rtol=0, atol=1e-4)
    assert any(output["cached"] for output in got)


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


@pytest.mark.parametrize(
    "page_size, window_pool, at_least",
    [(1, False, 3.5), (16, False, 3.0), (64, False, 1.9), (1, True, 3.5), (16, True, 3.0)],
)
def test_engine_reads_prefixes_once(runs, page_size, window_pool, at_least):
    """In a decode step of 12 requests, three samples of each of four prompts with a common beginning."""
    asked = {
        "decode": True, "graph": False, "page_size": page_size, "requests": 12, "rows": 12, "window pool": window_pool
    }  # fmt: skip
    steps = [fact for facts in runs.facts.values() for fact in facts if asked.items() <= fact.items()]
    assert steps
    assert min(step["tokens"] / step["read"] for step in steps) > at_least


@pytest.mark.parametrize("name", ["retracted", "graphs, retracted"])
def test_engine_retracts(runs, name):
    assert any(output["retractions"] for call in calls_of(runs, name) for output in call)


@pytest.mark.parametrize("name", GRAPH_RUNS)
def test_engine_decodes_in_graphs(runs, name):
    """Every decode step, replayed from what was captured before there was any request; batches of many sizes, most of
    them padded. What requests share is read once there too."""
    calls, facts = calls_of(runs, name), runs.facts[name]
    assert not [fact for fact in facts if fact.get("decode") and not fact["graph"]]
    replays = {(fact["requests"], fact["size"]) for fact in facts if "replay" in fact}
    assert {size for _, size in replays} >= {4, 8, 16}
    assert any(requests < size for requests, size in replays)
    for i, output in enumerate(calls[2]):
        assert output["ids"] == calls[0][i]["ids"][: ENDS[i // 3]]
    assert max(fact["tokens"] / fact["read"] for fact in facts if fact.get("graph")) > 3.0


def test_engine_refuses_arguments(runs):
    assert "speculative_algorithm NGRAM" in runs.results["speculative"]["error"]
    assert "kv_cache_dtype fp8_e5m2" in runs.results["e5m2"]["error"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_engines_on_a_gpu(oracles, tmp_path):
    """With SGLang's CUDA graphs and without: in half precision near the logprobs of transformers."""
    options = {**OURS, "device": "cuda", "dtype": "float16", "page_size": 16, "cuda_graph_max_bs_decode": 16}
    ways = {
        "graphs": {"model": "qwen2", **options},
        "no graphs": {"model": "qwen2", **options, "disable_cuda_graph": True},
        "graphs, window pool": {"model": "cohere2", **options},
    }
    runs = run_engines(ways, oracles.folder, tmp_path, {})
    for name, way in ways.items():
        assert any(fact["graph"] for fact in runs.facts[name]) == (name != "no graphs")
        for outputs, call in zip(calls_of(runs, name), CALLS):
            for i, output in enumerate(outputs):
                prompt = PROMPTS[i // call["sampling_params"]["n"]]
                expected, _ = logprobs_of(oracles.models[way["model"]], prompt, output["ids"])
                assert (torch.tensor(output["logprobs"]) - expected).abs().mean() < 0.05
