"""What plan() of FlashInfer's cascade is given: the levels, read and checked, made one tree of KV nodes; and the tables
that a captured CUDA graph goes on reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tts_kernels.attention.work import refresh
from tts_kernels.tree.checks import INT32_MAX, check_integers, fail
from tts_kernels.tree.plan import POSITION, TreePlan, build, preorder

from .flashinfer_call import Options, check_tensor


@dataclass(frozen=True)
class Level:
    """Segment j serves the rows [qo_indptr[j], qo_indptr[j + 1]) of q; its `length[j]` tokens lie in the pages
    indices[kv_indptr[j] : kv_indptr[j + 1]]."""

    qo_indptr: list[int]
    kv_indptr: list[int]
    length: list[int]
    indices: Tensor  # int32, on the CPU

    @property
    def num_segments(self) -> int:
        return len(self.length)


def read_levels(
    num_levels: int,
    page_size: int,
    qo_indptr_arr: Sequence[Tensor],
    paged_kv_indptr_arr: Sequence[Tensor],
    paged_kv_indices_arr: Sequence[Tensor],
    paged_kv_last_page_len: Sequence[Tensor],
) -> list[Level]:
    """The arguments of plan(), read on the host and checked. TypeError and ValueError name what is wrong."""
    arrays = {
        "qo_indptr_arr": qo_indptr_arr,
        "paged_kv_indptr_arr": paged_kv_indptr_arr,
        "paged_kv_indices_arr": paged_kv_indices_arr,
        "paged_kv_last_page_len": paged_kv_last_page_len,
    }
    for name, tensors in arrays.items():
        check_tensors(name, tensors, num_levels)
    levels: list[Level] = []
    for i in range(num_levels):
        qo, kv, indices, last_page_len = (
            as_level_tensor(f"{name}[{i}]", tensors[i]) for name, tensors in arrays.items()
        )
        qo_indptr = read_indptr(f"qo_indptr_arr[{i}]", qo)
        kv_indptr = read_indptr(f"paged_kv_indptr_arr[{i}]", kv)
        if levels and qo_indptr[-1] != levels[0].qo_indptr[-1]:
            expected = f"{levels[0].qo_indptr[-1]} rows in all like qo_indptr_arr[0]"
            fail(f"qo_indptr_arr[{i}]", expected, qo_indptr[-1])
        if len(kv_indptr) != len(qo_indptr):
            fail(f"paged_kv_indptr_arr[{i}]", f"{len(qo_indptr)} entries like qo_indptr_arr[{i}]", len(kv_indptr))
        if len(last_page_len) != len(qo_indptr) - 1:
            expected = f"{len(qo_indptr) - 1} entries, one for each segment of qo_indptr_arr[{i}]"
            fail(f"paged_kv_last_page_len[{i}]", expected, len(last_page_len))
        length = lengths(f"paged_kv_last_page_len[{i}]", kv_indptr, last_page_len.tolist(), page_size)
        pages = read_pages(f"paged_kv_indices_arr[{i}]", indices, kv_indptr[-1])
        levels.append(Level(qo_indptr, kv_indptr, length, pages))
    return levels


def check_tensors(name: str, tensors: Sequence[Tensor], count: int) -> None:
    """`tensors` is a list or tuple of `count` tensors."""
    if not isinstance(tensors, (list, tuple)):
        fail(name, f"a list of {count} tensors, one for each level", type(tensors).__name__, TypeError)
    if len(tensors) != count:
        fail(name, f"{count} tensors, one for each level", len(tensors))
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            fail(f"{name}[{i}]", "a tensor", type(tensor).__name__, TypeError)


def as_level_tensor(name: str, tensor: Tensor) -> Tensor:
    check_integers(name, tensor, "[entries]")
    return tensor.detach().cpu()


def read_indptr(name: str, tensor: Tensor) -> list[int]:
    indptr = tensor.tolist()
    if not indptr or indptr[0] != 0:
        fail(name, "offsets that begin with 0", indptr[:1])
    for j, (begin, end) in enumerate(pairwise(indptr)):
        if end < begin:
            fail(f"{name}[{j + 1}]", f"at least {begin}, the entry before it", end)
    return indptr


def lengths(name: str, kv_indptr: list[int], last_page_len: list[int], page_size: int) -> list[int]:
    """Tokens of each segment. What stands for a segment without pages is not looked at."""
    length = []
    for j, last in enumerate(last_page_len):
        pages = kv_indptr[j + 1] - kv_indptr[j]
        if pages and not 1 <= last <= page_size:
            fail(f"{name}[{j}]", f"1 <= tokens in the last page <= page_size = {page_size}", last)
        length.append((pages - 1) * page_size + last if pages else 0)
    return length


def read_pages(name: str, indices: Tensor, count: int) -> Tensor:
    if len(indices) < count:
        fail(name, f"at least {count} page ids, as the last entry of paged_kv_indptr_arr says", len(indices))
    indices = indices[:count]
    if count:
        low, high = (int(extreme) for extreme in torch.aminmax(indices))
        if low < 0 or high > INT32_MAX:
            at = int(((indices < 0) | (indices > INT32_MAX)).nonzero()[0])
            fail(f"{name}[{at}]", f"a page id in [0, {INT32_MAX}]", int(indices[at]))
    return indices.to(torch.int32)


@dataclass
class Nodes:
    """Nodes as `tree.plan.build` takes them, parents before their children."""

    parent: list[int] = field(default_factory=list)
    length: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    first_row: list[int] = field(default_factory=list)
    page_count: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)  # position after the node's last token
    page_runs: list[list[int]] = field(default_factory=list)  # level, begin, end: the page ids of all nodes in order
    shifted: dict[int, int] = field(default_factory=dict)  # position of nodes that do not begin where the parent ends

    def add(
        self, parent: int, length: int = 0, pages: tuple[int, int, int] | None = None, rows: int = 0, first_row: int = 0
    ) -> int:
        """`pages` are entries [begin, end) of a level's indices: (level, begin, end)."""
        self.parent.append(parent)
        self.length.append(length)
        self.rows.append(rows)
        self.first_row.append(first_row)
        self.end.append(length + (self.end[parent] if parent >= 0 else 0))
        self.page_count.append(pages[2] - pages[1] if pages else 0)
        if pages:
            level, begin, end = pages
            if self.page_runs and self.page_runs[-1][0] == level and self.page_runs[-1][2] == begin:
                self.page_runs[-1][2] = end
            else:
                self.page_runs.append([level, begin, end])
        return len(self.parent) - 1


