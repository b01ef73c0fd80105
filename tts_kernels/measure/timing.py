"""Times of device calls: several methods side by side, each as a captured graph, L2 cold and warm.

A method is a list of calls, one for each of its input sets; the sets differ in memory, not in shape. Captured are
    cold   the sets one after the other: by the time a set comes again, the others have pushed it out of the L2
    warm   the first set again and again
and a sample is the time of one replay over its calls. Before it the graph runs once untimed, so that the device is busy
while the host issues what is timed, and the gap before the first kernel is not in it. The methods take turns sample by
sample, in an order that rotates: whatever else happens to the device meets all of them.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Call = Callable[[], Tensor]
SAMPLE_SECONDS = 0.5e-3  # that a sample lasts at least: event clocks tick in half microseconds
GRAPH_CALLS = 8
LONG_CALL_BYTES = 256 << 20  # read by a call that takes so long that a gap of microseconds behind it is little
MOST_SETS = 256
COLD_FACTOR = 4  # times the L2: the memory of the sets together


@dataclass(frozen=True)
class Times:
    """Seconds of one call, over the samples."""

    median: float
    q1: float
    q3: float
    least: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Times:
        if len(samples) < 2:
            raise ValueError(f"samples: expected at least 2, got {len(samples)}")
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q1, q3, min(samples), len(samples))


class Captured(Protocol):
    """Calls that were captured once and run again together."""

    outputs: list[Tensor]  # of each call; a replay writes them anew
    launches: float | None  # for each call: kernels, copies and fills; None where that cannot be seen

    def replay(self) -> None: ...

    def seconds(self, replays: int) -> float:
        """Of one call, over so many replays."""
        ...


class CapturedGraph:
    """On a GPU: a CUDA graph, timed by events."""

    def __init__(self, calls: Sequence[Call], cuda=torch.cuda) -> None:
        self.cuda, self.num_calls = cuda, len(calls)
        self.graph = cuda.CUDAGraph(keep_graph=True)
        self.outputs: list[Tensor] = []
        with capturing(self.graph, cuda):
            for call in calls:
                self.outputs.append(call())
        nodes = graph_nodes(self.graph)
        self.launches = None if nodes is None else nodes / len(calls)
        self.graph.instantiate()

    def replay(self) -> None:
        self.graph.replay()

    def seconds(self, replays: int) -> float:
        start, stop = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.graph.replay()
        start.record()
        for _ in range(replays):
            self.graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / (replays * self.num_calls)


_broken_off: list[object] = []  # graphs that were never finished: what torch keeps of their captures refers to them


@contextlib.contextmanager
def capturing(graph, cuda=torch.cuda) -> Iterator[None]:
    """torch.cuda.graph, which says what broke a capture off, and after which others are possible. By itself torch,
    until 2.12, stays on the stream of such a capture and takes it for one that goes on: no memory is given back any
    more, and no other capture begins."""
    before, pool, first = cuda.current_stream(), cuda.graph_pool_handle(), None
    try:
        with cuda.graph(graph, pool=pool):
            try:
                yield
            except Exception as error:
                first = error
                raise
    except Exception as error:
        cuda.set_stream(before)
        with contextlib.suppress(RuntimeError):  # there is nothing to end where torch has ended it
            torch._C._cuda_endAllocateToPool(cuda.current_device(), pool)
            _broken_off.append(graph)
            torch._C._cuda_releasePool(cuda.current_device(), pool)
        raise first or error from None


def graph_nodes(graph) -> int | None:
    """Nodes of a captured graph that was kept; None where CUDA's Python bindings are missing or another version."""
    try:
        from cuda.bindings import runtime

        error, _, count = runtime.cudaGraphGetNodes(graph.raw_cuda_graph(), numNodes=0)
        return count if error == runtime.cudaError_t.cudaSuccess else None
    except Exception:  # a figure less, never a lost run
        return None


class HostLoop:
    """On a CPU: the calls one after the other, by the host's clock."""

    launches = None

    def __init__(self, calls: Sequence[Call], clock: Callable[[], float] = time.perf_counter) -> None:
        self.calls, self.clock = list(calls), clock
        self.outputs: list[Tensor] = []
        self.replay()

    def replay(self) -> None:
        self.outputs = [call() for call in self.calls]

    def seconds(self, replays: int) -> float:
        start = self.clock()
        for _ in range(replays):
            self.replay()
        return (self.clock() - start) / (replays * len(self.calls))


def capture(calls: Sequence[Call], device: torch.device) -> Captured:
    """The calls have run before: what compiles or allocates for good has done so."""
    return CapturedGraph(calls) if device.type == "cuda" else HostLoop(calls)


def set_count(set_bytes: int, cache_bytes: int) -> int:
    """Input sets that make a cold call cold: enough memory to fill the cache COLD_FACTOR times, two at least; one where
    a set pushes out its own beginning many times over."""
    least = 1 if set_bytes > 4 * COLD_FACTOR * cache_bytes > 0 else 2
    return min(max(-(-COLD_FACTOR * cache_bytes // max(set_bytes, 1)), least), MOST_SETS)


def cache_bytes(device: torch.device) -> int:
    """Of the L2 of a GPU; 0 for a CPU, where nothing is claimed to be cold."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def graph_calls(call_bytes: int) -> int:
    """Calls that a graph has at least: the gap between two replays counts once for all of them."""
    return GRAPH_CALLS if call_bytes < LONG_CALL_BYTES else 1


def cold_calls(calls: Sequence[Call], least: int) -> list[Call]:
    """Every set as often as the others, and `least` calls or more."""
    return list(calls) * -(-least // len(calls))


def interleave(captured: dict[str, Captured], samples: int) -> dict[str, Times]:
    """So many samples of each, taking turns."""
    replays = {}
    for name, graph in captured.items():
        seconds = graph.seconds(1) * len(graph.outputs)
        replays[name] = min(max(round(SAMPLE_SECONDS / max(seconds, 1e-9)), 1), 64)
    taken: dict[str, list[float]] = {name: [] for name in captured}
    order = deque(captured)
    gc.collect()
    gc.disable()
    try:
        for _ in range(samples):
            order.rotate(1)
            for name in order:
                taken[name].append(captured[name].seconds(replays[name]))
    finally:
        gc.enable()
    return {name: Times.of(values) for name, values in taken.items()}


def host_seconds(call: Call, device: torch.device, calls: int = 10, rounds: int = 3) -> float:
    """What issuing a call costs the host, eager, while the device is busy: the median over the rounds. On a CPU it is
    the call itself."""
    times = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        for _ in itertools.repeat(None, calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    synchronize(device)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
