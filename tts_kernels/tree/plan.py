"""TreePlan: the device-side description of a tree of KV nodes and of the query rows of one call."""

from __future__ import annotations

import operator
import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, compress
from typing import TYPE_CHECKING

import torch

from tts_kernels.tree.checks import (
    INT32_MAX,
    check_device,
    check_int,
    check_nodes,
    check_options,
    check_page_ids,
    fail,
    int_list,
    page_lists,
)

if TYPE_CHECKING:
    from tts_kernels.tree.room import PlanWithRoom, Room

try:
    from tts_kernels import _C as native
except ImportError:  # not built: the same in Python, slower
    native = None

PARENT, LENGTH, POSITION, PAGE_BEGIN, OWN_BEGIN, OWN_END, ROWS_END = range(7)  # rows of TreePlan.nodes


@dataclass(eq=False)
class TreePlan:
    """What a tree attention call needs to know about the tree. Build it with `from_nodes`, `from_block_table` or
    `KVTree.plan`; read it; change it only with `advance_`. (One with room takes other trees too.)

    Nodes lie in depth-first preorder (roots and siblings in the order given), rows in the order of their nodes, so a
    node serves one range of rows, [OWN_BEGIN, ROWS_END). All tensors are int32, contiguous and on `device`:

    nodes  [7, num_nodes], with the rows
           PARENT      index of the parent, -1 for a root
           LENGTH      tokens stored in the node, those of its new rows included
           POSITION    absolute position of its first token: the sum of its ancestors' lengths
           PAGE_BEGIN  its first entry in `pages`
           OWN_BEGIN   first row that the node owns
           OWN_END     one past the last row that it owns
           ROWS_END    one past the last row of its subtree
    pages  [total_pages] page ids, each node's from its PAGE_BEGIN on: the i-th holds its tokens
           [i*page_size, (i+1)*page_size). Nodes may lie in any order here and may have pages in reserve.
    rows   [2, num_rows]: rows[0, r] is where row r lies in q and out, rows[1, r] the node that owns it
    grows  [num_nodes]: 1 for a node without children that holds tokens and owns rows, else 0: what `advance_` adds
           (0 too for a node of a KVTree whose children are left out of the plan: it can take no more tokens)

    Row j (from 0) of the c rows that node n owns sees every token of n's strict ancestors and the first
    max(0, LENGTH - c + j + 1) tokens of n, or all of n where `causal` is False. Its position is
    POSITION + LENGTH - c + j.
    """

    nodes: torch.Tensor
    pages: torch.Tensor
    rows: torch.Tensor
    grows: torch.Tensor
    page_size: int
    causal: bool
    num_nodes: int
    num_rows: int
    num_growing: int  # nodes that advance_ lengthens
    num_tokens: int  # sum of the lengths
    capacity: int  # tokens that every growing node can still take; 0 where none grows
    depth: int  # nodes on the longest path from a root
    max_page: int  # largest page id, -1 where there is none
    host: tuple[torch.Tensor, torch.Tensor] = field(repr=False)  # nodes and grows as built; on the CPU those themselves
    advanced: int = 0  # tokens that advance_ has added to each growing node
    most_tokens: int | None = None  # of plans that may be written into this one (PlanWithRoom, FlashInfer's graph mode)
    works: dict = field(default_factory=dict, repr=False)  # what GPU backends have prepared, by geometry

    @property
    def device(self) -> torch.device:
        return self.nodes.device

    def advance_(self, n: int = 1) -> TreePlan:
        """Lengthens every growing node by `n` tokens: in place, on the device, without a host sync. Returns self.

        A node's rows stay its last tokens, so their positions move on by `n` too. The caller stores the tokens.
        Raises TypeError where `n` is no int and ValueError where it is negative or exceeds `capacity`; nothing is
        changed then.
        """
        n = check_int("n", n)
        if not 0 <= n <= self.capacity:
            fail("n", f"0 <= n <= capacity = {self.capacity}", n)
        self.nodes[LENGTH].add_(self.grows, alpha=n)
        self.capacity -= n
        self.advanced += n
        self.num_tokens += n * self.num_growing
        return self

    def positions(self) -> torch.Tensor:
        """[num_rows] int64, the absolute position of each row of q, in the order of q: what rotary embeddings take.
        Right after `advance_` too; computed on the device, without a host sync."""
        source, node = self.rows
        begin = (self.nodes[POSITION] + self.nodes[LENGTH] - self.nodes[OWN_END]).long()  # of row 0, were it the node's
        rows = torch.arange(self.num_rows, device=self.device)
        return torch.empty_like(rows).index_copy_(0, source.long(), begin[node.long()] + rows)

    def slots(self) -> torch.Tensor:
        """[num_rows] int64, where the token of each row of q lies: what `append_kv` takes; -1 for a row of a node that
        holds fewer tokens than rows. Right after `advance_` too; computed on the device, without a host sync, so that a
        captured graph follows."""
        source, node = self.rows[0].long(), self.rows[1].long()
        if not self.pages.numel():
            return torch.full_like(source, -1)
        before = (self.nodes[LENGTH] - self.nodes[OWN_END]).long()  # the token of row 0 in the node, were it the node's
        token = before[node] + torch.arange(self.num_rows, device=self.device)
        page = self.nodes[PAGE_BEGIN].long()[node] + token // self.page_size
        slot = self.pages[page.clamp_(min=0)].long() * self.page_size + token % self.page_size
        return torch.empty_like(slot).index_copy_(0, source, torch.where(token < 0, -1, slot))

    def host_tables(self) -> tuple[list[list[int]], list[int], int]:
        """`nodes` and `grows` as lists, without asking the device, and the tokens by which growing nodes may become
        longer, or have become on a device, than that `nodes` says."""
        nodes, grows = self.host
        spare = self.capacity if self.device.type == "cpu" else self.capacity + self.advanced
        return nodes.tolist(), grows.tolist(), spare

    @classmethod
    def from_nodes(
        cls,
        parent: Sequence[int],
        length: Sequence[int],
        pages: Sequence[Sequence[int]],
        rows: Sequence[int],
        *,
        page_size: int,
        causal: bool = True,
        device: torch.device | str = "cpu",
    ) -> TreePlan:
        """The plan of a forest that is given node by node.

        parent     [num_nodes] index of each node's parent, -1 for a root; a parent stands before its children
        length     [num_nodes] tokens stored in each node, the new rows' tokens included; may be 0
        pages      [num_nodes] lists of page ids, at least ceil(length / page_size) each; what a growing node has beyond
                   that is capacity for `advance_`
        rows       [num_nodes] query rows that each node owns, its last tokens: at most its length
        page_size  tokens per page
        causal     whether a row sees, of its own node, the tokens up to itself or all of them

        The rows of q lie node by node in the order in which the nodes are given here.
        Raises TypeError for what is not of these types and ValueError for a wrong value.
        """
        check_options(page_size, causal)
        device = check_device(device)
        made = native.plan_from_nodes(parent, length, pages, rows, page_size) if native else None
        if made is not None:
            return from_tables(*made, page_size=page_size, causal=causal, device=device)
        # Anything but plain lists of valid ints is looked at here, thing by thing.
        parent, length, rows = int_list("parent", parent), int_list("length", length), int_list("rows", rows)
        try:
            page_count = list(map(len, pages))
        except TypeError:  # tensors without a length, or no lists at all
            pages = page_lists(pages)
            page_count = list(map(len, pages))
        check_nodes(parent, length, page_count, rows)
        room = [c * page_size - t for c, t in zip(page_count, length)]
        if room and min(room) < 0:
            i = next(i for i, r in enumerate(room) if r < 0)
            fail(f"pages[{i}]", f"at least ceil({length[i]} / {page_size}) page ids", f"{page_count[i]} ids")

        ids: list[int] = []
        for p in pages:
            ids += p
        try:
            page_ids = int_tensor(ids)
        except struct.error:  # check_page_ids says which
            page_ids = None
        max_page = check_page_ids(page_ids, ids, pages)
        first_row = list(accumulate(rows, initial=0))
        return build(
            parent, length, room, rows, first_row, page_count, page_ids, max_page,
            page_size=page_size, causal=causal, device=device,
        )  # fmt: skip

    @classmethod
    def from_block_table(
        cls,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        page_size: int,
        q_lens: torch.Tensor | None = None,
        causal: bool = True,
        reserve: int = 0,
        least_saving: int = 0,
        room: Room | None = None,
        into: PlanWithRoom | None = None,
    ) -> TreePlan:
        """The plan of a paged batch. Sequences whose leading page ids are equal share those pages: any number of
        groups, nested to any depth, their members anywhere in the batch.

        block_table  [B, max_pages] int32 or int64 page ids, of which row b's first
                     ceil((seq_lens[b] + reserve) / page_size) are read (the reserve only where the sequence has tokens
                     and rows); the others may hold anything
        seq_lens     [B] int32 or int64 tokens of each sequence, its new rows' tokens included. 0 is padding: its rows
                     see nothing and never grow
        q_lens       [B] int32 or int64 rows of each sequence, its last tokens; default 1 each
        reserve      tokens by which each sequence can grow with `advance_`, in pages that the table names now
        least_saving  pages that sequences share are a node of their own only where that saves reading so many tokens:
                     tokens * (sequences - 1). Others stay with the sequences, as if they were not shared
        room         makes a PlanWithRoom, whose tables take any batch within `room`: twice as many nodes as sequences
                     always do. What is shared deeper than room.depth is read by each sequence. room.pages None: as many
                     as block_table has entries
        into         such a plan: it is made to say what the new one would, in place, and is returned; a captured graph
                     that reads it follows the batch

        Whole pages before a sequence's rows can be shared; the rows always own a private leaf. Rows of q lie in batch
        order. The plan is on the device of `block_table`; the lengths may be on another.

        A table on the CPU is compared on the CPU. A table on another device is compared there by Triton kernels and is
        not copied to the host, but one copy of 6 * B integers waits for that device: build a plan once for many calls.
        Its `pages` are then a copy of the table on that device, in which nodes find theirs by PAGE_BEGIN.
        Raises TypeError for what is not of these types, ValueError for a wrong value, RuntimeError where the table is
        not on the CPU and triton cannot be imported.
        """
        from tts_kernels.tree.block_table import plan_of_block_table  # which makes plans of this class

        check_options(page_size, causal)
        return plan_of_block_table(
            block_table, seq_lens, q_lens, page_size=page_size, causal=causal, reserve=reserve,
            least_saving=least_saving, room=room, into=into,
        )  # fmt: skip


