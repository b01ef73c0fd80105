"""Cascades for the tests of FlashInfer's names, and their dense oracle.

The oracle knows segments, not trees: a row sees, level by level, the segment that its row number falls into. Everything
that no row may read is poisoned: unused slots and the pages of segments without rows are NaN, page ids beyond the last
indptr entry are far out of range, and last_page_len of segments without pages is nonsense.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import pytest
import torch
from attention_cases import BF16, FP16, FP32, on_device, one_thread
from attention_paths import Path
from dense import assert_close, dense_attention
from forests import POISON_PAGE, empty_caches, write

from tts_kernels.integrations import flashinfer

LN2 = math.log(2)


def params(*paths: Path) -> list:
    """Those that can run here; a GPU's are skipped by name without one."""
    cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    return [
        pytest.param(path, marks=cuda if path.device == "cuda" else [], id=str(path))
        for path in paths
        if path.device == "cuda" or path.missing() is None
    ]


PLAIN = params(Path("reference"), Path("cpu", isa="portable"), Path("reference", "cuda"), Path("triton", "cuda"))
# Under the interpreter Triton is slow: a few small cases.
ALL = [*PLAIN, *params(Path("triton"))]


@dataclass
class Cascade:
    """Segments level by level: their borders in q's rows, their lengths, their pages."""

    borders: list[list[int]]
    lengths: list[list[int]]
    page_size: int
    pages: list[list[list[int]]]
    num_pages: int

    @property
    def num_rows(self) -> int:
        return self.borders[0][-1]

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, self.lengths))

    def segments(self):
        for level, borders in enumerate(self.borders):
            for j, (begin, end) in enumerate(itertools.pairwise(borders)):
                yield level, j, begin, end

    def arguments(self, device="cpu", dtype=torch.int32) -> dict:
        def tensors(lists):
            return [torch.tensor(numbers, dtype=dtype, device=device) for numbers in lists]

        ids, indptr, last = [], [], []
        for level, lengths in enumerate(self.lengths):
            served = [end > begin for begin, end in itertools.pairwise(self.borders[level])]
            pages = [p if used else [POISON_PAGE] * len(p) for p, used in zip(self.pages[level], served)]
            ids.append([page for p in pages for page in p] + [POISON_PAGE])
            indptr.append([0, *itertools.accumulate(map(len, pages))])
            last.append([(n - 1) % self.page_size + 1 if n else 99 for n in lengths])
        return {
            "qo_indptr_arr": tensors(self.borders),
            "paged_kv_indptr_arr": tensors(indptr),
            "paged_kv_indices_arr": tensors(ids),
            "paged_kv_last_page_len": tensors(last),
        }

    def visibility(self, *, causal: bool, window: int) -> torch.Tensor:
        """bool [R, T], tokens segment by segment."""
        visible = torch.zeros(self.num_rows, self.num_tokens, dtype=torch.bool)
        above = torch.zeros(self.num_rows, dtype=torch.long)  # tokens of the levels before
        total = torch.zeros(self.num_rows, dtype=torch.long)
        for level, j, begin, end in self.segments():
            total[begin:end] += self.lengths[level][j]
        first = 0
        for level, j, begin, end in self.segments():
            length = self.lengths[level][j]
            token = torch.arange(length)
            for row in range(begin, end):
                own = row - self.last_end(row)  # negative: rows to the end of its request
                see = torch.ones(length, dtype=torch.bool)
                if causal and level == len(self.borders) - 1:
                    see = token < length + own + 1
                if window >= 0:
                    see &= above[row] + token >= total[row] + own - window
                visible[row, first : first + length] = see
            above[begin:end] += length
            first += length
        return visible

    def last_end(self, row: int) -> int:
        return next(border for border in self.borders[-1] if border > row)


