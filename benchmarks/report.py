"""The table and the plot of a record. `python -m benchmarks.report RECORD.json` makes both again."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import statistics
from pathlib import Path

from .machine import slug

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "ours"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("record", type=Path, help="a record that a benchmark run wrote")
    path = parser.parse_args().record
    record = json.loads(path.read_text())
    print(table(record))
    png = plot(record)
    if png is not None:
        write(path.with_suffix(".png"), png)
        print(f"wrote {path.with_suffix('.png')}")


def save(record: dict, folder: Path) -> list[Path]:
    """Writes DEVICE/DATE-COMMIT[-GRID].json and its plot into `folder`: whole files or none. Returns their paths."""
    commit = record["commit_info"]
    name = f"{record['datetime'][:10]}-{commit['id'][:10]}" + ("-dirty" if commit["dirty"] else "")
    name += "" if record["grid"] == "full" else f"-{record['grid']}"
    path = folder / slug(record["machine_info"]) / f"{name}.json"
    files = {path: json.dumps(record, indent=1, default=str).encode(), path.with_suffix(".png"): plot(record)}
    files = {path: content for path, content in files.items() if content is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        write(path, content)
    return list(files)


def write(path: Path, content: bytes) -> None:
    """All of it, or the file stays as it was."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def thread_warning(info: dict) -> str:
    """What is wrong with where the threads ran, or ""."""
    cpus = info["thread_cpus"]
    if cpus and len(set(cpus)) < info["threads"]:
        return f"{info['threads']} threads ran on CPUs {cpus}; OMP_PROC_BIND=true keeps them apart"
    return ""


def attention_entries(record: dict) -> list[dict]:
    return [b for b in record["benchmarks"] if b["group"] == "tree_attention"]


def peer_names(entries: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for b in entries for name in b["extra_info"]["peers"]))


def table(record: dict) -> str:
    info, commit, entries = record["machine_info"], record["commit_info"], attention_entries(record)
    lines = [
        f"{info['cpu']}, {info['threads']} threads, {info['code_path']}, torch {info['torch']}, "
        f"commit {commit['id'][:10]}{' with changes' if commit['dirty'] else ''}, {record['datetime'][:16]}"
    ]
    if thread_warning(info):
        lines.append(f"warning: {thread_warning(info)}")
    if entries:
        lines += attention_lines(entries)
    others = [b for b in record["benchmarks"] if b["group"] != "tree_attention"]
    if others:
        lines += ["", *map(other_line, others)]
    return "\n".join(lines)


def attention_lines(entries: list[dict]) -> list[str]:
    ceilings, names = entries[0]["extra_info"]["ceilings"], peer_names(entries)
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {dtype}" for dtype, rate in ceilings["flops_per_s"].items())
    lines = [
        f"ceilings: {ceilings['read_bytes_per_s'] / 1e9:.1f} GB/s read, {rates}",
        "medians in ms, ± half the interquartile range; in brackets how many times ours",
        "",
        f"{'tree_attention':24}{'ours':>15}{'x floor':>9}" + "".join(f"{name:>23}" for name in names),
    ]
    for b in entries:
        lines.append(attention_line(b, names))
    lines += ["", *geomean_lines(entries, names)]
    reasons: dict[str, list[str]] = {}
    for b in entries:
        for name, reason in b["extra_info"]["missing_peers"].items():
            reasons.setdefault(f"no {name}, {reason}", []).append(label(b))
    return lines + [f"{reason}: {'; '.join(labels)}" for reason, labels in reasons.items()]


def label(b: dict) -> str:
    case = b["extra_info"]["case"]
    return f"{case['dtype']} N={case['N']} P={case['P']} S={case['S']}"


