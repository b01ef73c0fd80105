"""What a record of benchmarks/reasoner says: internal and external scaling, apart and together, measured on small
models that were really trained; as a section of a report and as a block of the README. Nothing here is typed: every
number and every sentence follows from the record."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tts_kernels.errors import fail

from . import figures
from .sections import Section, Table
from .table import markdown, ratio

BEGIN = (
    "<!-- claim: begin, written by `tts-kernels report --readme README.md --claim benchmarks/reasoner/results.json` -->"
)
END = "<!-- claim: end -->"
FIGURE = "docs/reasoner.svg"
N = 16  # samples of a table's row
SYSTEMS = {"direct": "direct", "reasoner": "chain of thought"}
# The aggregates that the verifiers' recipes take by default, chosen before anything was measured.
AGGREGATES = {"direct": "last", "reasoner": "prod"}
SEARCHES = {"beam_search": "beam search", "dvts": "DVTS"}
ANSWERS = 100  # that the task has: what guessing gives follows from it
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
        for key in ("curves", "greedy", "paired", "costs", "tokens"):
            if key not in record["systems"].get(name, {}):
                fail(str(path), f"a record with systems.{name}.{key}", "one without it")
        for title, (method, n) in methods(name).items():
            searched = method in SEARCHES
            if not (searched and name == "direct") and at(record["systems"][name], method, n) is None:
                fail(str(path), f"a record with {title} of systems.{name}", f"one without it, of n = {record['n']}")
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


def choices(name: str) -> dict[str, str]:
    """Ways to choose among the samples of a system, and their curves in the record."""
    aggregate = AGGREGATES[name]
    return {
        "the majority": "majority",
        "best-of-N": f"best_of_n {aggregate}",
        "the weighted vote": f"weighted_vote {aggregate}",
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


def costs_of(record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], dict | None]]:
    """(what was run, its measured costs, the accuracy of the same way and N) of every system."""
    for name, title in SYSTEMS.items():
        system = record["systems"][name]
        for row in system["costs"]:
            method = row["method"]
            key = f"weighted_vote {AGGREGATES[name]}" if method == "weighted_vote" else method
            yield f"{title}, {SEARCHES.get(method, method.replace('_', ' '))}", row, at(system, key, row["n"])


def cost_rows(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): a method and N per line, what a query took with stock code and with ours."""
    header = ["seconds per query", "stock", "tts_kernels", "ratio", "same choice", "accuracy in %"]
    rows = [
        [
            f"{label} {row['n']}",
            f"{row['stock_seconds']:.2f}",
            f"{row['tts_seconds']:.2f}",
            ratio(row["stock_seconds"] / row["tts_seconds"]),
            f"{row['choice_equal']} of {row['problems']}",
            f"{100 * point['value']:.1f}" if point else NONE,
        ]
        for label, row, point in costs_of(record)
    ]
    return header, rows


def findings(record: Mapping[str, Any]) -> list[str]:
    """What held and what did not, a sentence each, by comparing the record's numbers. One way is said to be above or
    below another only where the interval of their difference, problem by problem, leaves out 0; between systems, where
    their two intervals do not overlap."""
    direct, reasoner = (record["systems"][name] for name in SYSTEMS)
    most = record["n"]
    of_direct, of_chains = choices("direct"), choices("reasoner")
    answer = at(direct, "pass", 1)
    decoded = {"decoded greedily": reasoner["greedy"], "sampled": at(reasoner, "pass", 1)}
    how, chain = max(decoded.items(), key=lambda pair: pair[1]["value"])  # the better one is what has to be beaten
    # The choice that does best for the direct answers, with hindsight: in favour of what is found wanting.
    shown, external = max(
        ((shown, at(direct, key, most)) for shown, key in of_direct.items()), key=lambda pair: pair[1]["value"]
    )
    verdict = {
        -1: "External scaling does not replace the internal foundation",
        0: "External scaling and the internal foundation, apart, do not clearly differ",
        1: "External scaling alone beats the internal foundation alone",
    }[compare(external, chain)]
    found = [f"{verdict}: {most} direct answers give {percent(external)} by {shown}, which does best, one chain of "
             f"thought {percent(chain)}, {how}."]  # fmt: skip
    best = at(direct, of_direct["best-of-N"], most)
    told = "tells right from wrong" if compare(best, answer) > 0 else "does not visibly tell right from wrong"
    found.append(
        f"The direct answers' verifier {told}: the best of {most} gives {percent(best)}, one answer {percent(answer)}. "
        f"The right answer is among the {most} for {percent(at(direct, 'pass', most))} of the problems; {most} guesses "
        f"among the {ANSWERS} answers that there are would hold it for {100 * (1 - (1 - 1 / ANSWERS) ** most):.1f}."
    )
    both = at(reasoner, of_chains["the weighted vote"], N)
    verb = "beat" if compare(both, chain) > 0 and compare(both, external) > 0 else "do not clearly beat"
    found.append(f"Together they {verb} either: a weighted vote of {N} chains gives {percent(both)}.")
    spent = {title: at(reasoner, *key) for title, key in methods("reasoner").items() if key[0] != "pass"}
    # Beside the greedy chain differences are paired; where sampling does better, the intervals have to part.
    keys = {title: key for title, key in methods("reasoner").items() if title in spent}
    above = [
        title
        for title, point in spent.items()
        if (sign(reasoner, f"{keys[title][0]} - greedy", N) if how != "sampled" else compare(point, chain)) > 0
    ]
    rest = [title for title in spent if title not in above]
    found.append(
        f"Clearly above one chain, {how}, {'are' if len(above) > 1 else 'is'} {', '.join(above) or 'nothing'}"
        + (f"; not so {', '.join(rest)}." if rest else ".")
    )
    for shown in ("best-of-N", "the weighted vote"):
        found.append(f"{sentence_case(shown)} {against_majority(reasoner, of_chains[shown])}.")
    found.append(f"Best-of-N {over_samples(reasoner, of_chains['best-of-N'])}.")
    for key, shown in SEARCHES.items():
        point = at(reasoner, key, N)
        word = {-1: "loses to", 0: "is not clearly different from", 1: "beats"}[
            sign(reasoner, f"{key} - weighted_vote", N)
        ]
        found.append(
            f"{sentence_case(shown)} with {N} candidates {word} a weighted vote of {N}: "
            f"{percent(point)}, for {point['tokens']:.0f} sampled tokens where {N} samples take "
            f"{N * reasoner['tokens']:.0f}."
        )
    return found


