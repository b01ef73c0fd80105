"""`python -m benchmarks.gpu.page`: results/README.md and its plots from the GPU records there. Says "not yet measured"
where there is none."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from ..report import RESULTS, write
from . import cases as grids
from . import record as records
from .figures import OURS, best_peer, groups, heading, microseconds, number, percent, rates, reasons, summary

DEVICES = ("NVIDIA H200", "NVIDIA H100 80GB HBM3")  # what the project wants to be measured on
HEAD = """# Results on GPUs

Made by `python -m benchmarks.gpu.page` from the records in this folder; do not edit. What is measured, and how, stands
in [../README.md](../README.md). Times are medians in µs, ± half the interquartile range, of captured graphs with the L2
cold (warm beside it). *Of the floor* is the floor over our time: the larger of bytes that have to be moved over the
measured copy bandwidth and FLOPs over the measured matrix rate. *x ours* is a method's time over ours, L2 cold.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.page", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    folder = parser.parse_args().results
    for path, content in pages(folder).items():
        write(path, content)
        print(f"wrote {path}")


def pages(folder: Path) -> dict[Path, bytes]:
    """The page and the plots that it shows."""
    latest: dict[str, dict] = {}  # of each device; the last with benchmarks, if there is one
    for record in records.load_all(folder):
        name = record["device"]["name"]
        if records.cases(record) or not records.cases(latest.get(name, record)):
            latest[name] = record
    parts, files = [HEAD], {}
    for name in dict.fromkeys([*DEVICES, *latest]):
        record = latest.get(name)
        if record is None:
            parts.append(f"## {name}\n\nNot yet measured.\n")
            continue
        plot = roofline(record)
        if plot:
            path = Path(record["path"]).with_suffix(".roofline.png")
            files[folder / path] = plot
        parts.append(device_section(record, path.as_posix() if plot else None))
    return {folder / "README.md": "\n".join(parts).encode()} | files


def device_section(record: dict, plot: str | None) -> str:
    lines = [f"## {record['device']['name']}", "", f"{heading(record)} ([record]({record['path']})).", ""]
    lines += table(
        ["stage", "", "seconds", ""],
        [[name, s["status"], f"{s['seconds']:.0f}", "; ".join(s["lines"][:1])] for name, s in record["stages"].items()],
    )
    lines += whole_models(record["stages"].get("models", {}))
    entries = records.cases(record)
    if not entries:
        return "\n".join([*lines, "Benchmarks: not yet measured.", ""])
    bench = record["stages"]["bench"]
    lines += [f"Ceilings, measured in the same run: {rates(bench['ceilings'])}.", ""]
    lines += table(
        ["group", "cases", "timed", "of the floor", "memory-bound ones", "best peer x ours", "least"],
        [summary_row(name, own) for name, own in (*groups(entries).items(), ("all", entries))],
    )
    if plot:
        lines += [f"![Roofline]({plot})", ""]
    for name, own in groups(entries).items():
        lines += [f"### {name}", "", *group_lines(record, name, own)]
    if bench["not_run"]:
        lines += ["Not run: " + "; ".join(bench["not_run"]) + ".", ""]
    missing = [f"- {why} ({count} cases)" for why, count in reasons(entries).items()]
    return "\n".join([*lines, "### Missing", "", *(missing or ["Nothing."]), ""])


WHOLE = """A model of a 7B model's shapes with random weights, bf16: decoding by as many samples, and a verifier's
scores of as many candidates, in one call and after every step. Seconds of the whole; of the eager run the share of each
part. *Not shared* is ours, where every row reads its whole path for itself.
"""


def whole_models(stage: dict) -> list[str]:
    """A table of the runs of the stage `models`, a row for each method and mode."""
    runs = [
        (f"decode, N = {e['samples']}, {e['trunk']:,} + {e['suffix']:,} tokens", e) for e in stage.get("decode", ())
    ]
    for e in stage.get("score", ()):
        size = f"{e['candidates']} candidates of {e['steps']} x {e['tokens']} tokens behind {e['prompt']}"
        runs += [(f"{kind.replace('_', '-')} scores, {size}", e[kind]) for kind in ("one_shot", "step_wise")]
    if not runs:
        return []
    parts = list(dict.fromkeys(part for _, e in runs for run in e["methods"].values() for part in run.get("parts", {})))
    rows, missing = [], []
    for what, e in runs:
        for name, run in e["methods"].items():
            parts_s, whole = run.get("parts", {}), run.get("eager_s")
            shares = [percent(parts_s[part] / whole) if whole and part in parts_s else "-" for part in parts]
            seconds = [number(run.get(key)) for key in ("eager_s", "graph_s")]
            rows.append([what, name, *seconds, *shares])
        missing += [f"- {what}: no {name}: {why}" for name, why in e["missing"].items()]
    head = ["run", "", "eager, s", "under a graph, s", *parts]
    return ["### Whole models", "", *WHOLE.splitlines(), "", *table(head, rows), *missing, *[""] * bool(missing)]


