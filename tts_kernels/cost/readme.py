"""The figure and the table of costs in the README, made from the same numbers as a report."""

from __future__ import annotations

import textwrap
from pathlib import Path

from tts_kernels.errors import fail

from . import sections
from .sections import Study, label_of
from .table import HEADER, markdown, ratio, scenario_rows

BEGIN = "<!-- costs: begin, written by `tts-kernels report --readme README.md` -->"
END = "<!-- costs: end -->"
FIGURE = "docs/what-sharing-buys.svg"
COLUMNS = ("scenario", "N", "KV bound", "KV V1/V2", "V0", "V1", "V2", "V1/V2", "decode V1/V2")


def block(study: Study) -> str:
    """What stands between the markers. Nothing in it changes with the commit or the day; the figure says both."""
    chosen = [HEADER.index(name) for name in COLUMNS]
    regimes = {
        regime: {label_of(s): study.costs(s, s.workload.n, regime) for s in study.scenarios}
        for regime in ("isolated", "saturated")
    }
    saturated = [ratio(of["paged"].seconds / of["tree"].seconds) for of in regimes["saturated"].values()]
    rows = [
        [*(row[i] for i in chosen), full]
        for row, full in zip(scenario_rows(regimes["isolated"]), saturated, strict=True)
    ]
    ratios = {label: ratio(of["paged"].seconds / of["tree"].seconds) for label, of in regimes["isolated"].items()}
    alt = (
        "What sharing buys: cost of a whole query with V1 over V2 against 2P/S, both axes logarithmic, with the "
        "ceiling of KV reads, 1 + 2P/S, as a dashed line. "
        + ", ".join(f"{label} {value}" for label, value in ratios.items())
    )
    words = (
        f"A model, not measured: {study.device}. GPU seconds of a query alone on the device; in the last column other "
        "queries fill its batch."
    )
    return "\n".join(
        [
            BEGIN,
            f"![{alt}]({FIGURE})",
            "",
            textwrap.fill(words, 120),
            "",
            markdown((*COLUMNS, "saturated V1/V2"), rows),
            END,
        ]
    )


def write(path: Path, study: Study) -> list[Path]:
    """Rewrite the block in the README and the figure beside it. Returns the files written."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        fail(str(path), f"one line {BEGIN} and below it one line {END}", "other markers, or none")
    figure = path.parent / FIGURE
    figure.parent.mkdir(exist_ok=True)
    figure.write_bytes(sections.headline(study).svg)
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    path.write_text(before + block(study) + after, encoding="utf-8")
    return [figure, path]