def place(rng: random.Random, borders, lengths, page_size) -> Cascade:
    need = [[-(-length // page_size) for length in level] for level in lengths]
    num_pages = sum(map(sum, need)) + 3
    ids = iter(rng.sample(range(num_pages), num_pages))
    pages = [[[next(ids) for _ in range(count)] for count in level] for level in need]
    return Cascade(borders, lengths, page_size, pages, num_pages)


def random_cascade(rng: random.Random, *, levels: int, page_size: int, rows: str, nested: bool) -> Cascade:
    """Six requests; some segments without pages, some without rows, some that end inside a page."""
    counts = [1] * 6 if rows == "decode" else [rng.randrange(0, 6) for _ in range(6)]
    counts[rng.randrange(6)] = 0
    borders = [[0, *itertools.accumulate(counts)]]
    num_rows = borders[0][-1]
    for level in range(1, levels):
        cuts = borders[0] if nested else range(num_rows + 1)
        inner = sorted(rng.choices(cuts, k=levels - level))
        borders.insert(0, [0, *inner, num_rows])
    sizes = [0, 1, page_size, 2 * page_size, rng.randrange(1, 40), rng.randrange(20, 60)]
    lengths = [[rng.choice(sizes) for _ in level[1:]] for level in borders]
    return place(rng, borders, lengths, page_size)


@dataclass(frozen=True)
class Case:
    levels: int = 2
    page_size: int = 16
    rows: str = "append"
    nested: bool = True
    causal: bool = True
    window: int = -1
    softcap: float | None = None
    scale: float | None = None
    heads: tuple = (4, 2)
    head_dim: int = 64
    dtype: torch.dtype = FP32
    layout: str = "NHD"
    joint: bool = False
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.seed}-{self.levels}-{self.rows}-D{self.head_dim}"


FACTORS = {
    "levels": (1, 2, 3),
    "page_size": (1, 16),
    "rows": ("decode", "append"),
    "nested": (True, False),
    "causal": (True, False),
    "window": (-1, 0, 7, 50),
    "softcap": (None, 2.5),
    "scale": (None, 0.4),
    "heads": ((3, 3), (8, 2), (7, 1)),
    "head_dim": (64, 80, 128, 256),
    "dtype": (FP32, FP16, BF16),
    "layout": ("NHD", "HND"),
    "joint": (False, True),
}
# Drawn at random: with 48 points any two values of any two factors meet with near certainty (at the least likely, 4 x 4
# values, each pair is missed once in 20 such sets), and the forest differs from point to point.
CASES = [
    Case(**{name: random.Random(f"{name} {seed}").choice(values) for name, values in FACTORS.items()}, seed=seed)
    for seed in range(48)
]
STEP = Case(levels=2, page_size=4, heads=(2, 1), causal=True, window=5)
# Where a tree has to say more than "a segment is a node".
CUTS = [
    Case(levels=levels, nested=False, causal=causal, window=window, page_size=4, heads=(2, 1), seed=seed)
    for levels, causal, window, seed in itertools.product((2, 3), (True, False), (-1, 5), range(2))
]


def make_caches(cascade: Cascade, case: Case, k: torch.Tensor, v: torch.Tensor):
    """paged_kv_cache as FlashInfer takes it, all unused slots NaN."""
    shape = (cascade.num_pages, cascade.page_size, case.heads[1], case.head_dim)
    k_cache, v_cache = empty_caches(*shape, case.dtype, "NHD")
    slots, first = [], 0
    for level, j, begin, end in cascade.segments():
        pages, length = cascade.pages[level][j], cascade.lengths[level][j]
        if end > begin:
            slots += [(first + i, pages[i // shape[1]] * shape[1] + i % shape[1]) for i in range(length)]
        first += length
    tokens = [token for token, _ in slots]
    for cache, values in ((k_cache, k), (v_cache, v)):
        write(cache, [slot for _, slot in slots], values[tokens])
    if case.layout == "HND":
        k_cache, v_cache = (cache.transpose(1, 2).contiguous() for cache in (k_cache, v_cache))
    return torch.stack((k_cache, v_cache), 1) if case.joint else (k_cache, v_cache)


def options(cascade: Cascade, case: Case) -> dict:
    return {
        "num_qo_heads": case.heads[0],
        "num_kv_heads": case.heads[1],
        "head_dim": case.head_dim,
        "page_size": cascade.page_size,
        "causal": case.causal,
        "sm_scale": case.scale,
        "window_left": case.window,
        "logits_soft_cap": case.softcap,
        "q_data_type": case.dtype,
    }


def random_inputs(cascade: Cascade, case: Case):
    gen = torch.Generator().manual_seed(case.seed)
    q = torch.randn(cascade.num_rows, case.heads[0], case.head_dim, generator=gen).to(case.dtype)
    k, v = (
        torch.randn(cascade.num_tokens, case.heads[1], case.head_dim, generator=gen).to(case.dtype) for _ in range(2)
    )
    return q, k, v


def check(cascade: Cascade, case: Case, path: Path, wrapper=None) -> None:
    q, k, v = random_inputs(cascade, case)
    if wrapper is None:
        workspace = torch.empty(1, device=path.device)
        wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(case.levels, workspace, case.layout)
        wrapper.plan(**cascade.arguments(path.device), **options(cascade, case))
    caches = make_caches(cascade, case, k, v)
    caches = on_device(caches, path.device) if case.joint else tuple(on_device(c, path.device) for c in caches)
    out, lse = wrapper.run(q.to(path.device), caches, return_lse=True, backend=path.backend)
    assert out.dtype == case.dtype and lse.dtype == FP32
    visible = cascade.visibility(causal=case.causal, window=case.window)
    dense = {
        "scale": case.scale or 1 / math.sqrt(case.head_dim), "softcap": case.softcap or 0.0, "sinks": None,
        "k_scale": None, "v_scale": None,
    }  # fmt: skip
    with one_thread():
        exact = dense_attention(q, k, v, visible, dtype=torch.float64, **dense)
        plain = dense_attention(q, k, v, visible, dtype=case.dtype, **dense)
    terms = case.head_dim + cascade.num_tokens
    assert_close("out", out.cpu(), plain[0], exact[0], terms=terms)
    assert_close("lse", lse.cpu(), plain[1] / LN2, exact[1] / LN2, terms=terms)


def cascade_of(case: Case) -> Cascade:
    return random_cascade(
        random.Random(case.seed), levels=case.levels, page_size=case.page_size, rows=case.rows, nested=case.nested
    )
