"""Drawings of costs with matplotlib: plain numbers in, a figure out. Nothing is computed here.

Colours are those of Okabe and Ito, and none stands alone: a marker, a dash, a hatch or a label says the same."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .account import PARTS
from .table import volume_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARING_LABELS = {"copies": "V0 copies", "paged": "V1 paged", "tree": "V2 tree"}
SHARING_COLOURS = {"copies": "#777777", "paged": "#D55E00", "tree": "#0072B2"}
SHARING_DASHES = {"copies": ":", "paged": "--", "tree": "-"}
SHARING_MARKERS = {"copies": "s", "paged": "o", "tree": "^"}
SHARING_SIZES = {"copies": 9, "paged": 7, "tree": 4.5}  # the large ones are hollow: points that coincide all show
SERIES = ("#000000", "#E69F00", "#009E73", "#56B4E9", "#0072B2", "#D55E00", "#CC79A7", "#777777")
MARKERS = "osdv^DpX"
PART_STYLES = {
    "prefill_prefix": ("#56B4E9", ""),
    "decode_linear": ("#0072B2", ""),
    "decode_attn_prefix": ("#D55E00", "//"),
    "decode_attn_suffix": ("#E69F00", "\\\\"),
    "head_sampling": ("#009E73", ".."),
    "prm_prefix": ("#CC79A7", "xx"),
    "prm_suffix": ("#F0E442", "||"),
    "prm_head": ("#000000", ""),
    "host_gap": ("#FFFFFF", "++"),
    "straggler_idle": ("#CCCCCC", "--"),
}
DRAWN_AS = {
    "svg.fonttype": "path",  # the same letters everywhere
    "svg.hashsalt": "tts_kernels",  # the same file from the same numbers
    "font.size": 10,
    "hatch.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


def new_figure(width: float, height: float, provenance: str) -> Figure:
    """In inches; below it, in lines, where its numbers are from. Raises RuntimeError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise RuntimeError("matplotlib is not installed; pip install 'tts-kernels[bench]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    pieces = [piece if len(piece) > 50 else piece.replace(" ", "\xa0") for piece in provenance.split(" · ")]
    lines = textwrap.wrap(" · ".join(pieces), int(15.5 * width))
    figure.supxlabel("\n".join(lines), fontsize=7.5, color="#444444")
    return figure


def image(figure: Figure, format: str) -> bytes:
    """The figure as "svg" or "png"."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(DRAWN_AS):
        figure.savefig(buffer, format=format, dpi=150, metadata={"Date": None} if format == "svg" else None)
    return buffer.getvalue()


def draw(function, *arguments) -> Figure:
    """A figure made by one of the functions below, in the style of all of them."""
    new_figure(1, 1, "")  # says so where there is no matplotlib
    import matplotlib

    with matplotlib.rc_context(DRAWN_AS):
        return function(*arguments)


def headline(
    tracks: Mapping[str, Sequence[Mapping]], measured: Sequence[Mapping], panels: Sequence[str], provenance: str
) -> Figure:
    """What sharing buys. tracks: for each label, by rising N, {"n", "x", "own", one ratio for each panel or None};
    measured: {"label", "x", "ratio"}, drawn in the first panel."""
    figure = new_figure(10.5, 5.2, provenance)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    ends = [row["x"] for rows in tracks.values() for row in rows] + [point["x"] for point in measured]
    low, high = min(ends, default=0.1) / 1.6, max(ends, default=10) * 1.9
    line = [low * (high / low) ** (i / 60) for i in range(61)]
    top = 1.25 * max(
        [row[panel] for rows in tracks.values() for row in rows for panel in panels]
        + [point["ratio"] for point in measured] + [2.0]
    )  # fmt: skip
    bottom = 0.8 * min([point["ratio"] for point in measured] + [1.0])
    for ax, panel in zip(axes, panels):
        ax.plot(
            line, [1 + x for x in line], "--", color="#444444", linewidth=1.2, label="ceiling 1 + 2P/S (KV reads only)"
        )
        ax.axhline(1, color="#444444", linewidth=0.8)
        for i, (label, rows) in enumerate(tracks.items()):
            _track(ax, i, label, [(row["x"], row[panel], row["own"]) for row in rows])
        ax.set(title=panel, xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, top))
        ax.set_xlabel("2P/S: twice the shared over a candidate's own tokens (ratio)")
        _plain_log(ax.xaxis, (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100))
        _plain_log(ax.yaxis, (0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50))
        ax.grid(True, linewidth=0.4, alpha=0.6)
    for point in measured:
        axes[0].plot(point["x"], point["ratio"], "*", color="#D55E00", markeredgecolor="black", markersize=15)
        place, side = ((-10, -3), "right") if point["x"] ** 2 > low * high else ((10, -3), "left")
        axes[0].annotate(f"{point['label']}, measured", (point["x"], point["ratio"]), place, ha=side,
                         textcoords="offset points", fontsize=9)  # fmt: skip
    axes[0].set_ylabel("V1/V2: cost of a whole query (ratio)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    return figure


def _track(ax: Axes, index: int, label: str, points: Sequence[tuple[float, float, bool]]) -> None:
    """The own point of a scenario is large, with its id beside it, on alternating sides; that of the control below."""
    colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
    ax.plot([x for x, _, _ in points], [y for _, y, _ in points], color=colour, marker=marker, markersize=3.5,
            linewidth=1, alpha=0.75)  # fmt: skip
    name, control = label.partition(" ")[0], "(control)" in label
    place, side = ((-6, -17), "left") if control else ((8, 4), "left") if index % 2 == 0 else ((-8, 4), "right")
    for x, y, own in points:
        if own:
            ax.plot(x, y, marker, color=colour, markersize=9, markeredgecolor="white", label=label, linestyle="none")
            ax.annotate(f"{name}: control" if control else name, (x, y), place, ha=side, textcoords="offset points",
                        fontsize=10, fontweight="bold", zorder=4,
                        bbox={"boxstyle": "square,pad=0", "facecolor": "white", "edgecolor": "none"})  # fmt: skip


def growth(panels: Mapping[str, Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]], provenance: str) -> Figure:
    """m(N) in each regime (rows) of each scenario (columns), by sharing; beside the line of N times the cost."""
    columns = len(next(iter(panels.values())))
    figure = new_figure(3.5 * columns, 3.1 * len(panels) + 0.7, provenance)
    grid = figure.subplots(len(panels), columns, sharex=True, sharey=True, squeeze=False)
    for axes, (regime, scenarios) in zip(grid, panels.items()):
        for ax, (label, curves) in zip(axes, scenarios.items()):
            most = max((n for points in curves.values() for n, _ in points), default=2)
            ax.plot([1, most], [1, most], color="#444444", linewidth=1, label="m = N")
            for sharing, points in curves.items():
                ax.plot([n for n, _ in points], [m for _, m in points], color=SHARING_COLOURS[sharing],
                        linestyle=SHARING_DASHES[sharing], marker=SHARING_MARKERS[sharing], linewidth=1.6,
                        markersize=SHARING_SIZES[sharing], markerfacecolor="none" if sharing != "tree" else None,
                        label=SHARING_LABELS[sharing])  # fmt: skip
            ax.set(xscale="log", yscale="log")
            ax.set_title(f"{label}\n{regime}", fontsize=10)
            _plain_log(ax.xaxis, (1, 2, 4, 8, 16, 32, 64, 128, 256))
            _plain_log(ax.yaxis, (1, 2, 5, 10, 20, 50, 100, 200))
            ax.grid(True, linewidth=0.4, alpha=0.6)
    for ax in grid[-1]:
        ax.set_xlabel("N (candidates)")
    for axes in grid:
        axes[0].set_ylabel("m(N) = C(N)/C(1) (ratio)")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def stacks(
    panels: Mapping[str, Mapping[str, Mapping[str, float] | None]],
    provenance: str,
    unit: str = "GPU seconds a query (s)",
    columns: int = 4,
) -> Figure:
    """Seconds of the ten parts. panels: by label, by name of the bar, seconds by part; None: it does not fit."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(max(7.5, 2.65 * columns), 2.9 * rows + 1.4, provenance)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for i, (ax, (label, bars)) in enumerate(zip(grid, panels.items())):
        bottoms = dict.fromkeys(bars, 0.0)
        for part in PARTS:
            colour, hatch = PART_STYLES[part]
            heights = [seconds[part] if seconds else 0.0 for seconds in bars.values()]
            ax.bar(list(bars), heights, 0.75, list(bottoms.values()), color=colour, hatch=hatch, edgecolor="#333333",
                   linewidth=0.4, label=part)  # fmt: skip
            bottoms = {bar: at + height for (bar, at), height in zip(bottoms.items(), heights)}
        for bar, seconds in bars.items():
            if seconds is None:
                ax.annotate("does not fit", (bar, 0), (0, 6), textcoords="offset points", rotation=90, ha="center",
                            va="bottom", fontsize=9)  # fmt: skip
        ax.set_title(label, fontsize=10)
        ax.set_ylim(0, 1.07 * max(bottoms.values(), default=0) or 1)
        if i % columns == 0:
            ax.set_ylabel(unit)
        ax.grid(True, axis="y", linewidth=0.4, alpha=0.6)
        ax.tick_params(axis="x", labelsize=9)
    for ax in grid[len(panels) :]:
        ax.set_visible(False)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=5 if columns > 2 else 4,
                  frameon=False, fontsize=9, handlelength=2.4, handleheight=1.3)  # fmt: skip
    return figure


