"""The clock of a profile, on a fake one: ranges exclude what is inside of them, and sum."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from tts_kernels.profile import clock as module
from tts_kernels.profile.clock import Clock, joules


class Now:
    """A clock that stands still until it is told."""

    def __init__(self):
        self.time = 0.0

    def __call__(self) -> float:
        return self.time

    def wait(self, seconds: float) -> None:
        self.time += seconds


def test_ranges_exclude_what_is_inside():
    now = Now()
    clock = Clock("cpu", now)
    now.wait(5)
    with clock("whole") as whole:
        now.wait(1)
        with clock("part") as part:
            now.wait(2)
            with clock("inner"), clock("part"):
                now.wait(4)
            now.wait(8)
        now.wait(16)
        with clock("part"):
            now.wait(32)
    now.wait(64)
    assert clock.seconds == {"whole": 17, "part": 46, "inner": 0}
    assert (whole.seconds, part.seconds) == (17, 10), "of this range alone"
    assert sum(clock.seconds.values()) == clock.wall == 63, "not what came before and after"


def test_a_range_ends_with_an_error():
    now = Now()
    clock = Clock("cpu", now)

    def interrupted():
        with clock("part"):
            now.wait(1)
            raise KeyboardInterrupt

    with clock("whole"):
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        now.wait(2)
    assert clock.seconds == {"part": 1, "whole": 2}


def test_ranges_are_marked_for_torch_profiler():
    clock = Clock()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu) as profiler, clock("prm"), clock("prm_head"):
        torch.zeros(1)
    assert {"tts_kernels.prm", "tts_kernels.prm_head"} <= {event.key for event in profiler.key_averages()}


def test_on_cuda_ranges_wait_and_are_marked_for_nsight(monkeypatch):
    calls = []

    class Range:
        def __init__(self, label):
            self.label = label

        def __enter__(self):
            calls.append(f"push {self.label}")

        def __exit__(self, *error):
            calls.append(f"pop {self.label}")

    monkeypatch.setattr(module.torch.cuda, "synchronize", lambda device: calls.append(f"wait for {device}"))
    monkeypatch.setattr(module.torch.cuda.nvtx, "range", Range)
    with Clock("cuda:1")("prm"):
        calls.append("work")
    mark = "tts_kernels.prm"
    assert calls == ["wait for cuda:1", f"push {mark}", "work", f"pop {mark}", "wait for cuda:1"]


def test_energy_of_a_gpu(monkeypatch):
    class Error(Exception):
        pass

    nvml = SimpleNamespace(
        NVMLError=Error, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 2500 if handle == "GPU-17" else 0,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=17))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert joules("cpu") is None
    assert joules("cuda") == 2.5, "NVML counts millijoules"

    def refuse(handle):
        raise Error("not supported")

    nvml.nvmlDeviceGetTotalEnergyConsumption = refuse
    assert joules("cuda") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert joules("cuda") is None, "nvidia-ml-py is not installed"