def nodes_of_levels(levels: list[Level], *, causal: bool, window: int) -> Nodes:
    """Each segment becomes a node under the segment of the level above that serves its rows, the rows those of the last
    level's nodes. A segment that crosses a border of the level above is cut there: one node for each part, with the
    same pages. A segment without rows becomes an empty root, so that the number of nodes depends on the number of
    segments and on such cuts only.
    """
    nodes = Nodes()
    above = [(levels[0].qo_indptr[-1], -1)]  # row ranges of the level above in order: where each ends, and its node
    for i, level in enumerate(levels):
        here, k = [], 0
        for j in range(level.num_segments):
            row, end = level.qo_indptr[j], level.qo_indptr[j + 1]
            pages = (i, level.kv_indptr[j], level.kv_indptr[j + 1])
            if row == end:
                nodes.add(-1)
            while row < end:
                until, parent = above[k]
                stop = min(until, end)
                if i < len(levels) - 1:
                    node = nodes.add(parent, level.length[j], pages)
                    here.append((stop, node))
                else:
                    add_last_level(nodes, parent, level.length[j], pages, row, stop, end - stop, causal, window)
                row = stop
                k += stop == until
        above = here
    return nodes


def add_last_level(
    nodes: Nodes, parent: int, length: int, pages: tuple[int, int, int], row: int, stop: int, after: int,
    causal: bool, window: int,
) -> None:  # fmt: skip
    """The part of a segment of the last level that serves the rows [row, stop), where `after` rows of it follow.

    A node's rows stand for its last tokens. Those of a part that others follow stand for tokens further up: where that
    makes them see less, the node has these tokens only. Where a window has to know their positions and the node cannot
    say it, an empty node below it owns them.
    """
    last = length - after  # tokens up to the one that the last of these rows stands for; may be negative
    seen = max(last, 0) if causal else length
    if window < 0 or seen == last:
        nodes.add(parent, seen, pages, stop - row, row)
        return
    node = nodes.add(parent, seen, pages)
    begin = nodes.end[node] - seen  # of the segment
    nodes.shifted[nodes.add(node, rows=stop - row, first_row=row)] = begin + last


def plan_levels(
    levels: list[Level], *, page_size: int, causal: bool, window: int, device: torch.device | str
) -> TreePlan:
    """The plan of one call for all levels. Its nodes do not grow: the next step's plan is another one."""
    nodes = nodes_of_levels(levels, causal=causal, window=window)
    runs = [levels[i].indices[begin:end] for i, begin, end in nodes.page_runs]
    pages = torch.cat([torch.empty(0, dtype=torch.int32, device="cpu"), *runs])
    plan = build(
        nodes.parent, nodes.length, [0] * len(nodes.parent), nodes.rows, nodes.first_row, nodes.page_count,
        pages, int(pages.max()) if len(pages) else -1, page_size=page_size, causal=causal, device=device,
    )  # fmt: skip
    if nodes.shifted:
        place = {node: at for at, node in enumerate(preorder(nodes.parent, nodes.length)[0])}
        for node, position in nodes.shifted.items():
            plan.nodes[POSITION, place[node]] = position
            plan.host[0][POSITION, place[node]] = position
    return plan


