"""The stages of `make gpu`. Each runs in processes of its own, within a budget: one that fails, hangs or takes the
device down leaves the others to run, and what it had found until then."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tts_kernels.configs import KEYS

from ..machine import ROOT
from . import cases
from .bench import OURS, all_cases

WORK = ROOT / "build" / "gpu"
SHARDS = 14  # of the tests: they compile as they go, one kernel after the other in each
RESTARTS = 8  # of the benchmarks, and of each shard, after crashes
LEAST_TEST = 60  # seconds that a test may take at least; else half of the stage's
START = 20  # seconds until a process has imported torch and begun


@dataclass(frozen=True)
class Run:
    """dry: everything small, on the CPU, Triton's kernels under its interpreter. arch: of the GPU, such as "sm_90"."""

    dry: bool
    grid: str
    results: Path
    arch: str = ""

    def environment(self) -> dict[str, str]:
        found = os.environ | {
            "TRITON_CACHE_DIR": str(WORK / "triton"),
            "FLASHINFER_WORKSPACE_BASE": str(WORK),
            "TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor"),
            "PYTHONUNBUFFERED": "1",
            # ninja and pytest of the interpreter that runs this.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }
        if self.dry:
            found |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return found


@dataclass
class Result:
    status: str = "passed"  # "failed", "timed out", "skipped"
    lines: list[str] = field(default_factory=list)  # of the short table
    data: dict = field(default_factory=dict)  # more of the record

    def fail(self, line: str, status: str = "failed") -> None:
        self.status = status
        self.lines.append(line)


@dataclass(frozen=True)
class Stage:
    name: str
    budget: float  # seconds
    run: Callable[[Run, float], Result]  # with the moment, of time.monotonic, at which it has to be done
    what: str
    default: bool = True


@dataclass(frozen=True)
class Done:
    code: int
    timed_out: bool
    output: str

    @property
    def tail(self) -> list[str]:
        return [line[:200] for line in self.output.strip().splitlines()[-3:]]


class Job:
    """A command in a process group of its own, its output in WORK/<name>.log."""

    def __init__(self, run: Run, name: str, command: list[str], **environment: str) -> None:
        WORK.mkdir(parents=True, exist_ok=True)
        self.log = WORK / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=run.environment() | environment, stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def wait(self, end: float) -> Done:
        timed_out = False
        try:
            self.process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            timed_out = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # and what it left behind
        code = self.process.wait()
        return Done(code, timed_out, self.log.read_text(errors="replace"))


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def judge(result: Result, done: Done, name: str) -> Result:
    if done.timed_out:
        result.fail(f"{name}: ran out of its time", "timed out")
    elif done.code:
        result.fail(f"{name}: exit status {done.code}")
        result.lines += done.tail
    return result


def ending(done: Done) -> str:
    """What a process that went down said last."""
    if re.search(r"Timeout \(\d+:\d\d:\d\d\)!", done.output):  # faulthandler's, with exit=True
        return "it did not end"
    # Torch adds lines of advice to CUDA's errors.
    raised = re.findall(r"^[\w.]+(?:Error|Exception): .*", done.output, re.MULTILINE)
    return f"status {done.code}: {(raised or done.tail or [''])[-1]}"[:200]


def build(run: Run, end: float) -> Result:
    """For this GPU's architecture alone, where there is an nvcc: for all of them it takes three times as long."""
    archs = {}
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("/usr/local/cuda/bin/nvcc")
    if run.arch.startswith("sm_") and found and "TTS_KERNELS_CUDA_ARCHS" not in os.environ:
        archs["TTS_KERNELS_CUDA_ARCHS"] = run.arch.removeprefix("sm_") + "a" * (run.arch in ("sm_90", "sm_100"))
    done = Job(run, "build", python("setup.py", "-q", "build_ext", "--inplace"), **archs).wait(end)
    result = judge(Result(), done, "setup.py")
    told = Job(run, "doctor", python("-m", "tts_kernels.cli", "doctor")).wait(end)
    result.data["doctor"] = told.output.splitlines()
    return judge(result, told, "doctor")


def warm_up(run: Run, end: float) -> Result:
    extra = ["--arch", "sm_90"] if run.dry else []
    done = Job(run, "compile", python("-m", "benchmarks.gpu.warm_up", "--grid", run.grid, *extra)).wait(end)
    lines = [
        line
        for line in done.output.splitlines()
        if "Triton kernels" in line or line.startswith(("FlashInfer ", "flex ", "compiled "))
    ]
    return judge(Result(lines=[line[:200] for line in lines]), done, "compile")


