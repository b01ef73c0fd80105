"""The figures of a report: for each its numbers, its drawing, its words, and where the numbers are from."""

from __future__ import annotations

import datetime
import functools
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tts_kernels._version import __version__

from . import figures
from .account import PARTS, Efficiency
from .economics import Comparison
from .hardware import Hardware
from .query import REGIMES, SHARINGS, QueryCost
from .scenario import Scenario
from .table import caption, costs_of, number, ratio
from .traces import Point, Traces, synthetic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COUNTS = (1, 2, 4, 8, 16, 32, 64)  # candidates that a query is shown with, beside those of its scenario
GROWTH = ("A", "C", "D")  # scenarios of which m(N) is drawn
VERSIONS = {sharing: text.partition(":")[0] for sharing, text in SHARINGS.items()}
NO_FIT = "does not fit"


@dataclass(frozen=True)
class Table:
    """Cells of the first column name their row."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A figure with its words and numbers; or `missing`, why there is none."""

    name: str
    title: str
    text: str
    missing: str = ""
    alt: str = ""
    provenance: str = ""
    figure: Figure | None = None
    tables: Sequence[Table] = ()

    @functools.cached_property
    def svg(self) -> bytes:
        return figures.image(self.figure, "svg")


@dataclass
class Study:
    """What is looked at, and the costs that were computed so far."""

    scenarios: list[Scenario]
    hardware: Hardware
    efficiency: Efficiency
    counts: Sequence[int] = field(default_factory=lambda: COUNTS)
    _kept: dict[tuple, dict[str, QueryCost]] = field(default_factory=dict)

    def costs(self, scenario: Scenario, n: int, regime: str) -> dict[str, QueryCost]:
        """By sharing, of the scenario with n candidates."""
        key = scenario.id, scenario.name, n, regime
        if key not in self._kept:
            at = scenario if n == scenario.workload.n else scenario.with_n(n)
            self._kept[key] = costs_of(at, self.hardware, regime, self.efficiency)
        return self._kept[key]

    def counts_of(self, scenario: Scenario) -> list[int]:
        """Lengths that a workload lists one by one are of its own number of candidates."""
        own = scenario.workload.n
        return [own] if isinstance(scenario.workload.suffix, tuple) else sorted({*self.counts, own})

    @property
    def device(self) -> str:
        device, share = self.hardware, self.efficiency
        source = "ceilings measured here" if device.source.startswith("measured") else "data sheet"
        return (
            f"{device.name} ({source}, {device.date}), bf16, at {share.bandwidth:.0%} of bandwidth, "
            f"{share.compute:.0%} / {share.prefill:.0%} of FLOP/s (decode / prefill)"
        )

    def brief(self, kind: str = "modelled, not measured") -> str:
        """Provenance in a line: under each drawing, which may be copied without its page."""
        return f"{kind} · {self.device} · {revision()} · {today()}"

    def provenance(self, regime: str, figures: str = "modelled, not measured") -> str:
        text = caption(self.hardware, regime, self.efficiency, figures).partition("\n")[2]
        return f"{text}. {revision()}, {today()}."


def today() -> str:
    return datetime.date.today().isoformat()


def revision() -> str:
    """The version, and the commit where the package lies in its repository."""
    folder = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "_version.py")
        dirty = " with changes" if git("status", "--porcelain", ".") else ""
        return f"tts_kernels {__version__}, commit {git('rev-parse', '--short=10', 'HEAD')}{dirty}"
    except (OSError, subprocess.CalledProcessError):
        return f"tts_kernels {__version__}, installed without its repository"


def label_of(scenario: Scenario) -> str:
    control = " (control)" if scenario.title.startswith("control") else ""
    return f"{scenario.id} {scenario.name}{control}"


