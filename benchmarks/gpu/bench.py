"""`python -m benchmarks.gpu.bench`: times the cases of a grid, in one process; a line of JSON for each on --out.

Run by the stage `bench`, which starts it again where a method took the process down, or did not end. A line
{"begin": name} stands before the entry of a case, behind it {"method": name} for each that is tried, "" while they are
timed; {"ceilings": ...} comes first, and again at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from tts_kernels.ceilings import CUDA_SIZES, copy_bandwidth, gemm_rate, read_bandwidth
from tts_kernels.measure.inputs import DTYPES
from tts_kernels.measure.timing import (
    Captured,
    cache_bytes,
    capture,
    cold_calls,
    graph_calls,
    host_seconds,
    interleave,
    set_count,
    synchronize,
)

from .cases import grid, tree_cases
from .scoring import scoring_cases

OURS = "ours"
MOST_SECONDS = {"cuda": 60, "cpu": 240}  # of a case: a kernel that never ends would take all the stage's time


class Wrong(Exception):
    """A result that differs from the reference by more than rounding."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--grid", default="full")
    parser.add_argument("--out", type=Path, default=Path(os.devnull), help="lines are added to this file")
    parser.add_argument("--compile", action="store_true", help="only call the peers that torch compiles, once each")
    parser.add_argument("--names", type=Path, help="a file with the names of the cases to run, as JSON; default all")
    parser.add_argument("--only-ours", action="store_true", help="without peers")
    parser.add_argument("--without", type=Path, help="a file with names of peers, and why they are left out, as JSON")
    given = parser.parse_args()
    chosen = grid(given.grid)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = all_cases(chosen, device.type)
    if given.names:
        names = set(json.loads(given.names.read_text()))
        cases = [case for case in cases if case.name in names]
    without = json.loads(given.without.read_text()) if given.without else {}
    if given.compile:
        return compile_peers(cases)
    with given.out.open("a") as out:

        def write(line: dict) -> None:
            print(json.dumps(line, allow_nan=False), file=out, flush=True)

        def begin(method: str) -> None:
            write({"method": method})

        ceilings = measure_ceilings(device, chosen)
        write({"ceilings": ceilings})
        # What imports made is not looked at again: collecting would take a tenth of a second, several times a case.
        gc.collect()
        gc.freeze()
        for case in cases:
            write({"begin": case.name})
            start = time.perf_counter()
            faulthandler.dump_traceback_later(MOST_SECONDS[device.type], exit=True)
            entry = measure(case, device, ceilings, chosen["samples"], given.only_ours, without, begin)
            faulthandler.cancel_dump_traceback_later()
            write({"case": entry | {"seconds": time.perf_counter() - start}})
            print(f"{time.perf_counter() - start:5.1f} s  {case.name}: {entry['status']}", flush=True)
            gc.collect()
            expect_sound(device)  # and all memory is there for the next
        write({"ceilings_after": measure_ceilings(device, chosen)})
    return 0


def compile_peers(cases: list) -> int:
    for case in cases:
        for peer in case.peers:
            if getattr(peer, "COMPILED", False) and not peer.reason_against(case):
                start = time.perf_counter()
                try:
                    peer.prepare(case.sets(1)[0])()
                    told = f"{time.perf_counter() - start:.0f} s"
                except Exception as failure:
                    told = last_line(failure)
                print(f"{peer.NAME}, {case.name}: {told}", flush=True)
    return 0


def all_cases(chosen: dict, device: str) -> list:
    return [*scoring_cases(chosen, device), *tree_cases(chosen, device)]


def measure_ceilings(device: torch.device, chosen: dict) -> dict:
    """On a GPU: copies from device memory to device memory, read and written, and torch.mm on random data."""
    dtypes = sorted({case.dtype for case in all_cases(chosen, device.type)})
    if device.type == "cuda":
        rates = {name: gemm_rate(DTYPES[name], CUDA_SIZES, device=device) for name in dtypes}
        return {"bytes_per_s": copy_bandwidth(device), "flops_per_s": rates, "cache_bytes": cache_bytes(device)}
    rates = {name: gemm_rate(DTYPES[name], (64,), 0.01) for name in dtypes}
    return {"bytes_per_s": read_bandwidth(1 << 24, 0.01), "flops_per_s": rates, "cache_bytes": 0}