def test(run: Run, end: float) -> Result:
    """Shards of the tests marked gpu, side by side."""
    count = 2 if run.dry else min(SHARDS, os.cpu_count() or 1)
    with ThreadPoolExecutor(count) as pool:
        ended = list(pool.map(lambda i: test_shard(run, i, count, end), range(count)))
    result, outcomes = Result(), {}
    for i, (done, lines) in enumerate(ended):
        # A test that failed and then could not be torn down stands there twice.
        for line in lines:
            if "test" in line and outcomes.get(line["test"], {}).get("outcome") != "failed":
                outcomes[line["test"]] = line
        last = next((line["begin"] for line in reversed(lines) if "begin" in line), "before any test")
        if done.timed_out:
            result.fail(f"shard {i} ran out of time, last in {last}", "timed out")
        elif not any("exit" in line for line in lines):
            result.fail(f"shard {i} died (status {done.code}), last in {last}: {' '.join(done.tail)[:200]}")
        elif done.code not in (0, 1, 5):  # 5: no tests for this shard
            result.fail(f"shard {i}: pytest's exit status {done.code}: {' '.join(done.tail)[:200]}")
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for line in outcomes.values():
        counts[line["outcome"]] += 1
    failed = [line for line in outcomes.values() if line["outcome"] == "failed"]
    result.lines.insert(0, ", ".join(f"{n} {outcome}" for outcome, n in counts.items()) + f" in {count} shards")
    for line in failed[:8]:
        result.fail(f"{line['test']}: {line['error']}"[:200])
    if not counts["passed"]:
        result.fail("no test passed")
    result.data = {"counts": counts, "failed": failed}
    return result


