"""What must not change a row's result: how its path is cut into nodes, in which order siblings stand, empty nodes (up
to rounding), and which other samples there are (bit for bit, on the `cpu` and `cuda` backends)."""

import random
from dataclasses import replace

import attention_cases as cases
import attention_paths as paths
import pytest
import torch
from attention_cases import BF16, FP8, FP16, FP32, Case
from forests import Forest

CASES = [
    Case(heads=(6, 2), window=17, sinks=True, seed=1),
    Case(heads=(28, 4), head_dim=128, dtypes=(BF16, BF16), softcap=2.5, seed=2),
    Case(heads=(5, 1), dtypes=(FP16, FP8), scales="head", causal=False, seed=3),
]


def small_forest(case: Case) -> Forest:
    return Forest(
        parent=[-1, 0, 0, 1, 1, 0, -1, 6],
        length=[90, 33, 5, 20, 1, 64, 12, 3],
        rows=[0, 2, 1, 4, 1, 1, 0, 3],
        page_size=case.page_size,
    ).place(random.Random(case.seed))


def split(forest: Forest, node: int, at: int) -> Forest:
    """`node` becomes two: its first `at` tokens, and below them the rest with the rows and the children. The order of
    tokens and of rows stays."""
    assert 0 <= at <= forest.length[node] - forest.rows[node]
    moved = [p + (p >= node) for p in forest.parent]
    parent = [*moved[: node + 1], node, *moved[node + 1 :]]
    length = [*forest.length[:node], at, forest.length[node] - at, *forest.length[node + 1 :]]
    rows = [*forest.rows[:node], 0, *forest.rows[node:]]
    return Forest(parent, length, rows, forest.page_size).place(random.Random(99))


def rearranged(inputs: cases.Inputs, order: list[int]) -> tuple[cases.Inputs, list[int]]:
    """The same call on the nodes `order` alone, in that order, and the rows of `inputs` that are left, in the new
    order. A node's parent must be there, before it."""
    forest = inputs.forest
    parent = [order.index(forest.parent[node]) if forest.parent[node] >= 0 else -1 for node in order]
    length, rows = [forest.length[node] for node in order], [forest.rows[node] for node in order]
    tokens = [sum(forest.length[:node]) + i for node in order for i in range(forest.length[node])]
    kept_rows = [sum(forest.rows[:node]) + j for node in order for j in range(forest.rows[node])]
    placed = Forest(parent, length, rows, forest.page_size).place(random.Random(len(order)))
    q, k, v = inputs.q[kept_rows], inputs.k[tokens], inputs.v[tokens]
    return replace(inputs, forest=placed, q=q, k=k, v=v), kept_rows


@pytest.mark.parametrize("case", CASES, ids=str)
# A node of a long prefix; at its ends, which leaves an empty node; a leaf just before its rows; a root.
@pytest.mark.parametrize("node, at", [(0, 37), (0, 0), (0, 90), (1, 31), (3, 16), (6, 1)])
def test_splitting_a_node(path, case, node, at):
    inputs = cases.make_inputs(case, small_forest(case), path)
    out, lse = cases.run(replace(inputs, forest=split(inputs.forest, node, at)), path)
    cases.assert_right(inputs, out, lse)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_empty_nodes_everywhere(path, case):
    inputs = cases.make_inputs(case, small_forest(case), path)
    forest = inputs.forest
    for node in reversed(range(forest.num_nodes)):
        forest = split(forest, node, 0)
    forest = Forest(
        [*forest.parent, -1, forest.num_nodes, 3], [*forest.length, 0, 0, 0], [*forest.rows, 0, 0, 0], forest.page_size
    ).place(random.Random(5))
    out, lse = cases.run(replace(inputs, forest=forest), path)
    cases.assert_right(inputs, out, lse)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("order", [[0, 5, 2, 1, 4, 3, 6, 7], [6, 7, 0, 1, 3, 4, 2, 5], [6, 0, 2, 7, 5, 1, 4, 3]])
def test_permuting_siblings(path, case, order):
    inputs = cases.make_inputs(case, small_forest(case), path)
    moved, rows = rearranged(inputs, order)
    out, lse = cases.run(moved, path)
    cases.assert_right(inputs, out[torch.tensor(rows).argsort()], lse[torch.tensor(rows).argsort()])


# Whatever may pick an instruction path by the number of rows: groups of 1, 7 and 8, one and several rows for each leaf,
# nodes below and above a chunk, a window that ends in the prefix.
SIBLING_CASES = [
    Case(heads=(28, 4), head_dim=128, dtypes=(BF16, BF16), seed=1),
    Case(heads=(28, 4), head_dim=64, dtypes=(FP32, FP32), window=300, seed=2),
    Case(heads=(2, 2), head_dim=80, dtypes=(FP16, FP16), sinks=True, seed=3),
    Case(heads=(8, 1), head_dim=96, dtypes=(BF16, FP8), scales="head", window=40, seed=4),
]
LEAVES = 42


def crowd(case: Case) -> Forest:
    """A prefix of 1,100 tokens, under it three nodes, and LEAVES leaves in turn under those four. Every third leaf has
    three rows."""
    parent = [-1, 0, 0, 0] + [leaf % 4 for leaf in range(LEAVES)]
    length = [1100, 130, 1, 65] + [(3, 9, 33, 64, 100)[leaf % 5] for leaf in range(LEAVES)]
    rows = [0, 0, 0, 0] + [3 if leaf % 3 == 0 else 1 for leaf in range(LEAVES)]
    return Forest(parent, length, rows, case.page_size).place(random.Random(0))


@pytest.mark.parametrize("path", paths.invariant())
@pytest.mark.parametrize("case", SIBLING_CASES, ids=str)
def test_siblings_change_nothing_bit_for_bit(path, case, monkeypatch):
    path.select(monkeypatch)
    inputs = cases.make_inputs(case, crowd(case), path)
    torch.set_num_threads(2)
    out, lse = cases.run(inputs, path)
    rng = random.Random(case.seed)
    leaves = list(range(4, 4 + LEAVES))
    for threads, count in ((1, 1), (2, 1), (1, 2), (3, 3), (2, 8), (1, 17), (1, LEAVES), (4, LEAVES)):
        torch.set_num_threads(threads)
        for _ in range(4 if count == 1 else 1):
            chosen = rng.sample(leaves, count)
            above = sorted({node for leaf in chosen for node in inputs.forest.path(leaf)[:-1]})
            fewer, rows = rearranged(inputs, above + chosen)
            few_out, few_lse = cases.run(fewer, path)
            assert torch.equal(few_out, out[rows]), f"out differs with {count} leaves, {threads} threads"
            assert torch.equal(few_lse, lse[rows]), f"lse differs with {count} leaves, {threads} threads"


@pytest.mark.parametrize("path", paths.invariant())
@pytest.mark.parametrize("layout", ["NHD", "HND", "joint"])
def test_where_pages_lie_changes_nothing_bit_for_bit(path, layout, monkeypatch):
    path.select(monkeypatch)
    inputs = cases.make_inputs(Case(dtypes=(BF16, BF16)), small_forest(Case()), path)
    out, lse = cases.run(inputs, path)
    moved = replace(inputs.forest, page_size=7).place(random.Random(8))
    got_out, got_lse = cases.run(replace(inputs, forest=moved, case=replace(inputs.case, layout=layout)), path)
    assert torch.equal(got_out, out)
    assert torch.equal(got_lse, lse)