def measure(
    case,
    device: torch.device,
    ceilings: dict,
    samples: int,
    only_ours: bool,
    without: dict[str, str] | None = None,
    begin: Callable[[str], object] = str,
) -> dict:
    """The entry of a case. Nothing is timed before its result was seen to be right, from the eager call and from the
    captured graph; where ours is wrong, nothing of the case is. `without`: why some peers are left out; `begin` is
    called with each method's name, and "" before they are timed."""
    memory, compute = case.least_bytes / ceilings["bytes_per_s"], case.flops / ceilings["flops_per_s"][case.dtype]
    entry = {
        "name": case.name,
        "op": case.op,
        "group": case.group,
        "kind": case.kind,
        "case": describe(case),
        "least_bytes": case.least_bytes,
        "flops": case.flops,
        "floor_s": max(memory, compute),
        "bound": "memory" if memory >= compute else "compute",
        "status": "ok",
        "methods": {},
        "missing": {},
        "wrong": {},
    }
    begin(OURS)
    try:
        trial = Trial(case, device, ceilings)
        trial.add(OURS, case.ours, case.least_bytes, ours=True)
    except Wrong as wrong:
        return entry | {"status": "wrong", "wrong": {OURS: str(wrong)}}
    except Exception as failure:
        expect_sound(device)
        return entry | {"status": "failed", "wrong": {OURS: last_line(failure)}}
    entry["sets"] = len(trial.sets)
    for peer in () if only_ours else case.peers:
        begin(peer.NAME)
        try:
            if reason := (without or {}).get(peer.NAME) or peer.reason_against(case):
                entry["missing"][peer.NAME] = reason
            else:
                trial.add(peer.NAME, peer.prepare, peer.bytes_read(case), ours=getattr(peer, "OURS", False))
        except Wrong as wrong:
            entry["wrong"][peer.NAME] = str(wrong)
        except Exception as failure:
            expect_sound(device)
            entry["missing"][peer.NAME] = last_line(failure)
    begin("")
    entry["methods"] = trial.time(samples)
    entry["methods"][OURS] |= case.told(trial.sets[0], ceilings)
    for method in entry["methods"].values():
        method["of_floor"] = entry["floor_s"] / method["cold"]["median"]
    return entry


def expect_sound(device: torch.device) -> None:
    """Raises, and so ends the process, where the device is lost, or torch can capture nothing any more."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Trial:
    """The methods of one case, over the same input sets."""

    def __init__(self, case, device: torch.device, ceilings: dict) -> None:
        self.case, self.device, self.cache = case, device, ceilings["cache_bytes"]
        self.sets = case.sets(set_count(case.set_bytes, self.cache))
        self.references: dict[int, torch.Tensor] = {}
        self.cold: dict[str, Captured] = {}
        self.warm: dict[str, Captured] = {}
        self.eager: dict[str, Callable] = {}
        self.figures: dict[str, dict] = {}

    def add(self, name: str, prepare: Callable, bytes_read: int, ours: bool) -> None:
        """Prepared, called once, checked, captured, and checked again from the graphs."""
        count = min(set_count(bytes_read, self.cache), len(self.sets))
        calls = [prepare(given) for given in self.sets[:count]]
        errors = [self.check(calls[0](), 0, ours)]
        for call in calls[1:]:
            call()
        least = graph_calls(bytes_read)
        cold = capture(cold_calls(calls, least), self.device)
        warm = capture(calls[:1] * least, self.device)
        for graph, first, last in ((cold, 0, count - 1), (warm, 0, 0)):
            for out in (graph.outputs[0], graph.outputs[-1]):
                out.fill_(torch.nan)  # what the calls above left there is right
            graph.replay()
            synchronize(self.device)
            errors += [self.check(graph.outputs[0], first, ours), self.check(graph.outputs[-1], last, ours)]
        self.cold[name], self.warm[name], self.eager[name] = cold, warm, calls[0]
        self.figures[name] = {
            "ours": ours, "bytes_moved": bytes_read, "sets": count, "error": max(errors), "launches": cold.launches,
        }  # fmt: skip

    def check(self, out: torch.Tensor, which: int, ours: bool) -> float:
        if which not in self.references:
            self.references[which] = self.case.reference(self.sets[which])
        off, allowed = self.case.error(out, self.references[which]), self.case.tolerance(ours)
        if not off <= allowed:
            raise Wrong(f"error {off:.2g}, allowed {allowed:.2g}")
        return off

    def time(self, samples: int) -> dict[str, dict]:
        cold, warm = interleave(self.cold, samples), interleave(self.warm, samples)
        return {
            name: figures
            | {
                "cold": dataclasses.asdict(cold[name]),
                "warm": dataclasses.asdict(warm[name]),
                "host_s": host_seconds(self.eager[name], self.device),
            }
            for name, figures in self.figures.items()
        }


def describe(case) -> dict:
    """The shape, for the tables."""
    if case.op == "scoring":
        return {"tokens": case.tokens, "steps": case.steps, "dim": case.dim, "vocabulary": case.vocabulary}
    return {"geometry": str(case.geometry)} | case.params


def last_line(failure: BaseException) -> str:
    lines = [line for line in str(failure).strip().splitlines() if line.strip()]
    place = traceback.extract_tb(failure.__traceback__)[-1]
    return f"{type(failure).__name__}: {lines[0][:200] if lines else ''} ({Path(place.filename).name}:{place.lineno})"


if __name__ == "__main__":
    sys.exit(main())
