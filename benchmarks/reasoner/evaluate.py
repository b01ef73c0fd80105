"""Evaluates the shipped models on held-out problems: what N samples, votes, verifiers and searches add to each policy,
and what a query costs with stock code and with ours.

All decoding and scoring runs through the project's own ops. The N of a curve are drawn from the same samples: each
value is over all choices of N of them, that of a weighted vote over 1,000 drawn ones where they are many. Seconds are
measured apart, on fewer problems, both ways one after the other with the draws of one driver, so that both sides write
the same candidates; the outcome verifier's raw scores are voted with there, and as probabilities in the curves. The
record is written anew after every stage, so a run that is cut off leaves what it has.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import torch

from benchmarks import machine
from tts_kernels.cost.claim import AGGREGATES
from tts_kernels.cost.traces import Sample, Traces, mean_interval
from tts_kernels.search import Policy, SearchResult, beam_search, dvts, majority, weighted_vote
from tts_kernels.stock import StockPolicy, StockVerifier
from tts_kernels.verifier import Verifier

from . import models, task

HERE = Path(__file__).parent
RECIPES = {"reasoner": ("prm", "qwen2.5-math-prm"), "direct": ("orm", "qwen2.5-math-rm")}
OPTIONS = {"temperature": 0.8, "max_new_tokens": 160, "answer": task.answer_of, "progress": False}
# Width and expand of beam search and DVTS, and how many problems: the largest takes long.
SEARCHES = {(2, 2): None, (4, 4): None, (16, 4): 200}
COUNTS = (1, 4, 16, 64)  # samples of a query whose seconds are measured
CHECK_PROBLEMS, CHECK_N = 60, 16  # what a test runs again
STOCK_BATCH = 8


def load(kind: str, weights: Path = models.WEIGHTS) -> tuple[Policy, Verifier]:
    """The policy and its verifier, as anyone would load them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, recipe = RECIPES[kind]
    verifier = Verifier.from_pretrained(weights / name, recipe, dtype=torch.float32, device=device)
    model = models.load_policy(weights / kind, device)
    return Policy(model, models.tokenizer(), max_tokens=32_768), verifier


def sample(kind: str, n: int, question: int, problem: task.Problem, weights: Path = models.WEIGHTS) -> list[Sample]:
    """n scored samples of a problem, which depend on the problem and its number alone."""
    policy, verifier = _loaded(kind, weights)
    result = weighted_vote(policy, verifier, problem.prompt, n=n, seed=question, **OPTIONS)
    return [
        Sample(
            str(question), str(i), candidate.tokens, _probabilities(verifier, candidate.step_scores),
            candidate.answer == problem.answer, candidate.answer, result.cost.prompt_tokens,
        )
        for i, candidate in enumerate(result.candidates)
    ]  # fmt: skip


def greedy(kind: str, question: int, problem: task.Problem, weights: Path = models.WEIGHTS) -> dict:
    policy, _ = _loaded(kind, weights)
    return _summary(majority(policy, problem.prompt, n=1, **OPTIONS | {"temperature": 0.0}), problem)


def searched(
    method: Callable, width: int, expand: int, question: int, problem: task.Problem, weights: Path = models.WEIGHTS
) -> dict:
    policy, verifier = _loaded("reasoner", weights)
    return _summary(search_once(method, policy, verifier, problem, width, expand, question), problem)


def search_once(method, policy, verifier, problem: task.Problem, width: int, expand: int, seed: int) -> SearchResult:
    more = {"until": None} if method is dvts else {}
    return method(policy, verifier, problem.prompt, width=width, expand=expand, depth=task.MOST_STEPS + 1, seed=seed,
                  reduce="last", **more, **OPTIONS)  # fmt: skip


def _summary(result: SearchResult, problem: task.Problem) -> dict:
    chosen = result.chosen
    return {"right": bool(chosen and chosen.answer == problem.answer), "tokens": result.cost.new_tokens,
            "verifier_tokens": result.cost.verifier_tokens}  # fmt: skip


def _probabilities(verifier: Verifier, scores: Sequence[float]) -> tuple[float, ...]:
    """Of the ORM, whose scores are raw: what a vote can add up. The order of candidates stays."""
    if verifier.recipe.head.activation == "identity":
        return tuple(torch.tensor(scores, dtype=torch.float64).sigmoid().tolist())
    return tuple(scores)


@cache
def _loaded(kind: str, weights: Path) -> tuple[Policy, Verifier]:
    return load(kind, weights)


# --- accuracy --------------------------------------------------------------------------------------------------------


