"""`python -m benchmarks.gpu.warm_up`: compiles what the later stages launch, side by side: our kernels into Triton's
cache, FlashInfer's into its own, and what torch.compile makes of peers into Inductor's."""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)  # kernels are plain Python under the interpreter

import argparse
import subprocess
import sys
import time

import torch

from tts_kernels.attention import triton as backend
from tts_kernels.measure.compiling import Launch, compile_ahead, geometry_launches, target_of

from ..static import cases as static
from .cases import grid, tree_cases


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.warm_up", description=__doc__)
    parser.add_argument("--grid", default="full")
    parser.add_argument("--arch", help="without a GPU: compile for this one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    name, arch = ("", given.arch) if given.arch else backend.device_kind(torch.device("cuda", 0))
    geometries = {case.geometry for case in tree_cases(grid(given.grid), "cuda")}
    launches = [launch for g in geometries for launch in geometry_launches(g, name, arch)]
    peers = []
    if not given.arch:
        dims = sorted({str(g.head_dim) for g in geometries})
        modules = (
            ["benchmarks.peers.flashinfer", *dims],
            ["benchmarks.gpu.bench", "--grid", given.grid, "--compile"],
            ["benchmarks.gpu.sanitized"],  # launches each kernel on odd shapes: it would compile them one by one later
        )
        # Processes of their own: the compilers below are forks, which threads would endanger.
        peers = [subprocess.Popen([sys.executable, "-m", *module]) for module in modules]
        launches += kernels_without_configs(arch)
    start = time.perf_counter()
    count, errors = compile_ahead(launches, target_of(arch), given.jobs)
    report(f"{count} Triton kernels for {arch}: {time.perf_counter() - start:.0f} s, {len(errors)} failed")
    for error in errors:
        report(error)
    for peer in peers:  # what fails there is named beside the cases that lack it
        peer.wait()
    return int(bool(errors))


def kernels_without_configs(arch: str) -> list[Launch]:
    cases = [*static.others(), *(static.scorings(arch) if arch in static.MMA else ())]
    return [(case.kernel, case.args, case.kwargs) for case in cases]


def report(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
