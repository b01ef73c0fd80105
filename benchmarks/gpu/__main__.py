"""`python -m benchmarks.gpu`, or `make gpu`: the stages, a record, a short table last. Exit status 0 if every stage
that was asked for passed, or was skipped for a reason that it names."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from .. import machine
from ..report import RESULTS
from . import record as records
from .report import table
from .stages import STAGES, WORK, Result, Run

DESCRIBE = """
import json, platform, torch
from importlib import metadata
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
software = {name: version(name) for name in ("torch", "triton", "transformers", "flashinfer-python")}
software |= {"python": platform.python_version(), "cuda": torch.version.cuda, "hip": torch.version.hip}
device = {"name": "cpu, dry run", "arch": "interpreter", "memory_bytes": 0, "l2_bytes": 0, "multiprocessors": 0}
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    device = {"name": p.name, "arch": f"sm_{p.major}{p.minor}", "memory_bytes": p.total_memory,
              "l2_bytes": p.L2_cache_size, "multiprocessors": p.multi_processor_count}
print(json.dumps({"device": device, "software": software, "gpu": torch.cuda.is_available()}))
"""


def main() -> int:
    names = [stage.name for stage in STAGES]
    default = [stage.name for stage in STAGES if stage.default]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{stage.name:10}{stage.budget:5.0f} s  {stage.what}" for stage in STAGES),
    )  # fmt: skip
    parser.add_argument("--stages", default=" ".join(default), metavar="NAMES", help="default: %(default)s")
    parser.add_argument(
        "--budget", action="append", default=[], metavar="STAGE=SECONDS", help="other than the ones below"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the record goes")
    parser.add_argument("--commit", default=os.environ.get("COMMIT", ""), help="where there is no git: what this is")
    parser.add_argument("--dry", action="store_true", help="everything small, on the CPU: whether it works")
    given = parser.parse_args()
    asked = given.stages.split()
    if unknown := set(asked) - set(names):
        parser.error(f"--stages: expected some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    # A dry run is little work, for a machine that may be small and busy.
    budgets = {stage.name: stage.budget * (4 if given.dry else 1) for stage in STAGES}
    for text in given.budget:
        name, _, seconds = text.partition("=")
        if name not in names or not seconds.replace(".", "", 1).isdigit():
            parser.error(f"--budget: expected STAGE=SECONDS, got {text!r}")
        budgets[name] = float(seconds)

    results = given.results.resolve()
    if given.dry and results == RESULTS:  # its figures mean nothing
        results = WORK / "results"
    run = Run(given.dry, "dry" if given.dry else "full", results)
    try:
        found = describe(run)
    except (subprocess.SubprocessError, ValueError) as error:
        print(f"error: torch does not start here: {error}", file=sys.stderr)
        return 1
    if not (found["gpu"] or given.dry):
        print("error: torch sees no GPU here; --dry shows on a CPU whether everything works", file=sys.stderr)
        return 1
    if not given.dry:
        run = dataclasses.replace(run, arch=found["device"]["arch"])
    commit = machine.commit()
    record = {
        "kind": records.KIND,
        "version": records.VERSION,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "grid": run.grid,
        "commit": {"id": given.commit, "dirty": False} if given.commit else commit,
        "device": found["device"] | {"driver": driver()},
        "software": found["software"],
        "stages": {},
    }
    for stage in STAGES:
        if stage.name in asked:
            record["stages"][stage.name] = perform(stage, run, budgets[stage.name])
    passed = all(stage["status"] in ("passed", "skipped") for stage in record["stages"].values())
    try:
        where = f"wrote {records.save(record, run.results)}"
    except ValueError as error:
        aside = run.results / "invalid-record.json"
        run.results.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(record, indent=1))
        where, passed = f"no record, but {aside}: {error}", False
    print(table(record))
    print(where)
    return int(not passed)


def perform(stage, run: Run, budget: float) -> dict:
    """The stage's entry of the record, whatever happens in it."""
    print(f"-- {stage.name}: {stage.what}, at most {budget:.0f} s", flush=True)
    start = time.monotonic()
    try:
        result = stage.run(run, start + budget)
    except Exception as error:
        result = Result("failed", [f"{type(error).__name__}: {error}"[:300]])
    seconds = time.monotonic() - start
    print(f"   {result.status} after {seconds:.0f} s", flush=True)
    return result.data | {
        "status": result.status, "seconds": seconds, "budget_s": budget, "lines": result.lines
    }  # fmt: skip


def describe(run: Run) -> dict:
    """Device and software, by a process of its own: this one never touches the device."""
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE], env=run.environment(), capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        raise ValueError(done.stderr.strip()[-300:])
    return json.loads(done.stdout)


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
