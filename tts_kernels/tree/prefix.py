"""Finding shared prefixes in a block table: sequences whose leading page ids are equal.

The table stays where it is. Either class below brings its sequences into an order that puts equal prefixes side by
side and says what neighbours in it share; from these few integers the forest is built on the host.
"""

from __future__ import annotations

import ctypes
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from tts_kernels.tree.checks import INT32_MAX, check_lens, check_lens_tensors, fail

SERIAL = 32768  # elements up to which torch works in the calling thread


class Run(NamedTuple):
    """A node of the forest of shared pages."""

    parent: int  # index of the parent, -1 for a root
    member: int  # the first sequence that contains it
    begin: int  # its pages, [begin, end) of that sequence
    end: int  # begin for a leaf: the caller knows how far the sequence goes
    leaf: bool  # whether it is the private rest of its one member


def shared_runs(order: list[int], common: list[int]) -> list[Run]:
    """The forest of a batch. Its leaves are the sequences, an inner node is a longest run of pages that the same two or
    more sequences share. Parents stand before their children, siblings in the order of their first sequences.

    order   [B] the sequences, equal prefixes side by side: what two of them share is the least that neighbours between
            them share
    common  [B] pages that order[i] and order[i + 1] share; the last is 0
    """
    # Neighbours in sorted order that share d pages lie under one inner node that ends at page d. `path` holds the inner
    # nodes around the current sequence; node 0 ends at page 0, holds everything and is no node of the forest.
    end, first, parent = [0], [-1], [-1]
    leaf_parent = [0] * len(order)
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
    nodes += [(b, max(end) + 1, 0) for b in range(len(order))]  # 0 for a leaf
    nodes.sort()  # by first sequence, and of those outer nodes before inner ones before the leaf
    index = {node: i for i, (_, _, node) in enumerate(nodes) if node}
    index[0] = -1
    runs = []
    for member, stop, node in nodes:
        outer = parent[node] if node else leaf_parent[member]
        begin = end[outer]
        runs.append(Run(index[outer], member, begin, stop if node else begin, not node))
    return runs


def worthwhile(runs: list[Run], least: int = 0, depth: int | None = None) -> list[Run]:
    """Without the inner nodes that save fewer than `least` reads of a page, pages x (sequences below - 1), and without
    those below which a path would be longer than `depth` nodes. Their pages go to their children, each of which then
    reads them for itself."""
    sequences = [int(run.leaf) for run in runs]
    for i in reversed(range(len(runs))):
        if runs[i].parent >= 0:
            sequences[runs[i].parent] += sequences[i]
    kept: list[Run] = []
    place, begins, gone = [], [], []  # of each run; of one that is gone, the place of the run around it
    level: list[int] = []  # of each kept run; a root's is 1
    for run, count in zip(runs, sequences):
        outer = run.parent
        begin = begins[outer] if outer >= 0 and gone[outer] else run.begin
        up = place[outer] if outer >= 0 else -1
        here = level[up] + 1 if up >= 0 else 1
        too_deep = depth is not None and here >= depth
        begins.append(begin)
        gone.append(not run.leaf and (too_deep or (run.end - begin) * (count - 1) < least))
        place.append(up if gone[-1] else len(kept))
        if not gone[-1]:
            kept.append(Run(up, run.member, begin, begin if run.leaf else run.end, run.leaf))
            level.append(here)
    return kept


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


