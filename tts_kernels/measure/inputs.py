"""Trees to measure on, and random caches for them: several sets in one slab, made on the device."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from tts_kernels.tree.plan import TreePlan

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}
# Standard deviation of the scores. Few keys then matter to a row, as in a trained model, and to most rows other ones: a
# kernel that loses a page is far off somewhere. With 1, the sums would hide it.
SCORE_SPREAD = 3.0


@dataclass(frozen=True)
class Geometry:
    """Heads and dtypes of a call. str() and `parse`: "32/8 d128", "32/8 d128 bf16+fp8" (q, caches)."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bf16"
    kv_dtype: str = ""  # "": as q
    page_size: int = 16

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads: expected a multiple of num_kv_heads = {self.num_kv_heads}, got {self.num_q_heads}"
            )
        for name in (self.dtype, self.kv_dtype or self.dtype):
            if name not in DTYPES:
                raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")

    @classmethod
    def parse(cls, text: str) -> Geometry:
        try:
            heads, dim, *dtypes = text.split()
            num_q_heads, num_kv_heads = map(int, heads.split("/"))
            if not dim.startswith("d") or len(dtypes) > 1:
                raise ValueError
            dtype, _, kv_dtype = (dtypes[0] if dtypes else "bf16").partition("+")
            head_dim = int(dim[1:])
        except ValueError:
            raise ValueError(
                f'geometry: expected text like "32/8 d128" or "32/8 d128 bf16+fp8", got {text!r}'
            ) from None
        return cls(num_q_heads, num_kv_heads, head_dim, dtype, kv_dtype)

    def __str__(self) -> str:
        dtypes = f"{self.dtype}+{self.kv_dtype}" if self.kv_dtype else self.dtype
        return f"{self.num_q_heads}/{self.num_kv_heads} d{self.head_dim}{'' if dtypes == 'bf16' else ' ' + dtypes}"

    @property
    def group(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def q_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def cache_dtype(self) -> torch.dtype:
        return DTYPES[self.kv_dtype or self.dtype]

    @property
    def row_bytes(self) -> int:
        """Of q of one row; out has as many."""
        return self.num_q_heads * self.head_dim * self.q_dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """K and V of one token."""
        return 2 * self.num_kv_heads * self.head_dim * self.cache_dtype.itemsize


@dataclass(frozen=True)
class Tree:
    """Nodes in depth-first preorder, as TreePlan.from_nodes takes them; rows of q follow the nodes."""

    parent: tuple[int, ...]
    length: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return sum(self.rows)

    @property
    def num_tokens(self) -> int:
        return sum(self.length)

    @cached_property
    def paths(self) -> list[list[int]]:
        """Of each node: from its root down to itself."""
        paths: list[list[int]] = []
        for node, parent in enumerate(self.parent):
            paths.append([*(paths[parent] if parent >= 0 else ()), node])
        return paths

    @cached_property
    def served(self) -> list[int]:
        """Rows in or below each node."""
        served = list(self.rows)
        for node in reversed(range(len(self.parent))):
            if self.parent[node] >= 0:
                served[self.parent[node]] += served[node]
        return served

    @property
    def owners(self) -> list[int]:
        """The node of each row."""
        return [node for node, count in enumerate(self.rows) for _ in range(count)]

    @property
    def visible(self) -> int:
        """(row, token) pairs that attention computes: ancestors whole, the own node up to the row's own token."""
        pairs = 0
        for length, rows, served in zip(self.length, self.rows, self.served):
            pairs += length * (served - rows) + sum(length - rows + j + 1 for j in range(rows))
        return pairs

    @property
    def replicated_tokens(self) -> int:
        """Tokens read where every group of rows with the same node reads its whole path for itself."""
        return sum(sum(self.length[n] for n in path) for path, rows in zip(self.paths, self.rows) if rows)

    @property
    def seen_tokens(self) -> int:
        return sum(length for length, served in zip(self.length, self.served) if served)


def star(n: int, prefix: int, suffix: int, rows: int = 1) -> Tree:
    """A prefix and n leaves under it."""
    return Tree((-1,) + (0,) * n, (prefix,) + (suffix,) * n, (0,) + (rows,) * n)


def lone(n: int, tokens: int) -> Tree:
    """n sequences that share nothing."""
    return Tree((-1,) * n, (tokens,) * n, (1,) * n)


def questions(count: int, n: int, prefix: int, suffix: int) -> Tree:
    """Several stars."""
    parent, length, rows = [], [], []
    for _ in range(count):
        root = len(parent)
        parent += [-1] + [root] * n
        length += [prefix] + [suffix] * n
        rows += [0] + [1] * n
    return Tree(tuple(parent), tuple(length), tuple(rows))


def chain(depth: int, tokens: int) -> Tree:
    """Nodes one under the other, a row in the last: nothing to share, and as many borders as there can be."""
    return Tree(tuple(range(-1, depth - 1)), (tokens,) * depth, (0,) * (depth - 1) + (1,))


def beam(leaves: int, parents: int, depth: int, prefix: int, step: int, seed: int = 0) -> Tree:
    """What a step-wise search holds after `depth` steps under a prompt: in every step `parents` of the nodes of the
    step before were kept, at random, and had leaves / parents children each; what has no living descendants is gone."""
    rng = random.Random(seed)
    children: dict[int, list[int]] = {}
    alive = [0]
    total = 1
    for _ in range(depth):
        kept = sorted(rng.sample(alive, min(parents, len(alive))))
        alive = []
        for node in kept:
            own = list(range(total, total + leaves // len(kept)))
            total += len(own)
            children[node] = own
            alive += own
    living, above = set(alive), {child: node for node, own in children.items() for child in own}
    for node in alive:
        while node in above:
            node = above[node]
            living.add(node)
    parent, length, rows = [], [], []
    todo = [(0, -1)]
    while todo:
        node, up = todo.pop()
        place = len(parent)
        parent.append(up)
        length.append(step if node else prefix)
        below = [child for child in children.get(node, ()) if child in living]
        rows.append(0 if below else 1)
        todo += [(child, place) for child in reversed(below)]
    return Tree(tuple(parent), tuple(length), tuple(rows))


def steps(n: int, prefix: int, history: int, step: int) -> Tree:
    """A verifier's increment: n candidates with a history each under one prompt, and a new step, all of it rows."""
    parent, length, rows = [-1], [prefix], [0]
    for _ in range(n):
        parent += [0, len(parent)]
        length += [history, step]
        rows += [0, step]
    return Tree(tuple(parent), tuple(length), tuple(rows))


TREES = {"star": star, "lone": lone, "questions": questions, "chain": chain, "beam": beam, "steps": steps}


class Inputs:
    """Sets of (q, k_cache, v_cache) of one tree: the same pages in every set, other numbers.

    q [sets, R, Hq, D]; k_cache, v_cache [sets, num_pages, page_size, Hkv, D]. Pages lie in no order; slots that no
    token uses hold NaN.
    """

    def __init__(self, tree: Tree, geometry: Geometry, device: torch.device, sets: int = 1, seed: int = 0) -> None:
        self.tree, self.geometry, self.device, self.num_sets = tree, geometry, device, sets
        g, page_size = geometry, geometry.page_size
        counts = [-(-length // page_size) for length in tree.length]
        ids = list(range(sum(counts)))
        random.Random(seed).shuffle(ids)
        begins = [0, *accumulate(counts)]
        self.pages = [ids[begin:end] for begin, end in pairwise(begins)]
        self.num_pages = len(ids)
        generator = torch.Generator(device).manual_seed(seed)
        q = torch.randn(sets, tree.num_rows, g.num_q_heads, g.head_dim, generator=generator, device=device)
        self.q = (q * SCORE_SPREAD).to(g.q_dtype)
        shape = (sets, self.num_pages, page_size, g.num_kv_heads, g.head_dim)
        unused = [
            pages[length // page_size] * page_size + offset
            for length, pages in zip(tree.length, self.pages)
            for offset in range(length % page_size, page_size)
            if length % page_size
        ]
        where = torch.tensor(unused, dtype=torch.int64, device=device)
        self.k_cache, self.v_cache = (
            torch.randn(shape, generator=generator, device=device, dtype=g.q_dtype) for _ in "kv"
        )
        for cache in (self.k_cache, self.v_cache):
            cache.view(sets, -1, g.num_kv_heads, g.head_dim)[:, where] = torch.nan
        if g.cache_dtype != g.q_dtype:
            self.k_cache, self.v_cache = self.k_cache.to(g.cache_dtype), self.v_cache.to(g.cache_dtype)

    def plan(self) -> TreePlan:
        return TreePlan.from_nodes(
            list(self.tree.parent), list(self.tree.length), self.pages, list(self.tree.rows),
            page_size=self.geometry.page_size, device=self.device,
        )  # fmt: skip

    def slots(self, nodes: Sequence[int]) -> Tensor:
        """int64, of the tokens of these nodes, one after the other."""
        size = self.geometry.page_size
        own = []
        for node in nodes:
            first = torch.tensor(self.pages[node], dtype=torch.int64) * size
            own.append((first[:, None] + torch.arange(size)).flatten()[: self.tree.length[node]])
        return torch.cat(own).to(self.device)

    def gather(self, which: int, slots: Tensor) -> list[Tensor]:
        """k and v of set `which` at slots [...]: [..., Hkv, D]."""
        g = self.geometry
        return [cache[which].view(-1, g.num_kv_heads, g.head_dim)[slots] for cache in (self.k_cache, self.v_cache)]

    @staticmethod
    def set_bytes(tree: Tree, geometry: Geometry) -> int:
        """About what a set takes."""
        return tree.num_tokens * geometry.token_bytes + tree.num_rows * geometry.row_bytes


def error(out: Tensor, reference: Tensor) -> float:
    """The largest error of a row's head, relative to the length of that vector; inf where there is a NaN."""
    difference = (out.float() - reference).norm(dim=-1) / reference.norm(dim=-1)
    return difference.nan_to_num(nan=math.inf).max().item()


def tolerance(dtype: torch.dtype) -> float:
    """For `error`. The result is rounded once and the probabilities may be (half an epsilon each, times two); scores
    of some tens in fp32, and fast exponentials, are good to about a hundred epsilons."""
    rounding = torch.finfo(dtype).eps if dtype.itemsize < 4 else 0.0
    return 2 * rounding + 128 * torch.finfo(torch.float32).eps