def build(
    parent: list[int],
    length: list[int],
    room: list[int],
    rows: list[int],
    first_row: list[int],
    page_count: list[int],
    pages: torch.Tensor,
    max_page: int,
    still: Sequence[int] = (),
    *,
    page_begin: list[int] | None = None,
    page_size: int,
    causal: bool,
    device: torch.device | str,
) -> TreePlan:
    """The plan of valid nodes, given in any order that has parents before their children.

    room       [num_nodes] tokens that the pages of each node can still take
    first_row  [num_nodes] where the rows of each node begin in q
    pages      int32, page ids: node by node in the order given, or each node's from its `page_begin` on
    still      nodes that do not grow though they have rows and, here, no children
    """
    num_nodes = len(parent)
    order, up, position, subtree_end, inner, depth = preorder(parent, length)
    one_each = sum(rows) == num_nodes - rows.count(0)  # one row or none in every node
    grows = rows.copy() if one_each else [1 if c else 0 for c in rows]
    for i in (*inner, *still):
        grows[i] = 0
    if not all(length):
        grows = [g if t else 0 for g, t in zip(grows, length)]
    capacity = min(compress(room, grows), default=0)

    pick = operator.itemgetter(*order) if num_nodes > 1 else tuple  # from the order given to depth-first order
    page_begin = pick(page_begin or list(accumulate(page_count, initial=0))[:num_nodes])
    rows, first_row = pick(rows), pick(first_row[:num_nodes])
    row_begin = list(accumulate(rows, initial=0))
    rows_end = row_begin[1:]
    for place, stop in subtree_end:
        rows_end[place] = row_begin[stop]

    if one_each:
        row_source, row_node = list(compress(first_row, rows)), list(compress(range(num_nodes), rows))
    else:
        row_source, row_node = [], []
        for node, (first, count) in enumerate(zip(first_row, rows)):
            row_source += range(first, first + count)
            row_node += [node] * count

    num_rows, num_tokens = len(row_node), sum(length)
    if num_tokens > INT32_MAX:
        fail("length", f"at most {INT32_MAX} tokens in all", num_tokens)
    tables = int_bytes(
        [*up, *pick(length), *position, *page_begin, *row_begin[:-1], *row_begin[1:], *rows_end,
         *row_source, *row_node, *pick(grows)]
    )  # fmt: skip
    return from_tables(
        tables, num_rows, 0, sum(grows), num_tokens, capacity, depth, max_page,
        page_size=page_size, causal=causal, device=device, pages=pages,
    )  # fmt: skip


