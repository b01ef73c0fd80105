"""What the figures may be: rules for every kernel, and limits of each in limits.json."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

import triton

from .archs import Arch
from .compiling import Figures, StaticCase

PATH = Path(__file__).with_name("limits.json")
AT_MOST = ("registers", "sgprs_spilled", "shared")
AT_LEAST = ("blocks", "wide_share")


def rules(arch: Arch, case: StaticCase, figures: Figures) -> list[str]:
    """What every kernel has to keep, whatever limits.json says. SGPRs are spilled to lanes of a VGPR, not to memory:
    limits.json says how many."""
    spills = [f"{count} {what}" for what, count in figures.spills.items() if count and what != "SGPRs"]
    broken = [f"spills: {', '.join(spills)}"] if spills else []
    if figures.shared > arch.shared_per_block:
        broken.append(f"{figures.shared} bytes of shared memory, a block may have {arch.shared_per_block}")
    elif not figures.blocks(arch):
        broken.append(
            f"no block fits: {figures.num_warps} warps of {figures.registers} registers, "
            f"{figures.tensor_memory} columns of tensor memory"
        )
    for word in case.wide:
        loads = [load for load in figures.loads if re.search(rf"\b{re.escape(word)}\b", load[0])]
        if not loads:
            broken.append(f"no load in a statement with {word!r}")
        for source, width, count in loads:
            if width < case.load_bytes:
                broken.append(f"{count} loads of {width} bytes, not {case.load_bytes}: {source}")
    if case.mma and case.mma not in figures.mma:
        broken.append(f"mma: expected {case.mma} among them, got {kinds(figures)}")
    return broken


def recorded(arch: Arch, figures: Figures) -> dict:
    """The limits that these figures just keep."""
    return {
        "registers": figures.registers,
        "sgprs_spilled": figures.spills.get("SGPRs", 0),
        "shared": figures.shared,
        "blocks": figures.blocks(arch),
        "wide_share": int(figures.wide_share * 100) / 100,
        "mma": kinds(figures),
    }


def kinds(figures: Figures) -> str:
    return "+".join(sorted(figures.mma)) or "none"


def exceeded(arch: Arch, figures: Figures, limits: dict | None) -> list[str]:
    if limits is None:
        return ["no limits: python -m benchmarks.static --update-limits"]
    now = recorded(arch, figures)
    broken = []
    for name in AT_MOST:
        if now[name] > limits[name]:
            broken.append(f"{name}: expected at most {limits[name]}, got {now[name]}")
    for name in AT_LEAST:
        if now[name] < limits[name]:
            broken.append(f"{name}: expected at least {limits[name]}, got {now[name]}")
    if now["mma"] != limits["mma"]:
        broken.append(f"mma: expected {limits['mma']}, got {now['mma']}")
    return broken


def read(path: Path) -> dict:
    """{"triton": the version that they are for, "limits": {arch: {case: limits}}}"""
    return json.loads(path.read_text()) if path.exists() else {"triton": triton.__version__, "limits": {}}


def update(path: Path, figures: dict[tuple[str, str], dict], cases: Collection[tuple[str, str]] | None) -> None:
    """Replaces the limits of the (arch, case) in `figures`. Of the others, those not in `cases` go, if given."""
    table: dict[str, dict] = {}
    old = {(arch, case): limits for arch, of_arch in read(path)["limits"].items() for case, limits in of_arch.items()}
    for (arch, case), limits in (old | figures).items():
        if cases is None or (arch, case) in cases:
            table.setdefault(arch, {})[case] = limits
    lines = []
    for arch in sorted(table):
        cases = ",\n".join(f"      {json.dumps(case)}: {json.dumps(table[arch][case])}" for case in sorted(table[arch]))
        lines.append(f"    {json.dumps(arch)}: {{\n{cases}\n    }}")
    path.write_text(
        f'{{\n  "triton": {json.dumps(triton.__version__)},\n  "limits": {{\n' + ",\n".join(lines) + "\n  }\n}\n"
    )
