"""The short table of a record. `python -m benchmarks.gpu.report RECORD.json` prints it again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import record as records
from .figures import best_peer, groups, heading, number, percent, rates, reasons, summary

MOST_LINES = 60


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.report", description=__doc__)
    parser.add_argument("record", type=Path)
    print(table(json.loads(parser.parse_args().record.read_text())))


def table(record: dict) -> str:
    """At most MOST_LINES - 1 lines, so that one may follow."""
    lines = [heading(record), ""]
    for name, stage in record["stages"].items():
        head = f"{name:9}{stage['status']:10}{stage['seconds']:4.0f} s of {stage['budget_s']:.0f} s"
        own = [line[:125] for line in stage["lines"]]
        lines += [head + (f"   {own[0]}" if own else ""), *(f"{'':11}{line}" for line in own[1:6])]
        if len(own) > 6:
            lines.append(f"{'':11}... {len(own) - 6} more in the record")
    entries = records.cases(record)
    if entries:
        lines += ["", *case_lines(record, entries)]
    if len(lines) >= MOST_LINES:
        lines = [*lines[: MOST_LINES - 2], f"... {len(lines) - MOST_LINES + 2} more lines: the record has all"]
    return "\n".join(lines)


def case_lines(record: dict, entries: list[dict]) -> list[str]:
    bench = record["stages"]["bench"]
    lines = [
        f"ceilings: {rates(bench['ceilings'])}",
        "",
        f"{'L2 cold':20}cases  timed  of floor  memory-bound  over best peer   least",
    ]
    for name, own in (*groups(entries).items(), ("all", entries)):
        s = summary(own)
        lines.append(
            f"{name:20}{s.cases:5}{s.timed:7}{percent(s.of_floor):>10}{percent(s.of_memory_floor):>14}"
            f"{number(s.over_best, '{:.2f}x'):>16}{number(s.least_over_best, '{:.2f}x'):>8}"
        )
    lost = sorted(((e, best) for e in entries if (best := best_peer(e))), key=lambda pair: pair[1][1])
    lines += [f"  {ratio:5.2f}x {e['name']}, against {name}" for e, (name, ratio) in lost[:6] if ratio < 1]
    not_run = bench["not_run"]
    if not_run:
        lines.append(f"not run: {len(not_run)} cases, first {not_run[0]}")
    missing = sorted(reasons(entries).items(), key=lambda pair: -pair[1])
    lines += ["", *(f"{why[:130]} ({count} cases)" for why, count in missing[:10])]
    if len(missing) > 10:
        lines.append(f"... {len(missing) - 10} more reasons in the record")
    return lines


if __name__ == "__main__":
    main()