def compare(a: Mapping[str, float], b: Mapping[str, float]) -> int:
    """1 where a's interval lies above b's, -1 where below, 0 where they overlap."""
    return (a["low"] > b["high"]) - (a["high"] < b["low"])


def sign(system: Mapping[str, Any], name: str, n: int) -> int:
    """1 where a paired difference of the record is clearly above 0, -1 where below, else 0."""
    point = next(point for point in system["paired"][name] if point["n"] == n)
    return (point["low"] > 0) - (point["high"] < 0)


def sentence_case(text: str) -> str:
    return text[0].upper() + text[1:]


def against_majority(system: Mapping[str, Any], key: str) -> str:
    """At which N a method is above the majority, and at which below."""
    counts = [point["n"] for point in system["curves"]["majority"] if point["n"] > 1]
    ways = {n: sign(system, f"{key} - majority", n) for n in counts}
    told = {1: "above the majority", -1: "below the majority", 0: "not clearly different from the majority"}
    if len(set(ways.values())) == 1:
        return f"is {told[ways[counts[0]]]} at every N from {counts[0]} to {counts[-1]}"
    return "is " + ", ".join(
        f"{told[way]} at N = {', '.join(str(n) for n in counts if ways[n] == way)}"
        for way in told
        if way in ways.values()
    )


def over_samples(system: Mapping[str, Any], key: str) -> str:
    """Where a curve is highest, and what it has at its end."""
    points = system["curves"][key]
    best, last = max(points, key=lambda point: point["value"]), points[-1]
    if last["value"] == best["value"]:
        return f"is highest at N = {last['n']}, the most that was measured: {100 * last['value']:.1f}"
    told = f"{100 * best['value']:.1f} at N = {best['n']}, {100 * last['value']:.1f} at N = {last['n']}"
    clear = sign(system, f"{key} - its best", last["n"]) < 0
    return f"over-optimises: {told}" if clear else f"falls, not clearly: {told}"


def words(record: Mapping[str, Any]) -> str:
    machine, costs = record["machine"], record["systems"]["reasoner"]["costs"]
    return (
        f"{record['problems']} held-out problems, temperature {record['temperature']}; intervals: 95%, bootstrap over "
        f"problems. A curve's value is over all choices of N of {record['n']} samples, that of a weighted vote over "
        f"1,000 drawn ones where there are many; a search ran once for each problem. Ways of answering are compared "
        f"problem by problem. Chains are ranked by the "
        f"{AGGREGATES['reasoner']} of their steps, as the verifier's recipe says, those of the searches by the last "
        f"step. Seconds: means of {costs[0]['problems']} queries, {machine['cpu']}, {machine['threads']} threads, fp32,"
        f" {record['date']}."
    )


def provenance(record: Mapping[str, Any]) -> str:
    commit = record["commit"]["id"][:10] + (" with changes" if record["commit"].get("dirty") else "")
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
    series: dict[str, list[dict]] = {}
    for label, row, point in costs_of(record):
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
