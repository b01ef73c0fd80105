"""What a record of benchmarks/reasoner says: internal and external scaling, apart and together, measured on small
models that were really trained; as a section of a report and as a block of the README. Nothing here is typed: every
number and every sentence follows from the record."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tts_kernels.errors import fail

from . import figures
from .sections import Section, Table
from .table import markdown, ratio

BEGIN = "<!-- claim: begin, written by `tts-kernels report --readme README.md --claim benchmarks/reasoner/results.json` -->"
END = "<!-- claim: end -->"
FIGURE = "docs/reasoner.svg"
N = 16  # samples of a table's row
SYSTEMS = {"direct": "direct", "reasoner": "chain of thought"}
# The aggregates that the verifiers' recipes take by default, chosen before anything was measured.
AGGREGATES = {"direct": "last", "reasoner": "prod"}
SEARCHES = {"beam_search": "beam search", "dvts": "DVTS"}
NONE = "-"


def read(path: str | Path) -> dict[str, Any]:
    """A record of benchmarks/reasoner/evaluate.py. Raises ValueError that names the file and what it lacks."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        fail(str(path), "JSON", error)
    for key in ("problems", "n", "temperature", "machine", "commit", "date", "systems"):
        if not isinstance(record, dict) or key not in record:
            fail(str(path), f"a record of benchmarks/reasoner with the field {key}", "one without it")
    for name in SYSTEMS:
        for key in ("curves", "greedy", "costs", "tokens"):
            if key not in record["systems"].get(name, {}):
                fail(str(path), f"a record with systems.{name}.{key}", "one without it")
    return record


def at(system: Mapping[str, Any], method: str, n: int) -> dict | None:
    """The point of a curve or of a search with n samples."""
    points = system["curves"].get(method) or system.get(method, ())
    return next((point for point in points if point["n"] == n), None)


def methods(name: str) -> dict[str, tuple[str, int]]:
    """Columns of the claim table: title, and (method, samples) of the record."""
    aggregate = AGGREGATES[name]
    return {
        "1 sample": ("pass", 1),
        f"majority of {N}": ("majority", N),
        f"best of {N}": (f"best_of_n {aggregate}", N),
        f"weighted vote of {N}": (f"weighted_vote {aggregate}", N),
        f"beam search {N}": ("beam_search", N),
        f"DVTS {N}": ("dvts", N),
        f"any of {N} (oracle)": ("pass", N),
    }


def percent(point: Mapping[str, float] | None) -> str:
    """Value and interval in percent."""
    if point is None:
        return NONE
    return f"{100 * point['value']:.1f} ({100 * point['low']:.1f} to {100 * point['high']:.1f})"


