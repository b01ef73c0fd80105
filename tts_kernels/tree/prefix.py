"""Finding shared prefixes in a block table: sequences whose leading page ids are equal.

It works on the bytes of the table: comparing, sorting and joining byte strings takes a fraction of the time of the same
tensor operations, and no thread pool, which costs milliseconds where other processes use the cores.
"""

from __future__ import annotations

import ctypes
from itertools import pairwise
from typing import NamedTuple

import torch

from tts_kernels.tree.checks import INT32_MAX, fail

SERIAL = 32768  # elements up to which torch works in the calling thread


class Run(NamedTuple):
    """A node of the forest of shared pages."""

    parent: int  # index of the parent, -1 for a root
    member: int  # the first sequence that contains it
    begin: int  # its pages, [begin, end) of that sequence
    end: int  # begin for a leaf: the caller knows how far the sequence goes
    leaf: bool  # whether it is the private rest of its one member


def shared_runs(table: TableBytes, shareable: list[int]) -> list[Run]:
    """The forest of a batch. Its leaves are the sequences, an inner node is a longest run of pages that the same two or
    more sequences share. Parents stand before their children, siblings in the order of their first sequences.

    shareable  [B] leading pages of each sequence that may be shared
    """
    keys = [table.run(b, 0, pages) for b, pages in enumerate(shareable)]
    order = sorted(range(len(keys)), key=keys.__getitem__)  # equal prefixes side by side
    common = [common_pages(keys[a], keys[b], table.item) for a, b in pairwise(order)] + [0] * bool(order)

    # Neighbours in sorted order that share d pages lie under one inner node that ends at page d. `path` holds the inner
    # nodes around the current sequence; node 0 ends at page 0, holds everything and is no node of the forest.
    end, first, parent = [0], [-1], [-1]
    leaf_parent = [0] * len(keys)
    path = [0]

    def open_node(stop: int, member: int) -> None:
        path.append(len(end))
        end.append(stop)
        first.append(member)
        parent.append(-1)

    for b, below in zip(order, common):
        if below > end[path[-1]]:
            open_node(below, b)
        leaf_parent[b] = path[-1]
        first[path[-1]] = min(first[path[-1]], b)
        while end[path[-1]] > below:
            node = path.pop()
            if end[path[-1]] < below:
                open_node(below, first[node])
            parent[node] = path[-1]
            first[path[-1]] = min(first[path[-1]], first[node])

    nodes = [(first[node], end[node], node) for node in range(1, len(end))]
    nodes += [(b, table.width + 1, 0) for b in range(len(keys))]  # 0 for a leaf
    nodes.sort()  # by first sequence, and of those outer nodes before inner ones before the leaf
    index = {node: i for i, (_, _, node) in enumerate(nodes) if node}
    index[0] = -1
    runs = []
    for member, stop, node in nodes:
        outer = parent[node] if node else leaf_parent[member]
        begin = end[outer]
        runs.append(Run(index[outer], member, begin, stop if node else begin, not node))
    return runs


def common_pages(a: bytes, b: bytes, item: int) -> int:
    """Leading pages, of `item` bytes each, that are equal."""
    limit = min(len(a), len(b)) // item
    if a.startswith(b) or b.startswith(a):
        return limit
    low, high = 0, limit  # the first `low` pages are equal, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        if a[low * item : middle * item] == b[low * item : middle * item]:
            low = middle
        else:
            high = middle
    return low


class TableBytes:
    """A block table [B, max_pages] on the CPU, int32 or int64, as bytes."""

    def __init__(self, table: torch.Tensor):
        table = table.contiguous()
        self.dtype, self.item, self.width = table.dtype, table.element_size(), table.shape[1]
        self.data = ctypes.string_at(table.data_ptr(), table.numel() * self.item) if table.numel() else b""

    def run(self, row: int, begin: int, end: int) -> bytes:
        first = row * self.width
        return self.data[(first + begin) * self.item : (first + end) * self.item]

    def pages(self, runs: list[tuple[int, int, int]]) -> tuple[torch.Tensor, int]:
        """Page ids of the runs (row, begin, end), one after the other, int32, and the largest of them (-1 for none).

        Raises ValueError for a negative or too large id in them.
        """
        joined = bytearray().join([self.run(*run) for run in runs])
        if not joined:
            return torch.empty(0, dtype=torch.int32, device="cpu"), -1
        ids = torch.frombuffer(joined, dtype=self.dtype)
        extremes = [torch.aminmax(part) for part in ids.split(SERIAL)]
        low, high = min(int(low) for low, _ in extremes), max(int(high) for _, high in extremes)
        if low < 0 or high > INT32_MAX:
            places = [(row, page) for row, begin, end in runs for page in range(begin, end)]
            for (row, page), value in zip(places, ids.tolist()):
                if not 0 <= value <= INT32_MAX:
                    fail(f"block_table[{row}, {page}]", f"a page id in [0, {INT32_MAX}]", value)
        return ids.to(torch.int32), high
