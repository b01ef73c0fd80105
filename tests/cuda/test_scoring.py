"""What is the cuda backend's own in scoring: blocks that find the last of them, lists that are sorted in shared memory
or in scratch, the parts of a product, launches and graphs. The scoring tests themselves run on it too."""

from __future__ import annotations

import importlib
import itertools
import random

import emulated
import pytest
import scoring_cases as cases
import torch
from fresh_memory import nan_in_fresh_memory  # noqa: F401
from own_process import failure
from scoring_cases import BF16, FP16, FP32, Case, ScoringPath

from tts_kernels.scoring import ScoreHead, aggregate, select, step_scores, token_logprobs, unsupported_reasons, verify

EMULATED = ScoringPath("cuda")
PATHS = [
    pytest.param(path, marks=[pytest.mark.gpu] if path.device == "cuda" else [])
    for path in (EMULATED, ScoringPath("cuda", device="cuda"))
    if path.missing() is None
]
SOURCES = ["csrc/bindings.cpp", "csrc/cuda/*.cu"]


@pytest.fixture
def backend():
    return importlib.import_module("tts_kernels.scoring.cuda")


@pytest.fixture(params=PATHS or [pytest.param(None, marks=pytest.mark.skip(reason=str(EMULATED.missing())))], ids=str)
def path(request, monkeypatch):
    request.param.select(monkeypatch)
    return request.param


@pytest.fixture
def calls(backend, path, monkeypatch):
    """The names of the native functions called, in their order."""
    names, native = [], backend.native

    class Counting:
        def __getattr__(self, name):
            found = getattr(native, name)
            if not callable(found) or name == "cuda_is_emulated":
                return found
            return lambda *arguments: (names.append(name), found(*arguments))[1]

    monkeypatch.setattr(backend, "native", Counting())
    return names


def batch(rng, num_candidates, most_steps, empty=0.3):
    """Steps of candidates, of which many have none, and the offsets of groups, of which many have none."""
    steps = tuple(0 if rng.random() < empty else rng.randint(1, most_steps) for _ in range(num_candidates))
    cuts = sorted(rng.choices(range(num_candidates + 1), k=rng.randint(0, max(1, num_candidates))))
    return steps, [0, *cuts, num_candidates]


def check_verdict(path, inputs, groups, answers, method, k, reduce="mean"):
    """Scores against the oracle; what is selected, by the scores that came, against plain sorting."""
    at = inputs.to(path.device)
    tensors = [None if x is None else torch.tensor(x, dtype=torch.int64, device=path.device) for x in (groups, answers)]
    scores, chosen = verify(
        at.hidden, at.positions, at.head, offsets=at.offsets, reduce=reduce, group_offsets=tensors[0], method=method,
        answers=tensors[1], k=k, backend="cuda", check=True,
    )  # fmt: skip
    cases.check_scores(scores, inputs)
    num_candidates = len(inputs.case.steps)
    wanted = cases.dense_select(getattr(scores, reduce).tolist(), groups or [0, num_candidates], method, k, answers)
    assert chosen.indices.tolist() == wanted[0]
    torch.testing.assert_close(chosen.scores.tolist(), wanted[1], rtol=0, atol=0, equal_nan=True)
    return scores, chosen


@pytest.mark.parametrize("seed", range(12))
def test_any_forest_of_candidates_and_groups(path, backend, seed):
    """Candidates that lie in one block's rows and in many, without steps at the beginning, between and at the end,
    groups likewise; every other batch has so many rows that a block takes two."""
    rng = random.Random(seed)
    steps, groups = batch(rng, rng.choice((0, 1, 7, 40)), rng.choice((1, 3, 90)), empty=rng.random())
    if seed % 2:
        long = 1030
        steps = (*steps[:2], long, *steps[2:])
        groups = [g + 1 if g >= 2 else g for g in groups]
        groups[-1] = len(steps)
    inputs = cases.make_inputs(
        Case(dim=8, columns=rng.choice((1, 2, 3)), positive=0, activation="sigmoid", steps=steps)
    )
    method = rng.choice(("best", "top_k", "weighted_vote", "majority"))
    answers = [rng.randint(-1, 3) for _ in steps]
    k = 1 if method == "best" else rng.choice((1, 3, 9))
    check_verdict(path, inputs, groups, answers, method, k)
    assert all(not counters.any() for counters in backend._counters.values())


