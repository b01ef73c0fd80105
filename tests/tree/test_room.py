"""Plans with room: after any changes of the tree, and on every backend that runs on CPU tensors, the plan that is
written in place says what a plan made anew says."""

import importlib
import random
from dataclasses import replace

import attention_paths as paths
import pytest
import torch
from block_tables import batches
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_oracle import rows_of

from tts_kernels.attention import explain, tree_attention
from tts_kernels.tree.kv_tree import KVTree, OutOfPages
from tts_kernels.tree.plan import LENGTH, OWN_BEGIN, PARENT, ROWS_END, TreePlan
from tts_kernels.tree.room import PlanWithRoom, Room

ROOM = Room(nodes=40, rows=9)
HEADS, KV_HEADS, DIM = 4, 2, 16


def make(num_pages=300, page_size=4, dtype=torch.float32):
    tree = KVTree(1, num_pages, page_size, KV_HEADS, DIM, dtype=dtype, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for cache in (*tree.k_cache, *tree.v_cache):
        cache.copy_(torch.randn(cache.shape, generator=generator))
    return tree


class Walk:
    """A search over a tree: leaves grow, fork, are released; a call takes some of them, one or two rows each."""

    def __init__(self, seed: int, tree: KVTree) -> None:
        self.rng, self.tree = random.Random(seed), tree
        self.trunk = tree.add(None, self.rng.randrange(1, 30))
        self.leaves = tree.fork(self.trunk, 3)
        tree.append(self.leaves)

    def step(self) -> dict[int, int]:
        tree, rng = self.tree, self.rng
        what = rng.random()
        if what < 0.3 and len(self.leaves) > 1:
            tree.release(self.leaves.pop(rng.randrange(len(self.leaves))))
        elif what < 0.6 and len(self.leaves) < 7:
            parent = self.leaves.pop(rng.randrange(len(self.leaves)))
            self.leaves += tree.fork(parent, 2)
            tree.release(parent)  # its children hold it
        tree.append(self.leaves, [rng.choice([1, 1, 2, 5]) for _ in self.leaves])
        rng.shuffle(self.leaves)
        return {leaf: rng.choice([1, 1, min(2, tree.num_tokens(leaf))]) for leaf in self.leaves[:4]}


def check_says_the_same(plan, fresh, num_rows):
    assert plan.num_rows == plan.room.rows and plan.rows.shape == (2, plan.room.rows)
    assert plan.nodes.shape == (7, plan.room.nodes + 1) == (7, plan.num_nodes)
    assert rows_of(plan)[:num_rows] == rows_of(fresh)
    assert plan.nodes[:, : fresh.num_nodes].equal(fresh.nodes)
    assert plan.grows[: fresh.num_nodes].equal(fresh.grows) and not plan.grows[fresh.num_nodes :].any()
    assert plan.pages[: fresh.pages.numel()].equal(fresh.pages)
    for name in ("num_tokens", "num_growing", "capacity", "max_page", "page_size", "causal"):
        assert getattr(plan, name) == getattr(fresh, name), name
    # The rest: no tokens, in depth-first order all the same, positions from 0 on.
    rest = plan.nodes[:, fresh.num_nodes :]
    assert (rest[PARENT] == -1).all() and not rest[LENGTH].any()
    assert rest[OWN_BEGIN].tolist() == [num_rows] + [plan.num_rows] * (rest.shape[1] - 1)
    assert (rest[ROWS_END] == plan.num_rows).all()
    assert plan.positions()[:num_rows].equal(fresh.positions())
    assert plan.positions()[num_rows:].tolist() == list(range(plan.num_rows - num_rows))
    assert plan.slots()[:num_rows].equal(fresh.slots()) and (plan.slots()[num_rows:] == -1).all()
    host, host_grows, spare = plan.host_tables()
    assert host == plan.nodes.tolist() and host_grows == plan.grows.tolist() and spare == plan.capacity


@pytest.mark.parametrize("causal", [True, False])
def test_it_says_what_a_plan_made_anew_says(causal):
    for seed in range(10):
        tree = make()
        walk, plan = Walk(seed, tree), None
        for _ in range(25):
            rows = walk.step()
            reserve = walk.rng.choice([0, 0, 6])
            before = plan
            if plan is None:
                plan = tree.plan(rows, causal=causal, reserve=reserve, room=ROOM)
            else:
                tables = [t.data_ptr() for t in (plan.nodes, plan.pages, plan.rows, plan.grows)]
                assert tree.plan(rows, causal=causal, reserve=reserve, into=plan) is before
                assert tables == [t.data_ptr() for t in (plan.nodes, plan.pages, plan.rows, plan.grows)]
            fresh = tree.plan(rows, causal=causal)
            check_says_the_same(plan, fresh, sum(rows.values()))
            if plan.capacity and walk.rng.random() < 0.5:
                growing = [node for node in rows if fresh.grows.any() and not tree._nodes[node].children]
                if len(growing) == plan.num_growing:
                    plan.advance_()
                    tree.append(growing)
                    check_says_the_same(plan, tree.plan(rows, causal=causal), sum(rows.values()))


@pytest.mark.parametrize("path", paths.available(), ids=str)
@pytest.mark.parametrize("window", [-1, 5])
def test_every_backend_takes_it(path, window, monkeypatch):
    """The rows that the tree does not use: out 0, lse -inf. The others: what they are without room, bit for bit where
    the kernels promise that."""
    if path.device != "cpu":
        pytest.skip("tests/cuda/test_graph.py does this on a GPU")
    path.select(monkeypatch)
    dtype = path.takes(torch.float32)
    tree = make(dtype=dtype)
    walk, plan = Walk(3, tree), None
    q = torch.randn(ROOM.rows, HEADS, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    sinks = torch.randn(HEADS)
    options = {"window": window, "sinks": sinks, "return_lse": True, "backend": path.backend}
    for _ in range(3 if path.slow else 8):
        rows = walk.step()
        n = sum(rows.values())
        plan = tree.plan(rows, into=plan) if plan else tree.plan(rows, room=ROOM)
        out = torch.full_like(q, torch.nan)
        out, lse = tree_attention(q, tree.k_cache[0], tree.v_cache[0], plan, out=out, **options)
        expected = tree_attention(q[:n], tree.k_cache[0], tree.v_cache[0], tree.plan(rows), **options)
        torch.testing.assert_close(out[:n], expected[0], rtol=1e-3 if path.backend == "cuda" else 1e-5, atol=1e-5)
        torch.testing.assert_close(lse[:n], expected[1], rtol=1e-5, atol=1e-5)
        assert not out[n:].any() and (lse[n:] == -torch.inf).all()


def test_work_lists_follow():
    """Of the GPU backends, by the host: the same tables as a plan with the same room that is made anew."""
    work = importlib.import_module("tts_kernels.attention.work")
    from tts_kernels.configs import TreeConfig

    config = TreeConfig(32, 16, 16, 16, 32, 4, 4, 1)
    tree = make()
    walk = Walk(5, tree)
    plan = tree.plan(walk.step(), room=ROOM)
    made = work.make_work(plan, HEADS, KV_HEADS, DIM, config)
    plan.works["any"] = made
    table = made.table
    for _ in range(10):
        rows = walk.step()
        tree.plan(rows, into=plan)
        fresh = work.make_work(tree.plan(rows, room=ROOM), HEADS, KV_HEADS, DIM, config)
        assert plan.works["any"] is made and made.table is table
        assert table.equal(fresh.table)


def test_a_room_that_is_too_small_names_what_is_short():
    tree = make()
    trunk = tree.add(None, 10)
    leaves = tree.fork(trunk, 4)
    tree.append(leaves)
    rows = dict.fromkeys(leaves, 1)
    free, pages = tree.free_pages, 7
    fits = Room(nodes=5, rows=4, pages=pages, depth=2)
    for name, need in (
        ("nodes", "the 5 nodes"),
        ("rows", "the 4 rows"),
        ("pages", "the 7 pages"),
        ("depth", "a depth of 2"),
    ):
        least = replace(fits, **{name: getattr(fits, name) - 1})
        with pytest.raises(ValueError, match=rf"^room.{name}: expected room for {need}( of the tree)?, got"):
            tree.plan(rows, room=least)
    plan = tree.plan(rows, room=fits)
    before = plan.tables.clone()
    more = tree.fork(leaves[0], 1)
    tree.append(more)
    with pytest.raises(ValueError, match=r"^into.room.nodes: expected room for the 6 nodes of the tree, got 5"):
        tree.plan({more[0]: 1, **dict.fromkeys(leaves[1:], 1)}, into=plan)
    tree.release(more)
    with pytest.raises(ValueError, match=r"^into.room.pages: expected room for the 11 pages of the tree, got 7"):
        tree.plan(rows, into=plan, reserve=4)
    with pytest.raises(OutOfPages):
        tree.plan(rows, room=replace(fits, pages=1000), reserve=400)
    assert tree.free_pages == free and plan.tables.equal(before)
    assert tree.plan({}, into=plan).num_tokens == 0


def test_what_else_is_refused():
    tree, other = make(), make(page_size=2)
    node = tree.add(None, 3)
    plan = tree.plan({node: 1}, room=ROOM)
    plain = tree.plan({node: 1})
    before = plan.tables.clone()
    for arguments, error, text in (
        ({"into": plain}, TypeError, "into: expected a plan that was made with room, got TreePlan"),
        ({"into": plan, "room": ROOM}, ValueError, "room: expected None beside into"),
        ({"into": plan, "causal": False}, ValueError, "into: expected a plan with causal False, got True"),
        ({"room": 3}, TypeError, "room: expected a Room, got int"),
    ):
        with pytest.raises(error, match="^" + text):
            tree.plan({node: 1}, **arguments)
    with pytest.raises(ValueError, match=r"^into: expected a plan with page_size 2, got 4"):
        other.plan({other.add(None, 3): 1}, into=plan)
    with pytest.raises(TypeError, match=r"^other: expected a TreePlan, got int"):
        plan.update_(3)
    with pytest.raises(ValueError, match=r"^other: expected page_size 4 like this plan, got 8"):
        plan.update_(TreePlan.from_nodes([-1], [1], [[0]], [1], page_size=8))
    # Two nodes on the same pages: more tokens than places.
    small = tree.plan({node: 1}, room=Room(nodes=2, rows=2, pages=1))
    shared = TreePlan.from_nodes([-1, -1], [4, 4], [[0], [1]], [1, 1], page_size=4)
    shared.pages = shared.pages[:1]
    with pytest.raises(ValueError, match=r"^room.pages: expected places for the 8 tokens of all nodes.*, got 4"):
        small.update_(shared)
    for wrong in ({"nodes": 0, "rows": 1}, {"nodes": 1, "rows": -1}, {"nodes": 1, "rows": 1, "depth": 0}):
        with pytest.raises(ValueError, match=r"^room\."):
            Room(**wrong)
    assert plan.tables.equal(before)


def test_plans_of_lists_are_written_into_it():
    tree = make()
    plan = tree.plan({tree.add(None, 3): 1}, room=ROOM)
    fresh = TreePlan.from_nodes([-1, 0, 0], [5, 2, 3], [[9, 8], [1], [2]], [0, 2, 1], page_size=4)
    assert isinstance(plan, PlanWithRoom) and plan.update_(fresh) is plan
    check_says_the_same(plan, fresh, 3)


@settings(max_examples=150, deadline=None)
@given(st.lists(batches(), min_size=1, max_size=4), st.integers(1, 4), st.sampled_from([torch.int32, torch.int64]))
def test_batches_of_block_tables_are_written_into_it(made, depth, dtype):
    """Rows read the same slots as by a plan made anew; no path has more nodes than there is room for."""
    page_size, plan = made[0][3], None
    for table, seq_lens, q_lens, own_page_size, reserve in made:
        if own_page_size != page_size:
            continue
        lens = torch.tensor(seq_lens, dtype=dtype), torch.tensor(q_lens, dtype=dtype)
        options = {"page_size": page_size, "reserve": reserve}
        fresh = TreePlan.from_block_table(table, lens[0], q_lens=lens[1], **options)
        room = Room(nodes=18, rows=30, pages=400, depth=depth)
        into = {"room": room} if plan is None else {"into": plan}
        before, plan = plan, TreePlan.from_block_table(table, lens[0], q_lens=lens[1], **options, **into)
        assert before is None or plan is before
        num_rows = sum(q_lens)
        assert rows_of(plan)[:num_rows] == rows_of(fresh)
        if fresh.depth <= depth:
            check_says_the_same(plan, fresh, num_rows)
        level = []
        for parent in plan.nodes[PARENT].tolist():
            level.append(1 + (level[parent] if parent >= 0 else 0))
        assert max(level) <= depth
        if plan.capacity:
            assert rows_of(plan.advance_())[:num_rows] == rows_of(fresh.advance_())


def test_what_is_shared_deeper_is_read_by_each():
    table = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6, 7], [1, 8, 9, 10]], dtype=torch.int32)
    lens = torch.tensor([16] * 4)
    tokens = [
        TreePlan.from_block_table(table, lens, page_size=4, room=Room(nodes=8, rows=4, depth=depth)).num_tokens
        for depth in (1, 2, 3, 4, None)
    ]
    assert tokens == [4 * 16, 4 + 4 * 12, 4 + 4 + 3 * 8 + 12, 40, 40]


