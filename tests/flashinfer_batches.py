"""Decode batches for the tests of FlashInfer's names, and their dense oracle: request by request, over its own pages.

Batches are grown from one another, so that requests share pages in nested groups whose members lie anywhere. Page ids
beyond the last entry of indptr are far out of range, slots that hold no token are NaN, and last_page_len of requests
without pages is nonsense.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import torch
from attention_cases import BF16, FP16, FP32, on_device, one_thread
from attention_paths import Path
from dense import assert_close, dense_attention
from forests import POISON_PAGE, empty_caches

from tts_kernels.integrations import flashinfer

LN2 = math.log(2)


@dataclass(frozen=True)
class Case:
    page_size: int = 4
    requests: int = 7
    window: int | None = -1
    softcap: float | None = None
    scale: float | None = None
    heads: tuple = (4, 2)
    head_dim: int = 64
    dtype: torch.dtype = FP32
    layout: str = "NHD"
    joint: bool = False
    seed: int = 0

    @property
    def options(self) -> dict:
        return {
            "num_qo_heads": self.heads[0],
            "num_kv_heads": self.heads[1],
            "head_dim": self.head_dim,
            "page_size": self.page_size,
            "window_left": self.window,
            "logits_soft_cap": self.softcap,
            "sm_scale": self.scale,
            "q_data_type": self.dtype,
        }


FACTORS = {
    "page_size": (1, 4, 16),
    "requests": (1, 7),
    "window": (None, -1, 0, 5, 50),
    "softcap": (None, 0.0, 2.5),
    "scale": (None, 0.4),
    "heads": ((3, 3), (8, 2), (7, 1)),
    "head_dim": (64, 80, 128),
    "dtype": (FP32, FP16, BF16),
    "layout": ("NHD", "HND"),
    "joint": (False, True),
}
# Drawn at random: with 24 points most pairs of values meet; the batch differs from point to point.
CASES = [
    Case(**{name: random.Random(f"{name} {seed}").choice(values) for name, values in FACTORS.items()}, seed=seed)
    for seed in range(24)
]


@dataclass
class Batch:
    """The page ids of each request, and its tokens."""

    pages: list[list[int]]
    tokens: list[int]
    num_pages: int

    def arguments(self, page_size: int, device="cpu", dtype=torch.int32) -> dict:
        last = [(n - 1) % page_size + 1 if n else 99 for n in self.tokens]
        ids = [page for pages in self.pages for page in pages]
        lists = {
            "indptr": [0, *itertools.accumulate(map(len, self.pages))],
            "indices": [*ids, POISON_PAGE],
            "last_page_len": last,
        }
        return {name: torch.tensor(numbers, dtype=dtype, device=device) for name, numbers in lists.items()}


def random_batch(rng: random.Random, case: Case) -> Batch:
    """Each request continues whole pages of an earlier one, or begins anew; the first of several has none."""
    fresh = iter(rng.sample(range(60), 60))
    pages: list[list[int]] = []
    tokens: list[int] = []
    for i in range(case.requests):
        source = rng.choice(pages) if pages and rng.random() < 0.8 else []
        own = [*source[: rng.randint(0, len(source))], *(next(fresh) for _ in range(rng.randint(1, 4)))]
        if i == 0 and case.requests > 1:
            own = []
        pages.append(own)
        tokens.append(len(own) * case.page_size - rng.randrange(case.page_size) if own else 0)
    return Batch(pages, tokens, 60)


def caches_of(batch: Batch, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """NHD; slots that no request uses are NaN."""
    gen = torch.Generator().manual_seed(case.seed)
    caches = empty_caches(batch.num_pages, case.page_size, case.heads[1], case.head_dim, case.dtype, "NHD")
    values = torch.randn(2, *caches[0].shape, generator=gen).to(case.dtype)
    for pages, tokens in zip(batch.pages, batch.tokens):
        for t in range(tokens):
            at = pages[t // case.page_size], t % case.page_size
            for cache, value in zip(caches, values):
                cache[at] = value[at]
    return caches


def laid_out(caches: tuple[torch.Tensor, torch.Tensor], case: Case, device: str):
    """As the caller of FlashInfer has them."""
    if case.layout == "HND":
        caches = tuple(cache.transpose(1, 2).contiguous() for cache in caches)
    return on_device(torch.stack(caches, 1), device) if case.joint else tuple(on_device(c, device) for c in caches)


def queries(case: Case) -> torch.Tensor:
    gen = torch.Generator().manual_seed(case.seed + 1)
    return torch.randn(case.requests, case.heads[0], case.head_dim, generator=gen).to(case.dtype)


def planned(batch: Batch, case: Case, device="cpu"):
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(1, device=device), case.layout)
    wrapper.plan(**batch.arguments(case.page_size, device), **case.options)
    return wrapper


def check(batch: Batch, case: Case, path: Path, wrapper=None) -> None:
    wrapper = wrapper or planned(batch, case, path.device)
    q, caches = queries(case), caches_of(batch, case)
    out, lse = wrapper.run(
        q.to(path.device), laid_out(caches, case, path.device), return_lse=True, backend=path.backend
    )
    assert out.dtype == case.dtype and lse.dtype == FP32
    dense = {"scale": case.scale or 1 / math.sqrt(case.head_dim), "softcap": case.softcap or 0.0, "sinks": None,
             "k_scale": None, "v_scale": None}  # fmt: skip
    window = -1 if case.window is None else case.window
    exact, plain = [], []
    for i, (pages, tokens) in enumerate(zip(batch.pages, batch.tokens)):
        k, v = (cache[pages].flatten(0, 1)[:tokens] for cache in caches)
        visible = (torch.arange(tokens) >= tokens - 1 - window) | (window < 0)
        with one_thread():
            exact.append(dense_attention(q[i : i + 1], k, v, visible[None], dtype=torch.float64, **dense))
            plain.append(dense_attention(q[i : i + 1], k, v, visible[None], dtype=case.dtype, **dense))
    exact, plain = ([torch.cat(parts) for parts in zip(*results)] for results in (exact, plain))
    terms = case.head_dim + max(batch.tokens)
    assert_close("out", out.cpu(), plain[0], exact[0], terms=terms)
    assert_close("lse", lse.cpu(), plain[1] / LN2, exact[1] / LN2, terms=terms)
