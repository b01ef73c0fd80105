"""The plans of captured decode graphs, on plain tensors: whatever requests come, grow, branch and go, a replay reads
the same memory as when it was captured, and gives what an eager call with a plan of its own gives."""

from __future__ import annotations

import random

import attention_paths as paths
import pytest
import torch
from dense import assert_close
from sglang_traffic import Calls, CudaGraph, Traffic, places

from tts_kernels import tree_attention
from tts_kernels.integrations import sglang as plugin
from tts_kernels.integrations.graph_plans import DEPTH, GraphPlans
from tts_kernels.tree import block_table
from tts_kernels.tree.prefix import DeviceTable

SIZES = 1, 2, 4, 8  # batches that are captured
HQ, HKV, D = 4, 2, 64
CONTEXT = 320


def kernels() -> list:
    cpu = [path for path in paths.ALL if path.backend == "cpu" and path.isa == "portable"]
    found = paths.available((*cpu, *(p for p in paths.ALL + paths.WARPGROUPS if p.backend in ("cuda", "triton"))))
    return [param for param in found if param.values[0].missing() is None]


class Runner:
    """Graphs of two layers' attention, one for each of SIZES, replayed as SGLang's runner does: a batch is padded to
    the next size by requests in row 0 with one token."""

    def __init__(self, path: paths.Path, traffic: Traffic, window: int) -> None:
        self.backend, self.device, self.traffic, self.window = path.backend, path.device, traffic, window
        dtype = path.takes(torch.float32)
        self.caches = [torch.full((traffic.num_slots, HKV, D), torch.nan).to(path.device, dtype) for _ in range(2)]
        for cache in self.caches:
            cache[: traffic.page_size] = 0
        self.table = traffic.table.to(path.device)
        self.rows, self.lens = (torch.ones(SIZES[-1], dtype=torch.int64, device=path.device) for _ in range(2))
        self.q, self.out = (torch.zeros(SIZES[-1], HQ, D, dtype=dtype, device=path.device) for _ in range(2))
        self.generator = torch.Generator().manual_seed(0)
        self.pages = -(-traffic.table.shape[1] // traffic.page_size)
        self.plans = GraphPlans(traffic.page_size, path.device, self.attend)
        self.graphs, self.places = {}, {}
        for size in reversed(SIZES):
            plan = self.write(size)
            if path.device == "cuda":  # SGLang warms up what it captures
                self.attend(plan)
            with CudaGraph() if path.device == "cuda" else Calls(path.backend) as graph:
                for _ in range(2):
                    self.attend(plan)
            self.graphs[size], self.places[size] = graph, places(plan)

    def attend(self, plan) -> None:
        self.attention(self.q[: plan.num_rows], plan, out=self.out[: plan.num_rows])

    def attention(self, q, plan, **options):
        caches = [plugin.as_pages(cache, self.traffic.page_size) for cache in self.caches]
        options = {"backend": self.backend, "window": self.window, **options}
        return tree_attention(q, *caches, plan, **options)

    def write(self, size: int):
        plan = self.plans.plan_for(size, self.pages)
        arguments = self.table, self.rows[:size], self.lens[:size]
        assert plugin.make_plan(*arguments, page_size=self.traffic.page_size, into=plan) is plan
        return plan

    def step(self) -> tuple[int, int]:
        """Of a batch: how many requests it has, and how many it is padded to."""
        traffic, n = self.traffic, len(self.traffic.at)
        size = next(size for size in SIZES if size >= n)
        traffic.write(*self.caches, self.generator)
        self.table.copy_(traffic.table)
        self.rows[:n], self.rows[n:size] = torch.tensor(traffic.at), 0
        self.lens[:n], self.lens[n:size] = traffic.seq_lens, 1
        self.q.copy_(torch.randn(self.q.shape, generator=self.generator))
        plan = self.write(size)
        self.out.fill_(torch.nan)
        self.graphs[size].replay()
        assert places(plan) == self.places[size]

        arguments = self.table, self.rows[:n], self.lens[:n]
        eager = plugin.make_plan(*arguments, page_size=traffic.page_size)
        assert eager.num_tokens == traffic.distinct
        if eager.depth > DEPTH:  # some tokens are read more than once: by a plan of these requests alone too
            into = GraphPlans(traffic.page_size, self.device, lambda plan: None).plan_for(n, self.pages)
            eager = plugin.make_plan(*arguments, page_size=traffic.page_size, into=into)
            assert eager.num_tokens > traffic.distinct
        assert plan.num_tokens - (size - n) == eager.num_tokens
        alone, out = self.attention(self.q[:n], eager), self.out[:n]
        if self.backend == "cuda":  # a row's result depends on its own path alone
            assert torch.equal(out, alone)
        else:
            torch.testing.assert_close(out, alone, rtol=1e-5, atol=1e-5)
        inputs = self.q[:n].cpu(), *(cache.cpu() for cache in self.caches)
        plain, exact = (traffic.dense(*inputs, dtype=dtype, window=self.window) for dtype in (out.dtype, torch.float64))
        assert_close("out", out.cpu(), plain, exact, terms=CONTEXT)
        assert not self.out[n:size].any()
        return n, size


@pytest.mark.parametrize("page_size, window", [(1, -1), (16, 40)])
@pytest.mark.parametrize("path", kernels(), ids=str)
def test_replays_follow_the_requests(path, page_size, window, monkeypatch):
    path.select(monkeypatch)
    traffic = Traffic(random.Random(page_size), page_size, rows=SIZES[-1], context=CONTEXT, num_pages=3000 // page_size)
    runner = Runner(path, traffic, window)
    traffic.start(100)
    steps = set()
    count, every = 12 if path.slow else 40, 2 if path.interpreted else 1
    for i in range(count):
        traffic.step(SIZES[-1], branching=0.75 if i < count // 2 else 0)
        if i % every == 0:
            steps.add(runner.step())
    assert {size for _, size in steps} >= {2, 4, 8}
    assert any(n < size for n, size in steps)


def test_tables_that_are_compared_on_a_device(monkeypatch):
    """Their plans take a copy of the whole table: as many entries as the longest has, for every request."""
    monkeypatch.setattr(block_table, "HostTable", DeviceTable)
    traffic = Traffic(random.Random(3), 4, rows=SIZES[-1], context=CONTEXT, num_pages=600)
    runner = Runner(paths.Path("reference"), traffic, -1)
    traffic.start(CONTEXT - 1)
    for i in range(SIZES[-1] - 1):
        traffic.start(5 + i, 0, 4)
    for i in range(SIZES[-1]):
        traffic.grow(i)
    assert runner.step() == (8, 8)
    traffic.stop(2)
    assert runner.step() == (7, 8)
