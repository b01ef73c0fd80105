"""tree_attention of every backend and CPU code path against the dense float64 oracle, over poisoned random forests."""

import functools
import random

import attention_cases as cases
import attention_paths as paths
import pytest
import torch
from attention_cases import BF16, FACTORS, FP8, FP16, FP32, Case
from forests import Forest, star
from hypothesis import given, settings
from hypothesis import strategies as st

import tts_kernels.attention as attention
from tts_kernels.tree.plan import TreePlan

pytestmark = pytest.mark.parametrize("path", paths.available(paths.ALL + paths.WARPGROUPS), indirect=True)


@pytest.mark.parametrize("case", cases.covering_cases(), ids=str)
def test_against_dense(path, case):
    cases.check(cases.cached_inputs(cases.fitting(case, path)), path)


# Longer than the chunks into which kernels cut nodes, and more rows than their tiles hold; lengths that end one token
# before, at and after multiples of 64. A window and a causal border fall inside.
@pytest.mark.parametrize(
    "dtypes", [(FP32, FP32), (FP16, FP16), (BF16, BF16), (BF16, FP8)], ids=lambda d: f"{d[0]}-{d[1]}"
)
@pytest.mark.parametrize("window", [-1, 700])
def test_long_nodes(path, dtypes, window):
    cases.check(long_inputs(tuple(path.takes(dtype) for dtype in dtypes), window), path)


@functools.cache
def long_inputs(dtypes, window):
    forest = Forest(
        parent=[-1, 0, 0, 0, 1, 1],
        length=[2113, 511, 64, 1, 1025, 140],
        rows=[0, 3, 1, 1, 1, 140],
        page_size=16,
    ).place(random.Random(1))
    return cases.make_inputs(Case(dtypes=dtypes, window=window, heads=(4, 2), page_size=16), forest)


def test_many_rows_below_one_node(path):
    case = Case(dtypes=(BF16, BF16), heads=(28, 4), head_dim=128)
    forest = star(80, prefix=131, suffix=[1, 5, 17], page_size=case.page_size)
    cases.check(cases.make_inputs(case, forest, path), path)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_rows_that_see_nothing(path, sinks, causal):
    """Padding of a decode batch: a sequence of length 0 still has its row. All others go on as if it were not there."""
    lens = torch.tensor([5, 0, 9, 0], dtype=torch.int32)
    table = torch.full((4, 2), 2_147_480_000, dtype=torch.int32)
    table[0, :1], table[2, :2] = torch.tensor([3]), torch.tensor([3, 1])
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(4, 4, 32, generator=gen).to(path.device, path.takes(FP32))
    k_cache, v_cache = torch.randn(2, 4, 8, 2, 32, generator=gen).to(path.device, path.takes(FP32))
    sink = torch.randn(4, generator=gen).to(path.device) if sinks else None
    plan = TreePlan.from_block_table(table.to(path.device), lens.to(path.device), page_size=8, causal=causal)
    out, lse = attention.tree_attention(q, k_cache, v_cache, plan, sinks=sink, return_lse=True, backend=path.backend)
    assert torch.equal(out[[1, 3]], torch.zeros_like(out[[1, 3]]))
    assert torch.isneginf(lse[[1, 3]]).all()
    assert torch.isfinite(out).all() and torch.isfinite(lse[[0, 2]]).all()


def test_no_rows(path):
    case = Case()
    forest = Forest([-1], [5], [0], case.page_size).place(random.Random(0))
    out, lse = cases.run(cases.make_inputs(case, forest, path), path)
    assert out.shape == (0, 8, 64) and lse.shape == (0, 8)


def test_large_scores(path):
    """exp of the raw scores would overflow in fp32: about +-500."""
    case = Case(head_dim=128, scale=40.0, sinks=True)
    cases.check(cases.make_inputs(case, path=path), path)


def test_sink_beyond_all_scores(path):
    inputs = cases.make_inputs(Case(sinks=True), path=path)
    inputs.options["sinks"] = torch.tensor([300.0, -300.0, -torch.inf, 0.0] * 2)
    cases.check(inputs, path)


def test_sinks_and_scales_of_other_dtypes(path):
    inputs = cases.make_inputs(Case(sinks=True, scales="head", dtypes=(BF16, FP8)))
    for name in ("sinks", "k_scale", "v_scale"):
        inputs.options[name] = inputs.options[name].to(BF16)
    cases.check(inputs, path)


def test_without_lse(path):
    inputs = cases.make_inputs(Case(), path=path)
    k_cache, v_cache = inputs.caches(path.device)
    plan = inputs.forest.plan(device=path.device)
    out = attention.tree_attention(inputs.q.to(path.device), k_cache, v_cache, plan, backend=path.backend)
    assert torch.equal(out.cpu(), cases.run(inputs, path)[0])


def test_rows_in_the_callers_order(path):
    """Nodes given breadth-first: rows of q lie in that order, not in the depth-first order of the plan."""
    case = Case(heads=(2, 1), head_dim=32)
    forest = Forest([-1, -1, 0, 1, 0, 1], [9, 4, 3, 2, 7, 6], [1, 0, 2, 1, 3, 2], case.page_size).place(
        random.Random(2)
    )
    cases.check(cases.make_inputs(case, forest, path), path)


@pytest.mark.parametrize("context", ["inference_mode", "autocast"])
def test_contexts(path, context):
    inputs = cases.make_inputs(Case(), path=path)
    manager = torch.inference_mode() if context == "inference_mode" else torch.autocast(path.device, dtype=BF16)
    with manager:
        out, lse = cases.run(inputs, path)
    cases.assert_right(inputs, out.clone(), lse.clone())


def test_fuzz(path):
    """Beyond pairs: any combination, on forests of any shape. Shrinks to the simplest values that fail."""

    @settings(max_examples=12 if path.slow else 40, deadline=None, derandomize=True, database=None)
    @given(
        case=st.builds(
            Case, **{name: st.sampled_from(values) for name, values in FACTORS.items()}, seed=st.integers(0, 999)
        )
    )
    def any_case(case):
        cases.check(cases.make_inputs(case, path=path), path)

    any_case()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001])
def test_nan_keys_of_any_payload_show(path, bits):
    inputs = cases.make_inputs(Case(), star(2, prefix=40, suffix=[3], page_size=16), path)
    inputs.k[5] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    out, lse = cases.run(inputs, path)
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("gap", [5, 8, -8, 100])  # x 32: scores far apart
def test_scores_far_apart(path, gap):
    q = torch.ones(1, 1, 32, dtype=BF16, device=path.device)
    k = torch.zeros(2, 16, 1, 32, dtype=BF16, device=path.device)
    k[0, 0] = gap
    plan = TreePlan.from_nodes([-1], [20], [[0, 1]], [1], page_size=16, device=path.device)
    out = attention.tree_attention(q, k, torch.ones_like(k), plan, scale=1.0, backend=path.backend)
    assert torch.equal(out, torch.ones_like(out))


def test_finite_sink_of_any_size(path):
    inputs = cases.make_inputs(Case(sinks=True), path=path)
    inputs.options["sinks"] = torch.full((8,), 3e38)
    out, _ = cases.run(inputs, path)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("group", [128, 512])
def test_the_largest_groups(path, group):
    case = Case(heads=(group, 1), head_dim=32, dtypes=(BF16, BF16))
    cases.check(cases.make_inputs(case, star(2, prefix=40, suffix=[3], page_size=16)), path)
