"""Timing of several methods side by side."""

from __future__ import annotations

import gc
import statistics
import time
from collections import deque
from collections.abc import Callable

from .cases import Grid

OURS = "ours"


def interleave(
    benchmark, methods: dict[str, Callable], prepare: Callable, grid: Grid, rounds: int | None = None
) -> None:
    """Times the methods round by round, each once in a round, so that whatever else the machine does meets all of them.

    methods[OURS] is what pytest-benchmark measures: the stats of the benchmark are its own. The others are timed, with
    the same clock, in the set-up and the tear-down of each of its rounds; they go to benchmark.extra_info["peers"] with
    their raw times. The order rotates. `prepare` runs before each timed call, for the first call of a round as for the
    last. All methods have been called before. The grid says how many rounds, where they are not given.
    """
    times: dict[str, list[float]] = {name: [] for name in methods if name != OURS}

    def one(name: str) -> float:
        prepare()
        start = time.perf_counter()
        methods[name]()
        return time.perf_counter() - start

    if rounds is None:
        start = time.perf_counter()
        for name in methods:
            one(name)
        rounds = int(grid.seconds / (time.perf_counter() - start))
        rounds = min(max(rounds, grid.min_rounds), grid.max_rounds)
    order = deque(methods)

    def before() -> None:
        order.rotate(1)
        for name in list(order)[: order.index(OURS)]:
            times[name].append(one(name))
        prepare()

    def after() -> None:
        for name in list(order)[order.index(OURS) + 1 :]:
            times[name].append(one(name))

    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(methods[OURS], setup=before, teardown=after, rounds=rounds)
    finally:
        gc.enable()
    benchmark.extra_info["peers"] = {name: summary(t) for name, t in times.items()}


def summary(times: list[float]) -> dict:
    """Seconds; the names are those of pytest-benchmark's stats."""
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    spread = {"median": median, "q1": q1, "q3": q3, "iqr": q3 - q1, "min": min(times)}
    return spread | {"rounds": len(times), "data": times}
