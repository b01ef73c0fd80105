"""`python -m benchmarks.vllm_samples`, in an environment that has vLLM's build for CPUs (`make vllm`): seconds in which
vLLM samples N answers to one prompt, with its own attention and with ours, everything else being vLLM's.

Each engine has a process of its own; they take turns, and medians over the rounds are shown. The prompt is in vLLM's
prefix cache already, so a round is N decodes over shared blocks. In float32 the tokens must be equal, or no time is
printed. The model is seeded: the geometry of Qwen2.5-0.5B (14 query and 2 KV heads of 64), cut to a few layers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "vocab_size": 8192, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
    "num_key_value_heads": 2, "max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None,
    "tie_word_embeddings": True,
}  # fmt: skip
BACKENDS = {"vLLM": None, "ours": "CPU_ATTN"}


def main() -> int:
    parser = argparse.ArgumentParser(description="vLLM's seconds for N samples, with its own attention and with ours")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 8, 32], metavar="N")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens (default 4096)")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each sample (default 64)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was measured")
    parser.add_argument("--engine", metavar="MODEL", help=argparse.SUPPRESS)  # the process of one engine
    options = parser.parse_args()
    if options.engine:
        return engine(options)
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, options.layers)
        entries = [measure(n, folder, options) for n in options.samples]
    if any(entry["tokens"] == "differ" for entry in entries) and options.dtype == "float32":
        print("error: the tokens differ, so no time is shown", file=sys.stderr)
        return 1
    print(
        f"seconds: {options.dtype}, {options.layers} layers, prompt {options.prompt}, {options.new_tokens} new tokens"
    )
    print(f"{'N':>4} {'vLLM':>9} {'ours':>9} {'ratio':>7}  tokens")
    for entry in entries:
        stock, ours = entry["seconds"].values()
        print(f"{entry['samples']:>4} {stock:>9.3f} {ours:>9.3f} {stock / ours:>6.2f}x  {entry['tokens']}")
    if options.json:
        told = {k: v for k, v in vars(options).items() if k not in ("json", "engine")}
        options.json.write_text(json.dumps({"options": told, "entries": entries}, indent=1) + "\n")
    return 0


def make_model(folder: str, layers: int) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=layers, **SIZES)).save_pretrained(folder)


def measure(n: int, folder: str, options: argparse.Namespace) -> dict:
    """The engines by turns: each round is asked for by a line and answered by one."""
    command = [sys.executable, "-m", "benchmarks.vllm_samples", "--engine", folder, "--samples", str(n)]
    for name in ("prompt", "new_tokens", "dtype"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    engines, seconds, tokens = {}, {name: [] for name in BACKENDS}, {}
    try:
        for name, registered in BACKENDS.items():
            environment = {k: v for k, v in os.environ.items() if k not in ("TTS_KERNELS_VLLM", "TRITON_INTERPRET")}
            if registered:
                environment["TTS_KERNELS_VLLM"] = registered
            engines[name] = subprocess.Popen(
                command, env=environment, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        for i in range(options.rounds + 1):
            for name, process in engines.items():
                process.stdin.write("go\n")
                process.stdin.flush()
                line = next((line for line in process.stdout if line.startswith("{")), None)
                if line is None:
                    raise RuntimeError(f"{name}: the engine ended, exit status {process.wait()}")
                told = json.loads(line)
                tokens.setdefault(name, told["tokens"])
                if i:  # the first fills caches
                    seconds[name].append(told["seconds"])
    finally:
        for process in engines.values():
            process.stdin.close()
            process.wait()
    return {
        "samples": n,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "all_seconds": seconds,
        "tokens": "equal" if len({json.dumps(told) for told in tokens.values()}) == 1 else "differ",
    }


def engine(options: argparse.Namespace) -> int:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    from vllm import LLM, SamplingParams

    n = options.samples[0]
    llm = LLM(
        options.engine, skip_tokenizer_init=True, dtype=options.dtype, enforce_eager=True, block_size=32, seed=7,
        max_model_len=options.prompt + options.new_tokens + 32, max_num_seqs=n, enable_prefix_caching=True,
    )  # fmt: skip
    prompt = random.Random(0).choices(range(SIZES["vocab_size"]), k=options.prompt)
    sampling = SamplingParams(n=n, temperature=0.8, max_tokens=options.new_tokens, detokenize=False, ignore_eos=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        (request,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": [list(o.token_ids) for o in request.outputs]}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
