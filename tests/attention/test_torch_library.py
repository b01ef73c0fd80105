"""The registered ops under opcheck and torch.compile(fullgraph=True)."""

import shutil
from dataclasses import replace

import attention_cases as cases
import pytest
import torch
from attention_cases import BF16, FP8, Case
from forests import star

from tts_kernels.attention import append_kv, decode_attention, merge_states, tree_attention
from tts_kernels.attention.api import work_of

OP = torch.ops.tts_kernels


@pytest.fixture(params=["aot_eager", "inductor"])
def compiler(request):
    if request.param == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    return request.param


@pytest.fixture
def inputs():
    forest = star(3, prefix=13, suffix=[5], page_size=4)
    return cases.make_inputs(Case(heads=(4, 2), head_dim=32, page_size=4, layout="HND"), forest)


def test_opcheck_tree_attention(path, inputs):
    inputs = cases.make_inputs(inputs.case, inputs.forest, path)
    plan = inputs.forest.plan(device=path.device)
    q = inputs.q.to(path.device)
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:2], device=path.device)
    sinks, scales = torch.ones(4, device=path.device), torch.ones(2, device=path.device)
    caches = inputs.caches(path.device)
    work = work_of(plan, q, *caches, path.backend)
    if work[1] is not None:
        work[1].zero_()
    for maybe_lse, sink, scale in ((lse, None, None), (None, sinks, scales)):
        torch.library.opcheck(
            OP.tree_attention.default,
            (out, maybe_lse, q, *caches, plan.nodes, plan.pages, plan.rows, plan.page_size, plan.causal)
            # scale, softcap, window, sinks, k_scale, v_scale, table, scratch, tile, backend, check
            + (0.5, 0.0, -1, sink, scale, scale, *work, path.backend, True),
        )


def test_opcheck_append_kv(path):
    k, v = torch.randn(2, 3, 2, 8).to(path.device)
    k_cache, v_cache = torch.zeros(2, 2, 4, 2, 8).to(path.device)
    slots = torch.tensor([3, -1, 6], device=path.device)
    torch.library.opcheck(OP.append_kv.default, (k, v, k_cache, v_cache, slots, path.backend, True))


def test_opcheck_merge_states(path):
    out, lse = torch.randn(2, 3, 2, 8).to(path.device), torch.randn(2, 3, 2).to(path.device)
    torch.library.opcheck(OP.merge_states.default, (out, lse, path.backend))


def test_fake_results_have_the_shapes_of_real_ones():
    with torch._subclasses.FakeTensorMode():
        out, lse = merge_states(torch.empty(2, 3, 4, 8, dtype=BF16), torch.empty(2, 3, 4))
    assert out.shape == (3, 4, 8) and out.dtype == BF16 and lse.shape == (3, 4) and lse.dtype == torch.float32


# What the compiler sees ends at the registered op: one backend, the default one, stands for all.


@pytest.mark.parametrize("plan_is", ["an argument", "closed over"])
def test_compiled_tree_attention(compiler, inputs, plan_is):
    """Across advance_ too: it changes the plan in place, and nothing is compiled again."""
    q = inputs.q
    k_cache, v_cache = inputs.caches()
    forest = inputs.forest
    shorter = [forest.length[0]] + [n - 2 for n in forest.length[1:]]
    plan = replace(forest, length=shorter).plan()

    def attend(q, given):
        # The ops around it are there for the compiler to fuse and to reorder, if it dared.
        out, lse = tree_attention(q * 2, k_cache, v_cache, given or plan, softcap=3.0, k_scale=0.5, return_lse=True)
        return out + 1, lse

    compiled = torch.compile(attend, fullgraph=True, backend=compiler)
    given = plan if plan_is == "an argument" else None
    for step in range(3):
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"), torch.no_grad():
            got = compiled(q, given)
        for a, b in zip(got, attend(q, given)):
            torch.testing.assert_close(a, b)
        if step < 2:
            plan.advance_()


def test_compiled_decode_step(compiler, inputs):
    """Append, attend into a preallocated output, merge with a second part: a layer's step, mutations in their order."""
    k_cache, v_cache = inputs.caches()
    plan = inputs.forest.plan()
    slots = torch.tensor([inputs.forest.slots(node)[-1] for node in (1, 2, 3)])
    gen = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 3, 2, 32, generator=gen)
    q = inputs.q

    def step(q, k, v, k_cache, v_cache, out):
        append_kv(k * 2, v, k_cache, v_cache, slots)
        got, lse = decode_attention(q, k_cache, v_cache, None, None, plan=plan, out=out, return_lse=True)
        return merge_states(torch.stack([got, q]), torch.stack([lse, lse + 1]))

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=compiler)):
        caches = [cache.clone() for cache in (k_cache, v_cache)]
        out = torch.full_like(q, torch.nan)
        with torch.no_grad():
            merged, lse = function(q, k, v, *caches, out)
        results.append((merged, lse, out, *caches))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, equal_nan=True)


def test_compiled_with_sizes_that_change(inputs):
    """Another number of rows and nodes: compiled at most once more, for any size."""
    torch._dynamo.reset()
    compiled = torch.compile(tree_attention, fullgraph=True, backend="aot_eager")
    for samples in (3, 5, 7, 9):
        case = replace(inputs.case, dtypes=(BF16, FP8), sinks=True, scales="head")
        now = cases.make_inputs(case, star(samples, prefix=13, suffix=[5, 2], page_size=4))
        k_cache, v_cache = now.caches()
        stance = "default" if samples <= 5 else "fail_on_recompile"
        with torch.compiler.set_stance(stance), torch.no_grad():
            out, lse = compiled(now.q, k_cache, v_cache, now.forest.plan(), **now.options, return_lse=True)
        cases.assert_right(now, out, lse)