def test_one_launch(path, calls):
    inputs = cases.make_inputs(Case(steps=(3, 0, 1, 5))).to(path.device)
    arguments = inputs.hidden, inputs.positions, inputs.head
    for call in (
        lambda: step_scores(*arguments, offsets=inputs.offsets, backend="cuda"),
        lambda: verify(*arguments, offsets=inputs.offsets, k=12, method="top_k", backend="cuda"),
        lambda: aggregate(torch.zeros(9, device=path.device), offsets=inputs.offsets, backend="cuda"),
    ):
        call()
        assert calls == ["cuda_step_scores"]
        calls.clear()
    select(torch.zeros(9, device=path.device), backend="cuda")
    assert calls == ["cuda_select"]
    calls.clear()
    inputs = cases.make_inputs(Case(hidden_layer=24, steps=(3, 0, 1, 5))).to(path.device)
    verify(inputs.hidden, inputs.positions, inputs.head, offsets=inputs.offsets, backend="cuda")
    assert calls == ["cuda_gather_rows", "cuda_step_scores"]


@pytest.mark.parametrize("method, k", [("best", 1), ("top_k", 8), ("top_k", 9), ("majority", 3), ("weighted_vote", 40)])
def test_thousands_of_candidates_in_a_group(path, method, k):
    """Many ties; few answers and many."""
    gen = torch.Generator().manual_seed(0)
    inputs = cases.make_inputs(Case(dim=8, columns=1, positive=0, activation="identity", steps=(1,) * 3000))
    inputs.hidden.copy_(torch.randint(-2, 3, inputs.hidden.shape, generator=gen))
    inputs.head.w2.copy_(torch.randint(-2, 3, inputs.head.w2.shape, generator=gen))
    inputs.head.b2.zero_()
    for answers in (5, 1500):
        answers = torch.randint(-1, answers, (3000,), generator=gen).tolist()
        check_verdict(path, inputs, None, answers, method, k, reduce="last")


@pytest.mark.parametrize("shared", [0, 1, 16, 4096])
@pytest.mark.parametrize("method, k", [("top_k", 9), ("top_k", 100), ("majority", 2), ("weighted_vote", 30)])
def test_where_lists_are_sorted_changes_nothing(path, backend, monkeypatch, method, k, shared):
    monkeypatch.setattr(backend, "SHARED_CANDIDATES", shared)
    gen = torch.Generator().manual_seed(1)
    sizes = (0, 1, 2, 3, 16, 17, 64, 65)
    bounds = [0, *itertools.accumulate(sizes)]
    scores = torch.randint(-3, 4, (bounds[-1],), generator=gen) / 4
    scores[torch.rand(bounds[-1], generator=gen) < 0.2] = torch.nan
    answers = torch.randint(-1, 12, (bounds[-1],), generator=gen)
    got = select(
        scores.to(path.device), group_offsets=torch.tensor(bounds, device=path.device), k=k, method=method,
        answers=answers.to(path.device), backend="cuda",
    )  # fmt: skip
    wanted = cases.dense_select(scores.tolist(), bounds, method, k, answers.tolist())
    assert got.indices.tolist() == wanted[0]
    torch.testing.assert_close(got.scores.tolist(), wanted[1], rtol=0, atol=0, equal_nan=True)


def test_more_columns_than_shared_memory_takes(path, backend, monkeypatch):
    monkeypatch.setattr(backend, "SHARED_COLUMNS", 10)
    inputs = cases.make_inputs(Case(columns=11, positive=3, steps=(3, 0, 1, 500, 600)))
    cases.check_scores(inputs.run(path), inputs)


