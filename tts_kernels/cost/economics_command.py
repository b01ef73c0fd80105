"""The command `tts-kernels economics`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from tts_kernels.errors import fail

from .account import Efficiency
from .checks import check_number
from .economics import Comparison, cheapest, compare
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
    money_regime,
    price_of,
    write_json,
)
from .query import Price, query_cost
from .scenario import Scenario
from .table import caption, costs_of, markdown, number, volume_text
from .traces import Traces
from .workload import Lognormal, Workload

EXAMPLES = """examples:
  tts-kernels economics --train-cost '14 USD' --queries 20000 --price '2 USD' --internal A --external B \\
      --internal-accuracy 0.75 --external-accuracy 0.76
  tts-kernels economics --train-cost '294000 USD' --queries 1e8 --price '2 USD' --internal A --traces samples.jsonl \\
      --model qwen3-8b --internal-accuracy 0.8 --plot break-even.svg
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_examples(parser, EXAMPLES)
    add = parser.add_argument
    add("--queries", type=float, required=True, help="queries over the life of the model")
    add_comparison_arguments(parser, required=True)
    add_common_arguments(parser)
    add_trace_arguments(parser)
    add("--model", metavar="NAME", help="of the traces: a preset or the path of a config.json")
    add("--prompt", type=int, help="tokens of the prompts, where the traces do not say")
    add("--plot", metavar="FILE", type=Path, help="total cost against queries, as SVG or PNG")
    add("--json", metavar="FILE", type=Path, help="write all figures to FILE")


def add_comparison_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    add = parser.add_argument
    add("--train-cost", metavar="MONEY", required=required, help="of training once, with its currency: '14 USD'")
    add("--internal", metavar="SCENARIO", default="A", help="one candidate of its mean length, unverified, is a query "
        "of the trained model (default %(default)s)")  # fmt: skip
    add("--external", metavar="SCENARIO", default="B", help="a query of the sampled side (default %(default)s); traces "
        "take its place")  # fmt: skip
    add("--internal-accuracy", type=float, help="of the trained model")
    add("--external-accuracy", type=float, help="of the sampled side; from the traces where there are any")


def main(args: argparse.Namespace) -> int:
    """Print the break-even volume of training against sampling. Exit status 0; a comparison at unequal accuracy is an
    error. Interrupted, it has nothing to compare."""
    check_output(args.json)
    check_output(args.plot)
    hardware, efficiency = device_of(args)
    regime = money_regime(args)
    queries = check_number("--queries", args.queries, least=0)
    traces = Traces.read(args.traces) if args.traces else None
    found, internal, source = comparison_of(args, hardware, efficiency, traces, _progress)
    money = f"{price_of(args).amount:g} {found.currency} a GPU hour"
    print(caption(hardware, regime, efficiency, "costs (model)") + f"; {money}")
    print(f"internal: {internal}; accuracy {found.internal_accuracy:g}")
    print(f"external: {source}; accuracy {found.external_accuracy:.4g}, at least as high: costs are compared\n")
    print(_economics_table(found, queries) + "\n")
    print(found.sensitivity())
    figures = {
        **dataclasses.asdict(found), "queries": queries, "regime": regime, "hardware": hardware.name,
        "break_even": {s: finite(found.volume(s)) for s in found.external},
    }  # fmt: skip
    write_json(args.json, figures)
    if args.plot:
        found.plot(args.plot, f"costs: model, {hardware.name}, {regime}; external: {source}")
        print(f"\nplot in {args.plot}")
    return 0


def comparison_of(
    args: argparse.Namespace, hardware: Hardware, efficiency: Efficiency, traces: Traces | None,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[Comparison, str, str]:  # fmt: skip
    """What the arguments ask to compare, and in words its internal and its external side. `progress` is told what is
    being worked on."""
    price, regime = price_of(args), money_regime(args)
    train_cost = amount_of("--train-cost", args.train_cost, price)
    inner = Scenario.load(args.internal).with_n(1)
    tokens = _mean(inner.workload)
    single = query_cost(
        dataclasses.replace(inner.workload, suffix=tokens, queries=1), inner.model, hardware,
        regime=regime, efficiency=efficiency, price=price,
    )  # fmt: skip
    if traces:
        if args.external_accuracy is not None:
            fail("--external-accuracy", "none beside --traces, which have their own", args.external_accuracy)
        accuracy, external, source = _external_of_traces(args, traces, hardware, efficiency, price, progress)
    else:
        outer = Scenario.load(args.external)
        costs = costs_of(outer, hardware, regime, efficiency, price=price)
        accuracy, external = args.external_accuracy, {s: costs[s].money for s in ("paged", "tree")}
        source = f"{outer.id} {outer.name}, N = {outer.workload.n}, {outer.model.name}"
    found = compare(train_cost, single.money, external, internal_accuracy=args.internal_accuracy,
                    external_accuracy=accuracy, currency=price.currency)  # fmt: skip
    return found, f"{inner.id} {inner.name}, one candidate of {tokens:,} tokens, {inner.model.name}", source


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
    args: argparse.Namespace, traces: Traces, hardware: Hardware, efficiency: Efficiency, price: Price,
    progress: Callable[[str], None],
) -> tuple[float, dict[str, float], str]:  # fmt: skip
    """The smallest N of the traces that reaches the internal accuracy; the best one where none does."""
    if not args.model:
        fail("--model", "the model that the samples are of", "none")
    best, counts = None, traces.counts()
    for n in counts:
        progress(f"N = {n} of {counts[-1]} ..")
        found = {s: curve[0] for s, curve in curves_of(args, traces, hardware, efficiency, price, [n]).items()}
        if best is None or found["tree"].accuracy.value > best["tree"].accuracy.value:
            best = found
        if found["tree"].accuracy.value >= (args.internal_accuracy or 0):
            break
    point = best["tree"]
    found = point.accuracy
    source = f"{args.traces}, {found.method}, N = {point.n}, 95% interval {found.low:.3f} to {found.high:.3f}"
    return point.accuracy.value, {s: of.cost for s, of in best.items()}, source


def _progress(text: str) -> None:
    print(text, file=sys.stderr)


def _mean(work: Workload) -> int:
    """Tokens of a candidate on average: what one of them alone is taken to have."""
    return round(work.suffix.mean) if isinstance(work.suffix, Lognormal) else round(
        sum(map(sum, work.suffixes)) / work.n / work.queries
    )  # fmt: skip
