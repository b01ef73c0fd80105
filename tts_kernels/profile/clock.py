"""Wall time of nested ranges, and the energy of a GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass
class Span:
    """One range; `seconds` is complete when it has ended."""

    name: str
    seconds: float = 0.0


class Clock:
    """Seconds by name of range, each without the ranges inside of it: they sum to the outermost range.

    A range is marked for profilers: `record_function` for torch.profiler and, on CUDA, NVTX for Nsight. On CUDA the
    device is waited for at both ends of every range, so that its seconds are those of the work started in it; the whole
    then takes longer than it would without the clock.
    """

    def __init__(self, device: torch.device | str = "cpu", now: Callable[[], float] = time.perf_counter):
        self.seconds: dict[str, float] = {}
        self._cuda, self._device, self._now = torch.device(device).type == "cuda", device, now
        self._open: list[Span] = []
        self._first: float | None = None
        self._last = 0.0

    @property
    def wall(self) -> float:
        """Seconds from the first begin of a range to the last end, by the very readings that made the ranges' seconds:
        another process that has the core meanwhile is in both or in neither."""
        return 0.0 if self._first is None else self._last - self._first

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[Span]:
        label = f"tts_kernels.{name}"
        self._turn()
        span = Span(name)
        self._open.append(span)
        try:
            with torch.profiler.record_function(label), self._nvtx(label):
                yield span
        finally:
            self._turn()
            self._open.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + span.seconds

    def _turn(self) -> None:
        """What passed since the last begin or end belongs to the innermost range."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        now = self._now()
        if self._open:
            self._open[-1].seconds += now - self._last
        if self._first is None:
            self._first = now
        self._last = now

    def _nvtx(self, label: str) -> contextlib.AbstractContextManager:
        return torch.cuda.nvtx.range(label) if self._cuda else contextlib.nullcontext()


def joules(device: torch.device | str) -> float | None:
    """What a GPU has used since its driver was loaded, by NVML; None without a GPU, nvidia-ml-py or a counter."""
    if torch.device(device).type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000  # from millijoules
    except pynvml.NVMLError:
        return None
