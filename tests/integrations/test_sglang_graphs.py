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
from tts_kernels.integrations.sglang_graphs import DEPTH, GraphPlans
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
        pages = -(-traffic.table.shape[1] // traffic.page_size)
        self.plans = GraphPlans(SIZES[-1], pages, traffic.page_size, path.device, self.attend)
        self.graphs, self.places = {}, {}
        for size in reversed(SIZES):
            plan = self.write(size)
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
        plan = self.plans.plan_for(size)
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

        eager = plugin.make_plan(self.table, self.rows[:n], self.lens[:n], page_size=traffic.page_size)
        assert plan.num_tokens - (size - n) == eager.num_tokens == traffic.distinct
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
    count = 12 if path.slow else 40
    for i in range(count):
        traffic.step(SIZES[-1], branching=0.75 if i < count // 2 else 0)
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


def test_deeper_than_the_room():
    """Each request goes on from the one before it: what is deeper is read by each, and the results stay right."""
    traffic = Traffic(random.Random(4), 4, rows=64, context=CONTEXT, num_pages=600)
    plans = GraphPlans(2 * DEPTH, CONTEXT // 4, 4, "cpu", attend=lambda plan: None)
    traffic.start(9)
    for i in range(2 * DEPTH - 1):
        traffic.start(9 + 5 * (i + 1), i, 8 + 5 * i)
    plan = plans.plan_for(2 * DEPTH)
    plugin.make_plan(traffic.table, torch.tensor(traffic.at), traffic.seq_lens, page_size=4, into=plan)
    assert traffic.plan().depth > DEPTH == plan.depth
    assert plan.num_tokens > traffic.distinct
    q, k, v = torch.randn(2 * DEPTH, HQ, D), *torch.randn(2, traffic.num_slots, HKV, D)
    out = tree_attention(q, plugin.as_pages(k, 4), plugin.as_pages(v, 4), plan, check=True)
    plain, exact = (traffic.dense(q, k, v, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert_close("out", out, plain, exact, terms=CONTEXT)


def test_sizes_share_their_memory(monkeypatch):
    """All tables lie in those of the largest, and all partial states too."""
    path = paths.Path("cuda")
    if path.missing():
        pytest.skip(path.missing())
    path.select(monkeypatch)
    traffic = Traffic(random.Random(0), 16, rows=SIZES[-1], context=CONTEXT, num_pages=10)
    plans = Runner(path, traffic, -1).plans
    largest = plans.plans[SIZES[-1]]
    assert largest.tables.numel() == plans.memory.numel()
    (scratch,) = plans.scratch.values()
    for plan in plans.plans.values():
        (work,) = plan.works.values()
        assert plan.tables.data_ptr() == plans.memory.data_ptr()
        assert work.scratch.data_ptr() == scratch.data_ptr()
        assert work.scratch.numel() <= scratch.numel()
