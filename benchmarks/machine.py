"""What the machine is and the most it can do: names, caches, threads, and the ceilings that floors are made of."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tts_kernels.ceilings import gemm_rate, read_bandwidth

ROOT = Path(__file__).resolve().parent.parent
GIB = 1 << 30


def describe() -> dict:
    """The machine_info of a record."""
    from tts_kernels.attention import cpu  # not at the top: `make gpu` starts before the native module is built

    cpuinfo = read("/proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)", cpuinfo, re.MULTILINE)
    model = re.search(r"^model name\s*:\s*(.+)", cpuinfo, re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "flags": sorted(f for f in flags[1].split() if f.startswith(("amx", "avx", "fma", "asimd"))) if flags else [],
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache(),
        "code_path": cpu.active_isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "omp": {name: value for name, value in sorted(os.environ.items()) if name.startswith(("OMP_", "GOMP_"))},
    }


def slug(info: dict) -> str:
    """A folder's name: processor, threads and code path."""
    cpu_name = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", " ", info["cpu"].lower())
    return re.sub(r"[^a-z0-9.]+", "-", f"{cpu_name} {info['threads']} threads {info['code_path']}").strip("-")


def commit() -> dict:
    """The commit_info of a record: what was measured. Dirty where the package's own sources differ from it."""
    found = git("rev-parse", "HEAD")
    return {"id": found or "unknown", "dirty": bool(found and git("status", "--porcelain", "csrc", "tts_kernels"))}


def git(*arguments: str) -> str:
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()


def read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def last_level_cache() -> int:
    """Bytes; 0 where the system does not say."""
    sizes = [read(p).strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units), default=0)


def memory_shortage(needed: int, device: str = "cpu") -> str:
    """ "" or, as a reason, that so many bytes (and some to work with) are not free."""
    if device == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info()
        free_bytes += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        short = needed + 2 * GIB > free_bytes
        return f"needs {needed / 1e9:.1f} GB on the GPU, {free_bytes / 1e9:.1f} GB are free" if short else ""
    free = re.search(r"MemAvailable:\s*(\d+) kB", read("/proc/meminfo"))
    if free is None or needed + GIB // 2 < int(free[1]) * 1024:
        return ""
    return f"needs {needed / 1e9:.1f} GB of memory, {int(free[1]) * 1024 / 1e9:.1f} GB are free"


def cache_evictor() -> Callable[[], None]:
    """A function that leaves every cache, of every core, full of something else. It reads: lines that a write leaves
    dirty would be written back during the timed call."""
    buffer = torch.ones(max(256 << 20, 4 * last_level_cache()) // 4)
    return lambda: buffer.sum()


def ceilings(buffer_bytes: int, gemm_sizes: tuple[int, ...], dtypes: dict[str, torch.dtype]) -> dict:
    """What floors are computed from. A type narrower than fp32 can be widened: its rate is fp32's at least."""
    gemm = {name: gemm_rate(dtype, gemm_sizes) for name, dtype in dtypes.items()}
    widened = gemm.get("fp32", 0.0)
    return {
        "read_bytes_per_s": read_bandwidth(buffer_bytes),
        "gemm_flops_per_s": gemm,
        "flops_per_s": {name: max(rate, widened) for name, rate in gemm.items()},
    }


def thread_cpus(seconds: float = 0.3) -> list[int]:
    """The CPUs on which the threads of a parallel region ran, one entry for each thread that worked; empty where /proc
    does not say."""
    a = torch.ones(384, 384)
    before, end = thread_times(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(a, a)
    after = thread_times()
    gained = {thread: (ticks - before.get(thread, (0, 0))[0], where) for thread, (ticks, where) in after.items()}
    most = max((ticks for ticks, _ in gained.values()), default=0)
    return sorted(where for ticks, where in gained.values() if ticks and ticks >= most / 4)


def thread_times() -> dict[str, tuple[int, int]]:
    """Of each thread of this process: clock ticks of processor time, and the CPU it last ran on."""
    times = {}
    for path in Path("/proc/self/task").glob("*/stat"):
        fields = read(path).rpartition(")")[2].split()
        if fields:
            times[path.parent.name] = (int(fields[11]) + int(fields[12]), int(fields[36]))
    return times