def accuracy(curves: Mapping[str, Sequence], method: str, currency: str, title: str, provenance: str) -> Figure:
    """Accuracy against cost, by sharing: sequences of `traces.Point`."""
    figure = new_figure(7.5, 4.8, provenance)
    axes = figure.add_subplot()
    for sharing, points in curves.items():
        values = [100 * p.accuracy.value for p in points]
        spans = [
            [max(0.0, value - 100 * p.accuracy.low) for value, p in zip(values, points)],
            [max(0.0, 100 * p.accuracy.high - value) for value, p in zip(values, points)],
        ]
        axes.errorbar([1000 * p.cost for p in points], values, spans, color=SHARING_COLOURS[sharing],
                      linestyle=SHARING_DASHES[sharing], marker=SHARING_MARKERS[sharing],
                      label=SHARING_LABELS[sharing], elinewidth=0.8, capsize=3)  # fmt: skip
    for point in curves["tree"]:
        axes.annotate(f"N={point.n}", (1000 * point.cost, 100 * point.accuracy.value), (-6, 7), ha="right",
                      textcoords="offset points", fontsize=9)  # fmt: skip
    axes.set(xscale="log", xlabel=f"cost of 1,000 queries ({currency})", ylabel=f"accuracy, {method} (% of questions)")
    _plain_log(axes.xaxis, [digit * 10.0**power for power in range(-9, 9) for digit in (1, 2, 5)])
    axes.margins(x=0.1)
    axes.set_title(title, fontsize=11)
    axes.grid(True, linewidth=0.4, alpha=0.6)
    axes.legend(frameon=False, loc="lower right")
    return figure


