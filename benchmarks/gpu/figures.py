"""What records say, worked out: best peers, means over groups, times as text. For the short table and for the page."""

from __future__ import annotations

import math
from dataclasses import dataclass

OURS = "ours"


def best_peer(entry: dict) -> tuple[str, float] | None:
    """The fastest method that is not ours, cold, and how many times our time it takes; None where there is none."""
    peers = {name: m["cold"]["median"] for name, m in entry["methods"].items() if not m["ours"]}
    if OURS not in entry["methods"] or not peers:
        return None
    name = min(peers, key=peers.get)
    return name, peers[name] / entry["methods"][OURS]["cold"]["median"]


@dataclass(frozen=True)
class Summary:
    """Of a group of cases: how many, and of those that were timed the means of the part of the floor that we reach, of
    the memory-bound ones, and of what the best peer takes over ours; the least of both."""

    cases: int
    timed: int
    of_floor: float
    of_memory_floor: float
    over_best: float
    least_over_best: float
    least_at: str


def summary(entries: list[dict]) -> Summary:
    timed = [e for e in entries if OURS in e["methods"]]
    floors = [e["methods"][OURS]["of_floor"] for e in timed]
    memory = [e["methods"][OURS]["of_floor"] for e in timed if e["bound"] == "memory"]
    ratios = {e["name"]: best[1] for e in timed if (best := best_peer(e))}
    least = min(ratios, key=ratios.get) if ratios else ""
    return Summary(
        len(entries), len(timed), geomean(floors), geomean(memory), geomean(ratios.values()),
        ratios.get(least, math.nan), least,
    )  # fmt: skip


def groups(entries: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for entry in entries:
        found.setdefault(entry["group"], []).append(entry)
    return found


def reasons(entries: list[dict]) -> dict[str, int]:
    """ "peer: why it is missing", and in how many cases."""
    found: dict[str, int] = {}
    for entry in entries:
        for name, why in entry["missing"].items():
            found[f"no {name}: {why}"] = found.get(f"no {name}: {why}", 0) + 1
    return found


def geomean(values) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def number(value: float | None, text: str = "{:.2f}") -> str:
    return "-" if value is None or math.isnan(value) else text.format(value)


def percent(value: float) -> str:
    return number(value, "{:.0%}")


def microseconds(times: dict) -> str:
    return f"{times['median'] * 1e6:.1f} ±{(times['q3'] - times['q1']) * 0.5e6:.1f}"


def rates(ceilings: dict | None) -> str:
    if not ceilings:
        return "no ceilings were measured"
    flops = ", ".join(f"{rate / 1e12:.4g} TFLOP/s {dtype}" for dtype, rate in ceilings["flops_per_s"].items())
    return f"{ceilings['bytes_per_s'] / 1e12:.3g} TB/s, {flops}"


def heading(record: dict) -> str:
    commit, software = record["commit"], record["software"]
    versions = ", ".join(f"{name} {software[name]}" for name in ("torch", "triton", "cuda") if software.get(name))
    return (
        f"{record['device']['name']}, commit {commit['id'][:10]}{' with changes' if commit['dirty'] else ''}, "
        f"{record['date'][:16].replace('T', ' ')}, {versions}"
    )
