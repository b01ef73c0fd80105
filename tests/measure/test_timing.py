"""Timing, on a device that is made up: what is captured and how often, what is timed and what is not."""

import itertools
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tts_kernels.measure import timing
from tts_kernels.measure.timing import CapturedGraph, HostLoop, Times, cold_calls, graph_calls, interleave, set_count


class FakeCuda:
    """A stream whose clock is the sum of what ran on it. A call of ours adds to `work` while a graph is captured."""

    def __init__(self, idle_gap: float = 0.0) -> None:
        self.now = 0.0
        self.capturing = None
        self.log = []
        self.idle_gap = idle_gap  # before the first graph on an idle stream
        self.idle = True
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = cuda.now
                cuda.log.append("record")

            def synchronize(self):
                cuda.idle = True

            def elapsed_time(self, stop):
                return 1e3 * (stop.at - self.at)

        class CUDAGraph:
            def __init__(self, keep_graph):
                assert keep_graph  # else its nodes cannot be counted
                self.seconds, self.nodes, self.ready = 0.0, 0, False

            def raw_cuda_graph(self):
                return self

            def instantiate(self):
                self.ready = True

            def replay(self):
                assert self.ready
                cuda.log.append("replay")
                cuda.now += self.seconds + cuda.idle_gap * cuda.idle
                cuda.idle = False

        self.Event, self.CUDAGraph = Event, CUDAGraph
        self.current_stream, self.graph_pool_handle = (lambda: None), (lambda: (0, 1))

    @contextmanager
    def graph(self, graph, pool):
        self.capturing = graph
        yield
        self.capturing = None

    def call(self, seconds, launches=2):
        def run():
            self.capturing.seconds += seconds
            self.capturing.nodes += launches
            return torch.zeros(1)

        return run


@pytest.fixture
def bindings(monkeypatch):
    """cuda.bindings.runtime, as far as it is used."""
    runtime = SimpleNamespace(
        cudaGraphGetNodes=lambda graph, numNodes: ("ok", [], graph.nodes),
        cudaError_t=SimpleNamespace(cudaSuccess="ok"),
    )
    package, module = ModuleType("cuda"), ModuleType("cuda.bindings")
    module.runtime = runtime
    package.bindings = module
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings", module)


def test_a_graph_is_timed_while_the_device_is_busy(bindings):
    cuda = FakeCuda(idle_gap=1.0)
    graph = CapturedGraph([cuda.call(2e-6), cuda.call(4e-6)], cuda)
    assert graph.launches == 2 and len(graph.outputs) == 2
    assert graph.seconds(10) == pytest.approx(3e-6)  # of a call; the gap of a second is in the untimed replay
    assert cuda.log == ["replay", "record", *["replay"] * 10, "record"]


def test_without_bindings_there_is_no_count(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    cuda = FakeCuda()
    assert CapturedGraph([cuda.call(1e-6)], cuda).launches is None


def test_methods_take_turns_and_samples_are_long_enough(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-3)
    cuda = FakeCuda()
    order = []

    class Spy(CapturedGraph):
        def seconds(self, replays):
            order.append((self.name, replays))
            return super().seconds(replays)

    captured = {}
    for name, seconds in (("fast", 1e-5), ("slow", 1e-2)):
        captured[name] = Spy([cuda.call(seconds)] * 4, cuda)
        captured[name].name = name
    times = interleave(captured, 4)
    assert times["fast"].median == pytest.approx(1e-5) and times["slow"].median == pytest.approx(1e-2)
    assert times["fast"].samples == 4
    taken = order[2:]  # after one each that tells how many replays a sample needs
    assert [name for name, _ in taken] == ["slow", "fast", "fast", "slow"] * 2
    assert set(taken) == {("fast", 25), ("slow", 1)}


def test_cold_sets_fill_the_cache_several_times():
    assert set_count(100 << 20, 50 << 20) == 2
    assert set_count(1 << 20, 50 << 20) == 200
    assert set_count(1 << 30, 50 << 20) == 1
    assert set_count(1, 50 << 20) == timing.MOST_SETS
    assert set_count(1 << 20, 0) == 2
    assert graph_calls(1 << 20) == 8 and graph_calls(1 << 30) == 1
    calls = [lambda i=i: i for i in range(3)]
    assert [call() for call in cold_calls(calls, 8)] == [0, 1, 2] * 3
    assert [call() for call in cold_calls(calls, 1)] == [0, 1, 2]


def test_host_loop_with_a_clock_that_is_given():
    ticks = itertools.count(0.0, 6.0)
    loop = HostLoop([lambda: torch.zeros(1)] * 3, clock=lambda: next(ticks))
    assert loop.seconds(2) == 1.0 and len(loop.outputs) == 3


def test_times():
    got = Times.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (got.median, got.q1, got.q3, got.least, got.samples) == (3.0, 2.0, 4.0, 1.0, 5)
    with pytest.raises(ValueError, match="samples: expected at least 2, got 1"):
        Times.of([1.0])