def test_what_a_block_table_and_a_room_refuse():
    table, lens = torch.tensor([[1, 2], [1, 3]], dtype=torch.int32), torch.tensor([8, 7])
    plan = TreePlan.from_block_table(table, lens, page_size=4, room=Room(nodes=3, rows=2))
    assert plan.room.pages == 4
    before = plan.tables.clone()
    for arguments, error, text in (
        ({"into": plan, "room": ROOM}, ValueError, "room: expected None beside into"),
        (
            {"into": TreePlan.from_block_table(table, lens, page_size=4)},
            TypeError,
            "into: expected a plan that was made",
        ),
        ({"into": plan, "causal": False}, ValueError, "into: expected a plan with causal False, got True"),
        ({"room": 3}, TypeError, "room: expected a Room, got int"),
        ({"into": plan, "q_lens": torch.tensor([2, 1])}, ValueError, "room.rows: expected room for the 3 rows"),
        ({"room": Room(nodes=2, rows=2)}, ValueError, "room.nodes: expected room for the 3 nodes"),
    ):
        with pytest.raises(error, match="^" + text):
            TreePlan.from_block_table(table, lens, page_size=4, **arguments)
    with pytest.raises(ValueError, match=r"^into: expected a plan with page_size 8, got 4"):
        TreePlan.from_block_table(table, lens, page_size=8, into=plan)
    assert plan.tables.equal(before)


def test_it_is_written_under_inference_mode_and_outside():
    tree = make()
    node = tree.add(None, 3)
    with torch.inference_mode():
        plan = tree.plan({node: 1}, room=ROOM)
        tree.plan({node: 2}, into=plan)
    tree.plan({node: 3}, into=plan).advance_()
    with torch.inference_mode():
        tree.plan({node: 1}, into=plan)
    check_says_the_same(plan, tree.plan({node: 1}), 1)


def test_explain_tells_of_the_tree_in_it():
    tree = make()
    trunk = tree.add(None, 10)
    leaves = tree.fork(trunk, 3)
    tree.append(leaves)
    rows = dict.fromkeys(leaves, 1)
    q = torch.zeros(ROOM.rows, HEADS, DIM)
    told = [
        explain(plan, q[: plan.num_rows], tree.k_cache[0], bandwidth=1e9, flops=1e9, backend="reference")
        for plan in (tree.plan(rows, room=ROOM), tree.plan(rows))
    ]
    assert told[0].flops == told[1].flops and told[0].num_tokens == told[1].num_tokens == 13
