"""What the attention tests vary, and one call of it: inputs, the oracle's answer and the comparison.

The full grid of these factors has over ten million points. A kernel goes wrong where two of them meet (a window and a
page border, fp8 and a group of 5, a sink and a row that sees nothing), so `covering_cases` picks points until every
pair of values of any two factors has been met: about seventy. Sizes are small, because what a case costs is the oracle;
nodes longer than a kernel's chunk have a test of their own.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import random
from dataclasses import dataclass, replace

import torch
from attention_paths import Path
from dense import assert_close, dense_attention, visibility
from forests import Forest, empty_caches, random_forest, write

import tts_kernels.attention as attention

FP32, FP16, BF16, FP8 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn

FACTORS = {
    "kind": ("decode", "verify", "mixed", "chain", "roots"),
    # (dtype of q, dtype of the caches)
    "dtypes": ((FP32, FP32), (FP16, FP16), (BF16, BF16), (BF16, FP8), (FP16, FP8), (FP32, FP8)),
    # Every size a model is known to use, and two that are a multiple of 8 only.
    "head_dim": (32, 40, 64, 72, 80, 96, 128, 192, 256),
    # MHA, MQA, groups of 7 (Qwen2), 5 (odd, one KV head), 4 and 3.
    "heads": ((3, 3), (8, 1), (28, 4), (5, 1), (8, 2), (6, 2)),
    "page_size": (1, 7, 16, 64),
    "layout": ("NHD", "HND", "joint"),
    "causal": (True, False),
    # 0: a row sees its own position alone; 3 and 40 end inside nodes and cross their borders.
    "window": (-1, 0, 3, 40),
    "softcap": (0.0, 2.5),
    "sinks": (False, True),
    "scales": (None, "number", "tensor", "head"),
    # 0.7 makes the softmax sharp: a few keys carry it.
    "scale": (None, 0.7),
    "out": ("fresh", "given", "strided"),
    "q": ("dense", "strided"),
}


@dataclass(frozen=True)
class Case:
    kind: str = "mixed"
    dtypes: tuple = (FP32, FP32)
    head_dim: int = 64
    heads: tuple = (8, 2)
    page_size: int = 16
    layout: str = "NHD"
    causal: bool = True
    window: int = -1
    softcap: float = 0.0
    sinks: bool = False
    scales: str | None = None
    scale: float | None = None
    out: str = "fresh"
    q: str = "dense"
    seed: int = 0

    def __str__(self) -> str:
        q, cache = (str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        kv = "" if q == cache else "-" + cache
        return f"{self.seed}-{self.kind}-{q}{kv}-D{self.head_dim}-H{self.heads[0]}.{self.heads[1]}"


def covering_cases(seed: int = 0) -> list[Case]:
    """Cases that together meet every pair of values of any two factors. Greedy: of 30 candidates, each with one pair
    not yet met and the rest at random, the one that meets the most new pairs."""
    rng = random.Random(seed)
    names = list(FACTORS)
    choices = list(FACTORS.values())
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(choices[a]))
        for j in range(len(choices[b]))
    }
    cases = []
    while missing:
        best, best_met = None, set()
        for forced in rng.sample(sorted(missing), min(30, len(missing))):
            point = [rng.randrange(len(values)) for values in choices]
            for factor, index in forced:
                point[factor] = index
            met = missing.intersection(itertools.combinations(enumerate(point), 2))
            if len(met) > len(best_met):
                best, best_met = point, met
        missing -= best_met
        values = {name: choices[factor][best[factor]] for factor, name in enumerate(names)}
        cases.append(Case(**values, seed=len(cases)))
    return cases


@dataclass
class Inputs:
    """Everything of one call in logical order (rows and tokens node by node), and what is true of it."""

    forest: Forest
    case: Case
    q: torch.Tensor  # [R, Hq, D]
    k: torch.Tensor  # [T, Hkv, D]
    v: torch.Tensor
    options: dict  # scale, softcap, window, sinks, k_scale, v_scale as the op takes them

    def caches(self, device="cpu"):
        forest, case = self.forest, self.case
        k_cache, v_cache = empty_caches(
            forest.num_pages, forest.page_size, case.heads[1], case.head_dim, case.dtypes[1], case.layout
        )
        slots = [slot for node in range(forest.num_nodes) for slot in forest.slots(node)]
        write(k_cache, slots, self.k)
        write(v_cache, slots, self.v)
        return on_device(k_cache, device), on_device(v_cache, device)

    @functools.cached_property
    def expected(self):
        """(out, lse) in float64 and in plain torch of q's dtype."""
        case = self.case
        visible = visibility(self.forest, causal=case.causal, window=case.window)
        options = dict(self.options, scale=case.scale or 1 / math.sqrt(case.head_dim))
        del options["window"]
        for name in ("k_scale", "v_scale"):
            if options[name] is not None:
                options[name] = torch.as_tensor(options[name], dtype=FP32).expand(case.heads[1])
        with one_thread():
            exact = dense_attention(self.q, self.k, self.v, visible, dtype=torch.float64, **options)
            plain = dense_attention(self.q, self.k, self.v, visible, dtype=case.dtypes[0], **options)
        return exact, plain


