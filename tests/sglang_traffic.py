"""Decode steps of requests that come, grow, branch and go, as SGLang's graph runner hands them to a backend; and what a
captured graph keeps of the calls that were made while it was captured."""

from __future__ import annotations

import importlib
import random

import pytest
import torch
from sglang_requests import Requests


class Traffic(Requests):
    """Requests whose pages lie in a pool of `num_pages`, page 0 being SGLang's padding. Each row of the table is a
    request's as long as it lives; row 0 is SGLang's padding."""

    def __init__(self, rng: random.Random, page_size: int, *, rows: int, context: int, num_pages: int):
        self.rng, self.page_size, self.context = rng, page_size, context
        self.num_slots = num_pages * page_size
        self.free_pages = list(range(1, num_pages))
        rng.shuffle(self.free_pages)
        self.free_rows = list(range(1, rows + 1))
        self.table = torch.zeros((rows + 1, context), dtype=torch.int32)
        self.at, self.pages, self.slots, self.lens = [], [], [], []
        self.written: set[int] = set()  # slots that hold a token's KV

    def start(self, tokens: int, of: int | None = None, shared: int = 0) -> None:
        """A request with so many tokens, of which whole pages within `shared` are those of the request `of`."""
        pages = [] if of is None else self.pages[of][: min(shared, tokens - 1, self.lens[of][0]) // self.page_size]
        self.at.append(self.free_rows.pop(0))
        self.pages.append(pages)
        self.slots.append(self.slots_of(pages, len(pages) * self.page_size))
        self.lens.append((0, 1))
        self.grow(len(self.at) - 1, tokens - len(self.slots[-1]))

    def grow(self, i: int, tokens: int = 1) -> None:
        for _ in range(tokens):
            at = len(self.slots[i])
            if at == len(self.pages[i]) * self.page_size:
                self.pages[i] = [*self.pages[i], self.free_pages.pop()]
            self.slots[i].append(self.pages[i][-1] * self.page_size + at % self.page_size)
        self.lens[i] = len(self.slots[i]), 1
        self.table[self.at[i], : len(self.slots[i])] = torch.tensor(self.slots[i])

    def stop(self, i: int) -> None:
        self.free_rows.append(self.at.pop(i))
        for of_requests in (self.pages, self.slots, self.lens):
            del of_requests[i]

    def step(self, most: int, branching: float = 0.5) -> None:
        """All grow by a token, after one has branched or gone or the batch has another order."""
        what = self.rng.random()
        if what < branching and len(self.at) < most:
            of = self.rng.randrange(len(self.at))
            self.start(self.rng.randint(1, self.lens[of][0] + 20), of, self.rng.randint(0, self.lens[of][0]))
        elif what < 0.8 and len(self.at) > 1:
            self.stop(self.rng.randrange(len(self.at)))
        elif what < 0.9:
            order = self.rng.sample(range(len(self.at)), len(self.at))
            for name in ("at", "pages", "slots", "lens"):
                setattr(self, name, [getattr(self, name)[i] for i in order])
        for i in range(len(self.at)):
            self.grow(i)

    def write(self, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> None:
        """KV [slots, Hkv, D] of the tokens that have none yet."""
        new = sorted({slot for slots in self.slots for slot in slots} - self.written)
        self.written.update(new)
        for cache in (k, v):
            cache[new] = torch.randn((len(new), *cache.shape[1:]), generator=generator).to(cache.dtype)

    def req_to_token(self) -> torch.Tensor:
        return self.table


class Calls:
    """A CUDA graph in small: keeps the calls of an attention backend in `with Calls(...) as graph:`, which do nothing
    there. A replay makes them."""

    def __init__(self, backend: str) -> None:
        self.module = importlib.import_module(f"tts_kernels.attention.{backend}")
        self.owner, self.name = self.module, "tree_attention"
        if backend == "cuda":
            self.owner, self.name = self.module.TreeCall, "__call__"
        self.calls: list[tuple] = []

    def __enter__(self) -> Calls:
        self.patch = pytest.MonkeyPatch()
        function = getattr(self.owner, self.name)

        def record(*arguments):
            self.calls.append((function, arguments))

        self.patch.setattr(self.owner, self.name, record)
        return self

    def __exit__(self, *error) -> None:
        self.patch.undo()

    def replay(self) -> None:
        for function, arguments in self.calls:
            function(*arguments)


def places(plan) -> list[tuple]:
    """Where everything lies that a call with this plan reads and writes besides q, out and the caches."""
    tensors = [plan.nodes, plan.pages, plan.rows, plan.grows, plan.tables]
    for work in plan.works.values():
        tensors += [work.table, work.scratch]
    return [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors]


class CudaGraph:
    def __enter__(self) -> CudaGraph:
        self.graph = torch.cuda.CUDAGraph()
        self.capture = torch.cuda.graph(self.graph)
        self.capture.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.capture.__exit__(*error)

    def replay(self) -> None:
        self.graph.replay()
