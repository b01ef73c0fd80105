"""python -m benchmarks.static: a table of what the kernels compile to; exit status 1 if a rule or limit is broken."""

from __future__ import annotations

import os

# Kernels are plain Python under the interpreter. Triton reads this when a kernel is defined.
os.environ.pop("TRITON_INTERPRET", None)

import argparse
import dataclasses
import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import triton

from . import cuda, limits
from .archs import ARCHS
from .compiling import Figures, Job, compile_all

CASES = "benchmarks.static.cases"
CACHE = Path(__file__).resolve().parents[2] / "build" / "static"


def main() -> int:
    arguments = parse()
    module = import_cases(arguments.cases)
    jobs = [(ARCHS[arch], case) for arch in arguments.arch or ARCHS for case in module.cases(arch)]
    for arch in {arch.name for arch, _ in jobs}:
        names = [case.name for a, case in jobs if a.name == arch]
        if len(set(names)) < len(names):
            raise ValueError(f"cases: expected a name for each on {arch}, got {sorted(names)}")
    everything = not arguments.arch and not arguments.only
    jobs = [(arch, case) for arch, case in jobs if arguments.only in case.name]
    if not jobs:
        print(f"error: no cases in {arguments.cases} for what was asked", file=sys.stderr)
        return 1
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    results: dict[tuple[str, str], Figures | str] = {}
    compiled = 0
    for (arch, case), result, now in compile_all(jobs, arguments.jobs, arguments.cache, arguments.keep):
        results[arch.name, case.name] = result
        compiled += now
    print(table(jobs, results))
    print(f"{len(jobs)} kernels, {compiled} compiled now, {time.perf_counter() - start:.0f} s")

    known = {k: limits.recorded(ARCHS[k[0]], r) for k, r in results.items() if isinstance(r, Figures)}
    if arguments.update_limits:
        limits.update(arguments.limits, known, results.keys() if everything else None)
        print(f"wrote {arguments.limits}")
    if arguments.json:
        arguments.json.write_text(json.dumps(record(jobs, results), indent=1) + "\n")
    broken = violations(jobs, results, limits.read(arguments.limits), everything)
    if everything and arguments.cases == CASES:
        why_not = cuda.missing()
        if why_not:
            print(f"csrc/cuda is not looked at: {why_not}")
        else:
            broken += cuda.check(arguments.update_limits)
    sys.stdout.flush()  # the table before what is wrong with it
    for text in broken:
        print(f"error: {text}", file=sys.stderr)
    return 1 if broken else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__.partition(": ")[2])
    parser.add_argument(
        "--arch", choices=list(ARCHS), action="append", help="this architecture, several times for several"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--update-limits", action="store_true", help="make the figures of now the limits")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="compile all again and keep IR and assembly there")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, metavar="DIR", help="figures of kernels that have not changed"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--cases", default=CASES, metavar="MODULE", help="or a file; has cases(arch)")
    parser.add_argument("--limits", type=Path, default=limits.PATH, metavar="FILE")
    return parser.parse_args()


def import_cases(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(jobs: list[Job], results: dict) -> str:
    """Registers and spills of a thread, shared memory of a block, blocks and warps that a multiprocessor holds."""
    width = max(len(case.name) for _, case in jobs)
    lines = []
    for name in dict.fromkeys(arch.name for arch, _ in jobs):
        arch = ARCHS[name]
        lines.append(f"{name:{width}}  regs  spill  shared  blocks  warps  16 B  compile  tensor core instructions")
        for case in (case for a, case in jobs if a is arch):
            figures = results[name, case.name]
            if isinstance(figures, str):
                lines.append(f"{case.name:{width}}  not compiled")
                continue
            blocks = figures.blocks(arch)
            mma = ", ".join(f"{count} {kind}" for kind, count in sorted(figures.mma.items())) or "none"
            lines.append(
                f"{case.name:{width}}  {figures.registers:4}  {sum(figures.spills.values()):5}"
                f"  {figures.shared / 1024:4.0f} K  {blocks:6}  {blocks * figures.num_warps:2}/{arch.max_warps}"
                f"  {figures.wide_share:4.0%}  {figures.seconds:5.1f} s  {mma}"
            )
        lines.append("")
    return "\n".join(lines)


def record(jobs: list[Job], results: dict) -> dict:
    cases: dict[str, dict] = {}
    for arch, case in jobs:
        figures = results[arch.name, case.name]
        if isinstance(figures, Figures):
            more = {"blocks": figures.blocks(arch), "mma": figures.mma, "wide_share": figures.wide_share}
            cases.setdefault(arch.name, {})[case.name] = dataclasses.asdict(figures) | more
        else:
            cases.setdefault(arch.name, {})[case.name] = {"error": figures}
    return {"triton": triton.__version__, "cases": cases}


def violations(jobs: list[Job], results: dict, table: dict, everything: bool) -> list[str]:
    same_compiler = table["triton"] == triton.__version__
    if not same_compiler:
        print(f"limits are for triton {table['triton']}, this is {triton.__version__}: only the rules are checked")
    broken = []
    for arch, case in jobs:
        figures = results[arch.name, case.name]
        if isinstance(figures, str):
            found = [f"not compiled: {figures}"]
        else:
            found = limits.rules(arch, case, figures)
            if same_compiler:
                found += limits.exceeded(arch, figures, table["limits"].get(arch.name, {}).get(case.name))
        broken += [f"{arch.name} {case.name}: {text}" for text in found]
    if everything:
        stale = {(a, c) for a, cases in table["limits"].items() for c in cases} - results.keys()
        broken += [f"{arch} {case}: has limits, but there is no such case" for arch, case in sorted(stale)]
    return broken


if __name__ == "__main__":
    sys.exit(main())
