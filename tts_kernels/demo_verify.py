"""The second half of the demo: the samples are scored step by step and one is chosen, then a small beam search; stock
code beside ours, on the same models."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import transformers

from . import search, seeded
from .scoring import select
from .stock import StockPolicy, StockVerifier
from .verifier import RECIPES, Verifier, find_recipe

RECIPE = "math-shepherd"  # of the seeded verifier
BATCH = 8  # candidates that stock code scores at a time, as search-and-learn does


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--verifier",
        metavar="PATH",
        help="a local process reward model with its tokenizer (default: a small seeded one)",
    )
    add("--recipe", choices=RECIPES, help="how the verifier of --verifier is used")
    add("--width", type=int, default=4, help="beams that the beam search keeps (default %(default)s)")
    add("--expand", type=int, default=4, help="steps sampled under each (default %(default)s)")
    add("--depth", type=int, default=3, help="steps of the beam search (default %(default)s)")


def load(args: argparse.Namespace, sizes: dict, text: str, dtype: torch.dtype) -> Verifier:
    """The verifier; seeded: of the policy's sizes, with weights of its own."""
    if not args.verifier:
        tokenizer = seeded.tokenizer(sizes["vocab_size"], text)
        model = seeded.causal_lm(args.seed + 1, dtype=dtype, **sizes)
        return Verifier(model, tokenizer, RECIPE, backend=args.backend)
    check_folder("--verifier", args.verifier)
    if not args.recipe:
        raise ValueError("--recipe: expected one beside --verifier, got none")
    if find_recipe(args.recipe).head.kind != "vocab_rows":
        return Verifier.from_pretrained(args.verifier, args.recipe, dtype=dtype, backend=args.backend)
    # The whole model, for stock code to run its LM head.
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.verifier, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.verifier, dtype=dtype, local_files_only=True)
    return Verifier(model.eval(), tokenizer, args.recipe, backend=args.backend)


def check_folder(name: str, path: str) -> None:
    """Before transformers looks for it elsewhere, which may take it a while."""
    if not Path(path).is_dir():
        raise ValueError(f"{name}: expected a folder, got {path}")


def score(verifier: Verifier, question: str, candidates: list[str]) -> dict:
    """Figures of scoring all candidates at once, by both, and of the choice."""
    stock = StockVerifier(verifier, batch_size=BATCH)
    short = [question[-60:]], [candidates[:1]]  # warm up
    stock.score(*short), verifier.score(*short)
    stock.tokens = 0
    begin = time.perf_counter()
    wanted = stock.score([question], [candidates])[0]
    between = time.perf_counter()
    scores = verifier.score_batch([question], [candidates])
    choice = select(getattr(scores, verifier.recipe.aggregate), k=3, method="top_k")
    end = time.perf_counter()
    got = scores.prob.tolist()
    flat = [s for steps in wanted for s in steps]
    return {
        "stock_score_seconds": between - begin,
        "tts_score_seconds": end - between,
        "stock_score_tokens": stock.tokens,
        "tts_score_tokens": scores.tokens,
        "steps": len(got),
        "score_difference": max((abs(a - b) for a, b in zip(got, flat)), default=0.0),
        "aggregate": verifier.recipe.aggregate,
        "best": [(i, s) for i, s in zip(choice.indices[0].tolist(), choice.scores[0].tolist()) if i >= 0],
    }


def beams(args: argparse.Namespace, model, tokenizer, verifier: Verifier, question: str) -> dict:
    """Figures of the same beam search on stock code and on ours. By the last step's score, as search-and-learn's is:
    the least of a path's often belongs to several paths, and rounding would decide between them."""
    tokens = len(tokenizer(question)["input_ids"])
    size = args.width * args.expand
    # Room for every step ever sampled: a search gives most of it back on its way.
    room = tokens + size * args.depth * (args.max_new_tokens + 32)
    policies = {
        "stock": (StockPolicy(model, tokenizer, prompt=str), StockVerifier(verifier, batch_size=BATCH)),
        "tts": (search.Policy(model, tokenizer, max_tokens=room, prompt=str, backend=args.backend), verifier),
    }
    results = {}
    for key, (policy, judge) in policies.items():
        results[key] = search.beam_search(
            policy, judge, question, width=args.width, expand=args.expand, depth=args.depth, seed=args.seed,
            max_new_tokens=args.max_new_tokens, temperature=1.0, reduce="last",
        )  # fmt: skip
    stock, ours = (sorted(results[key].candidates, key=lambda c: c.text) for key in ("stock", "tts"))
    equal = [c.text for c in stock] == [c.text for c in ours]
    pairs = [(a, b) for one, other in zip(stock, ours) for a, b in zip(one.step_scores, other.step_scores)]
    chosen = {key: result.chosen and result.chosen.text for key, result in results.items()}
    figures = {
        "beam_candidates_equal": equal,
        "beam_choice_equal": chosen["stock"] == chosen["tts"],
        "beam_score_difference": max((abs(a - b) for a, b in pairs), default=0.0) if equal else None,
        "beam": {"width": args.width, "expand": args.expand, "depth": args.depth},
    }
    for key, result in results.items():
        cost = result.cost
        figures |= {
            f"{key}_beam_policy_seconds": cost.prefill_seconds + cost.decode_seconds,
            f"{key}_beam_verifier_seconds": cost.verify_seconds,
            f"{key}_beam_seconds": cost.seconds,
            f"{key}_beam_policy_tokens": cost.policy_tokens,
            f"{key}_beam_verifier_tokens": cost.verifier_tokens,
        }
    return figures
