"""What the attention tests do not ask of the cuda kernels: that no order of threads, blocks and copies shows in a bit
of the result, nor the size of the grid; that a plan's counters and states are as good as new after every call."""

from __future__ import annotations

import random

import attention_cases as cases
import attention_paths as paths
import emulated
import pytest
import torch
from attention_cases import BF16, FP8, FP16, Case
from forests import Forest

import tts_kernels.attention as attention

PATH = paths.Path("cuda")
pytestmark = pytest.mark.skipif(PATH.missing() is not None, reason=str(PATH.missing()))

CASES = [
    Case(heads=(6, 2), dtypes=(FP16, FP16), head_dim=64, window=90, sinks=True, seed=1),
    Case(heads=(28, 4), dtypes=(BF16, FP8), head_dim=80, scales="head", seed=2),
    Case(heads=(4, 1), dtypes=(BF16, BF16), head_dim=256, softcap=2.5, seed=3),
]


@pytest.fixture(autouse=True)
def selected(monkeypatch):
    PATH.select(monkeypatch)


def forest(case: Case) -> Forest:
    """Rows of one state and of many; tiles of each size; nodes that no row sees; an empty one."""
    parent = [-1, 0, 0, 1, 1, 0, -1, -1, -1]
    length = [700, 133, 5, 20, 1, 64, 12, 9, 0]
    rows = [0, 40, 1, 4, 1, 1, 3, 0, 0]
    return Forest(parent, length, rows, case.page_size).place(random.Random(case.seed))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_order_and_no_grid_shows(case):
    inputs = cases.make_inputs(case, forest(case))
    caches, native = inputs.caches(), emulated.native()
    first = None
    for seed, multiprocessors in ((0, 3), (1, 1), (2, 2), (3, 7), (4, 3), (5, 40)):
        native.cuda_emulation_seed(seed, multiprocessors)
        got = cases.run(inputs, PATH, caches=caches)
        if first is None:
            first = got
            cases.assert_right(inputs, *got)
        assert all(torch.equal(a, b) for a, b in zip(got, first)), f"seed {seed}, {multiprocessors} multiprocessors"


def test_a_plan_serves_call_after_call():
    """The counters wrap to zero by themselves; states of the call before are not taken for those of this one."""
    case = CASES[0]
    plan = forest(case).plan()
    for seed in range(4):
        inputs = cases.make_inputs(cases.replace(case, seed=seed), forest(case))
        cases.check(cases.replace(inputs, forest=forest(case)), PATH, plan=plan, caches=inputs.caches())
        (work,) = plan.works.values()
        counters = work.scratch[-plan.num_rows * case.heads[0] :]
        assert not counters.view(torch.int32).any()


def test_a_launch_that_fails_says_what_it_was(monkeypatch):
    inputs = cases.make_inputs(CASES[0], forest(CASES[0]))
    plan = inputs.forest.plan()
    cases.run(inputs, PATH, plan=plan)
    plan.works = {key: cases.replace(w, config=cases.replace(w.config, num_stages=99)) for key, w in plan.works.items()}
    with pytest.raises(RuntimeError, match=r"tree_attention: .*50 rows of 6 heads, 2 KV heads of 64, 9 nodes"):
        attention.tree_attention(inputs.q, *inputs.caches(), plan, backend="cuda")
