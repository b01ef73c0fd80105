"""Host time of an eager call on the cuda backend, without the driver: the emulated module, in which a launch returns
after its checks. What it leaves out: cudaLaunchKernel, looking up the current stream, and what torch's allocator takes
on a GPU beyond that on a CPU. Values in tensors are not looked at, as on a GPU. Each call is the second or later one of
its plan, as in the layers of a model."""

import importlib
import sys

import pytest
import torch

import tts_kernels as tts
from tts_kernels.attention import checks
from tts_kernels.scoring import ScoreHead
from tts_kernels.scoring import checks as scoring_checks

from .cases import HEAD_DIM, NUM_KV_HEADS, NUM_Q_HEADS, PAGE_SIZE
from .machine import ROOT

sys.path.insert(0, str(ROOT / "tests" / "emulation"))
import build

ROWS, STEPS, CANDIDATES, DIM = 64, 64, 16, 256
LAUNCH = "  struct State {\n"  # where emulated_launch.h has checked, and goes on to run the kernel


@pytest.fixture(scope="module")
def modules():
    """The emulated module, and the same without launches."""
    if reason := build.missing():
        pytest.skip(reason)
    edit = {"tests/emulation/emulated_launch.h": [(LAUNCH, "  if (true) return;\n" + LAUNCH)]}
    return build.load(build.build()), build.load(build.build(edit))


@pytest.fixture
def emulated(modules, monkeypatch):
    """Puts one of the modules in place of the native one."""
    backends = [importlib.import_module(f"tts_kernels.{family}.cuda") for family in ("attention", "scoring")]

    def use(which: int) -> None:
        for backend in backends:
            monkeypatch.setattr(backend, "native", modules[which])

    # On the CPU they are always looked at.
    monkeypatch.setattr(checks, "check_no_nan", lambda name, value, check: None)
    monkeypatch.setattr(scoring_checks, "looked_at", lambda tensor, check: check)
    return use


def attention() -> dict:
    """One shared node and a leaf for each row."""
    own = [[16 + 2 * i, 17 + 2 * i] for i in range(ROWS)]
    plan = tts.TreePlan.from_nodes(
        [-1] + [0] * ROWS, [256] + [20] * ROWS, [list(range(16)), *own], [0] + [1] * ROWS, page_size=PAGE_SIZE
    )
    q = torch.randn(ROWS, NUM_Q_HEADS, HEAD_DIM).bfloat16()
    caches = torch.randn(2, 16 + 2 * ROWS, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM).bfloat16()
    k, v = torch.randn(2, ROWS, NUM_KV_HEADS, HEAD_DIM).bfloat16()
    states, lse = torch.randn(2, *q.shape).bfloat16(), torch.randn(2, ROWS, NUM_Q_HEADS)
    kv, out, scale = (k, v, *caches, torch.arange(ROWS)), torch.empty_like(q), torch.ones(NUM_KV_HEADS)
    rope = {"cos_sin_cache": torch.randn(64, HEAD_DIM), "positions": torch.arange(ROWS), "q": q}
    scales = {"sinks": torch.zeros(NUM_Q_HEADS), "k_scale": scale, "v_scale": scale}
    return {
        "tree_attention": lambda by: tts.tree_attention(q, *caches, plan, backend=by),
        "tree_attention, out": lambda by: tts.tree_attention(q, *caches, plan, out=out, backend=by),
        "tree_attention, lse, sinks, scales": lambda by: tts.tree_attention(
            q, *caches, plan, return_lse=True, **scales, backend=by
        ),
        "decode_attention, plan": lambda by: tts.decode_attention(q, *caches, None, None, plan=plan, backend=by),
        "append_kv": lambda by: (tts.append_kv(*kv, backend=by), *caches),
        "append_kv, RoPE, q": lambda by: (tts.append_kv(*kv, **rope, backend=by), *caches),
        "merge_states": lambda by: tts.merge_states(states, lse, backend=by),
    }


def scoring() -> dict:
    hidden, positions = torch.randn(10 * STEPS, DIM).bfloat16(), torch.arange(0, 10 * STEPS, 10)
    offsets = torch.arange(0, STEPS + 1, STEPS // CANDIDATES)
    groups, answers = torch.arange(0, CANDIDATES + 1, 4), torch.arange(CANDIDATES) % 3
    head, scores = ScoreHead.linear(torch.randn(1, DIM).bfloat16()), torch.rand(CANDIDATES)
    vote = {"group_offsets": groups, "method": "weighted_vote", "answers": answers}
    return {
        "step_scores": lambda by: tts.step_scores(hidden, positions, head, offsets=offsets, backend=by).prob,
        "verify, votes": lambda by: tts.verify(hidden, positions, head, offsets=offsets, **vote, backend=by)[1].scores,
        "select": lambda by: tts.select(scores, group_offsets=groups, backend=by).scores,
    }


CALLS = {"attention": attention, "scoring": scoring}
NAMES = [(family, name) for family, calls in CALLS.items() for name in calls()]


@pytest.mark.parametrize("family, name", NAMES, ids=[name for _, name in NAMES])
def test_host(benchmark, grid, emulated, family, name):
    call = CALLS[family]()[name]
    emulated(0)
    for got, wanted in zip(results(call("cuda")), results(call("reference")), strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-2, rtol=2e-2, equal_nan=True)
    emulated(1)
    benchmark.group = "host"
    benchmark.extra_info["what"] = f"host: {name}"
    rounds, iterations = (10 * grid.min_rounds, 100) if grid.seconds else (3, 3)
    benchmark.pedantic(call, ("cuda",), warmup_rounds=1, rounds=rounds, iterations=iterations)


def results(returned: torch.Tensor | tuple) -> list[torch.Tensor]:
    """Copies: the next call may write into the same memory."""
    return [x.clone() for x in (returned if isinstance(returned, tuple) else (returned,)) if x is not None]
