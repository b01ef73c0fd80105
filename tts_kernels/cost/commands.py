"""The commands `tts-kernels cost` and `tts-kernels economics`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

from .account import PLANNED, Efficiency
from .checks import check_number, fail
from .economics import Comparison, cheapest, compare, volume_text
from .hardware import Hardware, as_hardware
from .query import REGIMES, SHARINGS, Price, query_cost
from .scenario import Scenario, scenarios
from .shapes import ModelShape
from .table import caption, costs_of, markdown, number, part_table, scenario_table, summary_table
from .traces import AGGREGATES, METHODS, Point, Traces, best_n
from .workload import SEARCHES, VERIFIERS, Lognormal, Workload

COST_EXAMPLES = """examples:
  tts-kernels cost --scenario all --hardware h200
  tts-kernels cost --scenario D --hardware b200 --price '2 USD'
  tts-kernels cost --model qwen3-8b --n 32 --prompt 8192 --suffix 512 --hardware h100
  tts-kernels cost --traces samples.jsonl --model qwen3-8b --hardware h200 --price '2 USD' --value '0.05 USD'
"""
ECONOMICS_EXAMPLES = """examples:
  tts-kernels economics --train-cost '14 USD' --queries 20000 --price '2 USD' --internal A --external B \\
      --internal-accuracy 0.75 --external-accuracy 0.76
  tts-kernels economics --train-cost '294000 USD' --queries 1e8 --price '2 USD' --internal A --traces samples.jsonl \\
      --model qwen3-8b --internal-accuracy 0.8 --plot break-even.svg
