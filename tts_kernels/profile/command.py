"""The command `tts-kernels profile`."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import sys
from pathlib import Path

import torch
import transformers

from tts_kernels import demo, seeded
from tts_kernels.cost import Hardware, ModelShape
from tts_kernels.cost.options import add_examples
from tts_kernels.cost.table import rate
from tts_kernels.tree.checks import fail
from tts_kernels.verifier import RECIPES, Verifier, find_recipe

from . import report
from .ways import WAYS, Profile, Query, differences, profile

SCHEMA = 1  # of --json
RECIPE = "math-shepherd"  # of the seeded verifier
ROOM, CHUNK = 65536, 16384  # tokens of the verifier's KV tree, and of a forward
INTERRUPTED = 130  # exit status, as a shell has it

EXAMPLES = """examples:
  tts-kernels profile
  tts-kernels profile --n 8 --ways paged,tree --json figures.json
  tts-kernels profile --model path/to/policy --verifier path/to/prm --recipe qwen2.5-math-prm --n 32 --prompt FILE
  nsys profile tts-kernels profile --device cuda --dtype bfloat16 --model ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_examples(parser, EXAMPLES)
    add = parser.add_argument
    add("--model", metavar="PATH", help="a local transformers model with its tokenizer (default: the seeded one of "
        "tts-kernels demo)")  # fmt: skip
    add("--verifier", metavar="PATH", help="a local process reward model with its tokenizer (default: a seeded one)")
    add("--recipe", choices=RECIPES, help="how the verifier of --verifier is used")
    add("--prompt", metavar="FILE", type=Path, help="a text file with the question (default: the demo's)")
    add("--n", type=demo.positive, default=32, help="candidates (default %(default)s)")
    add("--max-new-tokens", type=demo.positive, default=48, help="of each candidate, at least 2 (default %(default)s)")
    add("--temperature", type=float, default=1.0, help="default %(default)s")
    add("--seed", type=int, default=0, help="of the seeded weights and of the sampling (default %(default)s)")
    add("--dtype", choices=demo.DTYPES, default="float32", help="default %(default)s; only there must all ways give "
        "the same tokens and scores")  # fmt: skip
    add("--device", default="cpu", help="as torch names it (default %(default)s)")
    add("--hardware", default="measured", metavar="NAME", help="whose ceilings: measured here, or a preset of "
        "tts-kernels cost (default %(default)s)")  # fmt: skip
    add("--ways", default=",".join(WAYS), metavar="NAMES", help="default %(default)s")
    add("--sizes", default="", metavar="NAME=NUMBER,...", help="of the seeded models, such as num_hidden_layers=2")
    add("--backend", help="of our ops (default: picked by device)")
    add("--threads", type=demo.positive, help="threads of torch and of the kernels (default: as torch does)")
    add("--json", metavar="FILE", type=Path, help="write all figures to FILE, whenever a way is finished")


