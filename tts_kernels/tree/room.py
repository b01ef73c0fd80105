"""Plans with room: tables of one size for a tree that grows and branches, so that a captured graph goes on reading
them, call after call, while the host writes other trees into them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tts_kernels.tree.checks import check_int, fail
from tts_kernels.tree.plan import (
    LENGTH,
    OWN_BEGIN,
    PAGE_BEGIN,
    PARENT,
    POSITION,
    ROWS_END,
    TreePlan,
)


@dataclass(frozen=True)
class Room:
    """What a plan can come to hold, all of it at a time.

    nodes  the ancestors of nodes with rows counted
    rows   of q: every call has so many, whatever the tree of the moment uses
    pages  page ids of all these nodes, reserved ones too. None: all that the KVTree has
    depth  nodes on a path from a root. None: no bound but `nodes`. A row has partial states for each node of its path,
           so the memory of GPU backends grows with rows * depth; what a search is deep is known beforehand
    """

    nodes: int
    rows: int
    pages: int | None = None
    depth: int | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "rows", "pages", "depth"):
            value = getattr(self, name)
            if value is not None or name in ("nodes", "rows"):
                object.__setattr__(self, name, check_int(f"room.{name}", value, 1))

    @property
    def deepest(self) -> int:
        return min(self.depth or self.nodes, self.nodes)

    @property
    def table_size(self) -> int:
        """Numbers in the tables of a plan, where `pages` is given."""
        return 8 * (self.nodes + 1) + 2 * self.rows + self.pages

    def check(self, argument: str, *, nodes: int, rows: int, pages: int, depth: int) -> None:
        """ValueError where a tree of so many is too large."""
        for name, need, most in (
            ("nodes", nodes, self.nodes),
            ("rows", rows, self.rows),
            ("pages", pages, self.pages),
            ("depth", depth, self.deepest),
        ):
            if need > most:
                what = f"a depth of {need}" if name == "depth" else f"the {need} {name} of the tree"
                fail(f"{argument}.{name}", f"room for {what}", most)


@dataclass(eq=False)
class PlanWithRoom(TreePlan):
    """A TreePlan whose tables have the size of `room` and are written in place by `update_`, or by
    `KVTree.plan(rows, into=plan)`. It says of any tree what a plan of that tree alone says, and is used like one: a
    graph that was captured with it follows `advance_` and `update_`, and a compiled function is not compiled again.

    num_rows is room.rows: q and out have that many rows always. Where the tree has fewer, its rows are the first ones.
    Those behind them see no token (out = 0, lse = -inf; positions from 0 on): they belong to an empty root, the node
    behind those of the tree, and num_nodes is room.nodes + 1. Nodes behind that one have neither tokens nor rows.
    depth is that of the deepest tree that fits.
    """

    room: Room | None = None
    tables: torch.Tensor | None = None  # nodes, rows, grows and pages, one behind the other

    def update_(self, other: TreePlan) -> PlanWithRoom:
        """Makes this plan say what `other`, a plan on the CPU, says: in place, and on a GPU behind what the current
        stream has been given, without waiting for it. Returns self.

        Raises TypeError or ValueError, and changes nothing, where `other` is no such plan, has another page_size or
        causal, or is too large for `room`.
        """
        self.check_takes(other)
        staged = write(other, self.room, self.tables)
        if self.device.type != "cpu":
            self.host = host_tables(staged, self.room)
        for name in ("num_growing", "num_tokens", "capacity", "max_page"):
            setattr(self, name, getattr(other, name))
        self.advanced = 0
        for work in self.works.values():
            work.refresh(self)
        return self

    def check_takes(self, other: TreePlan) -> None:
        if not isinstance(other, TreePlan):
            fail("other", "a TreePlan", type(other).__name__, TypeError)
        if other.device.type != "cpu":
            fail("other", "a plan on cpu, whose tables are copied to this one's", f"one on {other.device}")
        for name in ("page_size", "causal"):
            if getattr(other, name) != getattr(self, name):
                fail("other", f"{name} {getattr(self, name)} like this plan", getattr(other, name))
        check_fits("room", self.room, other)


def room_of(
    room: Room | None, into: PlanWithRoom | None, *, page_size: int, causal: bool, device: torch.device, pages: int
) -> Room | None:
    """The room that a plan which is asked for with these arguments has to keep to; None: it has none. pages: where room
    names no number."""
    if into is not None:
        if room is not None:
            fail("room", "None beside into, which has one", repr(room))
        if not isinstance(into, PlanWithRoom):
            fail("into", "a plan that was made with room", type(into).__name__, TypeError)
        for name, value in (("page_size", page_size), ("device", device), ("causal", causal)):
            if getattr(into, name) != value:
                fail("into", f"a plan with {name} {value}", getattr(into, name))
        return into.room
    if room is None:
        return None
    if not isinstance(room, Room):
        fail("room", "a Room", type(room).__name__, TypeError)
    return room if room.pages else replace(room, pages=pages)


def plan_with_room(
    plan: TreePlan, room: Room, device: torch.device, memory: torch.Tensor | None = None
) -> PlanWithRoom:
    """The plan `plan`, which is on the CPU, with room. memory: int32 on `device`, in whose beginning its tables then
    lie; plans that share it are written before each use."""
    check_fits("room", room, plan)
    with torch.inference_mode(False):  # else it could not be written outside of inference mode
        nodes, rows = room.nodes + 1, room.rows
        size = room.table_size
        tables = torch.zeros(size, dtype=torch.int32, device=device) if memory is None else memory[:size]
        staged = write(plan, room, tables)
        parts = tables.split_with_sizes([7 * nodes, 2 * rows, nodes, room.pages])
        host = parts[0].view(7, nodes), parts[2]
        return PlanWithRoom(
            nodes=parts[0].view(7, nodes),
            pages=parts[3],
            rows=parts[1].view(2, rows),
            grows=parts[2],
            page_size=plan.page_size,
            causal=plan.causal,
            num_nodes=nodes,
            num_rows=rows,
            num_growing=plan.num_growing,
            num_tokens=plan.num_tokens,
            capacity=plan.capacity,
            depth=room.deepest,
            max_page=plan.max_page,
            host=host if tables.device.type == "cpu" else host_tables(staged, room),
            most_tokens=room.pages * plan.page_size,
            room=room,
            tables=tables,
        )


def check_fits(argument: str, room: Room, plan: TreePlan) -> None:
    pages = plan.pages.numel()
    room.check(argument, nodes=plan.num_nodes, rows=plan.num_rows, pages=pages, depth=plan.depth)
    # Nodes may name the same pages: work lists are made for as many tokens as there are places.
    tokens = plan.num_tokens + plan.capacity * plan.num_growing
    places = room.pages * plan.page_size
    if tokens > places:
        fail(f"{argument}.pages", f"places for the {tokens} tokens of all nodes, reserved ones too", places)


def write(plan: TreePlan, room: Room, tables: torch.Tensor) -> torch.Tensor:
    """Makes `tables` say what `plan` says. Returns what was copied there from the CPU: all but the page ids where those
    lie on the device already."""
    n, r, nodes, rows = plan.num_nodes, plan.num_rows, room.nodes + 1, room.rows
    there = plan.pages.device.type != "cpu"
    sizes = [7 * nodes, 2 * rows, nodes, 0 if there else plan.pages.numel()]
    # In memory that a copy to a GPU reads at its own time (torch keeps it until then).
    staged = torch.empty(sum(sizes), dtype=torch.int32, device="cpu", pin_memory=tables.device.type == "cuda")
    node, row, grows, pages = staged.split_with_sizes(sizes)
    node, row = node.view(7, nodes), row.view(2, rows)
    node[:, :n] = plan.nodes
    for name, rest in ((PARENT, -1), (LENGTH, 0), (POSITION, 0), (PAGE_BEGIN, 0)):
        node[name, n:] = rest
    node[OWN_BEGIN : ROWS_END + 1, n:] = rows
    # The rows that the tree does not use: those of an empty root, so that their positions are 0, 1, ...
    node[OWN_BEGIN, n], node[POSITION, n] = r, rows - r
    row[:, :r] = plan.rows
    torch.arange(r, rows, dtype=torch.int32, out=row[0, r:])
    row[1, r:] = n
    grows[:n], grows[n:] = plan.grows, 0
    if there:
        tables[len(staged) : len(staged) + plan.pages.numel()].copy_(plan.pages)
    else:
        pages.copy_(plan.pages)
    tables[: len(staged)].copy_(staged, non_blocking=True)
    return staged


def host_tables(staged: torch.Tensor, room: Room) -> tuple[torch.Tensor, torch.Tensor]:
    """TreePlan.host of a plan on a device."""
    nodes, rows = room.nodes + 1, room.rows
    return staged[: 7 * nodes].view(7, nodes), staged[7 * nodes + 2 * rows : 8 * nodes + 2 * rows]
