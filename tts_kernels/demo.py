"""`tts-kernels demo`: N samples of one prompt, stock `generate` beside `generate` over a shared KV tree."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
import zlib
from pathlib import Path

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer

from .doctor import cpu_name, versions
from .integrations.transformers import generate

PROMPT = Path(__file__).parent / "data" / "prompt.txt"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Heads as in the small Qwen2.5 models (head_dim 64, 2 KV heads), narrower, with fewer layers and no tokenizer.
SEEDED_MODEL = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="PATH", help="a local transformers model with its tokenizer (default: a small model of the "
        "Qwen2 architecture with seeded random weights)")  # fmt: skip
    add(
        "--prompt",
        metavar="FILE",
        type=Path,
        help="a text file to use as the prompt (default: the one that comes with the package)",
    )
    add("--n", type=positive, default=32, help="samples (default %(default)s)")
    add("--max-new-tokens", type=positive, default=48, help="tokens of each sample (default %(default)s)")
    add("--seed", type=int, default=0, help="of the weights and of the sampling (default %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="default %(default)s; only there must the tokens be equal")
    add("--backend", help="attention backend (default: picked by device)")
    add("--threads", type=positive, help="threads of torch and of the kernels (default: as torch does)")
    add("--json", metavar="FILE", type=Path, help="write the figures to FILE")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {number}")
    return number


def main(args: argparse.Namespace) -> int:
    """Run both, print and write the figures. Exit status 1 if tokens differ in float32."""
    if args.json and not args.json.parent.is_dir():
        raise ValueError(f"--json: expected a file in a directory that exists, got {args.json}")
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    model, input_ids = load(args)
    prompt_tokens = input_ids.shape[1]
    print(describe(model))
    print(f"prompt of {prompt_tokens} tokens, {args.n} samples of up to {args.max_new_tokens} tokens, "
          f"{torch.get_num_threads()} threads, {args.dtype}")  # fmt: skip

    settings = {
        "num_return_sequences": args.n,
        "max_new_tokens": args.max_new_tokens,
        "do_sample": True,
        "return_dict_in_generate": True,
    }
    shared = lambda *a, **k: generate(model, *a, backend=args.backend, **k)  # noqa: E731
    runs = {"stock": ("stock generate", model.generate), "tts": ("shared tree", shared)}
    results, figures = {}, {}
    for _, run in runs.values():  # warm up: threads, allocator, first imports
        run(input_ids[:, :16], **{**settings, "max_new_tokens": 3})
    for key, (name, run) in runs.items():
        timer = Timer(name, args.max_new_tokens)
        torch.manual_seed(args.seed)
        results[key] = run(input_ids, streamer=timer, **settings)
        figures |= {f"{key}_seconds": timer.seconds, f"{key}_prefill_seconds": timer.prefill,
                    f"{key}_decode_seconds": timer.seconds - timer.prefill}  # fmt: skip

    figures = {**compare(results, prompt_tokens), **figures}
    figures["speedup"] = figures["stock_seconds"] / figures["tts_seconds"]
    figures |= {"prompt_tokens": prompt_tokens, "samples": args.n, "max_new_tokens": args.max_new_tokens,
                "dtype": args.dtype, "seed": args.seed, "backend": args.backend or "by device",
                "model": geometry(model, args.model), "machine": machine()}  # fmt: skip
    report(figures)
    if args.json:
        write_json(args.json, figures)
    if not figures["tokens_equal"] and args.dtype == "float32":
        print("FAILED: the tokens differ", file=sys.stderr)
        return 1
    return 0


def load(args: argparse.Namespace) -> tuple[transformers.PreTrainedModel, Tensor]:
    """The model and the prompt's ids [1, P]."""
    text = (args.prompt or PROMPT).read_text(encoding="utf-8")
    if args.model:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            args.model, dtype=DTYPES[args.dtype], local_files_only=True
        )
        input_ids = tokenizer(text, return_tensors="pt").input_ids
    else:
        torch.manual_seed(args.seed)
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SEEDED_MODEL)).to(DTYPES[args.dtype])
        input_ids = torch.tensor([piece_ids(text)])
    if input_ids.shape[1] < 1:
        raise ValueError(f"--prompt: expected at least one token, got {text!r}")
    return model.eval(), input_ids


