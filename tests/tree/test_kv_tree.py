"""KVTree against a model that keeps every node's tokens in a list: after each operation no page is lost or owned twice,
a refused operation has changed nothing, and plans and slots lead to the tokens that were written."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_oracle import check_tables, rows_of

from tts_kernels.tree.kv_tree import KVTree, OutOfPages


def make(num_pages=8, page_size=4, num_layers=2):
    return KVTree(num_layers, num_pages, page_size, 2, 8, dtype=torch.float16, device="cpu")


def snapshot(tree):
    """All that an operation could change."""
    nodes = {i: (n.parent, n.length, tuple(n.pages), n.children, n.held) for i, n in tree._nodes.items()}
    return nodes, tuple(tree._free)


def check_invariants(tree):
    owned = [page for node in tree._nodes.values() for page in node.pages]
    assert sorted(owned + tree._free) == list(range(tree.num_pages))  # none lost, none owned twice
    assert tree.free_pages == tree.num_pages - len(owned)
    assert tree.bytes_in_use == len(owned) * tree.num_layers * 2 * tree.page_size * 2 * 8 * 2
    for handle, node in tree._nodes.items():
        assert len(node.pages) * tree.page_size >= node.length
        assert node.children == sum(other.parent == handle for other in tree._nodes.values())
        assert node.held or node.children


class Model:
    """The tree as lists of tokens; `written` is the cache: what lies at each slot."""

    def __init__(self):
        self.tokens, self.parent, self.held, self.alive = {}, {}, set(), set()
        self.written, self.fresh = {}, iter(range(10**6))

    def write(self, tree, rows):
        slots = tree.slots(rows)
        assert slots.dtype == torch.int64 and slots.shape == (sum(rows.values()),)
        slots = iter(slots.tolist())
        for node, count in rows.items():
            for _ in range(count):
                token = next(self.fresh)
                self.tokens[node].append(token)
                self.written[next(slots)] = token

    def new(self, parent, node):
        assert node not in self.tokens  # a handle is never used again
        self.tokens[node], self.parent[node] = [], parent
        self.held.add(node)
        self.alive.add(node)

    def leaves(self):
        return [n for n in sorted(self.held) if not any(self.parent[c] == n for c in self.alive)]

    def release(self, nodes):
        self.held -= set(nodes)
        while dead := {n for n in self.alive - self.held if not any(self.parent[c] == n for c in self.alive)}:
            self.alive -= dead

    def ancestors(self, node):
        """And the node itself, from the root down."""
        return [*self.ancestors(self.parent[node]), node] if node >= 0 else []

    def path_tokens(self, node):
        return [token for n in self.ancestors(node) for token in self.tokens[n]]

    def seen(self, rows):
        """Per row of a causal call: its position and the tokens that it sees."""
        return [
            (len(path) - count + j, path[: len(path) - count + j + 1])
            for node, count in rows.items()
            for path in [self.path_tokens(node)]
            for j in range(count)
        ]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 3, 4]))
def test_random_trees(seed, page_size):
    rng = random.Random(seed)
    tree, model = make(num_pages=rng.choice([6, 14, 40]), page_size=page_size), Model()
    for _ in range(rng.randrange(5, 40)):
        before = snapshot(tree)
        held = sorted(model.held)
        try:
            match rng.choice(["add", "fork", "append", "append", "release", "plan"]):
                case "add":
                    parent, count = rng.choice([-1, *held]), rng.randrange(3 * page_size)
                    node = tree.add(parent if parent >= 0 else rng.choice([None, -1]), count)
                    model.new(parent, node)
                    model.write(tree, {node: count})
                case "fork" if held:
                    parent = rng.choice(held)
                    for node in tree.fork(parent, rng.randrange(4)):
                        model.new(parent, node)
                case "append" if model.leaves():
                    nodes = rng.sample(model.leaves(), rng.randrange(len(model.leaves()) + 1))
                    counts = [rng.randrange(2 * page_size) for _ in nodes]
                    if rng.random() < 0.5:
                        tree.append(nodes)
                        counts = [1] * len(nodes)
                    else:
                        tree.append(nodes, counts)
                    model.write(tree, dict(zip(nodes, counts)))
                case "release" if held:
                    nodes = rng.sample(held, rng.randrange(len(held) + 1))
                    tree.release(nodes)
                    model.release(nodes)
                case "plan" if held:
                    nodes = rng.sample(held, rng.randrange(1, len(held) + 1))
                    rows = {n: rng.randrange(min(3, len(model.tokens[n])) + 1) for n in nodes}
                    check_plan(tree, model, rows, rng.randrange(2 * page_size))
        except OutOfPages:
            assert snapshot(tree) == before
        check_invariants(tree)
        assert set(tree._nodes) == model.alive
        for node in model.held:
            assert tree.num_tokens(node) == len(model.tokens[node])
            assert tree.context_len(node) == len(model.path_tokens(node))
    tree.release(sorted(model.held))
    assert tree.free_pages == tree.num_pages and not tree._nodes and tree.bytes_in_use == 0


def check_plan(tree, model, rows, reserve):
    plan = tree.plan(rows, reserve=reserve)
    in_plan = {a for n in rows for a in model.ancestors(n)}
    growing = [n for n in model.leaves() if rows.get(n)]
    tips = [n for n in rows if rows[n] and not any(model.parent[c] == n for c in in_plan)]
    check_tables(plan, still=len(tips) - len(growing))

    def tokens(seen):
        return [(position, [model.written[p * tree.page_size + t] for p, t in places]) for position, places in seen]

    assert tokens(rows_of(plan)) == model.seen(rows)
    assert plan.num_growing == len(growing)
    if growing:
        assert plan.capacity >= reserve
        free = tree.free_pages
        n = min(reserve, plan.capacity)
        tree.append(growing, n)
        assert tree.free_pages == free  # the reserve is used first
        model.write(tree, dict.fromkeys(growing, n))
        plan.advance_(n)
        assert tokens(rows_of(plan)) == model.seen(rows)


def test_fork_shares_and_release_frees():
    tree = make(num_pages=8)
    root = tree.add(None, 6)
    leaves = tree.fork(root, 3)
    assert tree.free_pages == 6  # nothing was copied
    tree.append(leaves)
    assert tree.free_pages == 3 and [tree.num_tokens(n) for n in leaves] == [1, 1, 1]
    assert tree.slots({leaves[1]: 1, root: 2}).tolist() == [12, 4, 5]
    tree.release([root])
    assert tree.free_pages == 3  # its children hold it
    tree.release(leaves[0])
    assert tree.free_pages == 4
    tree.release(leaves[1:])
    assert tree.free_pages == 8


def test_rows_lie_in_dict_order_even_where_an_ancestor_comes_last():
    tree = make()
    root = tree.add(None, 3)
    leaf = tree.add(root, 2)
    plan = tree.plan({leaf: 2, root: 1})
    assert plan.rows.tolist() == [[2, 0, 1], [0, 1, 1]]
    assert tree.slots({leaf: 2, root: 1}).tolist() == [4, 5, 2]
    empty = tree.plan({})
    assert (empty.num_nodes, empty.num_rows, empty.capacity, empty.depth, empty.max_page) == (0, 0, 0, 0, -1)


@pytest.mark.parametrize("as_int", [np.int64, np.int32, torch.tensor], ids=["int64", "int32", "tensor"])
def test_integers_of_other_kinds(as_int):
    """Handles and counts out of arrays do what ints do, and the tree keeps ints."""

    def grow(tree, i):
        root = tree.add(i(-1), i(6))
        leaves = tree.fork(i(root), i(3))
        tree.append([i(leaf) for leaf in leaves], [i(1), i(2), i(3)])
        tree.append(i(leaves[0]), i(2))
        tree.append(leaves[1:], i(1))
        child = tree.add(i(leaves[2]), i(1))
        tree.release(i(leaves[1]))
        tree.release([i(root)])
        plan = tree.plan({i(leaves[0]): i(3), i(child): i(1)}, reserve=i(1))
        counted = [tree.num_tokens(i(child)), tree.context_len(i(child)), tree.room(i(child))]
        slots = tree.slots({i(child): i(1)})
        return [counted, snapshot(tree), plan.nodes.tolist(), plan.pages.tolist(), slots.tolist()]

    wanted, tree = grow(make(), int), make()
    assert grow(tree, as_int) == wanted
    assert {type(node) for handle, record in tree._nodes.items() for node in (handle, record.parent)} == {int}
    assert {type(record.length) for record in tree._nodes.values()} == {int}


def test_out_of_pages_leaves_the_tree_as_it_was():
    tree = make(num_pages=3)
    a, b = tree.add(None, 4), tree.add(None, 4)
    before = snapshot(tree)
    for refused in (
        lambda: tree.append([a, b]),  # one page is left for the two
        lambda: tree.add(a, 5),
        lambda: tree.plan({a: 1, b: 1}, reserve=1),
    ):
        with pytest.raises(OutOfPages, match="2 more pages are needed, 1 of 3 are free"):
            refused()
        assert snapshot(tree) == before
    assert issubclass(OutOfPages, RuntimeError)
    tree.append([a])


def test_room_is_what_append_takes():
    tree = make(num_pages=4, page_size=4)
    a = tree.add(None, 5)
    assert tree.room(a) == 11
    b = tree.add(a, 1)
    assert tree.room(b) == 7
    with pytest.raises(OutOfPages):
        tree.append(b, 8)
    tree.append(b, 7)
    assert tree.room(b) == 0 and tree.free_pages == 0


def test_caches():
    tree = make(num_pages=5, page_size=3, num_layers=2)
    assert len(tree.k_cache) == len(tree.v_cache) == 2
    for cache in (*tree.k_cache, *tree.v_cache):
        assert cache.shape == (5, 3, 2, 8) and cache.dtype == torch.float16
    assert len({cache.data_ptr() for cache in (*tree.k_cache, *tree.v_cache)}) == 4
    with torch.inference_mode():
        tree = make()
    tree.k_cache[0].fill_(1)  # written outside of the mode it was made in


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda t, a, b: t.append([a]), ValueError, r"nodes: expected nodes without children, got node 0, which has 1"),
        (lambda t, a, b: t.append([b, b]), ValueError, r"nodes: expected each node once, got 1 2 times"),
        (lambda t, a, b: t.append([99]), ValueError, r"nodes: expected a node of this tree that .* got 99"),
        (lambda t, a, b: t.append([b], -1), ValueError, r"num_tokens: expected at least 0, got -1"),
        (lambda t, a, b: t.append([b], [1, 2]), ValueError, r"num_tokens: expected 1 entries, as many as nodes, got 2"),
        (lambda t, a, b: t.append([b], [-1]), ValueError, r"num_tokens: expected at least 0 each, got -1"),
        (lambda t, a, b: t.append([b], 1.5), TypeError, r"num_tokens: expected a list of ints, got 1.5"),
        (lambda t, a, b: t.append([True]), TypeError, r"nodes\[0\]: expected an int, got True"),
        (lambda t, a, b: t.append(b, True), TypeError, r"num_tokens: expected an int, got True"),
        (lambda t, a, b: t.append(np.array([b, 1.5])), TypeError, r"nodes\[0\]: expected an int, got 1.0"),
        (lambda t, a, b: t.fork(a, np.float64(2)), TypeError, r"n: expected an int, got .*2.0"),
        (lambda t, a, b: t.plan({np.int64(b): np.bool_(True)}), TypeError, r"rows\[1\]: expected an int, got .*True"),
        (lambda t, a, b: t.plan({torch.tensor(b): 1, b: 1}), ValueError, r"rows: expected each node once, got 1 twice"),
        (lambda t, a, b: t.append(1.0), TypeError, r"nodes: expected a list of ints"),
        (lambda t, a, b: t.release([b, b]), ValueError, r"nodes: expected each node once"),
        (lambda t, a, b: t.release([b, 7]), ValueError, r"nodes: expected a node .* got 7"),
        (lambda t, a, b: t.add(-2, 1), ValueError, r"parent: expected a node .* got -2"),
        (lambda t, a, b: t.add("x", 1), TypeError, r"parent: expected an int, got 'x'"),
        (lambda t, a, b: t.add(a, -1), ValueError, r"num_tokens: expected at least 0, got -1"),
        (lambda t, a, b: t.add(a, 1.0), TypeError, r"num_tokens: expected an int, got 1.0"),
        (lambda t, a, b: t.fork(a, -1), ValueError, r"n: expected at least 0"),
        (lambda t, a, b: t.fork(9, 1), ValueError, r"node: expected a node"),
        (lambda t, a, b: t.plan({b: 3}), ValueError, r"rows\[1\]: expected 0 <= rows <= the node's 2 tokens, got 3"),
        (lambda t, a, b: t.plan({b: -1}), ValueError, r"rows\[1\]: expected 0 <= rows .* got -1"),
        (lambda t, a, b: t.plan({b: True}), TypeError, r"rows\[1\]: expected an int, got True"),
        (lambda t, a, b: t.plan([b]), TypeError, r"rows: expected a dict"),
        (lambda t, a, b: t.plan({8: 0}), ValueError, r"rows: expected a node of this tree"),
        (lambda t, a, b: t.plan({b: 1}, reserve=-1), ValueError, r"reserve: expected at least 0"),
        (lambda t, a, b: t.plan({b: 1}, causal=0), TypeError, r"causal: expected a bool"),
        (lambda t, a, b: t.slots({b: 3}), ValueError, r"rows\[1\]: expected"),
        (lambda t, a, b: t.num_tokens(5), ValueError, r"node: expected a node"),
    ],
)  # fmt: skip
def test_refusals_change_nothing(call, error, message):
    tree = make()
    a = tree.add(None, 5)
    b = tree.add(a, 2)
    before = snapshot(tree)
    with pytest.raises(error, match="^" + message):
        call(tree, a, b)
    assert snapshot(tree) == before


def test_a_released_handle_is_refused_everywhere():
    tree = make()
    a = tree.add(None, 5)
    tree.fork(a, 1)
    tree.release([a])
    for call in (
        lambda: tree.release([a]),
        lambda: tree.fork(a, 1),
        lambda: tree.add(a, 1),
        lambda: tree.plan({a: 1}),
        lambda: tree.slots({a: 1}),
        lambda: tree.num_tokens(a),
        lambda: tree.room(a),
    ):
        with pytest.raises(ValueError, match="expected a node of this tree that is not released, got 0"):
            call()


@pytest.mark.parametrize(
    "bad, error, message",
    [
        ({"num_pages": 0}, ValueError, "num_pages: expected at least 1, got 0"),
        ({"head_dim": 8.0}, TypeError, "head_dim: expected an int, got 8.0"),
        ({"num_layers": True}, TypeError, "num_layers: expected an int, got True"),
        ({"dtype": torch.int8}, TypeError, "dtype: expected one of torch.float32, .* got torch.int8"),
        ({"dtype": "float32"}, TypeError, "dtype: expected one of torch.float32"),
    ],
)
def test_constructor_refuses(bad, error, message):
    good = {"num_layers": 1, "num_pages": 2, "page_size": 4, "num_kv_heads": 1, "head_dim": 8}
    good |= {"dtype": torch.float32, "device": "cpu"}
    with pytest.raises(error, match="^" + message):
        KVTree(**(good | bad))
