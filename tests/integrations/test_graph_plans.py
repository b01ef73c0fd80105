"""The plans of captured decode graphs, which both engines' backends take: all sizes in one memory, room for any batch,
and calls of all sizes that take turns in one scratch."""

from __future__ import annotations

import random

import pytest
import torch
from attention_paths import Path
from dense import assert_close
from sglang_traffic import Traffic, places

from tts_kernels import TreePlan, tree_attention
from tts_kernels.attention import api
from tts_kernels.integrations.graph_plans import DEPTH, GraphPlans
from tts_kernels.tree.room import Room

PAGE, PAGES, NUM_PAGES = 4, 40, 400
GEOMETRIES = (4, 2, 64), (6, 1, 32)  # query heads, KV heads, head_dim
ORDERS = pytest.mark.parametrize(
    "order, own",
    [((8, 3, 1), []), ((1, 3, 8), [1, 3]), ((3, 8, 1), [3])],
    ids=["largest first", "smallest first", "mixed"],
)


class Calls:
    """Of both geometries."""

    def __init__(self, backend: str, monkeypatch) -> None:
        path = Path(backend)
        if path.missing():
            pytest.skip(path.missing())
        path.select(monkeypatch)
        self.backend, self.tensors = backend, []
        generator = torch.Generator().manual_seed(0)
        for q_heads, kv_heads, dim in GEOMETRIES:
            q = torch.randn(8, q_heads, dim, generator=generator)
            k, v = torch.randn(2, NUM_PAGES, PAGE, kv_heads, dim, generator=generator)
            self.tensors.append([tensor.to(path.takes(torch.float32)) for tensor in (q, k, v)])

    def make_works(self, plan) -> None:
        for q, k, v in self.tensors:
            api.work_of(plan, q, k, v, self.backend)

    def attend(self, plan) -> list[torch.Tensor]:
        return [tree_attention(q[: plan.num_rows], k, v, plan, backend=self.backend) for q, k, v in self.tensors]


def counters(plan) -> list[torch.Tensor]:
    return [w.scratch[w.num_states * heads * (dim + 2) :] for (heads, _, dim, *_), w in plan.works.items()]


def batch(rng: random.Random, size: int) -> dict:
    """Requests of which some share a prompt, and some of those more: never deeper than the room, so that the tree is
    the same with room as without."""
    pages = rng.sample(range(NUM_PAGES), NUM_PAGES)
    table = torch.tensor([[pages.pop() for _ in range(PAGES)] for _ in range(8)])[:size]
    for shared in rng.choices(range(1, PAGES // 2), k=2):
        first = rng.randrange(size)
        table[first:, :shared] = table[first, :shared].clone()
    lens = torch.tensor([rng.randint(PAGES * PAGE // 2, PAGES * PAGE) for _ in range(size)])
    return {"block_table": table, "seq_lens": lens, "page_size": PAGE}


@ORDERS
def test_calls_of_all_sizes_take_turns(order, own, monkeypatch):
    """Each finds the counters of its kernels at 0, whatever states another has left, and leaves them there."""
    calls = Calls("cuda", monkeypatch)
    plans = GraphPlans(PAGE, "cpu", calls.make_works)
    held = {}
    for size in order:
        with torch.inference_mode():  # as engines make them; they are written outside of it too
            held[size] = places(plans.plan_for(size, PAGES))
        calls.attend(plans.plans[size])
    rng = random.Random(1)
    for size in [*order, *order[::-1], *rng.choices(order, k=6)]:
        requests = batch(rng, size)
        plan = plans.plan_for(size, PAGES)
        assert TreePlan.from_block_table(**requests, into=plan) is plan
        for out, alone in zip(calls.attend(plan), calls.attend(TreePlan.from_block_table(**requests)), strict=True):
            assert torch.equal(out, alone)
        for plan in plans.plans.values():
            assert len(counters(plan)) == len(GEOMETRIES) and not any(each.any() for each in counters(plan))
    assert {size: places(plan) for size, plan in plans.plans.items()} == held


@ORDERS
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_sizes_lie_in_the_memory_of_the_largest(backend, order, own, monkeypatch):
    """Those before it keep their own."""
    plans = GraphPlans(PAGE, "cpu", Calls(backend, monkeypatch).make_works)
    for size in order:
        plans.plan_for(size, PAGES)
    assert plans.memory.numel() == plans.plans[8].tables.numel()
    for size in order:
        like = plans.plans[size if size in own else 8]
        assert plans.plans[size].tables.data_ptr() == like.tables.data_ptr()
        for key, work in plans.plans[size].works.items():
            assert work.scratch.data_ptr() == like.works[key].scratch.data_ptr()
            assert work.num_states == like.works[key].num_states > 0
    assert len({plan.tables.data_ptr() for plan in plans.plans.values()}) == 1 + len(own)


def test_more_states_may_have_fewer_counters(monkeypatch):
    """Few requests with long tables, and many with short ones."""
    plans = GraphPlans(PAGE, "cpu", Calls("cuda", monkeypatch).make_works)
    for size, pages in ((2, 1000), (8, 1), (1, 1)):
        assert [len(each) for each in counters(plans.plan_for(size, pages))] == [
            size * heads for heads, *_ in GEOMETRIES
        ]


def test_room_is_for_any_batch_of_the_size():
    plans = GraphPlans(PAGE, "cpu", lambda plan: None)
    plan = plans.plan_for(6, PAGES, causal=False)
    assert plan.room == Room(12, 6, 6 * PAGES, DEPTH) and not plan.causal
    assert plans.plan_for(6, PAGES, causal=False) is plan and plans.plan_for(5, PAGES).causal


def test_deeper_than_the_room():
    """Each request goes on from the one before it: what is deeper is read by each, and the results stay right."""
    size, context = 2 * DEPTH, 80
    traffic = Traffic(random.Random(4), PAGE, rows=size, context=context, num_pages=600)
    traffic.start(9)
    for i in range(size - 1):
        traffic.start(9 + 5 * (i + 1), i, 8 + 5 * i)
    table = traffic.table[traffic.at, ::PAGE] // PAGE
    plan = GraphPlans(PAGE, "cpu", lambda plan: None).plan_for(size, table.shape[1])
    TreePlan.from_block_table(table, traffic.seq_lens, page_size=PAGE, into=plan)
    assert traffic.plan().depth > DEPTH == plan.depth
    assert plan.num_tokens > traffic.distinct
    q, k, v = torch.randn(size, 4, 64), *torch.randn(2, traffic.num_slots, 2, 64)
    out = tree_attention(q, *(cache.view(-1, PAGE, 2, 64) for cache in (k, v)), plan, check=True)
    plain, exact = (traffic.dense(q, k, v, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert_close("out", out, plain, exact, terms=context)