def piece_ids(text: str) -> list[int]:
    """Ids for the seeded model, which has no tokenizer: words, digits and signs, about as many as a real one makes."""
    pieces = re.findall(r"\d| ?[^\W\d]+|\s|[^\w\s]", text)
    return [zlib.crc32(piece.encode()) % SEEDED_MODEL["vocab_size"] for piece in pieces]


class Timer(BaseStreamer):
    """Sees what a streamer sees, the prompt and then each step's tokens; `prefill` is the time to the first token."""

    def __init__(self, name: str, steps: int):
        self.bar = tqdm(total=steps, desc=f"{name:15s}", unit="step", disable=None)
        self.calls = 0
        self.prefill = self.seconds = 0.0
        self.begin = time.perf_counter()

    def put(self, value: Tensor) -> None:
        self.calls += 1
        if self.calls == 1:
            return
        if self.calls == 2:
            self.prefill = time.perf_counter() - self.begin
        self.bar.update()

    def end(self) -> None:
        self.seconds = time.perf_counter() - self.begin
        self.bar.close()


def compare(results: dict, prompt_tokens: int) -> dict:
    """Tokens and KV bytes of the two results."""
    stock, ours = (results[key].sequences for key in ("stock", "tts"))
    equal = stock.shape == ours.shape and bool((stock == ours).all())
    steps = ours.shape[1] - prompt_tokens
    width = min(stock.shape[1], ours.shape[1])
    cache, layers = results["tts"].past_key_values, results["stock"].past_key_values.layers
    per_step = cache.kv_bytes_per_step()
    samples, suffix = ours.shape[0], steps - 1
    return {
        "tokens_equal": equal,
        "tokens_equal_fraction": (stock[:, prompt_tokens:width] == ours[:, prompt_tokens:width]).float().mean().item(),
        "new_tokens": steps,
        "stock_kv_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in layers),
        "tts_kv_bytes": cache.kv_bytes_held,
        "stock_kv_bytes_per_step": per_step["replicated"],
        "tts_kv_bytes_per_step": per_step["read"],
        "least_kv_bytes_per_step": per_step["least"],
        # the most that sharing a prompt of P tokens between N samples of S tokens can save of the KV reads
        "kv_saving_bound": samples * (2 * prompt_tokens + suffix) / (2 * prompt_tokens + samples * suffix),
    }


def report(figures: dict) -> None:
    mib = {key: value / 2**20 for key, value in figures.items() if "bytes" in key}
    print(f"{'':28}{'stock generate':>16}{'shared tree':>16}{'ratio':>9}")
    for label, suffix, values, unit in (
        ("prefill (to first token)", "prefill_seconds", figures, "s"),
        ("decode", "decode_seconds", figures, "s"),
        ("whole generation", "seconds", figures, "s"),
        ("KV held", "kv_bytes", mib, "MiB"),
        ("KV read in a decode step", "kv_bytes_per_step", mib, "MiB"),
    ):
        stock, ours = values[f"stock_{suffix}"], values[f"tts_{suffix}"]
        ratio = f"{stock / ours:8.1f}x" if ours else f"{'-':>9}"
        print(f"{label:28}{stock:12.2f} {unit:3}{ours:12.2f} {unit:3}{ratio}")
    print(f"{'least possible to read':28}{'':16}{mib['least_kv_bytes_per_step']:12.2f} MiB")
    print(f"the prompt is computed once instead of {figures['samples']} times; sharing it can save at most "
          f"{figures['kv_saving_bound']:.1f}x of the KV reads of the whole generation")  # fmt: skip
    print(f"tokens equal: {'yes' if figures['tokens_equal'] else 'NO'} "
          f"({figures['tokens_equal_fraction']:.2%} of {figures['samples']} x {figures['new_tokens']})")  # fmt: skip


def describe(model: transformers.PreTrainedModel) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{type(model).__name__}, {parameters / 1e6:.1f} M parameters, on {model.device}"


def geometry(model: transformers.PreTrainedModel, path: str | None) -> dict:
    config = model.config.get_text_config(decoder=True)
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    return {"class": type(model).__name__, "path": path, **{name: getattr(config, name, None) for name in names}}


def machine() -> dict:
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.system(),
            **versions()}  # fmt: skip


def write_json(path: Path, figures: dict) -> None:
    """All of the file or none of it: written beside it and then renamed."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
