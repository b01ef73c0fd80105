"""What the attention tests do not ask of the kernels of csrc/cuda/hopper: pages of every kind, for boxes and pieces, in
every layout; that no order shows in a bit; when they are taken, and what is refused."""

from __future__ import annotations

import dataclasses
import random

import attention_cases as cases
import attention_paths as paths
import emulated
import pytest
import torch
from attention_cases import BF16, FP16, Case
from forests import LAYOUTS, Forest

import tts_kernels as tts
from tts_kernels.attention import cuda

PATH = paths.WARPGROUPS[0]
pytestmark = pytest.mark.skipif(PATH.missing() is not None, reason=str(PATH.missing()))
RATES = {"bandwidth": 1e12, "flops": 1e14}


@pytest.fixture(autouse=True)
def selected(monkeypatch):
    PATH.select(monkeypatch)


def forest(case: Case) -> Forest:
    """Rows of one state and of many; tiles of each size; nodes that end inside of blocks and at their ends; nodes that
    no row sees; an empty one. Page ids in reserve are out of range."""
    rng = random.Random(case.seed)
    parent = [-1, 0, 0, 1, 1, 0, -1, -1, -1]
    length = [rng.choice([520, 640, 770]), rng.choice([128, 133, 256]), 5, 20, 1, rng.choice([64, 127, 129]), 12, 9, 0]
    rows = [0, 40, 1, 4, 1, 1, 3, 0, 0]
    placed = Forest(parent, length, rows, case.page_size).place(rng, reserve=1)
    for node, pages in enumerate(placed.pages):
        pages[-(-placed.length[node] // case.page_size) :] = [2_147_480_000]
    return placed


def options(seed: int) -> dict:
    rng = random.Random(seed)
    return {
        "dtypes": rng.choice([(FP16, FP16), (BF16, BF16)]),
        "head_dim": rng.choice([64, 128]),
        "heads": rng.choice([(4, 2), (6, 1), (3, 3)]),
        "window": rng.choice([-1, -1, 0, 90, 300]),
        "softcap": rng.choice([0.0, 2.5]),
        "sinks": rng.random() < 0.5,
        "causal": rng.random() < 0.7,
        "scale": rng.choice([None, 0.7, -0.2]),
        "seed": seed,
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 4, 8, 16, 48, 64, 128, 256])
def test_pages_of_every_kind(page_size, layout):
    case = Case(page_size=page_size, layout=layout, **options(page_size * 3 + LAYOUTS.index(layout)))
    cases.check(cases.make_inputs(case, forest(case)), PATH)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_no_order_and_no_grid_shows(head_dim):
    case = Case(heads=(6, 2), dtypes=(FP16, FP16), head_dim=head_dim, window=190, sinks=True, seed=1)
    inputs = cases.make_inputs(case, forest(case))
    caches, native = inputs.caches(), emulated.native()
    first = None
    for seed, multiprocessors in ((0, 3), (1, 1), (2, 2), (3, 7), (4, 3), (5, 40)):
        native.cuda_emulation_seed(seed, multiprocessors)
        got = cases.run(inputs, PATH, caches=caches)
        first = first or got
        assert all(torch.equal(a, b) for a, b in zip(got, first)), f"seed {seed}, {multiprocessors} multiprocessors"
    cases.assert_right(inputs, *first)


def test_explain_says_so():
    case = Case(heads=(8, 2), dtypes=(BF16, BF16), head_dim=128)
    inputs = cases.make_inputs(case, Forest([-1], [300], [2], case.page_size).place(random.Random(0)))
    caches, plan = inputs.caches(), inputs.forest.plan()
    got = tts.explain(plan, inputs.q, caches[0], backend="cuda", **RATES)
    assert "x 128 tokens by warpgroups, head_dim 128" in got.config
    # 8 packed rows are 64, 300 tokens three blocks, both products, two KV heads.
    assert got.issued_flops == 4 * 128 * 64 * 384 * 2


@pytest.mark.parametrize("change", [{"num_stages": 4}, {"num_stages": 1}])
def test_no_kernel_for_other_numbers_of_stages(change):
    case = Case(heads=(4, 2), dtypes=(FP16, FP16))
    inputs = cases.make_inputs(case, forest(case))
    plan = inputs.forest.plan()
    caches = inputs.caches()
    cases.run(inputs, PATH, plan=plan, caches=caches)
    plan.works = {key: dataclasses.replace(w, config=dataclasses.replace(w.config, **change))
                  for key, w in plan.works.items()}  # fmt: skip
    with pytest.raises(RuntimeError, match=r"no kernel is made for this .* warpgroups"):
        cases.run(inputs, PATH, plan=plan, caches=caches)


def test_they_are_not_the_rule(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(cuda, "native", emulated.native())
    config = cuda.config_of(torch.empty(1, 4, 128, dtype=FP16), torch.empty(1, 16, 2, 128, dtype=FP16))
    assert config.warpgroups == 0
