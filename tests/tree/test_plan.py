"""TreePlan against the definition of who sees what, on random forests, and its refusals.

The oracle walks from each row to its root and lists the (page, offset) it may see in order of position; it knows
nothing of depth-first order.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_oracle import check_tables, rows_of

from tts_kernels.tree import plan as tree_plan
from tts_kernels.tree.pack import pack, pack_many
from tts_kernels.tree.plan import TreePlan

TOP = 2**31 - 1


@st.composite
def forests(draw):
    """Arguments of from_nodes; some nodes are empty, some own pages in reserve."""
    page_size = draw(st.sampled_from([1, 2, 4, 16]))
    num_nodes = draw(st.integers(0, 12))
    parent = [draw(st.integers(-1, i - 1)) for i in range(num_nodes)]
    length = [draw(st.sampled_from([0, 1, 2, 3, page_size, 2 * page_size + 1])) for _ in range(num_nodes)]
    one_each = draw(st.booleans())
    rows = [draw(st.integers(0, min(t, 1) if one_each else t)) for t in length]
    extra = [draw(st.integers(0, 2)) for _ in range(num_nodes)]
    count = [-(-t // page_size) + e for t, e in zip(length, extra)]
    ids = draw(st.permutations(range(sum(count))))
    pages = [[ids.pop() for _ in range(c)] for c in count]
    return parent, length, pages, rows, page_size


def expected_rows(parent, length, pages, rows, page_size, causal):
    """Per row of q: its position and the (page, offset) of each token that it sees."""
    seen = []
    for node, count in enumerate(rows):
        above, p = [], parent[node]
        while p >= 0:
            above = [(p, t) for t in range(length[p])] + above
            p = parent[p]
        for j in range(count):
            own = length[node] - count + j + 1 if causal else length[node]
            tokens = above + [(node, t) for t in range(own)]
            position = len(above) + length[node] - count + j
            seen.append((position, [(pages[i][t // page_size], t % page_size) for i, t in tokens]))
    return seen


@settings(max_examples=150, deadline=None)
@given(forests(), st.booleans())
def test_from_nodes_says_what_the_definition_says(forest, causal):
    parent, length, pages, rows, page_size = forest
    plan = TreePlan.from_nodes(parent, length, pages, rows, page_size=page_size, causal=causal)
    check_tables(plan)
    assert plan.num_nodes == len(parent) and plan.num_rows == sum(rows) and plan.causal is causal
    assert rows_of(plan) == expected_rows(*forest, causal)
    room = [
        len(pages[i]) * page_size - length[i] for i in range(len(parent)) if i not in parent and rows[i] and length[i]
    ]
    assert plan.capacity == min(room, default=0)


def test_depth_first_order_and_the_callers_rows():
    #   0       3      given level by level: 0 3 | 1 2 | 4
    #  1 2
    #  4
    plan = TreePlan.from_nodes(
        [-1, -1, 0, 0, 2], [5, 2, 4, 3, 1], [[9, 8], [7], [6], [5], [4]], [0, 2, 0, 3, 1], page_size=4
    )
    assert plan.nodes[tree_plan.PARENT].tolist() == [-1, 0, 1, 0, -1]
    assert plan.nodes[tree_plan.LENGTH].tolist() == [5, 4, 1, 3, 2]
    assert plan.nodes[tree_plan.POSITION].tolist() == [0, 5, 9, 5, 0]
    assert plan.nodes[tree_plan.OWN_BEGIN].tolist() == [0, 0, 0, 1, 4]
    assert plan.nodes[tree_plan.OWN_END].tolist() == [0, 0, 1, 4, 6]
    assert plan.nodes[tree_plan.ROWS_END].tolist() == [4, 1, 1, 4, 6]
    assert plan.rows.tolist() == [[5, 2, 3, 4, 0, 1], [2, 3, 3, 3, 4, 4]]
    assert plan.grows.tolist() == [0, 0, 1, 1, 1]
    assert (plan.depth, plan.num_tokens, plan.capacity, plan.max_page) == (3, 15, 1, 9)
    assert plan.positions().tolist() == [0, 1, 5, 6, 7, 9]
    assert plan.slots().tolist() == [28, 29, 20, 21, 22, 16]
    assert plan.advance_().positions().tolist() == [1, 2, 6, 7, 8, 10]
    assert plan.slots().tolist() == [29, 30, 21, 22, 23, 17]


def test_slots_of_rows_without_a_token():
    table = torch.tensor([[3, 1], [5, 9]])
    plan = TreePlan.from_block_table(table, torch.tensor([6, 0]), q_lens=torch.tensor([2, 1]), page_size=4)
    assert plan.slots().tolist() == [4, 5, -1]
    empty = TreePlan.from_block_table(table[:, :0], torch.tensor([0, 0]), page_size=4)
    assert empty.slots().tolist() == [-1, -1]


@settings(max_examples=60, deadline=None)
@given(forests(), st.booleans(), st.integers(0, 3))
def test_advance_is_the_plan_of_the_longer_tree(forest, causal, n):
    parent, length, pages, rows, page_size = forest
    plan = TreePlan.from_nodes(parent, length, pages, rows, page_size=page_size, causal=causal)
    before = plan.nodes.clone()
    if n > plan.capacity:
        with pytest.raises(ValueError, match="n: expected 0 <= n <= capacity"):
            plan.advance_(n)
        assert torch.equal(plan.nodes, before)
        return
    capacity = plan.capacity
    assert plan.advance_(n) is plan
    longer = [t + n if i not in parent and rows[i] else t for i, t in enumerate(length)]
    check_tables(plan)
    assert rows_of(plan) == expected_rows(parent, longer, pages, rows, page_size, causal)
    assert plan.capacity == capacity - n


def test_advance_works_across_inference_mode():
    with torch.inference_mode():
        plan = TreePlan.from_nodes([-1], [1], [[0, 1]], [1], page_size=2)
        plan.advance_()
    plan.advance_()
    assert plan.nodes[tree_plan.LENGTH].tolist() == [3] and plan.capacity == 1


@pytest.mark.parametrize("n, error", [(-1, ValueError), (4, ValueError), (1.0, TypeError), (True, TypeError)])
def test_advance_refuses(n, error):
    plan = TreePlan.from_nodes([-1], [1], [[0, 1]], [1], page_size=2)
    with pytest.raises(error, match=r"^n: expected"):
        plan.advance_(n)
    assert plan.nodes[tree_plan.LENGTH].tolist() == [1] and (plan.capacity, plan.num_tokens) == (3, 1)


def test_a_deep_chain_and_a_wide_forest():
    n = 3000  # past the depth of Python's stack
    plan = TreePlan.from_nodes(
        list(range(-1, n - 1)), [1] * n, [[i] for i in range(n)], [0] * (n - 1) + [1], page_size=1
    )
    assert plan.depth == n and plan.nodes[tree_plan.POSITION].tolist() == list(range(n))
    assert plan.nodes[tree_plan.ROWS_END].tolist() == [1] * n
    plan = TreePlan.from_nodes([-1] * n, [1] * n, [[i] for i in range(n)], [1] * n, page_size=1)
    assert plan.depth == 1 and plan.rows[0].tolist() == list(range(n))


def test_lists_may_be_tuples_ranges_and_tensors():
    want = TreePlan.from_nodes([-1, 0], [4, 2], [[3], [1]], [0, 1], page_size=4)
    got = TreePlan.from_nodes(
        torch.tensor([-1, 0]), (4, 2), (range(3, 4), torch.tensor([1])), torch.tensor([0, 1]), page_size=4, device="cpu"
    )
    for name in ("nodes", "pages", "rows", "grows"):
        assert torch.equal(getattr(got, name), getattr(want, name))


GOOD = {"parent": [-1, 0, 0], "length": [5, 2, 3], "pages": [[0, 1], [2], [3]], "rows": [0, 1, 3], "page_size": 4}


@pytest.mark.parametrize(
    "bad, error, message",
    [
        ({"length": [5, 2]}, ValueError, r"length: expected 3 entries, as many as parent, got 2"),
        ({"pages": [[0, 1], [2]]}, ValueError, r"pages: expected 3 entries"),
        ({"rows": [0, 1, 1, 1]}, ValueError, r"rows: expected 3 entries"),
        ({"parent": [-1, 2, 0]}, ValueError, r"parent\[1\]: expected -1 or the index of an earlier node, got 2"),
        ({"parent": [0, 0, 0]}, ValueError, r"parent\[0\]: .* got 0"),
        ({"parent": [-1, -2, 0]}, ValueError, r"parent\[1\]: .* got -2"),
        ({"parent": [-1, 0, 3]}, ValueError, r"parent\[2\]: .* got 3"),
        ({"parent": [-1, 0.0, 0]}, TypeError, r"parent\[1\]: expected an int, got 0.0"),
        ({"parent": [-1, False, 0]}, TypeError, r"parent\[1\]: expected an int, got False"),
        ({"parent": None}, TypeError, r"parent: expected a list of ints, got None"),
        ({"parent": "abc"}, TypeError, r"parent: expected a list of ints"),
        ({"length": [5, -1, 3]}, ValueError, r"length\[1\]: expected at least 0, got -1"),
        ({"length": [5, 2.0, 3]}, TypeError, r"length\[1\]: expected an int"),
        ({"length": [9, 2, 3]}, ValueError, r"pages\[0\]: expected at least ceil\(9 / 4\) page ids, got 2 ids"),
        ({"length": torch.tensor([5.0, 2, 3])}, TypeError, r"length\[0\]: expected an int, got 5.0"),
        ({"rows": [0, 3, 3]}, ValueError, r"rows\[1\]: expected 0 <= rows <= length\[1\] = 2, got 3"),
        ({"rows": [0, -1, 3]}, ValueError, r"rows\[1\]: .* got -1"),
        ({"rows": [0, True, 3]}, TypeError, r"rows\[1\]: expected an int, got True"),
        ({"pages": [[0, 1], [-2], [3]]}, ValueError, r"pages\[1\]\[0\]: expected a page id in .* got -2"),
        ({"pages": [[0, 2**31], [2], [3]]}, ValueError, r"pages\[0\]\[1\]: expected a page id"),
        ({"pages": [[0, 2**70], [2], [3]]}, ValueError, r"pages\[0\]\[1\]: expected a page id"),
        ({"pages": [[0, 1.5], [2], [3]]}, TypeError, r"pages\[0\]\[1\]: expected an int, got 1.5"),
        ({"pages": [[0, True], [2], [3]]}, TypeError, r"pages\[0\]\[1\]: expected an int, got True"),
        ({"pages": [[0, 1], 2, [3]]}, TypeError, r"pages\[1\]: expected a list of ints, got 2"),
        ({"pages": ["ab", [2], [3]]}, TypeError, r"pages\[0\]\[0\]: expected an int, got 'a'"),
        ({"pages": 5}, TypeError, r"pages: expected a list of lists"),
        ({"page_size": 0}, ValueError, r"page_size: expected at least 1, got 0"),
        ({"page_size": 4.0}, TypeError, r"page_size: expected an int"),
        ({"page_size": True}, TypeError, r"page_size: expected an int"),
        ({"causal": 1}, TypeError, r"causal: expected a bool, got 1"),
        ({"parent": [-1] * 3, "length": [TOP, 2, 3], "page_size": TOP}, ValueError, r"length: expected at most"),
    ],
)  # fmt: skip
def test_from_nodes_refuses(bad, error, message):
    TreePlan.from_nodes(**GOOD)
    with pytest.raises(error, match="^" + message):
        TreePlan.from_nodes(**(GOOD | bad))


@settings(max_examples=100, deadline=None)
@given(forests(), st.booleans())
@pytest.mark.skipif(tree_plan.native is None, reason="tts_kernels._C is not built")
def test_the_native_pass_and_the_python_path_build_equal_plans(forest, causal):
    parent, length, pages, rows, page_size = forest
    plans = []
    for native in (tree_plan.native, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tree_plan, "native", native)
            plans.append(TreePlan.from_nodes(parent, length, pages, rows, page_size=page_size, causal=causal))
    for field in dataclasses.fields(TreePlan):
        fast, slow = (getattr(plan, field.name) for plan in plans)
        if isinstance(fast, tuple):
            assert all(map(torch.equal, fast, slow)), field.name
        else:
            assert torch.equal(fast, slow) if isinstance(fast, torch.Tensor) else fast == slow, field.name


@pytest.mark.parametrize("device, error", [(torch.float16, TypeError), (3.5, TypeError), ("nope", ValueError)])
def test_what_is_no_device(device, error):
    with pytest.raises(error, match=r"^device: expected a torch.device or its name, got"):
        TreePlan.from_nodes([-1], [3], [[0]], [1], page_size=4, device=device)
    for function, arguments in ((pack, ([[1]],)), (pack_many, ([[1]], [[[2]]]))):
        with pytest.raises(error, match=r"^device: expected a torch.device or its name, got"):
            function(*arguments, device=device)