def curves(traces: Traces) -> dict[str, list[dict]]:
    """Of each method: n, value, low and high (95%, bootstrap over problems)."""
    methods = {"pass": ("pass", "last"), "majority": ("majority", "last")}
    for aggregate in ("last", "min", "prod") if _most_steps(traces) > 1 else ("last",):
        methods |= {f"best_of_n {aggregate}": ("best_of_n", aggregate),
                    f"weighted_vote {aggregate}": ("weighted_vote", aggregate)}  # fmt: skip
    return {
        name: [_rounded(asdict(traces.accuracy(n, method, aggregate=aggregate))) for n in traces.counts()]
        for name, (method, aggregate) in methods.items()
    }


def paired(traces: Traces, greedy: Sequence[dict], searches: dict[str, list], aggregate: str) -> dict:
    """Differences between ways of answering, problem by problem: mean, low and high (95%, bootstrap over problems) for
    each n. What two intervals that overlap cannot tell apart, the interval of a difference often can.

    greedy    a row for each problem
    searches  (n, rows) for each size of each search; rows for the first problems or all
    """
    counts = [n for n in traces.counts() if n > 1]
    ways = {"majority": ("majority", "last")}
    for method in ("best_of_n", "weighted_vote"):
        ways[f"{method} {aggregate}"] = method, aggregate
    chances = {
        (name, n): traces.chances(n, method, aggregate=of)[0] for name, (method, of) in ways.items() for n in counts
    }
    for name, runs in searches.items():
        chances |= {(name, n): [float(row["right"]) for row in rows] for n, rows in runs}
    single = [float(row["right"]) for row in greedy]
    found: dict[str, list[dict]] = {}

    def add(name: str, n: int, left: Sequence[float], right: Sequence[float]) -> None:
        mean, low, high = mean_interval([a - b for a, b in zip(left, right)])
        found.setdefault(name, []).append(
            {"n": n, "value": round(mean, 4), "low": round(low, 4), "high": round(high, 4)}
        )

    for (name, n), values in chances.items():
        add(f"{name} - greedy", n, values, single)
        if name in ways and name != "majority":
            add(f"{name} - majority", n, values, chances["majority", n])
            best = max(counts, key=lambda m: sum(chances[name, m]))
            add(f"{name} - its best", n, values, chances[name, best])
        if name in searches and (vote := (f"weighted_vote {aggregate}", n)) in chances:
            add(f"{name} - weighted_vote", n, values, chances[vote])
    return found


def _most_steps(traces: Traces) -> int:
    return max(len(s.step_scores) for samples in traces.questions.values() for s in samples)


def _rounded(accuracy: dict) -> dict:
    return {"n": accuracy["n"], **{key: round(accuracy[key], 4) for key in ("value", "low", "high")}}


def outcome(rows: Sequence[dict]) -> dict:
    value, low, high = mean_interval([float(row["right"]) for row in rows])
    return {"value": round(value, 4), "low": round(low, 4), "high": round(high, 4),
            "tokens": round(statistics.mean(row["tokens"] for row in rows), 1),
            "verifier_tokens": round(statistics.mean(row["verifier_tokens"] for row in rows), 1)}  # fmt: skip


def check(kind: str, pool: Callable = map, weights: Path = models.WEIGHTS) -> dict[str, list[dict]]:
    """Curves of the first problems with few samples: what a test runs again."""
    problems = task.split("test")[:CHECK_PROBLEMS]
    groups = pool(partial(sample, kind, CHECK_N, weights=weights), range(len(problems)), problems)
    return curves(Traces(one for group in groups for one in group))


# --- cost ------------------------------------------------------------------------------------------------------------


def costs(kind: str, problems: Sequence[task.Problem]) -> list[dict]:
    """Mean seconds per query, stock and ours by turns."""
    policy, verifier = load(kind)
    sides = {
        "stock": (
            StockPolicy(
                models.load_policy(models.WEIGHTS / kind, policy.device), policy.tokenizer, prompt=policy.prompt
            ),
            StockVerifier(verifier, batch_size=STOCK_BATCH),
        ),
        "tts": (policy, verifier),
    }  # fmt: skip
    runs: dict[str, Callable] = {
        f"weighted_vote {n}": lambda p, v, problem, seed, n=n: weighted_vote(
            p, v, problem.prompt, n=n, seed=seed, **OPTIONS
        )
        for n in COUNTS
    }
    if kind == "reasoner":
        for method in (beam_search, dvts):
            for width, expand in list(SEARCHES)[:2]:
                runs[f"{method.__name__} {width * expand}"] = partial(_search_run, method, width, expand)
    for policy, verifier in sides.values():  # warm up
        weighted_vote(policy, verifier, problems[0].prompt, n=2, **OPTIONS)
    made = []
    for name, run in runs.items():
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        parts = {side: [0.0, 0.0] for side in sides}
        equal = 0
        for seed, problem in enumerate(problems):
            chosen = []
            for side, (policy, verifier) in sides.items():
                begin = time.perf_counter()
                result = run(policy, verifier, problem, seed)
                seconds[side].append(time.perf_counter() - begin)
                parts[side][0] += result.cost.prefill_seconds + result.cost.decode_seconds
                parts[side][1] += result.cost.verify_seconds
                chosen.append(result.chosen and result.chosen.text)
            equal += chosen[0] == chosen[1]
        row = {"method": name.split()[0], "n": int(name.split()[1]), "problems": len(problems), "choice_equal": equal}
        for side in sides:
            row |= {f"{side}_seconds": round(statistics.mean(seconds[side]), 4),
                    f"{side}_policy_seconds": round(parts[side][0] / len(problems), 4),
                    f"{side}_verifier_seconds": round(parts[side][1] / len(problems), 4)}  # fmt: skip
        made.append(row)
        print(f"{kind}, {name}: stock {row['stock_seconds']:.2f} s, ours {row['tts_seconds']:.2f} s, "
              f"choice equal {equal}/{len(problems)}", flush=True)  # fmt: skip
    return made