"""

EXTRA = ("trunk", "cv", "cap", "search", "keep", "steps", "verifier", "verifier_model")  # of a workload of one's own


def add_cost_arguments(parser: argparse.ArgumentParser) -> None:
    _format(parser, COST_EXAMPLES)
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
    _common(parser)
    add("--sharing", choices=[*SHARINGS, "all"], default="all", help="policies to print for one workload")
    add("--watts", type=float, help="mean power of the device, for joules")
    _trace_arguments(parser)
    add("--value", metavar="MONEY", help="of a solved query: prints the N that is worth most")
    add("--json", metavar="FILE", type=Path, help="write all figures to FILE")


def add_economics_arguments(parser: argparse.ArgumentParser) -> None:
    _format(parser, ECONOMICS_EXAMPLES)
    add = parser.add_argument
    add("--train-cost", metavar="MONEY", required=True, help="of training once, with its currency: '14 USD'")
    add("--queries", type=float, required=True, help="queries over the life of the model")
    add("--internal", metavar="SCENARIO", default="A", help="its first candidate alone, unverified, is a query of the "
        "trained model (default %(default)s)")  # fmt: skip
    add("--external", metavar="SCENARIO", default="B", help="a query of the sampled side (default %(default)s); traces "
        "take its place")  # fmt: skip
    add("--internal-accuracy", type=float, help="of the trained model")
    add("--external-accuracy", type=float, help="of the sampled side; from the traces where there are any")
    _common(parser)
    _trace_arguments(parser)
    add("--model", metavar="NAME", help="of the traces: a preset or the path of a config.json")
    add("--prompt", type=int, help="tokens of the prompts, where the traces do not say")
    add("--plot", metavar="FILE", type=Path, help="total cost against queries, as SVG or PNG")
    add("--json", metavar="FILE", type=Path, help="write all figures to FILE")


def _format(parser: argparse.ArgumentParser, examples: str) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, examples


def _common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--hardware", default="h200", help="a100, h100, h200, b200, mi300x, or measured: this machine (default "
        "%(default)s)")  # fmt: skip
    add("--regime", choices=[*REGIMES, "both"], help="isolated, saturated (default: both; for money saturated)")
    add("--price", metavar="MONEY", help="of a GPU hour, with its currency: '2 USD'")
    add("--efficiency", metavar="B,C,P", help="shares of bandwidth, of FLOP/s in decode, of FLOP/s in prefill that are "
        "reached (default 0.8,0.6,0.5; 1,1,1 for floors; 1,1,1 on measured hardware)")  # fmt: skip


def _trace_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traces", metavar="FILE", help="scored samples, JSON Lines (see tts_kernels/cost/traces.py)")
    parser.add_argument("--method", choices=METHODS, help="of choosing among samples (default best_of_n)")
    parser.add_argument("--aggregate", choices=AGGREGATES, default="last", help="of step scores (default %(default)s)")


# --- cost -----------------------------------------------------------------------------------------------------------


def cost(args: argparse.Namespace) -> int:
    """Print what queries cost. Exit status 0."""
    _check_output(args.json)
    hardware, efficiency = _device(args)
    if args.traces:
        figures = _print_traces(args, hardware, efficiency)
    else:
        chosen = _chosen(args)
        figures = (_print_scenarios if len(chosen) > 1 else _print_one)(args, chosen, hardware, efficiency)
    _write(args.json, figures)
    return 0


def _chosen(args: argparse.Namespace) -> list[Scenario]:
    """The scenarios asked for, or the one made of the arguments."""
    own = args.prompt is not None or args.suffix is not None
    if args.scenario and own:
        fail("--scenario", "none beside --prompt and --suffix", args.scenario)
    extra = {name: getattr(args, name) for name in EXTRA if getattr(args, name) is not None}
    if not own:
        for name, value in extra.items():
            fail("--" + name.replace("_", "-"), "none without a workload of --prompt and --suffix", value)
        name = args.scenario or "all"
        found = scenarios() if name == "all" else [Scenario.load(name)]
        if args.model:
            found = [dataclasses.replace(s, model=_model(args.model)) for s in found]
        return [_with_n(s, args.n) for s in found] if args.n else found
    for name in ("model", "n", "prompt", "suffix"):
        if getattr(args, name) is None:
            fail(f"--{name}", "a value, as --model, --n, --prompt and --suffix make a workload", "none")
    cv, cap = extra.pop("cv", None), extra.pop("cap", None)
    suffix = args.suffix if cv is None else Lognormal(args.suffix, cv, cap)
    if "verifier_model" in extra:
        extra["verifier_model"] = _model(extra["verifier_model"])
    work = Workload(args.n, args.prompt, suffix, name="your own workload", **extra)
    return [Scenario("", work.name, 1, "", _model(args.model), work)]


def _with_n(scenario: Scenario, n: int) -> Scenario:
    work = scenario.workload
    keep = None if work.keep is None else max(1, work.keep * n // work.n)
    return dataclasses.replace(scenario, workload=dataclasses.replace(work, n=n, keep=keep))


def _print_scenarios(
    args: argparse.Namespace, chosen: list[Scenario], hardware: Hardware, efficiency: Efficiency
) -> list:
    if args.sharing != "all":
        fail("--sharing", "all where several scenarios are printed", args.sharing)
    figures = []
    for regime in _regimes(args, ("isolated", "saturated")):
        costs = {
            f"{s.id} {s.name}": costs_of(s, hardware, regime, efficiency, price=args.price, watts=args.watts)
            for s in chosen
        }
        print(caption(hardware, regime, efficiency, _kind(costs.values())) + "\n")
        print(scenario_table(costs) + "\n")
        figures += [cost.to_dict() for of in costs.values() for cost in of.values()]
    for scenario in chosen:
        print(f"{scenario.id:3} v{scenario.version}  {scenario.title}, {scenario.model.name}. {scenario.note}".rstrip())
    print(
        "\nV0 copies the prompt per candidate, V1 stores it once and reads it for each, V2 reads it once per step. "
        "Compare V2 with V1.\n"
        "KV bound: N(2P+S)/(2P+NS), towards 1 + 2P/S: what sharing saves of the KV reads at most.\n"
        "m(N): cost of N candidates and their verifier over that of one, unverified."
    )
    return figures


def _print_one(args: argparse.Namespace, chosen: list[Scenario], hardware: Hardware, efficiency: Efficiency) -> list:
    figures, (scenario,) = [], chosen
    name = f"{scenario.id} {scenario.name}".strip()
    print(
        f"{name}, {scenario.model.name}: {_about(scenario.workload)}. {scenario.title} {scenario.note}".rstrip() + "\n"
    )
    for regime in _regimes(args, ("isolated", "saturated")):
        costs = costs_of(scenario, hardware, regime, efficiency, price=args.price, watts=args.watts)
        shown = costs if args.sharing == "all" else {args.sharing: costs[args.sharing]}
        print(caption(hardware, regime, efficiency, _kind([costs])) + "\n")
        print(part_table(shown) + f"\n(TFLOP and GB: {list(shown)[-1]})\n")
        print(summary_table(shown) + "\n")
        figures += [cost.to_dict() for cost in shown.values()]
    for sharing, text in SHARINGS.items():
        print(f"{sharing:7} {text}")
    return figures


def _about(work: Workload) -> str:
    lengths = [length for query in work.suffixes for length in query]
    return (
        f"N = {work.n}, prompt {work.prompt}, trunk {work.trunk}, suffixes of {min(lengths)} to {max(lengths)} tokens"
    )


def _kind(costs) -> str:
    kinds = {cost.figures for of in costs for cost in of.values()}
    return kinds.pop() if len(kinds) == 1 else "model and measured"


def _print_traces(args: argparse.Namespace, hardware: Hardware, efficiency: Efficiency) -> list:
    traces, price = Traces.read(args.traces), _price(args)
    if not args.model:
        fail("--model", "the model that the samples are of", "none")
    curves = _curves(args, traces, hardware, efficiency, price)
    regime = _money_regime(args)
    print(caption(hardware, regime, efficiency, "costs (model)"))
    print(
        f"accuracies (of the traces): {len(traces.questions)} questions of {args.traces}; 95% bootstrap over questions\n"
    )
    method, rows, figures = args.method or "best_of_n", [], []
    shown = [other for other in _shown(traces) if other != method]
    for paged, tree in zip(curves["paged"], curves["tree"]):
        found = tree.accuracy
        others = [traces.accuracy(tree.n, other, aggregate=args.aggregate).value for other in shown]
        rows.append(
            [
                str(tree.n),
                f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f}){'' if found.exact else ' drawn'}",
                *(f"{value:.3f}" for value in others),
                *(f"{x:.3g}" for x in (paged.cost, tree.cost, paged.per_solved, tree.per_solved)),
            ]
        )
        for sharing, point in (("paged", paged), ("tree", tree)):
            figures.append(
                {
                    "sharing": sharing,
                    **dataclasses.asdict(point),
                    "per_solved": _finite(point.per_solved),
                    "currency": price.currency,
                }
            )
    money = price.currency
    print(
        markdown(
            ("N", f"accuracy, {method}", *shown, f"V1, {money}", f"V2, {money}",
             f"V1 a solved, {money}", f"V2 a solved, {money}"),
            rows,
        )
    )  # fmt: skip
    if args.value:
        value = _money("--value", args.value, price)
        for label, sharing in (("V1", "paged"), ("V2", "tree")):
            best = best_n(curves[sharing], value)
            print(f"{label}: at {value:g} {money} a solved query, N = {best.n} is worth most")
    return figures


def _shown(traces: Traces) -> list[str]:
    answered = all(any(s.answer is not None for s in samples) for samples in traces.questions.values())
    return list(METHODS) if answered else ["pass", "best_of_n"]


def _curves(
    args: argparse.Namespace, traces: Traces, hardware: Hardware, efficiency: Efficiency, price: Price
) -> dict[str, list[Point]]:
    method = args.method or "best_of_n"
    verifier = getattr(args, "verifier", None) or ("prm" if method in ("best_of_n", "weighted_vote") else "none")
    model = getattr(args, "verifier_model", None)
    return {
        sharing: traces.curve(
            traces.counts(), _model(args.model), hardware, method=method, aggregate=args.aggregate, price=price,
            sharing=sharing, regime=_money_regime(args), efficiency=efficiency, prompt=args.prompt, verifier=verifier,
            verifier_model=_model(model) if model else None,
        )
        for sharing in ("paged", "tree")
    }  # fmt: skip


# --- economics ------------------------------------------------------------------------------------------------------


def economics(args: argparse.Namespace) -> int:
    """Print the break-even volume of training against sampling. Exit status 0; a comparison at unequal accuracy is an
    error."""
    _check_output(args.json)
    _check_output(args.plot)
    hardware, efficiency = _device(args)
    price, regime = _price(args), _money_regime(args)
    train_cost = _money("--train-cost", args.train_cost, price)
    queries = check_number("--queries", args.queries, least=0)
    inner = _with_n(Scenario.load(args.internal), 1)
    single = query_cost(
        dataclasses.replace(inner.workload, suffix=_mean(inner.workload), queries=1), inner.model, hardware,
        regime=regime, efficiency=efficiency, price=price,
    )  # fmt: skip
    if args.traces:
        if args.external_accuracy is not None:
            fail("--external-accuracy", "none beside --traces, which have their own", args.external_accuracy)
        accuracy, external, source = _external_of_traces(args, hardware, efficiency, price)
    else:
        outer = Scenario.load(args.external)
        costs = costs_of(outer, hardware, regime, efficiency, price=price)
        accuracy, external = args.external_accuracy, {s: costs[s].money for s in ("paged", "tree")}
        source = f"{outer.id} {outer.name}, N = {outer.workload.n}, {outer.model.name}"
    found = compare(train_cost, single.money, external, internal_accuracy=args.internal_accuracy,
                    external_accuracy=accuracy, currency=price.currency)  # fmt: skip
    print(caption(hardware, regime, efficiency, "costs (model)") + f"; {price.amount:g} {price.currency} a GPU hour")
    print(f"internal: {inner.id} {inner.name}, one candidate, {inner.model.name}; accuracy {found.internal_accuracy:g}")
    print(f"external: {source}; accuracy {found.external_accuracy:g}, at least as high: costs are compared\n")
    print(_economics_table(found, queries) + "\n")
    print(found.sensitivity())
    if args.plot:
        found.plot(args.plot, f"costs: model, {hardware.name}, {regime}; external: {source}")
        print(f"\nplot in {args.plot}")
    figures = {
        **dataclasses.asdict(found), "queries": queries, "regime": regime, "hardware": hardware.name,
        "break_even": {s: _finite(found.volume(s)) for s in found.external},
    }  # fmt: skip
    _write(args.json, figures)
    return 0


def _economics_table(found: Comparison, queries: float) -> str:
    rows = [("internal, trained once", number(found.internal), number(found.total("internal", queries)), "")]
    for sharing, cost in found.external.items():
        rows.append(
            (
                f"external, {sharing}",
                number(cost),
                number(found.total(sharing, queries)),
                volume_text(found.volume(sharing)),
            )
        )
    header = ("", f"{found.currency} a query", f"{found.currency}, {queries:,.0f} queries", "break-even, queries")
    best = cheapest(found, queries, ("internal", *found.external))
    return markdown(header, rows) + f"\nover {queries:,.0f} queries the cheapest is: {best}"


def _external_of_traces(
    args: argparse.Namespace, hardware: Hardware, efficiency: Efficiency, price: Price
) -> tuple[float, dict[str, float], str]:
    """The smallest N of the traces that reaches the internal accuracy; the best one where none does."""
    if not args.model:
        fail("--model", "the model that the samples are of", "none")
    curves = _curves(args, Traces.read(args.traces), hardware, efficiency, price)
    points = curves["tree"]
    enough = [i for i, point in enumerate(points) if point.accuracy.value >= (args.internal_accuracy or 0)]
    index = enough[0] if enough else max(range(len(points)), key=lambda i: points[i].accuracy.value)
    point = points[index]
    source = f"{args.traces}, {point.accuracy.method}, N = {point.n}"
    return point.accuracy.value, {s: curves[s][index].cost for s in curves}, source


def _mean(work: Workload) -> int:
    """Tokens of a candidate on average: what one of them alone is taken to have."""
    return round(work.suffix.mean) if isinstance(work.suffix, Lognormal) else round(
        sum(map(sum, work.suffixes)) / work.n / work.queries
    )  # fmt: skip


# --- what both take -------------------------------------------------------------------------------------------------


def _model(name: str) -> ModelShape:
    path = Path(name)
    return ModelShape.from_config(path) if path.exists() else ModelShape.preset(name)


def _device(args: argparse.Namespace) -> tuple[Hardware, Efficiency]:
    hardware = as_hardware(args.hardware)
    if args.efficiency is None:
        return hardware, Efficiency() if hardware.source == "measured here" else PLANNED
    try:
        bandwidth, compute, prefill = map(float, args.efficiency.split(","))
    except ValueError:
        fail("--efficiency", "three numbers such as 0.8,0.6,0.5", args.efficiency)
    return hardware, Efficiency(bandwidth, compute, prefill)


def _price(args: argparse.Namespace) -> Price:
    if args.price is None:
        fail("--price", "the price of a GPU hour, such as '2 USD': costs are compared in money", "none")
    return Price.parse(args.price, "--price")


def _money(name: str, text: str, price: Price) -> float:
    money = Price.parse(text, name)
    if money.currency != price.currency:
        fail(name, f"an amount in {price.currency}, the currency of --price", money.currency)
    return money.amount


def _regimes(args: argparse.Namespace, default: tuple[str, ...]) -> tuple[str, ...]:
    return default if args.regime in (None, "both") else (args.regime,)


def _money_regime(args: argparse.Namespace) -> str:
    if args.regime == "both":
        fail("--regime", "one of isolated, saturated where costs are compared", "both")
    return args.regime or "saturated"


def _finite(value: float) -> float | None:
    """For JSON, which has no infinity."""
    return value if math.isfinite(value) else None


def _check_output(path: Path | None) -> None:
    if path and not path.parent.is_dir():
        fail("output", "a file in a directory that exists", path)


def _write(path: Path | None, figures: object) -> None:
    if path:
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
