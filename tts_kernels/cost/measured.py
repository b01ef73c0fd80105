"""Measured profiles in a report: any JSON that holds `QueryCost.to_dict()` with measured seconds, however deep."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from tts_kernels.errors import fail

from . import figures
from .account import PARTS
from .checks import check_choice, check_number
from .query import SHARINGS
from .scenario import scenarios
from .sections import VERSIONS, Section, Table, revision, today
from .table import number, ratio


@dataclass(frozen=True)
class Run:
    """One query that ran under one policy of sharing: modelled and measured seconds of each part."""

    source: str
    workload: str
    model: str
    hardware: str
    hardware_source: str
    date: str
    sharing: str
    modelled: Mapping[str, float]
    measured: Mapping[str, float | None]
    sharing_ratio: float | None

    @property
    def group(self) -> tuple[str, ...]:
        """What runs under different policies of sharing have in common."""
        return self.source, self.workload, self.model, self.hardware

    @property
    def label(self) -> str:
        return self.workload or Path(self.source).stem

    def sums(self) -> tuple[float, float]:
        return sum(self.modelled.values()), sum(seconds or 0 for seconds in self.measured.values())


def read_profiles(paths: Iterable[str | Path]) -> list[Run]:
    """Raises ValueError or TypeError that names the file and the field of what is wrong."""
    runs = []
    for path in paths:
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            fail(str(path), "JSON", error)
        found = [_run(str(path), entry) for entry in _entries(data)]
        if not any(seconds is not None for run in found for seconds in run.measured.values()):
            fail(str(path), "measured seconds of parts, as `tts-kernels profile --json` writes them", "none")
        runs += found
    return runs


def points(runs: Sequence[Run]) -> list[dict]:
    """For the headline: each group that ran with V1 and with V2, where its 2P/S is known."""
    made = []
    for of in _groups(runs).values():
        if not {"paged", "tree"} <= set(of):
            continue
        tree, (model_v1, measured_v1), (model_v2, measured_v2) = of["tree"], of["paged"].sums(), of["tree"].sums()
        if tree.sharing_ratio and measured_v1 and measured_v2:
            made.append({"label": tree.label, "x": tree.sharing_ratio, "ratio": measured_v1 / measured_v2,
                         "model": model_v1 / model_v2, "device": tree.hardware})  # fmt: skip
    return made


def section(runs: Sequence[Run]) -> Section:
    """Measured beside modelled, part by part."""
    panels, tables, devices, told = {}, [], [], []
    for (source, *_), of in _groups(runs).items():
        run = next(iter(of.values()))
        title = f"{run.label}, {run.model}"
        bars = panels.setdefault(title, {})
        header, columns = ["part"], []
        for sharing in (s for s in SHARINGS if s in of):
            run, version = of[sharing], VERSIONS[sharing]
            bars[f"{version}\nmodel"] = run.modelled
            bars[f"{version}\nmeasured"] = {part: seconds or 0.0 for part, seconds in run.measured.items()}
            header += [f"{version} model, s", f"{version} measured, s", "measured / model"]
            lines = [(run.modelled[p], run.measured[p]) for p in PARTS]
            columns.append([_cells(*line) for line in [*lines, run.sums()]])
            told.append(f"{title} {version} {number(run.sums()[1])} s measured, {number(run.sums()[0])} s modelled")
        rows = [[name, *(cell for column in columns for cell in column[i])] for i, name in enumerate([*PARTS, "sum"])]
        tables.append(Table(f"{title} ({source})", header, rows))
        devices.append(", ".join(filter(None, (run.hardware, run.hardware_source, run.date))))
    where = "; ".join(dict.fromkeys(devices))
    return Section(
        "measured", "Measured beside modelled",
        "The query ran for real; its wall time was attributed to the ten parts, and stands beside the model at the "
        "ceilings of the same device.",
        alt="Pairs of stacked bars, modelled and measured, in seconds by part. Sums: " + "; ".join(told) + ".",
        provenance=f"measured (profiles {', '.join(dict.fromkeys(run.source for run in runs))}) beside the model: "
        f"{where}. Page: {revision()}, {today()}.",
        figure=figures.draw(figures.stacks, panels, f"measured and modelled · {where} · {revision()} · {today()}",
                            "seconds a query (s)", 2),
        tables=tables,
    )  # fmt: skip


def _groups(runs: Sequence[Run]) -> dict[tuple[str, ...], dict[str, Run]]:
    groups: dict[tuple[str, ...], dict[str, Run]] = {}
    for run in runs:
        groups.setdefault(run.group, {})[run.sharing] = run
    return groups


def _cells(modelled: float, measured: float | None) -> tuple[str, str, str]:
    return number(modelled), number(measured), ratio(measured / modelled) if modelled and measured else "-"


def _entries(data: object, around: Mapping = MappingProxyType({})) -> Iterator[Mapping]:
    """Each object that has parts, with the fields of the objects around it where it has none of that name."""
    if isinstance(data, Mapping) and isinstance(data.get("parts"), Mapping):
        yield {**around, **data}
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from _entries(value, {**around, **data})
    elif isinstance(data, list):
        for value in data:
            yield from _entries(value, around)


def _run(source: str, entry: Mapping) -> Run:
    for key in ("model", "hardware", "sharing"):
        if not isinstance(entry.get(key), str):
            fail(f"{source}: {key}", "a name", repr(entry.get(key)), TypeError)
    seconds: dict[str, dict] = {"ceiling_seconds": {}, "measured_seconds": {}}
    for part in PARTS:
        for kind, of in seconds.items():
            name = f"{source}: parts[{part!r}][{kind!r}]"
            if not isinstance(entry["parts"].get(part), Mapping) or kind not in entry["parts"][part]:
                fail(name, "a number", "nothing")
            value = entry["parts"][part][kind]
            of[part] = None if value is None and kind == "measured_seconds" else check_number(name, value, least=0)
    return Run(
        source, str(entry.get("workload") or ""), entry["model"], entry["hardware"],
        str(entry.get("hardware_source", "")), str(entry.get("date", ""))[:10],
        check_choice(f"{source}: sharing", entry["sharing"], SHARINGS),
        seconds["ceiling_seconds"], seconds["measured_seconds"], _sharing_ratio(entry),
    )  # fmt: skip


def _sharing_ratio(entry: Mapping) -> float | None:
    """2P/S: of a named scenario, or of the lengths that `tts-kernels profile` writes beside its costs."""
    for scenario in scenarios():
        if scenario.name == entry.get("workload"):
            return scenario.workload.sharing_ratio
    prompt, lengths = entry.get("prompt_tokens"), entry.get("new_tokens")
    if isinstance(prompt, int) and isinstance(lengths, list) and lengths:
        return 2 * prompt * len(lengths) / sum(lengths)
    return None