def _search_run(method, width, expand, policy, verifier, problem, seed):
    return search_once(method, policy, verifier, problem, width, expand, seed)


# --- the run ---------------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    problems = task.split("test")[: args.problems]
    numbers = range(len(problems))
    results: dict = {
        "date": datetime.date.today().isoformat(),
        "commit": machine.commit(),
        "machine": machine.describe(),
        "weights": {kind: digest(kind) for kind in models.KINDS},
        "problems": len(problems),
        "n": args.n,
        "temperature": OPTIONS["temperature"],
        "seconds": {},
        "systems": {},
    }
    begin = time.perf_counter()
    workers = 1 if torch.cuda.is_available() else os.cpu_count()
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU
    with ProcessPoolExecutor(workers, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        spread = partial(pool.map, chunksize=5)
        for kind in RECIPES:
            groups = list(spread(partial(sample, kind, args.n), numbers, problems))
            traces = Traces(one for group in groups for one in group)
            _write_traces(traces, args.traces / f"{kind}.jsonl", args.traces_n)
            single = list(spread(partial(greedy, kind), numbers, problems))
            results["systems"][kind] = {
                "curves": curves(traces),
                "greedy": outcome(single),
                "tokens": round(statistics.mean(s.tokens for group in groups for s in group), 1),
                "prompt_tokens": round(statistics.mean(group[0].prompt_tokens for group in groups), 1),
                "check": check(kind, spread),
            }
            write(args.out, results)
            print(f"{kind}: {time.perf_counter() - begin:.0f} s", flush=True)
            searches: dict[str, list] = {}
            for method in (beam_search, dvts) if kind == "reasoner" else ():
                for (width, expand), most in SEARCHES.items():
                    rows = list(spread(partial(searched, method, width, expand), numbers[:most], problems[:most]))
                    found = {"n": width * expand, "width": width, "expand": expand, "problems": len(rows),
                             **outcome(rows)}  # fmt: skip
                    results["systems"][kind].setdefault(method.__name__, []).append(found)
                    searches.setdefault(method.__name__, []).append((width * expand, rows))
                    write(args.out, results)
                    print(f"{method.__name__} {width} x {expand}: {found['value']}, "
                          f"{time.perf_counter() - begin:.0f} s", flush=True)  # fmt: skip
            results["systems"][kind]["paired"] = paired(traces, single, searches, AGGREGATES[kind])
            write(args.out, results)
    results["seconds"]["accuracy"] = round(time.perf_counter() - begin)
    for kind in RECIPES:
        results["systems"][kind]["costs"] = costs(kind, problems[: args.cost_problems])
        write(args.out, results)
    results["seconds"]["all"] = round(time.perf_counter() - begin)
    results["load"] = [round(load, 1) for load in os.getloadavg()]
    write(args.out, results)


def write(path: Path, results: dict) -> None:
    """All of the file, or it stays as it was."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(part, path)


def digest(kind: str) -> str:
    return hashlib.sha256((models.WEIGHTS / kind / "model.safetensors").read_bytes()).hexdigest()


def _write_traces(traces: Traces, path: Path, most: int) -> None:
    """The first samples of every problem, scores to six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Traces(
        Sample(**vars(s) | {"step_scores": tuple(round(x, 6) for x in s.step_scores)})
        for samples in traces.questions.values()
        for s in samples[:most]
    ).write(path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reasoner.evaluate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--problems", type=int, default=task.SIZES["test"], help="of the held-out ones (default all %(default)s)")
    add("--n", type=int, default=64, help="samples of each (default %(default)s)")
    add("--cost-problems", type=int, default=20, help="whose seconds are measured (default %(default)s)")
    add("--out", type=Path, default=HERE / "results.json", help="default %(default)s")
    add("--traces", type=Path, default=HERE / "traces", help="folder for the scored samples (default %(default)s)")
    add("--traces-n", type=int, default=16, help="samples of each problem that are kept there (default %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main(arguments())
