"""The cases of grids.json: what our op and its peers are handed, what the result has to be, what it costs at least."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from tts_kernels.attention import api
from tts_kernels.attention.explain import explain
from tts_kernels.measure.inputs import TREES, Geometry, Inputs, Tree, error, tolerance
from tts_kernels.measure.timing import Call

from ..peers import GPU_PEERS

GRIDS = Path(__file__).with_name("grids.json")


@dataclass(frozen=True)
class TreeCase:
    """A tree_attention call: a row of a group in grids.json, with one of its geometries."""

    group: str
    kind: str  # the function in tts_kernels.measure.inputs that makes the tree
    params: dict[str, int]
    geometry: Geometry
    device: str  # "cuda"; "cpu" in the dry run
    flex: bool = False

    op = "tree_attention"
    peers = GPU_PEERS

    @property
    def name(self) -> str:
        return f"{self.geometry} {self.kind} " + " ".join(f"{key}={value}" for key, value in self.params.items())

    @cached_property
    def tree(self) -> Tree:
        return TREES[self.kind](**self.params)

    @property
    def dtype(self) -> str:
        return self.geometry.dtype

    num_q_heads = property(lambda self: self.geometry.num_q_heads)
    num_kv_heads = property(lambda self: self.geometry.num_kv_heads)
    head_dim = property(lambda self: self.geometry.head_dim)
    page_size = property(lambda self: self.geometry.page_size)
    num_rows = property(lambda self: self.tree.num_rows)
    seen_tokens = property(lambda self: self.tree.seen_tokens)

    @property
    def group_size(self) -> int:
        return self.geometry.group

    @property
    def num_samples(self) -> int:
        """Nodes that own rows."""
        return sum(rows > 0 for rows in self.tree.rows)

    @property
    def rows_each(self) -> int:
        return max(self.tree.rows)

    @property
    def two_level(self) -> bool:
        return self.kind == "star"

    @cached_property
    def path_lengths(self) -> set[int]:
        tree = self.tree
        return {sum(tree.length[n] for n in path) for path, rows in zip(tree.paths, tree.rows) if rows}

    @property
    def equal_paths(self) -> bool:
        return len(self.path_lengths) == 1

    @property
    def whole_pages(self) -> bool:
        """Of all inner nodes: a path is then a list of pages."""
        return all(self.tree.length[parent] % self.page_size == 0 for parent in self.tree.parent if parent >= 0)

    @property
    def row_bytes(self) -> int:
        """q in and out out."""
        return 2 * self.num_rows * self.geometry.row_bytes

    @property
    def replicated_kv_bytes(self) -> int:
        return self.tree.replicated_tokens * self.geometry.token_bytes

    @property
    def least_bytes(self) -> int:
        """Each distinct token once, the queries and the result."""
        return self.seen_tokens * self.geometry.token_bytes + self.row_bytes

    @property
    def flops(self) -> int:
        """4 * Hq * D for every (row, token) pair that is seen."""
        return 4 * self.num_q_heads * self.head_dim * self.tree.visible

    @property
    def set_bytes(self) -> int:
        return Inputs.set_bytes(self.tree, self.geometry)

    def sets(self, count: int) -> list[TreeSet]:
        inputs = Inputs(self.tree, self.geometry, torch.device(self.device), count)
        plan, outs, once = inputs.plan(), torch.empty_like(inputs.q), {}
        return [TreeSet(self, inputs, i, plan, outs[i], once) for i in range(count)]

    def ours(self, given: TreeSet) -> Call:
        return lambda: api.tree_attention(given.q, given.k_cache, given.v_cache, given.plan, out=given.out)

    def reference(self, given: TreeSet) -> Tensor:
        return api.tree_attention(given.q, given.k_cache, given.v_cache, given.plan, backend="reference")

    def error(self, out: Tensor, reference: Tensor) -> float:
        return error(out, reference.float())

    def tolerance(self, ours: bool) -> float:
        """Peers may round partial results to q's dtype, level by level."""
        return tolerance(self.geometry.q_dtype) * (1 if ours else 3)

    def told(self, given: TreeSet, ceilings: dict) -> dict:
        """What our call says of itself."""
        told = explain(
            given.plan, given.q, given.k_cache, given.v_cache, bandwidth=ceilings["bytes_per_s"],
            flops=ceilings["flops_per_s"][self.dtype],
        )  # fmt: skip
        return {
            "backend": told.backend,
            "why": told.why,
            "config": told.config,
            "bytes_moved": told.bytes_read + told.state_bytes // 2 + self.row_bytes // 2,
            "issued_flops": told.issued_flops,
        }


@dataclass
class TreeSet:
    """One input set, as our op and the peers take it."""

    case: TreeCase
    inputs: Inputs
    which: int
    plan: object
    out: Tensor
    shared: dict = field(repr=False)  # of all sets of the case

    @property
    def tree(self) -> Tree:
        return self.inputs.tree

    @property
    def geometry(self) -> Geometry:
        return self.inputs.geometry

    @property
    def pages(self) -> list[list[int]]:
        return self.inputs.pages

    @property
    def q(self) -> Tensor:
        return self.inputs.q[self.which]

    @property
    def k_cache(self) -> Tensor:
        return self.inputs.k_cache[self.which]

    @property
    def v_cache(self) -> Tensor:
        return self.inputs.v_cache[self.which]

    def once(self, key: str, make: Callable):
        """Made by the first set that asks, for all of them."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def gather(self, nodes: list[int]) -> list[Tensor]:
        """k and v [T, Hkv, D] of the tokens of these nodes."""
        return self.inputs.gather(self.which, self.inputs.slots(nodes))

    def dense(self, paths: list[list[int]]) -> list[Tensor]:
        """k and v [len(paths), Hkv, T, D]: the tokens of each path, contiguous."""
        slots = torch.stack([self.inputs.slots(path) for path in paths])
        caches = self.k_cache, self.v_cache  # one after the other: a copy may fill a third of the memory
        return [cache.flatten(0, 1)[slots].transpose(1, 2).contiguous() for cache in caches]

    @property
    def prefix(self) -> list[Tensor]:
        """Of a star: [1, Hkv, P, D]."""
        return self.dense([[0]])

    @property
    def suffix(self) -> list[Tensor]:
        """Of a star: [N, Hkv, S, D]."""
        return self.dense([[node] for node in range(1, len(self.tree.length))])

    @property
    def replicated(self) -> list[Tensor]:
        """[N, Hkv, T, D]: the path of every node that owns rows, for itself."""
        return self.dense([path for path, rows in zip(self.tree.paths, self.tree.rows) if rows])


def grid(name: str) -> dict:
    grids = json.loads(GRIDS.read_text())
    if name not in grids:
        raise ValueError(f"grid: expected one of {', '.join(grids)}, got {name!r}")
    return grids[name]


def tree_cases(grid: dict, device: str) -> Iterator[TreeCase]:
    for group in grid["attention"]:
        for text in group["geometries"]:
            for values in group["cases"]:
                params = dict(zip(group["fields"], values, strict=True))
                flex = values in group.get("flex", [])
                yield TreeCase(group["group"], group["tree"], params, Geometry.parse(text), device, flex)