def test_shard(run: Run, i: int, count: int, end: float) -> tuple[Done, list[dict]]:
    """How its last process ended, and the lines of all: behind a test that took one down, another goes on."""
    log = WORK / f"test-{i}.jsonl"
    log.unlink(missing_ok=True)
    chosen = ["tests/measure/test_timing.py"] if run.dry else ["-m", "gpu", "tests"]
    plugins = ["-p", "benchmarks.gpu.shard", "-p", "no:cacheprovider"]
    command = python("-m", "pytest", "-q", "--continue-on-collection-errors", *plugins, *chosen)
    environment = {
        "TTS_SHARD": f"{i}/{count}",
        "TTS_SHARD_LOG": str(log),
        "TTS_SHARD_SECONDS": f"{max((end - time.monotonic()) / 2, LEAST_TEST):.0f}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // count, 1)),  # the oracle runs on the CPU
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    for attempt in range(RESTARTS + 1):
        before = len(read_lines(log))
        done = Job(run, f"test-{i}-{attempt}", command, **environment).wait(end)
        lines = read_lines(log)
        begun = [line["begin"] for line in lines[before:] if "begin" in line]
        if done.timed_out or not begun or any("exit" in line for line in lines):
            break
        if not any(line.get("test") == begun[-1] for line in lines):
            told = {"test": begun[-1], "outcome": "failed", "error": f"took its process down: {ending(done)}"}
            with log.open("a") as file:
                print(json.dumps(told), file=file)
    return done, read_lines(log)


def sanitize(run: Run, end: float) -> Result:
    """The program alone, which compiles what it needs; then under memcheck and racecheck, side by side."""
    program = python("-m", "benchmarks.gpu.sanitized")
    checker = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    begin = time.monotonic()
    alone = Job(run, "sanitize", program).wait(end if run.dry else begin + (end - begin) * 0.4)
    result = judge(Result(), alone, "alone")
    if run.dry or not checker:
        why = "a dry run" if run.dry else "compute-sanitizer is not installed"
        result.lines.insert(0, f"{why}: the program alone was run")
        if not run.dry and result.status == "passed":
            result.status = "skipped"
        return result
    # Without torch's cache of memory every tensor is an allocation, and a step out of it is seen.
    jobs = {
        tool: Job(run, f"sanitize-{tool}", [checker, "--tool", tool, "--error-exitcode", "9", *program],
                  PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        for tool in ("memcheck", "racecheck")
    }  # fmt: skip
    refused = 0
    for tool, job in jobs.items():
        done = job.wait(end)
        if done.code and "Device not supported" in done.output:  # as under gVisor
            result.lines.append(f"{tool}: compute-sanitizer does not support this device here")
            refused += 1
            continue
        result.lines += [f"{tool}: {line.strip('= ')}" for line in done.output.splitlines() if "SUMMARY" in line]
        judge(result, done, tool)
    if refused == len(jobs) and result.status == "passed":
        result.status = "skipped"
    return result


def bench(run: Run, end: float) -> Result:
    """Starts benchmarks.gpu.bench again where a method took its process down or did not end. A peer is left out from
    there on; a case is where it was ours; where it came while all were timed, the case is run without peers first."""
    WORK.mkdir(parents=True, exist_ok=True)
    lines, names, left_out = WORK / "bench.jsonl", WORK / "bench-names.json", WORK / "bench-without.json"
    lines.unlink(missing_ok=True)
    everything = [case.name for case in all_cases(cases.grid(run.grid), "cuda")]
    todo = list(everything)
    result, alone, without = Result(), {}, {}
    for attempt in range(RESTARTS + 1):
        only_ours = [name for name in todo[:1] if name in alone]
        names.write_text(json.dumps(only_ours or todo))
        left_out.write_text(json.dumps(without))
        files = ["--out", str(lines), "--names", str(names), "--without", str(left_out)]
        command = python("-m", "benchmarks.gpu.bench", "--grid", run.grid, *files)
        done = Job(run, f"bench-{attempt}", command + ["--only-ours"] * bool(only_ours)).wait(end)
        found = read_lines(lines)
        finished = {line["case"]["name"] for line in found if "case" in line}
        begun = [line["begin"] for line in found if "begin" in line]
        todo = [name for name in todo if name not in finished]
        if done.timed_out:
            result.fail(f"out of time: {len(todo)} cases not run", "timed out")
            break
        if done.code:
            name = begun[-1] if begun and begun[-1] in todo else None
            last = next((line for line in reversed(found) if "begin" in line or "method" in line), {})
            method = last.get("method", "")
            why = ending(done)
            result.fail(f"crashed in {f'{name}, {method or None}' if name else 'no case'}: {why}"[:300])
            if name is None:
                break
            if method == OURS or name in alone:
                todo.remove(name)
            elif method:
                without[method] = f"it took the process down in {name}: {why}"[:300]
            else:
                todo = [name, *(other for other in todo if other != name)]
                alone[name] = why
        if not todo:
            break
    found = read_lines(lines)
    entries = [line["case"] for line in found if "case" in line]
    for entry in entries:
        if entry["name"] in alone:
            entry["missing"]["peers"] = f"one took the process down: {alone[entry['name']]}"
        for method, text in entry["wrong"].items():
            what = "failed" if entry["status"] == "failed" else "wrong result"
            result.fail(f"{what}: {method}, {entry['name']}: {text}")
    ceilings = [line["ceilings"] for line in found if "ceilings" in line]
    after = [line["ceilings_after"] for line in found if "ceilings_after" in line]
    result.data = {
        "ceilings": ceilings[0] if ceilings else None,
        "ceilings_after": after[-1] if after else None,
        "cases": entries,
        "not_run": [name for name in everything if name not in {entry["name"] for entry in entries}],
    }
    return result


def tune(run: Run, end: float) -> Result:
    """Starts nothing that would not be finished in time; what is left out is named."""
    small = ["--small", "--geometry", "2/1 d16 fp32", "--width", "d40 V300 fp32"] if run.dry else []
    out = ["--out", str(run.results / "tables"), "--seconds", f"{max(end - time.monotonic() - START, 1):.0f}"]
    done = Job(run, "tune", python("-m", "tts_kernels.cli", "tune", *out, *small)).wait(end)
    lines = [line[:200] for line in done.output.splitlines() if line.startswith(tuple(KEYS)) or "wrote" in line]
    return judge(Result(lines=lines), done, "tune")


def models(run: Run, end: float) -> Result:
    """Whole-model runs; transformers may be missing."""
    if importlib.util.find_spec("transformers") is None:
        return Result("skipped", ["transformers is not installed"])
    out = WORK / "models.json"
    out.unlink(missing_ok=True)
    dry = ["--dry"] if run.dry else []
    done = Job(run, "models", python("-m", "benchmarks.gpu.models", "--out", str(out), *dry)).wait(end)
    result = judge(Result(lines=[line[:200] for line in done.output.splitlines()][-8:]), done, "models")
    if out.exists():
        result.data = json.loads(out.read_text())
    return result


STAGES = (
    Stage("build", 60, build, "the native module; what `tts-kernels doctor` says"),
    Stage("compile", 90, warm_up, "Triton's kernels and the peers', side by side"),
    Stage("test", 135, test, "the tests marked gpu"),
    Stage("sanitize", 45, sanitize, "each kernel under compute-sanitizer"),
    Stage("bench", 150, bench, "ceilings, our ops and their peers"),
    Stage("models", 300, models, "whole-model runs", default=False),
    Stage("tune", 500, tune, "tts-kernels tune; tables go to RESULTS/tables", default=False),
)


def read_lines(path: Path) -> list[dict]:
    """Whole lines of JSON; the last may have been cut off."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found
