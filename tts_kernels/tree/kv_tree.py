"""KVTree: the KV pages of a tree of nodes, with reference counts. It moves no keys and values, only page ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

import torch

from tts_kernels.tree.checks import check_int, check_options, fail, int_list, is_one, one_or_more
from tts_kernels.tree.plan import TreePlan, build, int_tensor
from tts_kernels.tree.room import PlanWithRoom, Room, plan_with_room, room_of

CACHE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


class OutOfPages(RuntimeError):
    """A KVTree has too few free pages for what was asked; nothing was changed."""


class Node:
    __slots__ = ("children", "held", "length", "pages", "parent")

    def __init__(self, parent: int):
        self.parent = parent  # handle, -1 for a root
        self.length = 0
        self.pages: list[int] = []
        self.children = 0  # living ones; each holds this node
        self.held = True  # by whoever called add or fork, until release


class KVTree:
    """A paged KV cache whose sequences form trees: a node's tokens are stored once, however many descend from it.

    num_layers, num_pages, page_size (tokens per page), num_kv_heads, head_dim: ints of at least 1; every layer has
    num_pages pages, and a page id means the same place in each layer.
    dtype, device: of the caches, which are uninitialised: pages never written cost no memory on a CPU.

    A node is a handle, an int that is never used again. It lives while it is held: by the caller, from `add` or `fork`
    until `release`, and by each of its children. When nothing holds it any more its pages are free again. A handle
    that was released is refused everywhere, though its tokens stay visible to its descendants.

    Every method raises TypeError or ValueError for a wrong argument and OutOfPages where pages are short, and leaves
    the tree as it was then.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        self.num_layers = check_int("num_layers", num_layers, 1)
        self.num_pages = check_int("num_pages", num_pages, 1)
        self.page_size = check_int("page_size", page_size, 1)
        self.num_kv_heads = check_int("num_kv_heads", num_kv_heads, 1)
        self.head_dim = check_int("head_dim", head_dim, 1)
        if dtype not in CACHE_DTYPES:
            fail("dtype", f"one of {', '.join(map(str, CACHE_DTYPES))}", repr(dtype), TypeError)
        shape = (self.num_pages, self.page_size, self.num_kv_heads, self.head_dim)
        with torch.inference_mode(False):  # else they could not be written outside of inference mode
            self.k_cache = [torch.empty(shape, dtype=dtype, device=device) for _ in range(self.num_layers)]
            self.v_cache = [torch.empty(shape, dtype=dtype, device=device) for _ in range(self.num_layers)]
        self.dtype = dtype
        self.device = self.k_cache[0].device
        self._free = list(range(self.num_pages - 1, -1, -1))  # taken from the end: lowest ids first
        self._nodes: dict[int, Node] = {}
        self._next = 0

    # --- what there is -----------------------------------------------------------------------------------------------

    @property
    def free_pages(self) -> int:
        """Pages that no node owns."""
        return len(self._free)

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages that nodes own, K and V of all layers."""
        page = self.page_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return 2 * self.num_layers * (self.num_pages - len(self._free)) * page

    def num_tokens(self, node: int) -> int:
        """Tokens stored in the node itself."""
        return self._held("node", node).length

    def context_len(self, node: int) -> int:
        """Tokens from the root to the end of the node: the position of the token that `append` would add."""
        record = self._held("node", node)
        total = record.length
        while record.parent >= 0:
            record = self._nodes[record.parent]
            total += record.length
        return total

    def room(self, node: int) -> int:
        """Tokens that `append` could add to the node now, if no other node took pages."""
        record = self._held("node", node)
        return (len(record.pages) + len(self._free)) * self.page_size - record.length

    # --- growing and letting go --------------------------------------------------------------------------------------

    def add(self, parent: int | None, num_tokens: int) -> int:
        """A new node of `num_tokens` tokens (0 is allowed) under `parent`, or a root where that is None or -1.

        Returns its handle. Its tokens lie at `slots({node: num_tokens})`; the caller writes them.
        """
        parent = -1 if parent is None else check_int("parent", parent)
        if parent != -1:
            self._held("parent", parent)
        num_tokens = check_int("num_tokens", num_tokens, 0)
        (pages,) = self._take([-(-num_tokens // self.page_size)])
        node = self._new(parent)
        record = self._nodes[node]
        record.length, record.pages = num_tokens, pages
        return node

    def fork(self, node: int, n: int) -> list[int]:
        """`n` new empty children of `node`. Nothing is copied. While it has children `node` takes no more tokens."""
        node = check_int("node", node)
        self._held("node", node)
        return [self._new(node) for _ in range(check_int("n", n, 0))]

    def append(self, nodes: int | Sequence[int], num_tokens: int | Sequence[int] = 1) -> None:
        """Makes each of the `nodes` longer by `num_tokens`: one number for all, or one for each.

        The new tokens are the node's last ones: `slots({node: num_tokens})`. A node that has children is refused, as
        its tokens would come between it and them, and so is a node that is named twice.
        """
        records = self._distinct(nodes)
        if is_one(num_tokens):
            counts = [check_int("num_tokens", num_tokens, 0)] * len(records)
        else:
            counts = int_list("num_tokens", num_tokens)
            if len(counts) != len(records):
                fail("num_tokens", f"{len(records)} entries, as many as nodes", len(counts))
            if counts and min(counts) < 0:
                fail("num_tokens", "at least 0 each", min(counts))
        page_size = self.page_size
        growing: list[Node] = []
        missing: list[int] = []
        for (node, record), count in zip(records.items(), counts):
            if record.children:
                fail("nodes", "nodes without children", f"node {node}, which has {record.children}: append to those")
            short = -(-(record.length + count) // page_size) - len(record.pages)
            if short > 0:
                growing.append(record)
                missing.append(short)
        for record, pages in zip(growing, self._take(missing)):
            record.pages += pages
        for record, count in zip(records.values(), counts):
            record.length += count

    def release(self, nodes: int | Sequence[int]) -> None:
        """Gives the caller's hold of each of the `nodes` back. Pages that nothing holds any more are free at once."""
        for node, record in self._distinct(nodes).items():
            record.held = False
            while node >= 0 and not record.held and not record.children:
                self._free += reversed(record.pages)
                del self._nodes[node]
                node = record.parent
                if node >= 0:
                    record = self._nodes[node]
                    record.children -= 1

    # --- one call ----------------------------------------------------------------------------------------------------

    def plan(
        self,
        rows: Mapping[int, int],
        *,
        causal: bool = True,
        reserve: int = 0,
        room: Room | None = None,
        into: PlanWithRoom | None = None,
    ) -> TreePlan:
        """The plan of a call whose query rows are the last rows[node] tokens of each node: `append` comes first.

        The plan holds these nodes and their ancestors; the rows of q lie node by node in the order of the dict. It is
        right until one of its nodes is forked, released or appended to, and after `append(leaves, n)` again with
        `plan.advance_(n)`, where `leaves` are its nodes that have rows and no children. For that, `reserve` gives each
        of those leaves pages for so many more tokens. They belong to the node then: later appends use them first.

        room  makes a PlanWithRoom: tables that take any plan of this tree within `room`
        into  such a plan: it is made to say what the new one would, in place and without waiting for the device, and
              is returned. A captured graph that reads it follows, through forks and releases too
        """
        check_options(self.page_size, causal)
        reserve = check_int("reserve", reserve, 0)
        rows, records = self._rows(rows)
        index = {-1: -1}  # of each node in the plan, ancestors before descendants
        chosen: list[Node] = []
        for node in rows:
            path = []
            while node not in index:
                path.append(node)
                node = self._nodes[node].parent
            for handle in reversed(path):
                index[handle] = len(chosen)
                chosen.append(self._nodes[handle])
        parent = [index[record.parent] for record in chosen]

        leaves = [r for r, count in zip(records, rows.values()) if count and not r.children] if reserve else []
        missing = [max(0, -(-(r.length + reserve) // self.page_size) - len(r.pages)) for r in leaves]
        room = room_of(room, into, page_size=self.page_size, causal=causal, device=self.device, pages=self.num_pages)
        if room is not None:
            level = [1] * len(chosen)
            for i, p in enumerate(parent):
                level[i] += level[p] if p >= 0 else 0
            room.check(
                "room" if into is None else "into.room", nodes=len(chosen), rows=sum(rows.values()),
                pages=sum(missing) + sum(len(r.pages) for r in chosen), depth=max(level, default=0),
            )  # fmt: skip
        for record, pages in zip(leaves, self._take(missing)):
            record.pages += pages

        count, first_row = [0] * len(chosen), [0] * len(chosen)
        for node, first in zip(rows, accumulate(rows.values(), initial=0)):
            count[index[node]], first_row[index[node]] = rows[node], first
        ids: list[int] = []
        for record in chosen:
            ids += record.pages
        length = [record.length for record in chosen]
        page_count = [len(record.pages) for record in chosen]
        plan = build(
            parent,
            length,
            [c * self.page_size - t for c, t in zip(page_count, length)],
            count,
            first_row,
            page_count,
            int_tensor(ids),
            max(ids, default=-1),
            [i for i, record in enumerate(chosen) if record.children],
            page_size=self.page_size,
            causal=causal,
            device=self.device if room is None else "cpu",
        )
        if into is not None:
            return into.update_(plan)
        return plan if room is None else plan_with_room(plan, room, self.device)

    def slots(self, rows: Mapping[int, int]) -> torch.Tensor:
        """Where the last rows[node] tokens of each node lie, in dict order: what `append_kv` takes.

        [R] int64 on `device`: page id * page_size + offset in the page.
        """
        rows, records = self._rows(rows)
        slots: list[int] = []
        page_size = self.page_size
        for record, count in zip(records, rows.values()):
            token, stop = record.length - count, record.length
            while token < stop:
                offset = token % page_size
                first = record.pages[token // page_size] * page_size + offset
                run = min(page_size - offset, stop - token)
                if run == 1:
                    slots.append(first)
                else:
                    slots += range(first, first + run)
                token += run
        with torch.inference_mode(False):
            return int_tensor(slots, torch.int64).to(self.device)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _held(self, name: str, node: int) -> Node:
        record = self._nodes.get(node if type(node) is int else check_int(name, node))
        if record is None or not record.held:
            fail(name, "a node of this tree that is not released", node)
        return record

    def _distinct(self, nodes: int | Sequence[int]) -> dict[int, Node]:
        nodes = one_or_more("nodes", nodes)
        records = {node: self._held("nodes", node) for node in nodes}
        if len(records) != len(nodes):
            twice = next(node for node in records if nodes.count(node) > 1)
            fail("nodes", "each node once", f"{twice} {nodes.count(twice)} times")
        return records

    def _rows(self, rows: Mapping[int, int]) -> tuple[dict[int, int], list[Node]]:
        """`rows` in Python's ints, and the nodes."""
        if not isinstance(rows, Mapping):
            fail("rows", "a dict from node to number of rows", repr(rows), TypeError)
        checked: dict[int, int] = {}
        records = []
        for node, count in rows.items():
            record = self._held("rows", node)
            if type(node) is not int or type(count) is not int:
                node = check_int("rows", node)
                count = check_int(f"rows[{node}]", count)
            if not 0 <= count <= record.length:
                fail(f"rows[{node}]", f"0 <= rows <= the node's {record.length} tokens", count)
            if node in checked:  # tensors that say the same are two keys of a dict
                fail("rows", "each node once", f"{node} twice")
            checked[node] = count
            records.append(record)
        return checked, records

    def _new(self, parent: int) -> int:
        node = self._next
        self._next += 1
        self._nodes[node] = Node(parent)
        if parent >= 0:
            self._nodes[parent].children += 1
        return node

    def _take(self, counts: Iterable[int]) -> list[list[int]]:
        """So many pages for each, or OutOfPages and none for any."""
        total = sum(counts)
        if total > len(self._free):
            raise OutOfPages(f"{total} more pages are needed, {len(self._free)} of {self.num_pages} are free")
        taken = []
        for count in counts:
            split = len(self._free) - count
            taken.append(self._free[split:][::-1])
            del self._free[split:]
        return taken