def claim(series: Mapping[str, Sequence[Mapping]], provenance: str) -> Figure:
    """Accuracy against measured seconds of a query. series: for each label, by rising n, {"n", "seconds": (stock,
    ours), "value", "low", "high"}; the same accuracy stands twice, hollow where stock code paid for it."""
    figure = new_figure(7.5, 4.8, provenance)
    axes = figure.add_subplot()
    for i, (label, points) in enumerate(series.items()):
        values = [100 * p["value"] for p in points]
        spans = [[100 * (p["value"] - p["low"]) for p in points], [100 * (p["high"] - p["value"]) for p in points]]
        colour, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
        for side, dash, fill in ((0, ":", "white"), (1, "-", colour)):
            axes.errorbar([p["seconds"][side] for p in points], values, spans, color=colour, linestyle=dash,
                          marker=marker, markerfacecolor=fill, elinewidth=0.8, capsize=2,
                          label=f"{label}, {('stock', 'tts_kernels')[side]}")  # fmt: skip
        for p in points:
            axes.annotate(f"{p['n']}", (p["seconds"][1], 100 * p["value"]), (-4, 6), ha="right",
                          textcoords="offset points", fontsize=8, color=colour)  # fmt: skip
    axes.set(xscale="log", xlabel="seconds per query, measured", ylabel="accuracy (% of problems)", ylim=(0, 100))
    _plain_log(axes.xaxis, [digit * 10.0**power for power in range(-3, 4) for digit in (1, 2, 5)])
    axes.margins(x=0.1)
    axes.set_title("a small reasoner; numbers: samples or candidates", fontsize=11)
    axes.grid(True, linewidth=0.4, alpha=0.6)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


def break_even(comparison, provenance: str, note: str = "") -> Figure:
    """Total cost against queries of an `economics.Comparison`."""
    volumes = {sharing: comparison.volume(sharing) for sharing in comparison.external}
    finite = [v for v in volumes.values() if math.isfinite(v) and v > 0]
    middle = math.exp(sum(map(math.log, finite)) / len(finite)) if finite else 1e6
    queries = [middle * 10 ** (i / 20) for i in range(-40, 41)]
    figure = new_figure(7.5, 4.8, provenance)
    axes = figure.add_subplot()
    axes.plot(queries, [comparison.total("internal", q) for q in queries], color="black", linewidth=2,
              linestyle="-.", label="internal: trained once")  # fmt: skip
    for sharing, volume in volumes.items():
        crossing = f"break-even at {volume_text(volume)} queries" if volume in finite else "no break-even"
        axes.plot(queries, [comparison.total(sharing, q) for q in queries], color=SHARING_COLOURS[sharing],
                  linestyle=SHARING_DASHES[sharing], linewidth=2,
                  label=f"external, {SHARING_LABELS[sharing]}: {crossing}")  # fmt: skip
        if volume in finite:
            axes.plot(volume, comparison.total(sharing, volume), SHARING_MARKERS[sharing], markersize=9,
                      color=SHARING_COLOURS[sharing], markeredgecolor="white", zorder=3)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="queries over the life of the model (number)")
    axes.set_ylabel(f"total cost ({comparison.currency})")
    axes.set_title(f"Training once against sampling for every query, at equal accuracy{note}", fontsize=11)
    axes.grid(True, which="major", linewidth=0.4, alpha=0.6)
    axes.legend(frameon=False)
    return figure


def _plain_log(axis, ticks: Sequence[float]) -> None:
    """A log axis with plain numbers at these places, as far as they are in view."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