def headline(study: Study, measured: Sequence[Mapping] = ()) -> Section:
    """x = 2P/S against the ratio of a whole query's cost, V1 over V2. measured: points of profiles."""
    tracks: dict[str, list[dict]] = {}
    rows = []
    for scenario in study.scenarios:
        track = tracks.setdefault(label_of(scenario), [])
        for n in study.counts_of(scenario):
            if n == 1:
                continue  # nothing to share
            point, cells, fits = {"n": n, "own": n == scenario.workload.n}, [], True
            for regime in REGIMES:
                costs = study.costs(scenario, n, regime)
                paged, tree = costs["paged"], costs["tree"]
                fits = fits and paged.fits is not False and tree.fits is not False
                point["x"] = tree.workload.sharing_ratio
                point[regime] = paged.seconds / tree.seconds
                cells += [ratio(point[regime]), ratio(paged.decode_seconds / tree.decode_seconds)]
            if fits:
                track.append(point)
            x = point["x"]
            rows.append(
                [label_of(scenario), str(n), number(x), ratio(1 + x), *cells, "yes" if fits else "no, not drawn"]
            )
    devices = ", ".join(dict.fromkeys(point["device"] for point in measured))
    kind = f"stars measured on {devices}; all else modelled" if measured else "modelled, not measured"
    control = next((row for row in rows if "(control)" in row[0]), None)
    tables = [
        Table(
            "Whole query and decode alone, V1/V2",
            ("scenario", "N", "2P/S", "1 + 2P/S", "isolated", "isolated, decode", "saturated", "saturated, decode",
             "KV and weights fit"),
            rows,
        )
    ]  # fmt: skip
    if measured:
        cells = [[m["label"], number(m["x"]), ratio(m["ratio"]), ratio(m["model"]), m["device"]] for m in measured]
        tables.append(Table("Measured", ("profile", "2P/S", "V1/V2 measured", "V1/V2 modelled", "device"), cells))
    best = max((p for track in tracks.values() for p in track), key=lambda p: p["isolated"], default=None)
    alt = (
        "Two scatter plots, isolated and saturated, with logarithmic axes. Across: 2P/S, twice the shared tokens over "
        "the own tokens of a candidate. Up: cost of a whole query with V1 over its cost with V2. A dashed line at "
        "1 + 2P/S is the most that sharing can save of the KV reads."
    )
    if best:
        alt += f" Of a query alone on the device the ratios go up to {ratio(best['isolated'])}."
    if control:
        alt += f" The control, {control[0]}, stays at {control[4]} or near it."
    return Section(
        "headline", "What sharing buys",
        "How many times cheaper a query (its candidates and their verifier) is when a prefix is read once per step "
        "(V2) than when it is stored once and read by each candidate (V1). The dashed line is the ceiling for KV "
        "reads alone; weights, which everyone reads, keep generation below it. Reads are charged to memory: where a "
        "prefix stays in a cache, V1 is cheaper than shown. A point can lie above the line only because its verifier "
        "saves as well: V1's scorers encode the prompt anew for each candidate. Decode alone is in the table. A track "
        "joins the same scenario with rising N; the large mark is the scenario's own N.",
        alt=alt, provenance=study.provenance("isolated", kind),
        figure=figures.draw(figures.headline, tracks, measured, tuple(REGIMES), study.brief(kind)), tables=tables,
    )  # fmt: skip


def growth(study: Study) -> Section:
    """m(N) = C(N)/C(1)."""
    chosen = [s for s in study.scenarios if s.id in GROWTH] or study.scenarios[:3]
    panels: dict[str, dict] = {}
    rows = []
    for regime in REGIMES:
        for scenario in chosen:
            curves = panels.setdefault(regime, {}).setdefault(label_of(scenario), {s: [] for s in SHARINGS})
            for n in study.counts_of(scenario):
                costs = study.costs(scenario, n, regime)
                for sharing, cost in costs.items():
                    if cost.fits is not False:
                        curves[sharing].append((n, cost.m))
                cells = [number(c.m) + ("" if c.fits is not False else f", {NO_FIT}") for c in costs.values()]
                rows.append([label_of(scenario), regime, str(n), *cells])
    last = [f"{row[0]} {row[1]}: {row[4]} with V1, {row[5]} with V2" for row in rows if row[2] == rows[-1][2]]
    return Section(
        "growth", "What the N-th candidate adds: m(N)",
        "Cost of N candidates and their verifier over the cost of one candidate, unverified. On the line m = N a "
        "candidate costs as much as the first; far below it, the others ride along; above it, each is verified "
        "besides. A query alone on a device pays the weights once for all its candidates; on a saturated device it "
        "pays its share, and only sharing helps. V0 ends where its copies do not fit one device.",
        alt="Line plots with logarithmic axes, one for each regime and scenario: N across, m(N) up, lines for V0, V1 "
        f"and V2 beside the line m = N. At N = {rows[-1][2]}: " + "; ".join(last) + ".",
        provenance=study.provenance("isolated"),
        figure=figures.draw(figures.growth, panels, study.brief()),
        tables=[Table("m(N)", ("scenario", "regime", "N", *VERSIONS.values()), rows)],
    )  # fmt: skip


def parts(study: Study, regime: str) -> Section:
    """The ten parts of each scenario, stacked."""
    panels: dict[str, dict] = {}
    rows = []
    for scenario in study.scenarios:
        bars = panels.setdefault(f"{label_of(scenario)}\nN = {scenario.workload.n}", {})
        for sharing, cost in study.costs(scenario, scenario.workload.n, regime).items():
            fits = cost.fits is not False
            bars[VERSIONS[sharing]] = {p: part.seconds for p, part in cost.parts.items()} if fits else None
            cells = [number(part.seconds) for part in cost.parts.values()]
            note = "" if fits else f" ({NO_FIT})"
            rows.append([label_of(scenario), VERSIONS[sharing] + note, *cells, number(cost.seconds)])
    sums = [f"{row[0]} {row[1]} {row[-1]} s" for row in rows if row[1].startswith(("V1", "V2"))]
    return Section(
        f"parts-{regime}", f"Where the time goes, {regime}",
        f"{regime.capitalize()}: {REGIMES[regime]}. GPU seconds of a query, split into the ten parts; each scenario "
        "has a scale of its own. host_gap is measured only, and 0 in the model.",
        alt=f"Stacked bars, three for each scenario: V0, V1 and V2, in GPU seconds by part. Sums: {'; '.join(sums)}.",
        provenance=study.provenance(regime),
        figure=figures.draw(figures.stacks, panels, study.brief()),
        tables=[Table("GPU seconds of each part", ("scenario", "sharing", *PARTS, "sum"), rows)],
    )  # fmt: skip


