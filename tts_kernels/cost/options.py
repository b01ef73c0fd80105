"""What the commands `tts-kernels cost` and `tts-kernels economics` both take."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from tts_kernels.errors import fail

from .account import PLANNED, Efficiency
from .hardware import Hardware, as_hardware
from .query import REGIMES, Price
from .shapes import ModelShape
from .traces import AGGREGATES, METHODS, Point, Traces


def add_examples(parser: argparse.ArgumentParser, examples: str) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, examples


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--hardware", default="h200", help="a100, h100, h200, b200, mi300x, or measured: this machine (default "
        "%(default)s)")  # fmt: skip
    add("--regime", choices=[*REGIMES, "both"], help="isolated, saturated (default: both; for money saturated)")
    add("--price", metavar="MONEY", help="of a GPU hour, with its currency: '2 USD'")
    add("--efficiency", metavar="B,C,P", help="shares of bandwidth, of FLOP/s in decode, of FLOP/s in prefill that are "
        "reached (default 0.8,0.6,0.5; 1,1,1 for floors; 1,1,1 on measured hardware)")  # fmt: skip


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traces", metavar="FILE", help="scored samples, JSON Lines (see tts_kernels/cost/traces.py)")
    parser.add_argument("--method", choices=METHODS, help="of choosing among samples (default best_of_n)")
    parser.add_argument("--aggregate", choices=AGGREGATES, default="last", help="of step scores (default %(default)s)")


def curves_of(
    args: argparse.Namespace, traces: Traces, hardware: Hardware, efficiency: Efficiency, price: Price,
    counts: Sequence[int] | None = None,
) -> dict[str, list[Point]]:  # fmt: skip
    """By sharing, a point for each number of samples (default: all of `traces.counts()`)."""
    method = args.method or "best_of_n"
    verifier = getattr(args, "verifier", None) or ("prm" if method in ("best_of_n", "weighted_vote") else "none")
    model = getattr(args, "verifier_model", None)
    return {
        sharing: traces.curve(
            counts or traces.counts(), model_named(args.model), hardware, method=method, aggregate=args.aggregate,
            price=price, sharing=sharing, regime=money_regime(args), efficiency=efficiency, prompt=args.prompt,
            verifier=verifier, verifier_model=model_named(model) if model else None,
            verifier_head=getattr(args, "verifier_head", None) or "vocab",
        )
        for sharing in ("paged", "tree")
    }  # fmt: skip


def model_named(name: str) -> ModelShape:
    path = Path(name)
    return ModelShape.from_config(path) if path.exists() else ModelShape.preset(name)


def device_of(args: argparse.Namespace) -> tuple[Hardware, Efficiency]:
    hardware = as_hardware(args.hardware)
    if args.efficiency is None:
        return hardware, Efficiency() if hardware.source == "measured here" else PLANNED
    try:
        bandwidth, compute, prefill = map(float, args.efficiency.split(","))
    except ValueError:
        fail("--efficiency", "three numbers such as 0.8,0.6,0.5", args.efficiency)
    return hardware, Efficiency(bandwidth, compute, prefill)


def price_of(args: argparse.Namespace) -> Price:
    if args.price is None:
        fail("--price", "the price of a GPU hour, such as '2 USD': costs are compared in money", "none")
    return Price.parse(args.price, "--price")


def amount_of(name: str, text: str, price: Price) -> float:
    money = Price.parse(text, name)
    if money.currency != price.currency:
        fail(name, f"an amount in {price.currency}, the currency of --price", money.currency)
    return money.amount


def regimes_of(args: argparse.Namespace, default: tuple[str, ...]) -> tuple[str, ...]:
    return default if args.regime in (None, "both") else (args.regime,)


def money_regime(args: argparse.Namespace) -> str:
    if args.regime == "both":
        fail("--regime", "one of isolated, saturated where costs are compared", "both")
    return args.regime or "saturated"


def finite(value: float) -> float | None:
    """For JSON, which has no infinity."""
    return value if math.isfinite(value) else None


def check_output(path: Path | None) -> None:
    if path and not path.parent.is_dir():
        fail("output", "a file in a directory that exists", path)


def write_json(path: Path | None, figures: object) -> None:
    if path:
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