@contextlib.contextmanager
def one_thread():
    """Many tiny ops on a busy machine: waking a second thread for each costs more than it does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def on_device(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A copy there with the strides kept, unused memory and all."""
    if device == "cpu":
        return tensor
    copy = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    return copy.copy_(tensor)


def fitting(case: Case, path: Path) -> Case:
    """The nearest case that the path's backend takes: `cuda` has 16-bit q, and copies 16 bytes at a time; with
    warpgroups, the KV is of q's dtype, and there are two sizes of heads."""
    if path.backend != "cuda":
        return case
    q, kv = (path.takes(dtype) for dtype in case.dtypes)
    if case.dtypes[0] == FP32 and case.seed % 2:
        q, kv = BF16, kv if kv == FP8 else BF16
    whole = 16 if kv == FP8 else 8
    if path.warpgroups:
        return replace(case, dtypes=(q, q), head_dim=64 if case.head_dim <= 64 else 128)
    return replace(case, dtypes=(q, kv), head_dim=-(-case.head_dim // whole) * whole)


def make_inputs(case: Case, forest: Forest | None = None, path: Path | None = None) -> Inputs:
    """With a path: of the nearest case that it takes."""
    if path is not None:
        case = fitting(case, path)
    rng = random.Random(case.seed)
    if forest is None:
        forest = random_forest(rng, kind=case.kind, page_size=case.page_size)
    gen = torch.Generator().manual_seed(case.seed)
    num_q_heads, num_kv_heads = case.heads
    dtype, kv_dtype = case.dtypes

    def random_heads(count: int, heads: int) -> torch.Tensor:
        return torch.randn(count, heads, case.head_dim, generator=gen)

    q = random_heads(forest.num_rows, num_q_heads).to(dtype)
    k, v = (random_heads(forest.num_tokens, num_kv_heads).to(kv_dtype) for _ in range(2))
    head_scales = torch.rand(2, num_kv_heads, generator=gen) + 0.5
    k_scale, v_scale = {
        None: (None, None),
        "number": (0.75, 1.5),
        "tensor": (head_scales[0, 0], head_scales[1, :1]),
        "head": (head_scales[0], head_scales[1]),
    }[case.scales]
    options = {
        "scale": case.scale,
        "softcap": case.softcap,
        "window": case.window,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    options["sinks"] = torch.randn(num_q_heads, generator=gen) * 2 if case.sinks else None
    return Inputs(forest, case, q, k, v, options)


# Backends are the inner loop of the test run: the oracle answers once for all of them.
cached_inputs = functools.lru_cache(maxsize=None)(make_inputs)


def run(inputs: Inputs, path: Path, *, plan=None, caches=None):
    """(out, lse) of the op under test, in the forest's order."""
    case, device = inputs.case, path.device
    k_cache, v_cache = caches or inputs.caches(device)
    q = inputs.q.to(device)
    if case.q == "strided":
        # As a slice of a fused QKV projection, not even aligned to a vector.
        rows, heads, head_dim = q.shape
        fused = torch.full((rows * (heads + 2) * head_dim + 1,), torch.nan, dtype=q.dtype, device=device)
        q = fused[1:].view(rows, heads + 2, head_dim)[:, 1:-1].copy_(q)
    out = None
    if case.out == "given":
        out = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
    elif case.out == "strided":
        out = torch.full((q.shape[1], q.shape[0] + 1, q.shape[2] + 8), torch.nan, dtype=q.dtype, device=device)
        out = out[:, 1:, 8:].transpose(0, 1)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.options.items()}
    plan = plan or inputs.forest.plan(causal=case.causal, device=device)
    got, lse = attention.tree_attention(
        q, k_cache, v_cache, plan, **options, out=out, return_lse=True, backend=path.backend
    )
    if out is not None:
        assert got is out
    return got.cpu(), lse.cpu()


def check(inputs: Inputs, path: Path, **given) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = run(inputs, path, **given)
    assert_right(inputs, out, lse)
    return out, lse


def assert_right(inputs: Inputs, out: torch.Tensor, lse: torch.Tensor) -> None:
    (exact_out, exact_lse), (plain_out, plain_lse) = inputs.expected
    assert out.dtype == inputs.q.dtype and lse.dtype == torch.float32
    terms = inputs.case.head_dim + inputs.forest.num_tokens
    assert_close("out", out, plain_out, exact_out, terms=terms)
    assert_close("lse", lse, plain_lse, exact_lse, terms=terms)


def variants(case: Case, **factors) -> list[Case]:
    """`case` with every combination of the given values."""
    return [replace(case, **dict(zip(factors, values))) for values in itertools.product(*factors.values())]