def claim_rows(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of {direct, chain of thought} x methods, transposed: a method per line."""
    systems = record["systems"]
    header = ["accuracy in % (95% interval)", *SYSTEMS.values()]
    rows = [["greedy", *(percent(systems[name]["greedy"]) for name in SYSTEMS)]]
    for i, title in enumerate(methods("direct")):
        points = [at(systems[name], *list(methods(name).values())[i]) for name in SYSTEMS]
        rows.append([title, *map(percent, points)])
    rows.append(["tokens of an answer, mean", *(f"{systems[name]['tokens']:.0f}" for name in SYSTEMS)])
    return header, rows


def cost_rows(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): a method and N per line, what a query took with stock code and with ours."""
    header = ["seconds per query", "stock", "tts_kernels", "ratio", "same choice", "accuracy in %"]
    rows = []
    for name, title in SYSTEMS.items():
        system = record["systems"][name]
        for row in system["costs"]:
            method = row["method"]
            key = f"weighted_vote {AGGREGATES[name]}" if method == "weighted_vote" else method
            point = at(system, key, row["n"])
            shown = SEARCHES.get(method, method.replace("_", " "))
            rows.append([
                f"{title}, {shown} {row['n']}", f"{row['stock_seconds']:.2f}", f"{row['tts_seconds']:.2f}",
                ratio(row["stock_seconds"] / row["tts_seconds"]), f"{row['choice_equal']} of {row['problems']}",
                f"{100 * point['value']:.1f}" if point else NONE,
            ])  # fmt: skip
    return header, rows


def findings(record: Mapping[str, Any]) -> list[str]:
    """What held and what did not, a sentence each, by comparing the record's numbers."""
    direct, reasoner = (record["systems"][name] for name in SYSTEMS)
    aggregate = AGGREGATES["reasoner"]
    most = record["n"]
    vote, single = f"weighted_vote {aggregate}", at(reasoner, "pass", 1)
    found = []
    external, internal = at(direct, f"weighted_vote {AGGREGATES['direct']}", most), single
    oracle = at(direct, "pass", most)
    found.append(
        f"External scaling does not replace the internal foundation: {most} direct answers and their verifier give "
        f"{percent(external)}, one chain of thought {percent(internal)}; even an oracle over the {most} direct answers "
        f"gives {percent(oracle)}."
        if oracle["high"] < internal["low"]
        else f"External scaling alone, {most} direct answers and their verifier: {percent(external)}, an oracle over "
        f"them {percent(oracle)}; one chain of thought: {percent(internal)}."
    )
    both = at(reasoner, vote, N)
    verb = "beat" if both["low"] > max(single["high"], at(direct, "pass", N)["high"]) else "do not clearly beat"
    found.append(f"Together they {verb} either: a weighted vote of {N} chains gives {percent(both)}.")
    counts = [point["n"] for point in reasoner["curves"]["majority"] if point["n"] > 1]
    for shown, key in (("best-of-N", f"best_of_n {aggregate}"), ("the weighted vote", vote)):
        losing = [n for n in counts if at(reasoner, key, n)["value"] < at(reasoner, "majority", n)["value"]]
        found.append(
            f"{shown[0].upper()}{shown[1:]} is below the majority at N = {', '.join(map(str, losing))}."
            if losing
            else f"{shown[0].upper()}{shown[1:]} is above the majority at every N from {counts[0]} to {counts[-1]}."
        )
    points = reasoner["curves"][f"best_of_n {aggregate}"]
    best = max(points, key=lambda point: point["value"])
    last = points[-1]
    found.append(
        f"Best-of-N over-optimises: {100 * best['value']:.1f} at N = {best['n']}, {100 * last['value']:.1f} at "
        f"N = {last['n']}."
        if last["value"] < best["value"]
        else f"Best-of-N still rises at N = {last['n']}: {100 * last['value']:.1f}."
    )
    for key, shown in SEARCHES.items():
        point = at(reasoner, key, N)
        word = "pays" if point["low"] > both["high"] else "loses" if point["high"] < both["low"] else "is no better"
        beside = "than" if word == "is no better" else "against"
        found.append(
            f"{shown[0].upper()}{shown[1:]} with {N} candidates {word} {beside} a weighted vote of {N}: "
            f"{percent(point)}, for {point['tokens']:.0f} sampled tokens where {N} samples take "
            f"{N * reasoner['tokens']:.0f}."
        )
    return found


def words(record: Mapping[str, Any]) -> str:
    machine = record["machine"]
    return (
        f"{record['problems']} held-out problems, temperature {record['temperature']}; intervals: 95%, bootstrap over "
        f"problems. Candidates are ranked by the {AGGREGATES['reasoner']} of their steps, as the recipe says, those of "
        f"the searches by the last step. Seconds: {machine['cpu']}, {machine['threads']} threads, fp32, {record['date']}."
    )


def provenance(record: Mapping[str, Any]) -> str:
    commit = record["commit"]["id"][:10]
    return f"measured: benchmarks/reasoner · commit {commit} · {record['machine']['cpu']} · {record['date']}"


def section(record: Mapping[str, Any]) -> Section:
    header, rows = claim_rows(record)
    cost_header, costs = cost_rows(record)
    return Section(
        "claim", "Internal and external scaling, measured on a small reasoner", f"{words(record)} "
        + " ".join(findings(record)),
        alt=alt(record), provenance=provenance(record), figure=drawn(record),
        tables=[Table("Accuracy", header, rows), Table("Cost of a query", cost_header, costs)],
    )  # fmt: skip


def drawn(record: Mapping[str, Any]):
    series = {}
    for name, title in SYSTEMS.items():
        system = record["systems"][name]
        for row in system["costs"]:
            method = row["method"]
            key = f"weighted_vote {AGGREGATES[name]}" if method == "weighted_vote" else method
            point = at(system, key, row["n"])
            label = f"{title}, {SEARCHES.get(method, 'weighted vote')}"
            if point:
                seconds = (row["stock_seconds"], row["tts_seconds"])
                series.setdefault(label, []).append({"n": row["n"], "seconds": seconds, **point})
    return figures.draw(figures.claim, series, provenance(record))


def alt(record: Mapping[str, Any]) -> str:
    _, rows = cost_rows(record)
    return (
        "Accuracy in percent against measured seconds per query, logarithmic, with stock code and with tts_kernels. "
        + "; ".join(f"{row[0]}: {row[5]}% for {row[1]} s and {row[2]} s" for row in rows if row[5] != NONE)
    )


def block(record: Mapping[str, Any]) -> str:
    """What stands between the README's markers."""
    return "\n".join([
        BEGIN, textwrap.fill(words(record), 120), "", markdown(*claim_rows(record)), "",
        *(textwrap.fill(f"- {line}", 120, subsequent_indent="  ") for line in findings(record)), "",
        f"![{alt(record)}]({FIGURE})", "", markdown(*cost_rows(record)), END,
    ])  # fmt: skip


def write(path: Path, record: Mapping[str, Any]) -> list[Path]:
    """Rewrite the block in the README and the figure beside it. Returns the files written."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        fail(str(path), f"one line {BEGIN} and below it one line {END}", "other markers, or none")
    figure = path.parent / FIGURE
    figure.parent.mkdir(exist_ok=True)
    figure.write_bytes(section(record).svg)
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    path.write_text(before + block(record) + after, encoding="utf-8")
    return [figure, path]