def is_synthetic(traces: Traces) -> bool:
    """Whether it is the seeded set of `traces.synthetic`, read from a file or not."""
    made = synthetic(len(traces.questions), max(map(len, traces.questions.values())))
    return traces.questions == made.questions


def accuracy(
    study: Study, curves: Mapping[str, Sequence[Point]], traces: Traces, source: str, method: str, model: str,
    regime: str, currency: str,
) -> Section:  # fmt: skip
    """Accuracy at N against cost, with V1 and with V2."""
    invented = is_synthetic(traces)
    kind = "SYNTHETIC samples from a seed, which say nothing about any model" if invented else f"samples: {source}"
    rows = []
    for paged, tree in zip(curves["paged"], curves["tree"]):
        found = tree.accuracy
        costs = [number(1000 * cost) for cost in (paged.cost, tree.cost, paged.per_solved, tree.per_solved)]
        rows.append([str(tree.n), f"{found.value:.3f}", f"{found.low:.3f} to {found.high:.3f}", *costs])
    first, last = rows[0], rows[-1]
    return Section(
        "accuracy", "Accuracy against the cost of a query" + (" (synthetic samples)" if invented else ""),
        f"Chosen by {method} among N samples; intervals: 95% bootstrap over {len(traces.questions)} questions. "
        f"{regime.capitalize()}: {REGIMES[regime]}. " + (f"{kind}." if invented else ""),
        alt=f"{'Synthetic samples. ' if invented else ''}Accuracy in percent against the cost of 1,000 queries in "
        f"{currency}, logarithmic, with V1 and V2: {first[1]} at N = {first[0]}, {last[1]} at N = {last[0]}, which "
        f"costs {last[3]} {currency} with V1 and {last[4]} {currency} with V2.",
        provenance=f"Accuracies: {kind}. Costs: {model}, {study.provenance(regime)}",
        figure=figures.draw(
            figures.accuracy, curves, method, currency,
            "SYNTHETIC samples: no model's accuracy" if invented else f"{source}, {model}",
            study.brief("costs modelled" + (", samples SYNTHETIC" if invented else "")),
        ),
        tables=[
            Table(
                f"Accuracy and cost{' (synthetic samples)' if invented else ''}",
                ("N", f"accuracy, {method}", "95% interval", f"V1, {currency} per 1,000 queries",
                 f"V2, {currency} per 1,000 queries", f"V1, {currency} per 1,000 solved",
                 f"V2, {currency} per 1,000 solved"),
                rows,
            )
        ],
    )  # fmt: skip


def break_even(study: Study, found: Comparison, internal: str, external: str, regime: str, invented: bool) -> Section:
    """Total cost of training once and of sampling for every query, against queries."""
    flag = " (synthetic samples)" if invented else ""
    sides = [[f"external, {VERSIONS[s]}", number(cost)] for s, cost in found.external.items()]
    volumes = found.sensitivity_rows()
    versions = [VERSIONS[sharing] for sharing in found.external]
    told = ", ".join(f"{volume} queries with {version}" for version, volume in zip(versions, volumes[0][1:]))
    accuracies = f"internal accuracy {found.internal_accuracy:.3g}, external {found.external_accuracy:.3g}"
    return Section(
        "break-even", f"Training once or sampling every time: break-even{flag}",
        f"Training costs {found.train_cost:g} {found.currency} once. Internal: {internal}. External: {external}{flag}. "
        f"Compared since the external side is at least as accurate ({accuracies}).",
        alt=f"Total cost in {found.currency} against queries, both logarithmic: a line for training once and one each "
        f"for sampling with V1 and V2. They cross at {told}.",
        provenance=f"Costs: {study.provenance(regime)} Accuracies: {'SYNTHETIC samples' if invented else 'as given'}, "
        f"{accuracies}.",
        figure=figures.draw(figures.break_even, found, study.brief("costs modelled"), flag),
        tables=[
            Table("Costs", ("side", f"{found.currency} a query"), [["internal", number(found.internal)], *sides]),
            Table(f"Break-even, queries{flag}", ("costs", *versions), volumes),
        ],
    )  # fmt: skip