@pytest.mark.parametrize("dtypes", list(itertools.product((FP32, FP16, BF16), repeat=2)), ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_products_of_parts(path, dtypes, norm):
    """Of a hidden layer: every pair of dtypes, more rows than one product has, units that fill no 16 bytes."""
    inputs = cases.make_inputs(Case(dim=43, hidden_layer=21, dtypes=dtypes, norm=norm, steps=(100, 0, 60)))
    cases.check_scores(inputs.run(path), inputs)


def test_parts_are_exact(path, backend):
    """Whatever fp32 holds is the sum of three numbers in bfloat16, and infinities and nan stay themselves."""
    x = torch.tensor([1.0, -1 / 3, 3.4e38, -1.1754944e-38, 16777215.0, 0.0, torch.inf, -torch.inf, torch.nan, 2.0**-60])
    x = torch.cat([x, torch.randn(54, generator=torch.Generator().manual_seed(0))])[None].to(path.device)
    seen = []
    backend.product, before = lambda x, w, out: (seen.append(x.clone()), out.zero_()), backend.product
    try:
        backend.hidden_layer(x, torch.zeros(1, dtype=torch.int64, device=path.device),
                             torch.zeros(1, 64, dtype=BF16, device=path.device), None, 0.0)  # fmt: skip
    finally:
        backend.product = before
    (parts,) = seen
    assert parts.dtype == BF16 and parts.shape == (3 * backend.PRODUCT_ROWS, 64)
    parts = parts.view(3, -1, 64)
    torch.testing.assert_close(parts[:, 0].double().sum(0), x[0].double(), rtol=0, atol=0, equal_nan=True)
    assert not parts[:, 1:].any()


def test_the_order_of_blocks_changes_no_bit(path):
    if path.device == "cuda":
        pytest.skip("a GPU takes blocks in any order")
    inputs = cases.make_inputs(Case(norm=True, steps=(40, 0, 3, 70, 1)))
    groups = torch.tensor([0, 2, 5])
    results = []
    for seed in range(12):
        emulated.native().cuda_emulation_seed(seed, 1 + seed % 4)
        scores, chosen = verify(
            inputs.hidden, inputs.positions, inputs.head, offsets=inputs.offsets, group_offsets=groups, backend="cuda"
        )
        results.append([*(getattr(scores, n) for n in ("margin", "prob", *cases.STATS)), chosen.scores])
    assert all(cases.same_bits(a, b) for other in results[1:] for a, b in zip(other, results[0]))


def test_offsets_past_the_rows_leave_no_counter_behind(path, backend):
    """Which is undefined, but must not spoil the calls that come after."""
    inputs = cases.make_inputs(Case(steps=(3, 0, 1, 5))).to(path.device)
    head = (
        inputs.hidden,
        inputs.positions,
        inputs.head.w1,
        inputs.head.b1,
        "",
        inputs.head.w2,
        inputs.head.b2,
        None,
        0,
    )
    groups = torch.tensor([0, 9], device=path.device)
    backend.verdict(*head, inputs.offsets + 6, "softmax", 1, ("last", groups, None, "best", 1))
    assert all(not counters.any() for counters in backend._counters.values())


def test_counters_grow(path, backend):
    offsets = torch.arange(5001, device=path.device)
    for _ in range(2):
        got = aggregate(torch.zeros(5000, device=path.device), offsets=offsets, backend="cuda")
        assert torch.equal(got.last, torch.full_like(got.last, 0.5))


def test_weights_that_are_not_dense(path):
    """Biases and norms with strides; rows of weights apart."""
    gen = torch.Generator().manual_seed(0)
    w, b, norm = torch.randn(2, 50, generator=gen), torch.randn(2, 3, generator=gen), torch.randn(40, 2, generator=gen)
    hidden = torch.randn(5, 40, generator=gen)
    strided, dense = (
        step_scores(
            hidden.to(path.device), torch.arange(5, device=path.device),
            ScoreHead.linear(*(move(x) for x in (w[:, :40], b[:, 1])), norm=(move(norm[:, 1]), 1e-6)),
            offsets=torch.tensor([0, 5], device=path.device), backend="cuda",
        ).margin
        for move in (lambda x: cases_on_device(x, path.device), lambda x: x.contiguous().to(path.device))
    )  # fmt: skip
    assert cases.same_bits(strided, dense)


def cases_on_device(x, device):
    copy = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device)
    return copy.copy_(x)


def test_token_logprobs_is_not_there():
    (reason,) = unsupported_reasons("token_logprobs", "cuda", torch.empty(0, 4))
    assert "triton" in reason
    with pytest.raises(RuntimeError, match="cannot run token_logprobs"):
        token_logprobs(torch.ones(1, 4), torch.ones(3, 4), torch.zeros(1, dtype=torch.int64), backend="cuda")


KERNEL, VERDICT, SELECTION = "csrc/cuda/step_scores.cu", "csrc/cuda/verdict.cuh", "csrc/cuda/selection.cuh"

# That behind it publishes as much here as that before it: the emulation finds one of the two enough.
COUNTED = """      fence();
      last = atomic_wrap(counters + i, uint32_t(tiles - 1)) == uint32_t(tiles - 1);
      fence();
"""

