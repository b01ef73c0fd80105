"""Forests of KV nodes as plain lists, and caches for them in which everything that no one may read is NaN."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from tts_kernels.tree.plan import TreePlan

POISON_PAGE = 2_147_480_000  # far outside every cache


@dataclass
class Forest:
    """Nodes in the caller's order, parents before children: what TreePlan.from_nodes takes."""

    parent: list[int]
    length: list[int]
    rows: list[int]
    page_size: int = 4
    pages: list[list[int]] = field(default_factory=list)
    num_pages: int = 0

    @property
    def num_nodes(self) -> int:
        return len(self.parent)

    @property
    def num_tokens(self) -> int:
        return sum(self.length)

    @property
    def num_rows(self) -> int:
        return sum(self.rows)

    def path(self, node: int) -> list[int]:
        """From the root down to `node` itself."""
        path = []
        while node >= 0:
            path.append(node)
            node = self.parent[node]
        return path[::-1]

    def plan(self, *, causal: bool = True, device: str = "cpu") -> TreePlan:
        return TreePlan.from_nodes(
            self.parent, self.length, self.pages, self.rows, page_size=self.page_size, causal=causal, device=device
        )

    def slots(self, node: int) -> list[int]:
        """The cache slot of each token of `node`."""
        return [
            self.pages[node][i // self.page_size] * self.page_size + i % self.page_size
            for i in range(self.length[node])
        ]

    def place(self, rng: random.Random, *, reserve: int = 0, unused: int = 3) -> Forest:
        """Give every node its pages: shuffled, among `unused` pages that no node owns. Each node also holds `reserve`
        pages more than its tokens need."""
        need = [-(-length // self.page_size) + reserve for length in self.length]
        self.num_pages = sum(need) + unused
        ids = rng.sample(range(self.num_pages), sum(need))
        self.pages = []
        for count in need:
            self.pages.append(ids[:count])
            ids = ids[count:]
        return self


def star(leaves: int, *, prefix: int, suffix: list[int], rows: int = 1, page_size: int = 4, seed: int = 0) -> Forest:
    """One prefix and `leaves` leaves under it, their lengths taken from `suffix` in turn."""
    length = [prefix] + [suffix[i % len(suffix)] for i in range(leaves)]
    return Forest([-1] + [0] * leaves, length, [0] + [rows] * leaves, page_size).place(random.Random(seed))


def random_forest(rng: random.Random, *, kind: str, page_size: int) -> Forest:
    """`kind` says what the forest stresses; every kind has a zero-length node, a one-token node and a lone root with
    one row, and mixes nodes that fill their last page with nodes that end inside it."""
    num_nodes = {"decode": 9, "verify": 7, "mixed": 12, "chain": 6, "roots": 10}[kind]
    parent, length, rows = [], [], []
    for node in range(num_nodes):
        if kind == "chain":
            parent.append(node - 1)
        elif kind == "roots":
            parent.append(rng.randrange(-1, node) if rng.random() < 0.5 else -1)
        else:
            parent.append(rng.randrange(-1, node) if rng.random() < 0.9 else -1)
        length.append(rng.choice([0, 1, 2, page_size, 2 * page_size, rng.randrange(1, 40), rng.randrange(30, 90)]))
        rows.append(0)
    length[rng.randrange(num_nodes)] = 0
    length[rng.randrange(num_nodes)] = 1
    for node in range(num_nodes):
        leaf = node not in parent
        if kind == "decode":
            count = 1 if leaf else 0
        elif kind == "verify":
            count = rng.choice([length[node], rng.randrange(1, 12)])
        else:
            count = rng.choice([0, 1, 1, rng.randrange(1, 6), length[node]]) if leaf or rng.random() < 0.4 else 0
        rows[node] = min(count, length[node], 20)
    parent.append(-1)
    length.append(1)
    rows.append(1)
    forest = Forest(parent, length, rows, page_size).place(rng, reserve=rng.choice([0, 0, 1, 2]))
    # Pages held in reserve are not read, whatever they say.
    if rng.random() < 0.5:
        for node, pages in enumerate(forest.pages):
            used = -(-forest.length[node] // page_size)
            forest.pages[node] = pages[:used] + [POISON_PAGE] * (len(pages) - used)
    return forest


LAYOUTS = ("NHD", "HND", "joint")


def empty_caches(num_pages, page_size, num_kv_heads, head_dim, dtype, layout, device="cpu"):
    """Two caches [num_pages, page_size, Hkv, D] full of NaN. "joint": K and V side by side in one HND buffer."""
    if layout == "joint":
        both = torch.full((num_pages, num_kv_heads, page_size, 2 * head_dim), torch.nan, device=device).to(dtype)
        return both[..., :head_dim].transpose(1, 2), both[..., head_dim:].transpose(1, 2)
    if layout == "HND":
        caches = torch.full((2, num_pages, num_kv_heads, page_size, head_dim), torch.nan, device=device).to(dtype)
        return caches[0].transpose(1, 2), caches[1].transpose(1, 2)
    caches = torch.full((2, num_pages, page_size, num_kv_heads, head_dim), torch.nan, device=device).to(dtype)
    return caches[0], caches[1]


def write(cache: torch.Tensor, slots: list[int], tokens: torch.Tensor) -> None:
    """tokens [T, Hkv, D] into the cache [num_pages, page_size, Hkv, D]."""
    page_size = cache.shape[1]
    for slot, token in zip(slots, tokens, strict=True):
        cache[slot // page_size, slot % page_size] = token