def from_tables(
    tables: bytearray,
    num_rows: int,
    num_pages: int,
    num_growing: int,
    num_tokens: int,
    capacity: int,
    depth: int,
    max_page: int,
    *,
    page_size: int,
    causal: bool,
    device: torch.device | str,
    pages: torch.Tensor | None = None,
) -> TreePlan:
    """The plan whose int32 tables lie one behind the other: nodes [7, num_nodes], rows [2, num_rows], grows [num_nodes]
    and, where `pages` is not given, pages [num_pages]."""
    num_nodes = (len(tables) // 4 - 2 * num_rows - num_pages) // 8
    with torch.inference_mode(False):  # else advance_ would fail outside of inference mode
        table = (
            torch.frombuffer(tables, dtype=torch.int32) if tables else torch.empty(0, dtype=torch.int32, device="cpu")
        )
        sizes = [7 * num_nodes, 2 * num_rows, num_nodes, num_pages]
        parts, host = table.to(device).split_with_sizes(sizes), table.split_with_sizes(sizes)
        return TreePlan(
            nodes=parts[0].view(7, num_nodes),
            pages=parts[3] if pages is None else pages.to(device),
            rows=parts[1].view(2, num_rows),
            grows=parts[2],
            page_size=page_size,
            causal=causal,
            num_nodes=num_nodes,
            num_rows=num_rows,
            num_growing=num_growing,
            num_tokens=num_tokens,
            capacity=capacity,
            depth=depth,
            max_page=max_page,
            host=(host[0].view(7, num_nodes), host[2]),
        )


def preorder(
    parent: list[int], length: list[int]
) -> tuple[list[int], list[int], list[int], list[tuple[int, int]], list[int], int]:
    """Depth-first preorder of a forest: parents before children, siblings in the order given. Returns

    order        the nodes in that order
    up           parent of each, as a place in that order, -1 for a root
    position     sum of the lengths of each one's ancestors
    subtree_end  (place, one past the place of the last descendant) of each inner node
    inner        the nodes that have children
    depth        nodes on the longest path from a root
    """
    children = defaultdict(list)
    for i, p in enumerate(parent):
        children[p].append(i)

    order: list[int] = []
    up: list[int] = []
    position: list[int] = []
    # Of inner nodes; -1 stands for what the roots hang from.
    place, level, end, last = {-1: -1}, {-1: 0}, {-1: 0}, {}
    todo = [-1] if parent else []
    while todo:
        i = todo.pop()
        if i >= 0:
            p = parent[i]
            place[i] = len(order)
            order.append(i)
            up.append(place[p])
            position.append(end[p])
            if i not in children:
                continue
            level[i] = level[p] + 1
            end[i] = end[p] + length[i]
        below = children[i]
        if children.keys().isdisjoint(below):  # leaves only: all at once
            order += below
            up += [place[i]] * len(below)
            position += [end[i]] * len(below)
            last[i] = len(order)
        else:
            todo += reversed(below)

    inner = list(level)[1:]  # parents first
    for i in reversed(inner):
        if i not in last:
            child = children[i][-1]
            last[i] = last[child] if child in last else place[child] + 1
    depth = max(level.values()) + 1 if parent else 0
    return order, up, position, [(place[i], last[i]) for i in inner], inner, depth


def int_tensor(ints: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """[len(ints)] int32 or int64 on the CPU, several times faster than torch.tensor. Raises struct.error for others."""
    if not ints:
        return torch.empty(0, dtype=dtype, device="cpu")
    return torch.frombuffer(int_bytes(ints, dtype), dtype=dtype)


def int_bytes(ints: list[int], dtype: torch.dtype = torch.int32) -> bytearray:
    buffer = bytearray(dtype.itemsize * len(ints))
    struct.pack_into(f"={len(ints)}{'i' if dtype == torch.int32 else 'q'}", buffer, 0, *ints)
    return buffer
