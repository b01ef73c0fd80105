"""`tts-kernels demo`: N samples of one prompt, their steps scored, one chosen, and a small beam search; stock code and
ours side by side."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer

from . import demo_verify, seeded
from .doctor import cpu_name, versions
from .integrations.transformers import generate

PROMPT = Path(__file__).parent / "data" / "prompt.txt"
SAME_SCORE = 1e-3  # in float32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Heads as in the small Qwen2.5 models (head_dim 64, 2 KV heads), narrower, with fewer layers.
SEEDED_MODEL = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
STEP_TOKENS = 12  # of the seeded model's steps, in the mean


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
    demo_verify.add_arguments(parser)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {number}")
    return number


def main(args: argparse.Namespace) -> int:
    """Run both, print and write the figures. Exit status 1 if in float32 tokens, scores or choices differ."""
    if args.json and not args.json.parent.is_dir():
        raise ValueError(f"--json: expected a file in a directory that exists, got {args.json}")
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    text = (args.prompt or PROMPT).read_text(encoding="utf-8")
    model, tokenizer = load(args, text)
    verifier = demo_verify.load(args, SEEDED_MODEL, text, DTYPES[args.dtype])
    input_ids = tokenizer(text, return_tensors="pt").input_ids
    if input_ids.shape[1] < 1:
        raise ValueError(f"--prompt: expected at least one token, got {text!r}")
    print(f"policy: {describe(model)}; verifier: {describe(verifier.models[0])}, recipe {verifier.recipe.name}")
    print(f"prompt of {input_ids.shape[1]} tokens, {args.n} samples of up to {args.max_new_tokens} tokens, "
          f"{torch.get_num_threads()} threads, {args.dtype}")  # fmt: skip

    figures, results = sample(args, model, input_ids)
    report_sampling(figures)
    candidates = tokenizer.batch_decode(results["tts"].sequences[:, input_ids.shape[1] :], skip_special_tokens=True)
    figures |= demo_verify.score(verifier, text, candidates)
    report_scores(figures, candidates)
    figures |= demo_verify.beams(args, model, tokenizer, verifier, text)
    report_beams(figures)
    figures |= {"dtype": args.dtype, "seed": args.seed, "backend": args.backend or "by device",
                "model": geometry(model, args.model), "verifier": geometry(verifier.models[0], args.verifier),
                "recipe": verifier.recipe.name, "machine": machine()}  # fmt: skip
    if args.json:
        write_json(args.json, figures)
    wrong = [name for name, ok in checks(figures).items() if not ok]
    if wrong and args.dtype == "float32":
        print(f"FAILED: {', '.join(wrong)} differ", file=sys.stderr)
        return 1
    return 0


def checks(figures: dict) -> dict[str, bool]:
    return {
        "the tokens": figures["tokens_equal"],
        "the scores": figures["score_difference"] < SAME_SCORE,
        "the beams": figures["beam_candidates_equal"] and figures["beam_choice_equal"],
        "the beams' scores": (figures["beam_score_difference"] or 0.0) < SAME_SCORE,
    }


def load(
    args: argparse.Namespace, text: str
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    if args.model:
        demo_verify.check_folder("--model", args.model)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            args.model, dtype=DTYPES[args.dtype], local_files_only=True
        )
        return model.eval(), transformers.AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    model = seeded.causal_lm(args.seed, step_tokens=STEP_TOKENS, dtype=DTYPES[args.dtype], **SEEDED_MODEL)
    return model, seeded.tokenizer(SEEDED_MODEL["vocab_size"], text)


def sample(args: argparse.Namespace, model: transformers.PreTrainedModel, input_ids: Tensor) -> tuple[dict, dict]:
    """Figures and results of `generate`, stock and over a shared tree."""
    settings = {
        "num_return_sequences": args.n,
        "max_new_tokens": args.max_new_tokens,
        "do_sample": True,
        "top_k": 0,
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
    prompt_tokens = input_ids.shape[1]
    figures = {**compare(results, prompt_tokens), **figures}
    figures["speedup"] = figures["stock_seconds"] / figures["tts_seconds"]
    return figures | {"prompt_tokens": prompt_tokens, "samples": args.n, "max_new_tokens": args.max_new_tokens}, results


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


def report_sampling(figures: dict) -> None:
    mib = {key: value / 2**20 for key, value in figures.items() if "bytes" in key}
    head("sampling")
    row("prefill (to first token)", "prefill_seconds", figures, "s")
    row("decode", "decode_seconds", figures, "s")
    row("whole generation", "seconds", figures, "s")
    row("KV held", "kv_bytes", mib, "MiB")
    row("KV read in a decode step", "kv_bytes_per_step", mib, "MiB")
    print(f"{'least possible to read':28}{'':16}{mib['least_kv_bytes_per_step']:12.2f} MiB")
    print(f"the prompt is computed once instead of {figures['samples']} times; sharing it can save at most "
          f"{figures['kv_saving_bound']:.1f}x of the KV reads of the whole generation")  # fmt: skip
    print(f"tokens equal: {yes(figures['tokens_equal'])} "
          f"({figures['tokens_equal_fraction']:.2%} of {figures['samples']} x {figures['new_tokens']})")  # fmt: skip


def report_scores(figures: dict, candidates: list[str]) -> None:
    head(f"scoring {figures['steps']} steps")
    row("scores", "score_seconds", figures, "s")
    row("tokens encoded", "score_tokens", figures, "")
    print(f"largest difference of a score: {figures['score_difference']:.1e}")
    print(f"best by the {figures['aggregate']} of their steps: "
          + ", ".join(f"sample {i} ({score:.4f})" for i, score in figures["best"]))  # fmt: skip
    if figures["best"]:
        print(f"chosen: {candidates[figures['best'][0][0]][:70]!r}...")


def report_beams(figures: dict) -> None:
    beam = figures["beam"]
    head("beam search {width} x {expand}, {depth} deep".format(**beam))
    row("policy", "beam_policy_seconds", figures, "s")
    row("verifier", "beam_verifier_seconds", figures, "s")
    row("whole search", "beam_seconds", figures, "s")
    row("tokens through the policy", "beam_policy_tokens", figures, "")
    row("tokens through the verifier", "beam_verifier_tokens", figures, "")
    print(
        f"candidates equal: {yes(figures['beam_candidates_equal'])}, choice equal: {yes(figures['beam_choice_equal'])}"
    )
    if figures["beam_score_difference"] is not None:
        print(f"largest difference of a score: {figures['beam_score_difference']:.1e}")


def head(title: str) -> None:
    print(f"\n{title:28}{'stock':>16}{'shared tree':>16}{'ratio':>9}")


def row(label: str, suffix: str, values: dict, unit: str) -> None:
    stock, ours = values[f"stock_{suffix}"], values[f"tts_{suffix}"]
    ratio = f"{stock / ours:8.1f}x" if ours else f"{'-':>9}"
    places = 2 if unit else 0
    print(f"{label:28}{stock:12,.{places}f} {unit:3}{ours:12,.{places}f} {unit:3}{ratio}")


def yes(fact: bool) -> str:
    return "yes" if fact else "NO"


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