# (what goes wrong, the file, what stands there, what it becomes)
PLANTED = [
    ("fence: none around the counter", KERNEL, COUNTED, COUNTED.replace("fence();", "")),
    ("counter: one too few", KERNEL, "== uint32_t(tiles - 1);", "== uint32_t(tiles - 2);"),
    ("counter: it wraps too late", KERNEL, "counters + i, uint32_t(tiles - 1))", "counters + i, uint32_t(tiles))"),
    ("counter: that of the candidate before", KERNEL, "atomic_wrap(counters + i,", "atomic_wrap(counters + i / 2,"),
    ("barrier: none before warps' sums are read", KERNEL, "    sync_block();\n    const int r =", "    const int r ="),
    ("barrier: none after the last logits", KERNEL, "= logit;\n  }\n  sync_block();", "= logit;\n  }"),
    ("barrier: none behind the counters", KERNEL, "  sync_block();\n  return {begin", "  return {begin"),
    ("index: the weights of the next column", KERNEL, "(column + c) * p.w2.row + d", "(column + c + 1) * p.w2.row + d"),
    ("index: rows one after the other, not gathered", KERNEL, "p.positions[first_row + r] * p", "(first_row + r) * p"),
    ("border: who has no steps is nobody's", KERNEL, "max(row_of(i), row_of(i + 1) - 1)", "(row_of(i + 1) - 1)"),
    ("sum: a warp's is left out", KERNEL, "w < kWarps; ++w) logit", "w < kWarps - 7; ++w) logit"),
    ("sum: half of the lanes", VERDICT, "mask = 16; mask > 0; mask /= 2) x +=", "mask = 8; mask > 0; mask /= 2) x +="),
    ("sort: the last pair is left alone", SELECTION, "if (b >= count) return;", "if (b >= count - 1) return;"),
    ("sort: no barrier between its steps", SELECTION, "stride);\n      }\n      sync_block();", "stride);\n      }"),
    ("ties: the higher index", SELECTION, "| uint32_t(index);", "| ~uint32_t(index);"),
]  # fmt: skip


def compare(native, backend, monkeypatch) -> None:
    EMULATED.select(monkeypatch)
    monkeypatch.setattr(backend, "native", native)
    gen = torch.Generator().manual_seed(0)
    for seed in range(1, 5):
        native.cuda_emulation_seed(seed, 2)
        inputs = cases.make_inputs(Case(dim=300, columns=6, norm=True, steps=(9, 0, 2, 33, 0)))
        answers = torch.randint(0, 2, (5,), generator=gen).tolist()
        check_verdict(EMULATED, inputs, [0, 2, 5], answers, "weighted_vote", 2)
        assert all(not counters.any() for counters in backend._counters.values())
        scores = torch.randint(0, 5, (101,), generator=gen) / 4
        got = select(scores, k=20, method="top_k", backend="cuda")
        assert got.indices.tolist() == cases.dense_select(scores.tolist(), [0, 101], "top_k", 20, None)[0]


@pytest.mark.skipif(EMULATED.missing() is not None, reason=str(EMULATED.missing()))
def test_without_an_error_all_is_well(backend, monkeypatch):
    compare(emulated.native(), backend, monkeypatch)


@pytest.mark.skipif(EMULATED.missing() is not None, reason=str(EMULATED.missing()))
@pytest.mark.parametrize("what, file, line, planted", PLANTED, ids=[what for what, *_ in PLANTED])
def test_a_planted_error_is_found(what, file, line, planted, backend, monkeypatch):
    native = emulated.edited({file: [(line, planted)]}, SOURCES)
    found = failure(lambda: compare(native, backend, monkeypatch))
    assert found
    print(found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("hidden_layer", [0, 24])
def test_a_captured_graph(hidden_layer):
    """Replayed on new hidden states, twice, beside calls on the stream that it was captured on."""
    at = cases.make_inputs(Case(hidden_layer=hidden_layer, dtypes=(BF16, BF16), steps=(30, 0, 1, 50))).to("cuda")
    answers = torch.tensor([1, 1, 2, 2], device="cuda")

    def run():
        scores, chosen = verify(
            at.hidden, at.positions, at.head, offsets=at.offsets, method="majority", answers=answers, backend="cuda"
        )
        return [*(getattr(scores, name) for name in ("margin", "prob", *cases.STATS)), chosen.scores, chosen.indices]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in range(2):
        at.hidden.copy_(torch.randn(at.hidden.shape, generator=torch.Generator().manual_seed(seed)))
        wanted = run()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(captured, wanted))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_kernel_on_the_device():
    at = cases.make_inputs(Case(dim=4096, dtypes=(BF16, BF16), steps=(20,) * 64)).to("cuda")

    def run():
        return verify(at.hidden, at.positions, at.head, offsets=at.offsets, backend="cuda")

    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1 and "step_scores" in kernels[0]
