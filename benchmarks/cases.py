"""The shapes that are measured, their inputs, what their result has to be and what they cost at least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tts_kernels.measure.inputs import DTYPES as ALL_DTYPES
from tts_kernels.measure.inputs import SCORE_SPREAD
from tts_kernels.tree.plan import TreePlan

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 28, 4, 128, 16
GROUP = NUM_Q_HEADS // NUM_KV_HEADS
DTYPES = {name: ALL_DTYPES[name] for name in ("bf16", "fp32")}


@dataclass(frozen=True)
class AttentionCase:
    """A decode step: N samples, each with one row, over P shared tokens and S tokens of their own. With S = 0, N is 1:
    one leaf of P tokens, nothing shared."""

    dtype: str
    num_samples: int
    prefix: int
    suffix: int

    @property
    def name(self) -> str:
        return f"{self.dtype} N={self.num_samples} P={self.prefix} S={self.suffix}"

    device = "cpu"
    num_q_heads, num_kv_heads, head_dim, group_size = NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, GROUP
    rows_each = 1  # of a sample
    equal_paths = True  # every sample's path has as many tokens

    @property
    def shared(self) -> bool:
        return self.suffix > 0

    @property
    def two_level(self) -> bool:
        return self.shared

    @property
    def row_bytes(self) -> int:
        """q in and out out."""
        return 2 * self.num_samples * NUM_Q_HEADS * HEAD_DIM * DTYPES[self.dtype].itemsize

    def kv_bytes(self, tokens: int) -> int:
        return 2 * tokens * NUM_KV_HEADS * HEAD_DIM * DTYPES[self.dtype].itemsize

    @property
    def replicated_kv_bytes(self) -> int:
        return self.kv_bytes(self.num_samples * (self.prefix + self.suffix))

    @property
    def least_bytes(self) -> int:
        """Each distinct token once, the queries and the result."""
        return self.kv_bytes(self.prefix + self.num_samples * self.suffix) + self.row_bytes

    @property
    def flops(self) -> int:
        return 4 * NUM_Q_HEADS * HEAD_DIM * self.num_samples * (self.prefix + self.suffix)


class AttentionInputs:
    """Everything a method may want to be handed, allocated once and outside of the timing."""

    def __init__(self, case: AttentionCase) -> None:
        self.case = case
        n, dtype = case.num_samples, DTYPES[case.dtype]
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.q = (randn(n, NUM_Q_HEADS, HEAD_DIM) * SCORE_SPREAD).to(dtype)
        # Head by head and contiguous, as dense attention likes it best: k and v [1 or N, Hkv, tokens, D]
        self.prefix = [randn(1, NUM_KV_HEADS, case.prefix, HEAD_DIM) for _ in "kv"]
        self.suffix = [randn(n, NUM_KV_HEADS, case.suffix, HEAD_DIM) for _ in "kv"]
        self._fill_cache(generator)

    def _fill_cache(self, generator: torch.Generator) -> None:
        """The paged cache, pages in no order, and the plan of the tree in it."""
        case = self.case
        lengths = [case.prefix] + [case.suffix] * (case.num_samples if case.shared else 0)
        counts = [-(-length // PAGE_SIZE) for length in lengths]
        ids = torch.randperm(sum(counts), generator=generator)
        pages = [p.tolist() for p in ids.split(counts)]
        self.k_cache, self.v_cache = (self._paged(kv, ids, counts) for kv in zip(self.prefix, self.suffix))
        parent = [-1] + [0] * (len(lengths) - 1)
        rows = [0 if case.shared else 1] + [1] * (len(lengths) - 1)
        self.plan = TreePlan.from_nodes(parent, lengths, pages, rows, page_size=PAGE_SIZE)

    def _paged(self, kv: tuple[Tensor, Tensor], ids: Tensor, counts: list[int]) -> Tensor:
        prefix, suffix = kv
        shape = (sum(counts), PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
        cache = torch.full(shape, math.nan, dtype=prefix.dtype)  # what stays unused is poison
        begin = 0
        for tokens, count in zip([prefix[0], *suffix], counts):
            slots = torch.arange(tokens.shape[1])
            cache[ids[begin + slots // PAGE_SIZE], slots % PAGE_SIZE] = tokens.transpose(0, 1)
            begin += count
        return cache

    @cached_property
    def replicated(self) -> list[Tensor]:
        """k and v [N, Hkv, P + S, D]: the prefix once for every sample."""
        copies = []
        for prefix, suffix in zip(self.prefix, self.suffix):
            n, heads, s, dim = suffix.shape
            whole = prefix.new_empty(n, heads, self.case.prefix + s, dim)
            whole[:, :, : self.case.prefix] = prefix
            whole[:, :, self.case.prefix :] = suffix
            copies.append(whole)
        return copies

    def reference(self) -> Tensor:
        """[N, Hq, D] fp32: softmax attention written out."""
        n, p = self.case.num_samples, self.case.prefix
        q = self.q.float().view(n, NUM_KV_HEADS, GROUP, HEAD_DIM) / math.sqrt(HEAD_DIM)
        (k, v), (k_own, v_own) = ([x.float() for x in kv] for kv in (self.prefix, self.suffix))
        scores = [torch.einsum("nhgd,htd->nhgt", q, k[0]), torch.einsum("nhgd,nhtd->nhgt", q, k_own)]
        weight = torch.cat(scores, dim=-1).softmax(dim=-1)
        out = torch.einsum("nhgt,htd->nhgd", weight[..., :p], v[0])
        out += torch.einsum("nhgt,nhtd->nhgd", weight[..., p:], v_own)
        return out.reshape(n, NUM_Q_HEADS, HEAD_DIM)


@dataclass(frozen=True)
class Grid:
    """What one run measures, and how long it may take."""

    attention: tuple[AttentionCase, ...]
    seconds: float  # that all rounds of a case should take, where `min_rounds` allows
    min_rounds: int
    max_rounds: int
    ceiling_bytes: int  # of the buffer that the bandwidth is read from
    gemm_sizes: tuple[int, ...]


def cases(shapes, dtypes=tuple(DTYPES)) -> tuple[AttentionCase, ...]:
    return tuple(AttentionCase(dtype, *shape) for dtype in dtypes for shape in shapes)


LONE = [(1, 2048, 0), (1, 8192, 0)]
FULL = [(n, p, s) for n in (8, 32, 64) for p in (2048, 8192) for s in (64, 512)]
QUICK = [(8, 2048, 64), (8, 8192, 512), (32, 8192, 64), (64, 2048, 512), (64, 8192, 64)]
TINY = [(1, 40, 0), (3, 40, 20)]
SIZES = (256, 512, 1024, 2048, 3072)
GRIDS = {
    "full": Grid(cases(LONE + FULL), 4.0, 5, 31, 1 << 30, SIZES),
    "quick": Grid(cases(LONE + QUICK), 3.0, 3, 31, 1 << 30, SIZES),
    "tiny": Grid(cases(TINY), 0.0, 3, 3, 1 << 24, (64,)),  # whether everything works, not how fast
}