class HostTable:
    """A block table [B, max_pages] on the CPU, int32 or int64, with what `shared_runs` needs to know of it.

    It works on bytes: comparing, sorting and joining byte strings takes a fraction of the time of the same tensor
    operations, and no thread pool, which costs milliseconds where other processes use the cores.
    """

    def __init__(
        self,
        table: torch.Tensor,
        seq_lens: torch.Tensor,
        q_lens: torch.Tensor | None,
        *,
        page_size: int,
        reserve: int,
    ):
        self.seq_lens, self.q_lens = check_lens(seq_lens, q_lens, reserve, *table.shape, page_size)
        # Tables are as wide as the longest sequence that there could be.
        used = -(-(max(self.seq_lens, default=0) + reserve) // page_size)
        table = table[:, :used].contiguous()
        self.dtype, self.item, self.width = table.dtype, table.element_size(), table.shape[1]
        self.data = ctypes.string_at(table.data_ptr(), table.numel() * self.item) if table.numel() else b""
        shareable = [max(0, s - q) // page_size for s, q in zip(self.seq_lens, self.q_lens)]
        keys = [self.run(b, 0, pages) for b, pages in enumerate(shareable)]
        self.order = sorted(range(len(keys)), key=keys.__getitem__)
        self.common = [common_pages(keys[a], keys[b], self.item) for a, b in pairwise(self.order)]
        self.common += [0] * bool(keys)

    def run(self, row: int, begin: int, end: int) -> bytes:
        first = row * self.width
        return self.data[(first + begin) * self.item : (first + end) * self.item]

    def pages(self, runs: list[tuple[int, int, int]]) -> tuple[torch.Tensor, list[int], int]:
        """Page ids of the runs (row, begin, end) as int32, where each run begins there, and the largest id in the runs
        (-1 for none).

        Raises ValueError for a negative or too large id in them.
        """
        begins = list(accumulate((end - begin for _, begin, end in runs), initial=0))[:-1]
        joined = bytearray().join([self.run(*run) for run in runs])
        if not joined:
            return torch.empty(0, dtype=torch.int32, device="cpu"), begins, -1
        ids = torch.frombuffer(joined, dtype=self.dtype)
        extremes = [torch.aminmax(part) for part in ids.split(SERIAL)]
        low, high = min(int(low) for low, _ in extremes), max(int(high) for _, high in extremes)
        if low < 0 or high > INT32_MAX:
            for (row, begin, _), values in zip(runs, ids.split([end - begin for _, begin, end in runs])):
                check_run(row, begin, values.tolist())
        return ids.to(torch.int32), begins, high


class DeviceTable:
    """The same for a table on a device, which is compared there: its entries are never copied to the host. Making one
    waits for the device once, for a few integers per sequence.

    Raises RuntimeError where triton cannot be imported.
    """

    def __init__(
        self,
        table: torch.Tensor,
        seq_lens: torch.Tensor,
        q_lens: torch.Tensor | None,
        *,
        page_size: int,
        reserve: int,
    ):
        batch, self.width = table.shape
        check_lens_tensors(seq_lens, q_lens, reserve, batch)
        if table.numel() > INT32_MAX:
            fail("block_table", f"at most {INT32_MAX} entries on a device", f"{batch} rows of {self.width}")
        try:
            from tts_kernels.tree import prefix_triton
        except ImportError as error:
            raise RuntimeError(f"block_table on {table.device}: triton cannot be imported ({error})") from error
        self.table = table
        facts = prefix_triton.compare_rows(table, seq_lens, q_lens, page_size, reserve).cpu()
        lens = facts[prefix_triton.SEQ_LEN], facts[prefix_triton.Q_LEN]
        self.seq_lens, self.q_lens = check_lens(*lens, reserve, batch, self.width, page_size)
        self.order, self.common = facts[prefix_triton.ORDER].tolist(), facts[prefix_triton.COMMON].tolist()
        self.low, self.high = facts[prefix_triton.LOW].tolist(), facts[prefix_triton.HIGH].tolist()

    def pages(self, runs: list[tuple[int, int, int]]) -> tuple[torch.Tensor, list[int], int]:
        """As HostTable.pages, but the ids are the table's, on its device, up to the last column that a run uses;
        entries that may hold anything are among them. The runs, a plan's, cover what the sequences use."""
        used = max((end for _, _, end in runs), default=0)
        wrong = [low < 0 or high > INT32_MAX for low, high in zip(self.low, self.high)]
        if any(wrong):
            for row, begin, end in runs:
                if wrong[row]:
                    check_run(row, begin, self.table[row, begin:end].tolist())
        with torch.inference_mode(False):
            pages = torch.empty(len(self.table), used, dtype=torch.int32, device=self.table.device)
            pages.copy_(self.table[:, :used])
        return pages.view(-1), [row * used + begin for row, begin, _ in runs], max(self.high, default=-1)


def check_run(row: int, begin: int, ids: list[int]) -> None:
    for page, value in enumerate(ids, begin):
        if not 0 <= value <= INT32_MAX:
            fail(f"block_table[{row}, {page}]", f"a page id in [0, {INT32_MAX}]", value)
