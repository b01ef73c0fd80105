"""The most that a device does: bytes per second from its memory, FLOP per second of its matrix products. Measured, by
torch's own kernels, in this process: what floors are made of."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

CPU_BYTES, CUDA_BYTES = 512 << 20, 1 << 30  # of the buffers: far larger than caches
CPU_SECONDS = 0.06  # for each figure
CPU_SIZES, CUDA_SIZES = (512, 1024, 2048), (4096, 8192)  # of the matrices


@dataclass(frozen=True)
class Ceilings:
    bandwidth: float  # bytes per second
    flops: dict[str, float]  # FLOP per second, by the name of a dtype: "float32", "bfloat16", ...


def measured(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The ceilings of a device, for one dtype: measured by the first call of a process, which takes a second or two,
    and kept; on the CPU, kept for each number of torch's threads. While the device has other work they come out low.

    CPU: the rate at which all threads read 512 MiB (`read_bandwidth`), and that of torch.mm (`gemm_rate`).
    CUDA and ROCm: the rate of a copy from device memory to device memory, bytes read and bytes written both counted
    (`copy_bandwidth`), and that of torch.mm, fp32 at the precision that torch is set to.
    A dtype narrower than float32 can be widened: it counts with float32's rate at least.

    Raises ValueError for another kind of device.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, where ceilings can be measured, got {device}")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    rate = device_gemm_rate(device, dtype, threads)
    if dtype.itemsize < 4:
        rate = max(rate, device_gemm_rate(device, torch.float32, threads))
    return Ceilings(device_bandwidth(device, threads), {str(dtype).removeprefix("torch."): rate})


@functools.cache
def device_bandwidth(device: torch.device, threads: int) -> float:
    return read_bandwidth(CPU_BYTES, CPU_SECONDS) if device.type == "cpu" else copy_bandwidth(device)


@functools.cache
def device_gemm_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    if device.type == "cpu":
        return gemm_rate(dtype, CPU_SIZES, CPU_SECONDS)
    return gemm_rate(dtype, CUDA_SIZES, device=device)


def read_bandwidth(buffer_bytes: int, least_seconds: float = 0.3) -> float:
    """Bytes per second that all threads together read: the fastest of several passes of two reductions."""
    floats = torch.ones(buffer_bytes // 4, device="cpu")
    ints = floats.view(torch.int32)
    return floats.nbytes / min(best_time(floats.sum, least_seconds), best_time(ints.amax, least_seconds))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of the fastest of several copies within device memory."""
    source = torch.ones(CUDA_BYTES // 4, device=device)
    copy = torch.empty_like(source)
    return 2 * source.nbytes / best_time(lambda: copy.copy_(source), device=device)


def gemm_rate(
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    least_seconds: float = 0.3,
    device: torch.device | str = "cpu",
) -> float:
    """FLOP per second of torch.mm on random square matrices, the largest over the sizes. Larger sizes are left out once
    one takes long: some types have no fast path on some machines."""
    best = 0.0
    generator = torch.Generator(device).manual_seed(0)  # the caller's random numbers stay what they were
    for size in sizes:
        a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
        with torch.autocast(a.device.type, enabled=False):
            seconds = best_time(lambda a=a, b=b: torch.mm(a, b), least_seconds, device=device)
        best = max(best, 2 * size**3 / seconds)
        if seconds > least_seconds / 3:
            break
    return best


def best_time(
    function: Callable[[], object],
    least_seconds: float = 0.3,
    least_calls: int = 4,
    device: torch.device | str = "cpu",
) -> float:
    """Seconds of the fastest of so many calls or more. On a GPU by the device's clock, after one call that is not
    timed, and at most 50 calls."""
    if torch.device(device).type == "cuda":
        return best_device_time(function, torch.device(device), least_seconds, least_calls)
    best, end, calls = math.inf, time.perf_counter() + least_seconds, 0
    while calls < least_calls or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
        calls += 1
    return best


def best_device_time(
    function: Callable[[], object], device: torch.device, least_seconds: float, least_calls: int
) -> float:
    with torch.cuda.device(device):
        function()
        best, total, calls = math.inf, 0.0, 0
        while calls < least_calls or (total < least_seconds and calls < 50):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            stop.record()
            stop.synchronize()
            seconds = start.elapsed_time(stop) / 1000
            best, total, calls = min(best, seconds), total + seconds, calls + 1
    return best