def summary_row(name: str, entries: list[dict]) -> list[str]:
    s = summary(entries)
    return [
        name, str(s.cases), str(s.timed), percent(s.of_floor), percent(s.of_memory_floor),
        number(s.over_best, "{:.2f}x"), number(s.least_over_best, "{:.2f}x"),
    ]  # fmt: skip


def group_lines(record: dict, name: str, entries: list[dict]) -> list[str]:
    reason = next((g["reason"] for g in every_group(record["grid"]) if g["group"] == name), "")
    peers = list(dict.fromkeys(method for e in entries for method in e["methods"] if method != OURS))
    rows = []
    for e in entries:
        ours = e["methods"].get(OURS)
        if ours is None:
            rows.append([e["name"], e["status"]] + [""] * (6 + len(peers)))
            continue
        figures = [
            microseconds(ours["cold"]),
            microseconds(ours["warm"]),
            percent(ours["of_floor"]),
            f"{ours['bytes_moved'] / e['least_bytes']:.2f}",
            number(ours["launches"], "{:.0f}"),
            f"{ours['host_s'] * 1e6:.0f}",
        ]
        rows.append([e["name"], e["bound"], *figures, *(ratio(e, peer) for peer in peers)])
    head = ["case", "bound by", "ours, cold", "warm", "of the floor", "bytes x least", "launches", "host"]
    lines = [reason, "", *table(head + [f"{peer} x ours" for peer in peers], rows)]
    if name == "crossover":
        lines += crossover(entries)
    return lines


def ratio(entry: dict, peer: str) -> str:
    method = entry["methods"].get(peer)
    if method is None:
        return "wrong" if peer in entry["wrong"] else "-"
    return f"{method['cold']['median'] / entry['methods'][OURS]['cold']['median']:.2f}"


def crossover(entries: list[dict]) -> list[str]:
    """Where sharing pays: our kernels without sharing and the best peer, each over ours, by N and prefix."""
    by = {(e["case"]["n"], e["case"]["prefix"]): e for e in entries if OURS in e["methods"]}
    prefixes = sorted({prefix for _, prefix in by})
    rows = []
    for n in sorted({n for n, _ in by}):
        row = [f"N = {n}"]
        for prefix in prefixes:
            e = by.get((n, prefix))
            alone = ratio(e, "ours, not shared") if e else "-"
            best = best_peer(e) if e else None
            row.append(f"{alone} / {number(best and best[1])}")
        rows.append(row)
    head = ["not shared / best peer, x ours", *(f"prefix {prefix}" for prefix in prefixes)]
    return ["Where sharing pays: above 1 it does.", "", *table(head, rows)]


def every_group(grid: str) -> list[dict]:
    found = grids.grid(grid)
    return [*found["attention"], *found["scoring"]]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * min(len(head), 2) + ["---:"] * (len(head) - 2), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines] + [""]


def roofline(record: dict) -> bytes | None:
    """A PNG: FLOP per second over FLOP per byte that has to be moved, of ours and of the best peer, under the measured
    ceilings. None without cases or without matplotlib."""
    entries = [e for e in records.cases(record) if OURS in e["methods"]]
    ceilings = record["stages"].get("bench", {}).get("ceilings")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not entries or not ceilings:
        return None
    bandwidth, rate = ceilings["bytes_per_s"], max(ceilings["flops_per_s"].values())
    figure = Figure(figsize=(9, 6), layout="constrained")
    ax = figure.subplots()
    for group, own in groups(entries).items():
        x = [e["flops"] / e["least_bytes"] for e in own]
        ax.plot(x, [e["flops"] / e["methods"][OURS]["cold"]["median"] for e in own], "o", label=group, markersize=5)
    beside = [(e, best) for e in entries if (best := best_peer(e))]
    peers = [e["flops"] / (best[1] * e["methods"][OURS]["cold"]["median"]) for e, best in beside]
    ax.plot([e["flops"] / e["least_bytes"] for e, _ in beside], peers, "kx", label="best peer", markersize=5)
    low = min(e["flops"] / e["least_bytes"] for e in entries) / 2
    high = max(rate / bandwidth * 4, *(e["flops"] / e["least_bytes"] * 2 for e in entries))
    ax.plot([low, rate / bandwidth, high], [low * bandwidth, rate, rate], "k-", linewidth=1)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("FLOP per byte that has to be moved")
    ax.set_ylabel("FLOP per second, L2 cold")
    ax.set_title(f"{heading(record)}\n{rates(ceilings)}", fontsize=9)
    ax.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
