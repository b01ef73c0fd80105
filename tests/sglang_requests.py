"""Requests in a pool of pages as SGLang lays them out, and what a plain softmax gives for them."""

from __future__ import annotations

import math
import random

import torch
from dense import dense_attention

from tts_kernels.integrations import sglang as plugin

NOT_A_SLOT = 2_000_000_000
FP8 = torch.float8_e4m3fn


class Requests:
    """Requests in a pool of pages, as SGLang's radix cache lays them out: whole pages that two of them begin with are
    the same ones."""

    def __init__(self, rng: random.Random, page_size: int, lens: list[tuple[int, int]], *, share: float = 0.7):
        """lens: (tokens, rows) of each."""
        self.page_size, self.lens = page_size, lens
        pages = list(range(1, 1 + sum(-(-tokens // page_size) for tokens, _ in lens)))
        self.num_slots = (len(pages) + 2) * page_size  # page 0 is SGLang's padding
        rng.shuffle(pages)
        self.pages: list[list[int]] = []
        for tokens, rows in lens:
            cached = (tokens - rows) // page_size
            own: list[int] = []
            if self.pages and rng.random() < share:
                other = rng.randrange(len(self.pages))
                full = (lens[other][0] - lens[other][1]) // page_size
                own = self.pages[other][: rng.randint(0, min(cached, full))]
            own = own + [pages.pop() for _ in range(-(-tokens // page_size) - len(own))]
            self.pages.append(own)
        self.slots = [self.slots_of(own, tokens) for own, (tokens, _) in zip(self.pages, lens)]
        self.at = rng.sample(range(1, 3 * len(lens) + 1), len(lens))  # rows of req_to_token, in any order

    def slots_of(self, pages: list[int], tokens: int) -> list[int]:
        return [pages[t // self.page_size] * self.page_size + t % self.page_size for t in range(tokens)]

    @property
    def distinct(self) -> int:
        """What has to be read: shared slots once."""
        return len({slot for slots in self.slots for slot in slots})

    @property
    def new_slots(self) -> list[int]:
        return [slot for slots, (tokens, rows) in zip(self.slots, self.lens) for slot in slots[tokens - rows :]]

    @property
    def used(self) -> list[int]:
        return sorted({slot for slots in self.slots for slot in slots})

    def req_to_token(self, fill: int = NOT_A_SLOT) -> torch.Tensor:
        table = torch.full((3 * len(self.lens) + 1, max(t for t, _ in self.lens) + 5), fill, dtype=torch.int32)
        for row, slots in zip(self.at, self.slots):
            table[row, : len(slots)] = torch.tensor(slots)
        return table

    @property
    def seq_lens(self) -> torch.Tensor:
        return torch.tensor([tokens for tokens, _ in self.lens])

    @property
    def q_lens(self) -> torch.Tensor:
        return torch.tensor([rows for _, rows in self.lens], dtype=torch.int32)

    def plan(self, **options):
        return plugin.make_plan(
            self.req_to_token(), torch.tensor(self.at), self.seq_lens, page_size=self.page_size, **options
        )

    def dense(self, q, k, v, *, dtype, window=-1, scale=None, softcap=0.0, sinks=None, k_scale=None, v_scale=None):
        """One softmax for each request. q [R, Hq, D]; k, v [slots, Hkv, D]."""
        outs, row = [], 0
        for slots, (tokens, rows) in zip(self.slots, self.lens):
            at = torch.arange(tokens - rows, tokens)[:, None]
            token = torch.arange(tokens)
            visible = (token <= at) & ((token >= at - window) | (window < 0))
            out, _ = dense_attention(
                q[row : row + rows], k[slots], v[slots], visible, dtype=dtype, scale=scale or q.shape[-1] ** -0.5,
                softcap=softcap, sinks=sinks, k_scale=k_scale, v_scale=v_scale,
            )  # fmt: skip
            outs.append(out)
            row += rows
        return torch.cat(outs)


HQ, HKV, D = 6, 2, 32
LENS = {
    "decode": [(70, 1), (65, 1), (129, 1), (1, 1), (64, 1), (200, 1), (131, 1)],
    "extend": [(70, 3), (130, 130), (129, 65), (2, 2), (66, 1), (200, 7)],
    "one": [(90, 90)],
}


def tensors(requests: Requests, seed: int = 0, dtype=torch.float32):
    """Queries, and caches in which every slot that no request has is NaN."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.full((requests.num_slots, HKV, D), math.nan, dtype=dtype)
    v = k.clone()
    for cache in (k, v):
        cache[requests.used] = torch.randn((len(requests.used), HKV, D), generator=generator).to(dtype)
    q = torch.randn((sum(rows for _, rows in requests.lens), HQ, D), generator=generator).to(dtype)
    return q, k, v
