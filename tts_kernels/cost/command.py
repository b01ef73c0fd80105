"""The command `tts-kernels cost`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from tts_kernels.errors import fail

from .account import Efficiency
from .hardware import Hardware
from .options import (
    add_common_arguments,
    add_examples,
    add_trace_arguments,
    amount_of,
    check_output,
    curves_of,
    device_of,
    finite,
    model_named,
    money_regime,
    price_of,
    regimes_of,
    write_json,
)
from .query import SHARINGS
from .scenario import Scenario, scenarios
from .table import caption, costs_of, markdown, part_table, scenario_table, summary_table
from .traces import METHODS, Point, Traces, best_n
from .workload import HEADS, SEARCHES, VERIFIERS, Lognormal, Workload

EXAMPLES = """examples:
  tts-kernels cost --scenario all --hardware h200
  tts-kernels cost --scenario D --hardware b200 --price '2 USD'
  tts-kernels cost --model qwen3-8b --n 32 --prompt 8192 --suffix 512 --hardware h100
  tts-kernels cost --traces samples.jsonl --model qwen3-8b --hardware h200 --price '2 USD' --value '0.05 USD'
"""
EXTRA = (  # of a workload of one's own
    "trunk", "cv", "cap", "search", "keep", "steps", "verifier", "verifier_model", "verifier_head",
)  # fmt: skip
NOT_OF_TRACES = ("scenario", "n", "suffix", "trunk", "cv", "cap", "search", "keep", "steps")
OF_TRACES = ("method", "value")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_examples(parser, EXAMPLES)
    add = parser.add_argument
    add("--scenario", metavar="NAME", help="all, an id or name (A, longctx-bon), or a JSON file; default: all, unless "
        "a workload or traces are given")  # fmt: skip
    add("--model", metavar="NAME", help="a preset, or the path of a transformers config.json: in place of a "
        "scenario's, or of a workload's of your own")  # fmt: skip
    add("--n", type=int, help="candidates: of your own workload, or in place of a scenario's")
    add("--prompt", type=int, help="tokens of the prompt")
    add("--trunk", type=int, help="tokens decoded once before the candidates fork (default 0)")
    add("--suffix", type=int, help="tokens of each candidate; their mean where --cv is given")
    add("--cv", type=float, help="coefficient of variation of lognormal suffixes")
    add("--cap", type=int, help="longest suffix of these")
    add("--search", choices=SEARCHES, help="default best_of_n")
    add("--keep", type=int, help="candidates that a search keeps")
    add("--steps", type=int, help="steps of a candidate (default 1)")
    add("--verifier", choices=VERIFIERS, help="default none; with traces that are chosen among by score prm")
    add("--verifier-model", metavar="NAME", help="a preset or config.json (default: as the policy)")
    add("--verifier-head", choices=HEADS, help="what V0 and V1 verifiers compute at every token: their LM head, an "
        "MLP, a linear layer (default vocab)")  # fmt: skip
    add_common_arguments(parser)
    add("--sharing", choices=[*SHARINGS, "all"], default="all", help="policies to print for one workload")
    add("--watts", type=float, help="mean power of the device, for joules")
    add_trace_arguments(parser)
    add("--value", metavar="MONEY", help="of a solved query: prints the N that is worth most")
    add("--json", metavar="FILE", type=Path, help="write all figures to FILE")


def main(args: argparse.Namespace) -> int:
    """Print what queries cost. Exit status 0; 130 where it was interrupted, after the table of what was finished."""
    check_output(args.json)
    hardware, efficiency = device_of(args)
    _refuse(args, NOT_OF_TRACES if args.traces else OF_TRACES, "none " + ("beside" if args.traces else "without")
            + " --traces")  # fmt: skip
    if args.traces:
        figures, complete = _print_traces(args, hardware, efficiency)
    else:
        chosen = _chosen(args)
        figures, complete = (_print_scenarios if len(chosen) > 1 else _print_one)(args, chosen, hardware, efficiency)
    write_json(args.json, figures)
    return 0 if complete else 130


def _refuse(args: argparse.Namespace, names: Sequence[str], expected: str) -> None:
    """What would be ignored."""
    for name in names:
        if getattr(args, name) is not None:
            fail("--" + name.replace("_", "-"), expected, getattr(args, name))


def _chosen(args: argparse.Namespace) -> list[Scenario]:
    """The scenarios asked for, or the one made of the arguments."""
    own = args.prompt is not None or args.suffix is not None
    if args.scenario and own:
        fail("--scenario", "none beside --prompt and --suffix", args.scenario)
    extra = {name: getattr(args, name) for name in EXTRA if getattr(args, name) is not None}
    if not own:
        _refuse(args, EXTRA, "none without a workload of --prompt and --suffix")
        name = args.scenario or "all"
        found = scenarios() if name == "all" else [Scenario.load(name)]
        if args.model:
            found = [dataclasses.replace(s, model=model_named(args.model)) for s in found]
        return found if args.n is None else [s.with_n(args.n) for s in found]
    for name in ("model", "n", "prompt", "suffix"):
        if getattr(args, name) is None:
            fail(f"--{name}", "a value, as --model, --n, --prompt and --suffix make a workload", "none")
    cv, cap = extra.pop("cv", None), extra.pop("cap", None)
    if cap is not None and cv is None:
        fail("--cap", "none without --cv: the suffixes are as long as --suffix says", cap)
    suffix = args.suffix if cv is None else Lognormal(args.suffix, cv, cap)
    if "verifier_model" in extra:
        extra["verifier_model"] = model_named(extra["verifier_model"])
    work = Workload(args.n, args.prompt, suffix, name="your own workload", **extra)
    return [Scenario("", work.name, 1, "", model_named(args.model), work)]


def _print_scenarios(
    args: argparse.Namespace, chosen: list[Scenario], hardware: Hardware, efficiency: Efficiency
) -> tuple[list, bool]:
    """Figures, and whether all were reached."""
    if args.sharing != "all":
        fail("--sharing", "all where several scenarios are printed", args.sharing)
    figures, complete = [], True
    for regime in regimes_of(args, ("isolated", "saturated")):
        costs = {}
        try:
            for s in chosen:
                of = costs_of(s, hardware, regime, efficiency, price=args.price, watts=args.watts)
                figures += [cost.to_dict() for cost in of.values()]  # m(N) among them, which takes most of the time
                costs[f"{s.id} {s.name}"] = of
        except KeyboardInterrupt:
            print("interrupted: the last table ends with what was finished", file=sys.stderr)
            complete = False
        if not costs:
            break
        print(caption(hardware, regime, efficiency, _kind(costs.values())) + "\n")
        print(scenario_table(costs) + "\n", flush=True)
        if not complete:
            break
    for scenario in chosen:
        print(f"{scenario.id:3} v{scenario.version}  {scenario.title}, {scenario.model.name}. {scenario.note}".rstrip())
    print(
        "\nV0 copies the prompt per candidate, V1 stores it once and reads it for each, V2 reads it once per step. "
        "Compare V2 with V1.\n"
        "KV bound: N(2P+S)/(2P+NS), towards 1 + 2P/S: what sharing saves of the KV reads at most.\n"
        "m(N): cost of N candidates and their verifier over that of one, unverified.\n"
        "V0 and V1 verifiers encode the prompt with every candidate, in a search earlier steps too, and compute a head "
        "(verifier_head: the LM head in the scenarios) at every token.\n"
        "V1/V2 has that in it, decode V1/V2 has not: a cascade gains the latter as well where the whole batch has one "
        "prefix.\n"
        "N reads by V1 are charged to memory: where a layer's prefix stays in the L2 cache, V1 is cheaper than shown."
    )
    return figures, complete


def _print_one(
    args: argparse.Namespace, chosen: list[Scenario], hardware: Hardware, efficiency: Efficiency
) -> tuple[list, bool]:
    figures, (scenario,), complete = [], chosen, True
    name = f"{scenario.id} {scenario.name}".strip()
    print(
        ". ".join(
            filter(None, (f"{name}, {scenario.model.name}: {_about(scenario.workload)}", scenario.title, scenario.note))
        )
        + "\n"
    )
    for regime in regimes_of(args, ("isolated", "saturated")):
        try:
            costs = costs_of(scenario, hardware, regime, efficiency, price=args.price, watts=args.watts)
            shown = costs if args.sharing == "all" else {args.sharing: costs[args.sharing]}
            figures += [cost.to_dict() for cost in shown.values()]  # m(N) among them, which takes most of the time
        except KeyboardInterrupt:
            print(f"interrupted: {regime} is missing", file=sys.stderr)
            complete = False
            break
        print(caption(hardware, regime, efficiency, _kind([costs])) + "\n")
        print(part_table(shown) + f"\n(TFLOP and GB: {list(shown)[-1]})\n")
        print(summary_table(shown) + "\n", flush=True)
    for sharing, text in SHARINGS.items():
        print(f"{sharing:7} {text}")
    return figures, complete


def _about(work: Workload) -> str:
    lengths, prompts = [length for query in work.suffixes for length in query], sorted(set(work.prompts))
    prompt = ", ".join(map(str, prompts)) if len(prompts) < 4 else f"of {prompts[0]} to {prompts[-1]}"
    return f"N = {work.n}, prompt {prompt}, trunk {work.trunk}, suffixes of {min(lengths)} to {max(lengths)} tokens"


def _kind(costs) -> str:
    kinds = {cost.figures for of in costs for cost in of.values()}
    return kinds.pop() if len(kinds) == 1 else "model and measured"


def _print_traces(args: argparse.Namespace, hardware: Hardware, efficiency: Efficiency) -> tuple[list, bool]:
    """Figures, and whether all N were reached: votes over many questions take minutes."""
    traces, price = Traces.read(args.traces), price_of(args)
    if not args.model:
        fail("--model", "the model that the samples are of", "none")
    regime = money_regime(args)
    print(caption(hardware, regime, efficiency, "costs (model)"))
    print(f"accuracies (of the traces): {args.traces}, {len(traces.questions)} questions; 95% bootstrap over them\n")
    method, rows, figures = args.method or "best_of_n", [], []
    shown = [other for other in _shown(traces) if other != method]
    curves: dict[str, list[Point]] = {"paged": [], "tree": []}
    counts, complete = traces.counts(), True
    for n in counts:
        print(f"N = {n} of {counts[-1]} ..", file=sys.stderr)
        try:
            points = curves_of(args, traces, hardware, efficiency, price, [n])
            others = [traces.accuracy(n, other, aggregate=args.aggregate) for other in shown]
        except KeyboardInterrupt:
            print("interrupted: what follows ends before that N", file=sys.stderr)
            complete = False
            break
        (paged,), (tree,) = points["paged"], points["tree"]
        curves["paged"].append(paged)
        curves["tree"].append(tree)
        found = tree.accuracy
        rows.append(
            [
                str(tree.n),
                f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f}){'' if found.exact else ' drawn'}",
                *(f"{other.value:.3f}{'' if other.exact else ' drawn'}" for other in others),
                *(f"{x:.3g}" for x in (paged.cost, tree.cost, paged.per_solved, tree.per_solved)),
            ]
        )
        for sharing, point in (("paged", paged), ("tree", tree)):
            more = {"per_solved": finite(point.per_solved), "currency": price.currency}
            figures.append({"sharing": sharing, **dataclasses.asdict(point), **more})
    money = price.currency
    print(
        markdown(
            ("N", f"accuracy, {method}", *shown, f"V1, {money}", f"V2, {money}",
             f"V1 a solved, {money}", f"V2 a solved, {money}"),
            rows,
        )
    )  # fmt: skip
    if args.value and rows:
        value = amount_of("--value", args.value, price)
        for label, sharing in (("V1", "paged"), ("V2", "tree")):
            best = best_n(curves[sharing], value)
            print(f"{label}: at {value:g} {money} a solved query, N = {best.n} is worth most of these")
    return figures, complete


def _shown(traces: Traces) -> list[str]:
    answered = all(any(s.answer is not None for s in samples) for samples in traces.questions.values())
    return list(METHODS) if answered else ["pass", "best_of_n"]