def attention_line(b: dict, names: list[str]) -> str:
    stats, extra = b["stats"], b["extra_info"]
    bound = {"memory": "m", "compute": "c"}[extra["bound_by"]]
    line = f"{label(b):24}{milliseconds(stats):>15}{extra['time_over_floor']:>7.2f} {bound}"
    for name in names:
        peer = extra["peers"].get(name)
        line += f"{milliseconds(peer)} ({peer['times_ours']:.2f})".rjust(23) if peer else f"{'-':>23}"
    return line


def milliseconds(stats: dict) -> str:
    return f"{stats['median'] * 1e3:.2f} ±{stats['iqr'] * 500:.2f}"


def geomean_lines(entries: list[dict], names: list[str]) -> list[str]:
    """Of each dtype, where something is shared and where nothing is."""
    lines = []
    for dtype in dict.fromkeys(b["extra_info"]["case"]["dtype"] for b in entries):
        own = [b for b in entries if b["extra_info"]["case"]["dtype"] == dtype]
        shared = [b for b in own if b["extra_info"]["case"]["S"]]
        lone = [b for b in own if not b["extra_info"]["case"]["S"]]
        if shared:
            lines.append(geomean_line(f"{dtype} geomean, N>1", shared, names))
        if lone:
            lines.append(geomean_line(f"{dtype} geomean, N=1", lone, names))
    return lines


def geomean_line(title: str, entries: list[dict], names: list[str]) -> str:
    line = f"{title:24}{'':15}{geomean(b['extra_info']['time_over_floor'] for b in entries):>7.2f}  "
    for name in names:
        ratios = [b["extra_info"]["peers"][name]["times_ours"] for b in entries if name in b["extra_info"]["peers"]]
        # Without one of the cases it would be the mean of others than its neighbours are.
        line += f"({geomean(ratios):.2f})".rjust(23) if len(ratios) == len(entries) else f"{'-':>23}"
    return line


def geomean(values) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def other_line(b: dict) -> str:
    stats, extra = b["stats"], b["extra_info"]
    unit, scale = ("ms", 1e3) if stats["median"] >= 0.1 else ("µs", 1e6)
    line = f"{extra['what']:40}{stats['median'] * scale:>9.1f} {unit} ±{stats['iqr'] * scale / 2:.1f}"
    for name, peer in extra.get("peers", {}).items():
        line += f"    {name} {peer['median'] * scale:.1f} {unit} ({peer['median'] / stats['median']:.2f})"
    return line


def plot(record: dict) -> bytes | None:
    """A PNG: the time of every method over the floor of its case. None where there is no attention or no matplotlib."""
    entries = attention_entries(record)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not entries:
        return None
    info, names = record["machine_info"], [OURS, *peer_names(entries)]
    dtypes = list(dict.fromkeys(b["extra_info"]["case"]["dtype"] for b in entries))
    figure = Figure(figsize=(11, 1.2 + 4 * len(dtypes)), layout="constrained")
    axes = figure.subplots(len(dtypes), 1, squeeze=False)[:, 0]
    for ax, dtype in zip(axes, dtypes):
        own = [b for b in entries if b["extra_info"]["case"]["dtype"] == dtype]
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            at = [x + (i - (len(names) - 1) / 2) * width for x in range(len(own))]
            ax.bar(at, [over_floor(b, name) for b in own], width, label=name)
        ax.axhline(1, color="black", linewidth=1, linestyle="--")
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_ylabel("time over floor")
        ax.set_title(dtype)
        ax.set_xticks(range(len(own)), [label(b).partition(" ")[2].replace(" ", "\n") for b in own], fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=len(names), fontsize=9, loc="outside lower center")
    figure.suptitle(
        f"tree_attention, one decode step: {info['cpu']}, {info['threads']} threads, {info['code_path']}\n"
        "floor (dashed): every distinct token read once, or the arithmetic at GEMM speed, whichever takes longer",
        fontsize=10,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def over_floor(b: dict, name: str) -> float:
    extra = b["extra_info"]
    stats = b["stats"] if name == OURS else extra["peers"].get(name)
    return stats["median"] / extra["floor_s"] if stats else math.nan


if __name__ == "__main__":
    main()