def main(args: argparse.Namespace) -> int:
    """Run, measure, compare, print. Exit status 1 if counts are not the model's or, in float32, answers differ; 130 if
    interrupted, after the ways that were finished are printed."""
    if args.json and not args.json.parent.is_dir():
        fail("--json", "a file in a directory that exists", args.json)
    ways = ways_of(args.ways)
    if args.max_new_tokens < 2:
        fail("--max-new-tokens", "at least 2: the first token needs no decode step", args.max_new_tokens)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        fail("--device", "a device of this machine, which has no CUDA", args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    text = (args.prompt or demo.PROMPT).read_text(encoding="utf-8")
    query = load(args, text)
    hardware = Hardware.preset(args.hardware) if args.hardware != "measured" else Hardware.measured(
        args.device, args.dtype)  # fmt: skip
    print(f"policy: {demo.describe(query.model)}; verifier: {demo.describe(query.verifier.models[0])}, recipe "
          f"{query.verifier.recipe.name}; {args.dtype}")  # fmt: skip
    print(f"prompt of {len(query.prompt)} tokens, {args.n} candidates of up to {args.max_new_tokens} tokens")
    print(f"ceilings: {hardware.name}, {rate(hardware.bf16_flops, 'FLOP/s')}, {rate(hardware.bandwidth, 'B/s')} "
          f"({hardware.source}, {hardware.date})\n")  # fmt: skip

    done: dict[str, Profile] = {}
    interrupted = False
    for way in sorted(ways, key=list(WAYS).index, reverse=True):  # the quickest first: an interruption loses least
        try:
            done[way] = profile(query, way, hardware)
        except KeyboardInterrupt:
            interrupted = True
            break
        if args.json:
            demo.write_json(args.json, figures(args, query, hardware, done, complete=len(done) == len(ways)))
    return finish(args, query, report.order(done), interrupted)


def finish(args: argparse.Namespace, query: Query, done: dict[str, Profile], interrupted: bool) -> int:
    wrong = []
    if done:
        same = differences(list(done.values()))
        wrong = report.failures(done, query.verifier, same)
        for line in wrong:
            print(f"{'FAILED' if args.dtype == 'float32' else 'note'}: {line}", file=sys.stderr)
        if not wrong or args.dtype != "float32":
            for way in done:
                print(f"{way:7} {WAYS[way]}")
            print(f"\n{report.seconds_table(done)}\n\n{report.counts_table(done)}\n")
            print(f"{report.summary(done, query.verifier, same)}\n\n{report.NOTES}")
    if interrupted:
        print(f"interrupted; finished: {', '.join(done) or 'nothing'}", file=sys.stderr)
        return INTERRUPTED
    return int(bool(wrong) and args.dtype == "float32")


def figures(
    args: argparse.Namespace, query: Query, hardware: Hardware, done: dict[str, Profile], complete: bool
) -> dict:
    verifier = query.verifier
    return {
        "schema": SCHEMA,
        "complete": complete,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": demo.machine(),
        "device": str(query.model.device),
        "hardware": dataclasses.asdict(hardware),
        "dtype": args.dtype,
        "model": demo.geometry(query.model, args.model),
        "verifier": demo.geometry(verifier.models[0], args.verifier),
        "recipe": verifier.recipe.name,
        "n": query.n,
        "prompt_tokens": len(query.prompt),
        "max_new_tokens": query.max_new_tokens,
        "temperature": query.temperature,
        "seed": query.seed,
        **differences(list(done.values())),
        "ways": {way: report.to_dict(one, verifier) for way, one in report.order(done).items()},
    }


def ways_of(text: str) -> list[str]:
    ways = [way.strip() for way in text.split(",")]
    for way in ways:
        if way not in WAYS:
            fail("--ways", "some of " + ", ".join(WAYS), repr(way))
    if len(set(ways)) < len(ways):
        fail("--ways", "each once", text)
    return ways


def sizes_of(text: str) -> dict[str, int]:
    sizes = dict(demo.SEEDED_MODEL)
    for item in filter(None, text.split(",")):
        name, _, number = item.partition("=")
        if name not in sizes or not number.isdecimal() or int(number) < 1:
            fail("--sizes", f"name=number of {', '.join(sizes)}", repr(item))
        sizes[name] = int(number)
    return sizes


def load(args: argparse.Namespace, text: str) -> Query:
    dtype, device, sizes = demo.DTYPES[args.dtype], torch.device(args.device), sizes_of(args.sizes)
    if args.sizes and args.model and args.verifier:
        fail("--sizes", "none where both models are given", args.sizes)
    if args.recipe and not args.verifier:
        fail("--recipe", "none without --verifier", args.recipe)
    for option, path in (("--model", args.model), ("--verifier", args.verifier)):
        if path and not Path(path).is_dir():
            fail(option, "the folder of a local model", path)
    if args.model:
        model = pretrained(args.model, dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    else:
        model = seeded.causal_lm(args.seed, step_tokens=demo.STEP_TOKENS, dtype=dtype, **sizes)
        tokenizer = seeded.tokenizer(sizes["vocab_size"], text)
    verifier = load_verifier(args, text, sizes, dtype, device)
    for name, one in (("--model", model), ("--verifier", verifier.models[0])):
        try:
            ModelShape.from_config(one.config)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return Query.make(model.to(device), tokenizer, verifier, text, args.n, args.max_new_tokens, backend=args.backend,
                      temperature=args.temperature, seed=args.seed)  # fmt: skip


def load_verifier(
    args: argparse.Namespace, text: str, sizes: dict[str, int], dtype: torch.dtype, device: torch.device
) -> Verifier:
    settings = {"max_tokens": ROOM, "chunk_tokens": CHUNK, "backend": args.backend}
    if not args.verifier:
        model = seeded.causal_lm(args.seed + 1, dtype=dtype, **sizes).to(device)
        return Verifier(model, seeded.tokenizer(sizes["vocab_size"], text), RECIPE, **settings)
    if not args.recipe:
        fail("--recipe", "one beside --verifier", "none")
    recipe = find_recipe(args.recipe)
    if recipe.implicit:
        fail("--recipe", "a recipe with a head: implicit rewards of two models are not profiled", args.recipe)
    if recipe.head.kind != "vocab_rows":
        return Verifier.from_pretrained(args.verifier, recipe, dtype=dtype, device=device, **settings)
    # The whole model, for stock code to run its LM head.
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.verifier, local_files_only=True)
    return Verifier(pretrained(args.verifier, dtype).to(device), tokenizer, recipe, **settings)


def pretrained(path: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).eval()
