"""Tables of costs, as text that reads well in a terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .account import PARTS, Efficiency
from .formulas import kv_saving
from .hardware import Hardware
from .query import REGIMES, SHARINGS, QueryCost, query_cost
from .scenario import Scenario

HEADER = (
    "scenario",
    "N",
    "2P/S",
    "KV bound",
    "KV V1/V2",
    "V0",
    "V1",
    "V2",
    "V1/V2",
    "decode V1/V2",
    "m(N) V1",
    "m(N) V2",
)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def text(line: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        ]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([text(lines[0]), text(rule), *map(text, lines[1:])])


def costs_of(
    scenario: Scenario, hardware: Hardware, regime: str, efficiency: Efficiency, **options
) -> dict[str, QueryCost]:
    """The cost of a scenario under each policy of sharing."""
    return {
        sharing: query_cost(
            scenario.workload,
            scenario.model,
            hardware,
            sharing=sharing,
            regime=regime,
            efficiency=efficiency,
            **options,
        )
        for sharing in SHARINGS
    }


def scenario_table(costs: dict[str, dict[str, QueryCost]]) -> str:
    """A line for each scenario, see `scenario_rows`."""
    return markdown(HEADER, scenario_rows(costs))


def scenario_rows(costs: dict[str, dict[str, QueryCost]]) -> list[tuple[str, ...]]:
    """Under HEADER: GPU seconds of a query, or money where there is a price. costs: by label, sharing."""
    rows = []
    for label, of in costs.items():
        work, paged, tree = of["tree"].workload, of["paged"], of["tree"]
        prefix = sum(work.prompts) / work.queries + work.trunk
        suffix = sum(map(sum, work.suffixes)) / work.n / work.queries
        rows.append(
            (
                label,
                str(work.n),
                number(work.sharing_ratio),
                ratio(kv_saving(work.n, prefix, suffix)) if work.search == "best_of_n" else "",
                ratio(paged.kv_read_bytes / tree.kv_read_bytes),
                *(amount(cost) for cost in of.values()),
                ratio(paged.seconds / tree.seconds),
                ratio(paged.decode_seconds / tree.decode_seconds),
                number(paged.m),
                number(tree.m),
            )
        )
    return rows


def part_table(costs: dict[str, QueryCost]) -> str:
    """The ten parts of one query, for each sharing: seconds at the ceilings, and measured ones where there are any."""
    header, columns = ["part"], []
    for sharing, cost in costs.items():
        header.append(f"{sharing}, s")
        columns.append([number(part.ceiling_seconds) for part in cost.parts.values()])
        if cost.figures != "model":
            header.append("measured, s")
            columns.append([number(part.measured_seconds) for part in cost.parts.values()])
    tree = list(costs.values())[-1]
    header += ["TFLOP", "GB"]
    columns.append([number(part.flops / 1e12) for part in tree.parts.values()])
    columns.append([number(part.bytes / 1e9) for part in tree.parts.values()])
    rows = [[name, *cells] for name, *cells in zip(PARTS, *columns)]
    sums = ["sum"]
    for cost in costs.values():
        sums.append(number(cost.ceiling_seconds))
        if cost.figures != "model":
            sums.append(number(sum(part.measured_seconds or 0 for part in cost.parts.values())))
    return markdown(header, [*rows, [*sums, number(tree.flops / 1e12), number(tree.bytes / 1e9)]])


def summary_table(costs: dict[str, QueryCost]) -> str:
    """What stands beside a part table: totals of the other ways to add up, memory, the N-th candidate."""
    header = ("", *costs)
    money = next(iter(costs.values())).price
    lines = [
        ("GPU seconds", [number(c.seconds) for c in costs.values()]),
        ("with perfect overlap", [number(c.overlapped_seconds) for c in costs.values()]),
        ("without any overlap", [number(c.additive_seconds) for c in costs.values()]),
        ("m(N) = C(N) / C(1)", [number(c.m) for c in costs.values()]),
        ("marginal candidate, s", [number(c.marginal_seconds) for c in costs.values()]),
        ("fixed + each candidate, s", ["{} + {} N".format(*map(number, c.fit)) for c in costs.values()]),
        ("KV read, GB", [number(c.kv_read_bytes / 1e9) for c in costs.values()]),
        ("KV GB s", [number(c.kv_gb_seconds) for c in costs.values()]),
        (
            "memory, GB",
            [number(c.memory_bytes / 1e9) + ("" if c.fits is not False else " no fit") for c in costs.values()],
        ),
    ]
    if money:
        lines.append((f"{money.currency} a query", [f"{c.money:.3g}" for c in costs.values()]))
    if next(iter(costs.values())).joules is not None:
        lines.append(("joules", [number(c.joules) for c in costs.values()]))
    return markdown(header, [(name, *cells) for name, cells in lines])


def caption(hardware: Hardware, regime: str, efficiency: Efficiency, figures: str) -> str:
    """What the figures under it are: model or measured, on what, under which assumptions."""
    shares = f"{efficiency.bandwidth:.0%} of the bandwidth, {efficiency.compute:.0%} of the FLOP/s in decode, "
    return (
        f"{regime}: {REGIMES[regime]}\n"
        f"{figures}: {hardware.name}, bf16, {rate(hardware.bf16_flops, 'FLOP/s')} dense, "
        f"{rate(hardware.bandwidth, 'B/s')} ({hardware.source}, {hardware.date}), at {shares}"
        f"{efficiency.prefill:.0%} in prefill and verifier"
    )


def amount(cost: QueryCost) -> str:
    if cost.fits is False:
        return f"no fit ({cost.memory_bytes / 1e9:.0f} GB)"
    return number(cost.seconds) + " s" if cost.price is None else f"{cost.money:.3g} {cost.price.currency}"


def rate(value: float, unit: str) -> str:
    scale, letter = (1e12, "T") if value >= 1e12 else (1e9, "G")
    return f"{value / scale:.4g} {letter}{unit}"


def ratio(value: float) -> str:
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def number(value: float | None) -> str:
    """Three digits, without exponents between a thousandth and a million."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def volume_text(volume: float) -> str:
    return "never" if math.isinf(volume) else f"{volume:,.0f}" if volume < 1e7 else f"{volume:.3g}"