# CUDA graph mode: the tables of the first plan are those that captured runs read, so later plans are written to them.


class GraphBuffers(NamedTuple):
    """What the caller sets aside for each level in CUDA graph mode, by FlashInfer's names."""

    qo_indptr_buf_arr: list[Tensor]  # [segments + 1]
    paged_kv_indptr_buf_arr: list[Tensor]  # [segments + 1]
    paged_kv_indices_buf_arr: list[Tensor]  # [most pages]
    paged_kv_last_page_len_buf_arr: list[Tensor]  # [segments]

    def check(self, num_levels: int) -> None:
        for name, tensors in zip(self._fields, self):
            check_tensors(name, tensors, num_levels)
            for i, tensor in enumerate(tensors):
                check_tensor(f"{name}[{i}]", tensor, "[entries]", None, (torch.int32, torch.int64))
        for i in range(num_levels):
            entries = len(self.qo_indptr_buf_arr[i])
            if entries < 1:
                fail(f"qo_indptr_buf_arr[{i}]", "at least 1 entry", entries)
            for name, tensors, expected in (
                ("paged_kv_indptr_buf_arr", self.paged_kv_indptr_buf_arr, entries),
                ("paged_kv_last_page_len_buf_arr", self.paged_kv_last_page_len_buf_arr, entries - 1),
            ):
                if len(tensors[i]) != expected:
                    expected = f"{expected} entries for the {entries} of qo_indptr_buf_arr[{i}]"
                    fail(f"{name}[{i}]", expected, len(tensors[i]))

    def check_fits(self, arrays: tuple) -> None:
        """`arrays` are plan()'s, in the order of the fields: as many segments as buffers were made for, and no more
        pages. FlashInfer names the arrays as the buffers, but for the last."""
        for buffer_name, buffers, tensors in zip(self._fields, self, arrays):
            pages = buffer_name == "paged_kv_indices_buf_arr"
            name = buffer_name.replace("_buf", "").replace("last_page_len_arr", "last_page_len")
            for i, (buffer, tensor) in enumerate(zip(buffers, tensors)):
                if pages and len(tensor) > len(buffer):
                    fail(f"{name}[{i}]", f"at most the {len(buffer)} page ids of {buffer_name}[{i}]", len(tensor))
                if not pages and len(tensor) != len(buffer):
                    fail(f"{name}[{i}]", f"{len(buffer)} entries like {buffer_name}[{i}]", len(tensor))

    def fill(self, arrays: tuple) -> None:
        for buffers, tensors in zip(self, arrays):
            for buffer, tensor in zip(buffers, tensors):
                buffer[: len(tensor)].copy_(tensor)


def reserve_pages(tree: TreePlan, capacity: int) -> None:
    """`tree.pages` with room for `capacity` page ids, and backends make their work lists for any tree in them."""
    used = tree.pages.numel()
    if used > capacity:
        fail("paged_kv_indices_buf_arr", f"room for the {used} page ids of all nodes", capacity)
    with torch.inference_mode(False):  # else a later plan() outside of it could not write to them
        pages = torch.zeros(capacity, dtype=torch.int32, device=tree.device)
        pages[:used].copy_(tree.pages)
    tree.pages = pages
    tree.most_tokens = capacity * tree.page_size


def check_same_options(old: Options, new: Options) -> None:
    for option in [option.name for option in fields(Options)]:
        before, now = getattr(old, option), getattr(new, option)
        if before != now:
            fail(option, f"{before} as in the first plan(), which captured runs have built in", now)


def copy_into(old: TreePlan, new: TreePlan) -> None:
    """Makes `old` say what `new` says, in the tensors that it has. ValueError where they cannot take it: nothing is
    changed then."""
    for name, before, now in (
        ("float_workspace_buffer", f"{old.device}", f"{new.device}"),
        ("qo_indptr_arr", f"{old.num_rows} rows", f"{new.num_rows} rows"),
        ("qo_indptr_arr", f"{old.num_nodes} nodes", f"{new.num_nodes} nodes"),
    ):
        if before != now:
            fail(name, f"{before} as in the first plan(), which captured runs have built in", now)
    used = new.pages.numel()
    if used > old.pages.numel():
        fail("paged_kv_indices_buf_arr", f"room for the {used} page ids of all nodes", old.pages.numel())
    if new.depth > old.depth:
        fail("qo_indptr_arr", f"nodes {old.depth} deep as in the first plan(), which captured runs have built in",
             new.depth)  # fmt: skip

    old.nodes.copy_(new.nodes)
    old.pages[:used].copy_(new.pages)
    old.rows.copy_(new.rows)
    old.grows.copy_(new.grows)
    for table, values in zip(old.host, new.host):
        table.copy_(values)
    for name in ("num_growing", "num_tokens", "capacity", "max_page"):
        setattr(old, name, getattr(new, name))
    refresh(old.works, old)
