"""The work list of a tree on a GPU: what the tile programs do, and where each row's partial states lie.

It depends on the plan's nodes, on the heads and on a config, never on the lengths of the moment: nodes that can grow
have items for all the chunks that they may come to have, and the kernels read the lengths. So it stays valid under
`advance_` and inside a captured graph, and is kept with the plan.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tts_kernels import nvidia
from tts_kernels.configs import TreeConfig
from tts_kernels.dispatch import Checked
from tts_kernels.tree.plan import LENGTH, OWN_BEGIN, OWN_END, PARENT, ROWS_END, TreePlan, int_tensor

NARROW, WIDE, TALL = range(3)  # an item's tile
WITH_WORK_LISTS = ("triton", "cuda")  # that have lists, each its own


@dataclass(frozen=True)
class Work:
    """table    int32 [4 * num_items + num_nodes + num_rows + 1], one behind the other:
                items: node, first packed row, chunk, tile. Longest first; the tiles of one chunk side by side, since
                they read the same KV. Those beyond the last that there is name a chunk that no node has
                for each node, the chunks of its strict ancestors
                for each row (depth-first), its first state. The states of a row are those of its path, root first: as
                many as the chunks of its ancestors, then its own node's
                how many items there are
    scratch  fp32 [num_states * Hq * (head_dim + 2)]: o of each state and query head, then its m and sum of weights. A
             call writes what it reads; calls on two streams at a time need two plans. Behind them, for kernels that
             merge as they go, a counter for each row and query head, 0 between calls
    """

    config: TreeConfig
    table: Tensor
    scratch: Tensor
    num_items: int
    num_states: int
    group: int
    calls: Checked = field(default_factory=Checked, init=False, repr=False, compare=False)  # what backends keep of them

    @functools.cached_property
    def tile(self) -> list[int]:
        """The config as the registered op takes it."""
        c = self.config
        return [c.wide_rows, c.wide_tokens, c.narrow_rows, c.narrow_tokens, c.min_chunk, c.max_chunks, c.num_warps,
                c.num_stages, c.tall_rows, c.warpgroups]  # fmt: skip

    def refresh(self, plan: TreePlan) -> None:
        """Makes the list that of the plan's tables as they are now, in place, without waiting for the device. The plan
        has as many nodes and rows as before, and the list was made with room for it."""
        lists = work_lists(*plan.host_tables(), self.group, self.config)
        table = table_of_lists(lists, self.num_items, self.config)
        if self.table.device.type == "cuda":
            table = table.pin_memory()
        self.table.copy_(table, non_blocking=True)


def key_of(q: Tensor, k_cache: Tensor, backend: str) -> tuple:
    """Of a list in TreePlan.works."""
    return q.shape[1], k_cache.shape[2], q.shape[2], q.dtype, k_cache.dtype, backend


def argument(work: Work, backend: str) -> tuple[Tensor, Tensor, list[int]]:
    """The list as the registered op takes it: table, scratch, and the config's numbers with that of the backend."""
    return work.table, work.scratch, [*work.tile, WITH_WORK_LISTS.index(backend)]


def work_of_call(
    given: tuple[Tensor | None, Tensor | None, list[int]],
    backend: str,
    nodes: Tensor,
    q: Tensor,
    k_cache: Tensor,
    config_of: Callable[[Tensor, Tensor], TreeConfig],
    num_counters: int = 0,
) -> Work:
    """The list that came with the registered op, if it is one of this backend's. Else the call came without the plan's,
    from a compiled function that was traced before the plan had one: a list that is made here, from nodes that are read
    back from the device."""
    table, scratch, numbers = given
    num_rows, num_q_heads, head_dim = q.shape
    group = num_q_heads // k_cache.shape[2]
    if table is not None and numbers[-1] == WITH_WORK_LISTS.index(backend):
        num_items = (table.numel() - nodes.shape[1] - num_rows - 1) // 4
        num_states = (scratch.numel() - num_counters) // (num_q_heads * (head_dim + 2))
        return Work(_config(*numbers[:-1]), table, scratch, num_items, num_states, group)
    refuse_capture(q)
    warnings.warn(
        "a compiled tree_attention without a work list makes one in every call and waits for the device: call "
        "tree_attention once outside of torch.compile for each plan",
        stacklevel=2,
    )
    config = config_of(q, k_cache)
    lists = work_lists(nodes.tolist(), [0] * nodes.shape[1], 0, group, config)
    return work_of_lists(lists, num_q_heads, k_cache.shape[2], head_dim, config, q.device, num_counters=num_counters)


_config = functools.lru_cache(maxsize=1024)(TreeConfig)


def refuse_capture(q: Tensor) -> None:
    if nvidia.captures(q.device):
        raise RuntimeError(
            "plan: expected one that has been used once with these shapes before a CUDA graph is captured (the first "
            "call makes its work list), got one that has not"
        )


def most_chunks(own_rows: int, group: int, config: TreeConfig) -> int:
    """Of a node, by its own rows: where they fill many tiles, they fill the GPU without chunks, and each chunk would
    cost each of them a state."""
    return max(config.max_chunks // max(-(-own_rows * group // config.wide_rows), 1), 1)


def chunk_tokens(length: int, most: int, config: TreeConfig) -> int:
    """Tokens per chunk of a node that is cut into at most `most`."""
    tokens = -(-length // most)
    return max(-(-tokens // config.min_chunk), 1) * config.min_chunk


def num_chunks(length: int, most: int, config: TreeConfig) -> int:
    return -(-length // chunk_tokens(length, most, config))


def chunks_within(length: int, spare: int, most: int, config: TreeConfig) -> int:
    """The most chunks of a node whose length may become anything from `length` to `length + spare`."""
    if spare == 0:
        return num_chunks(length, most, config)
    return min(most, -(-(length + spare) // config.min_chunk))


def num_tiles(packed: int, config: TreeConfig) -> int:
    """Of a node with so many packed rows: only the last may be smaller than the largest."""
    return -(-packed // (config.tall_rows or config.wide_rows))


def tiles(packed: int, config: TreeConfig) -> list[tuple[int, int]]:
    """(first packed row, which) of each tile. Where there are tall ones, the last is as small as will do; else all of a
    node's are the same."""
    if not config.tall_rows:
        if packed <= config.narrow_rows:
            return [(0, NARROW)] if packed else []
        return [(first, WIDE) for first in range(0, packed, config.wide_rows)]
    found = [(first, TALL) for first in range(0, packed, config.tall_rows)]
    if found and packed - found[-1][0] <= config.wide_rows:
        first = found[-1][0]
        found[-1] = first, WIDE if packed - first > config.narrow_rows else NARROW
    return found


def make_work(plan: TreePlan, num_q_heads: int, num_kv_heads: int, head_dim: int, config: TreeConfig) -> Work:
    """Reads the plan's tables on the host, where the plan keeps a copy."""
    group = num_q_heads // num_kv_heads
    lists = work_lists(*plan.host_tables(), group, config)
    most = None
    if plan.most_tokens is not None:
        most = most_work(plan, group, config)
    return work_of_lists(lists, num_q_heads, num_kv_heads, head_dim, config, plan.device, most)


def refresh(works: dict, plan: TreePlan) -> None:
    for work in works.values():
        work.refresh(plan)


@dataclass(frozen=True)
class Lists:
    items: list[int]
    above: list[int]
    first_state: list[int]
    num_states: int


def node_chunks(
    nodes: list[list[int]], grows: list[int], spare: int, group: int, config: TreeConfig
) -> tuple[list[int], list[int], list[int]]:
    """Of each node: the most chunks by its own rows, the chunks that it may come to have, those of its ancestors."""
    parents, lengths, begins, own_ends = (nodes[i] for i in (PARENT, LENGTH, OWN_BEGIN, OWN_END))
    most = [most_chunks(end - begin, group, config) for begin, end in zip(begins, own_ends)]
    chunks = [chunks_within(length, spare * grow, m, config) for length, grow, m in zip(lengths, grows, most)]
    above: list[int] = []  # parents come first
    for parent in parents:
        above.append(above[parent] + chunks[parent] if parent >= 0 else 0)
    return most, chunks, above


def work_lists(
    nodes: list[list[int]],  # [7][num_nodes]
    grows: list[int],
    spare: int,  # tokens by which growing nodes may be longer than LENGTH says
    group: int,
    config: TreeConfig,
) -> Lists:
    lengths, begins, own_ends, ends = (nodes[i] for i in (LENGTH, OWN_BEGIN, OWN_END, ROWS_END))
    most, chunks, above = node_chunks(nodes, grows, spare, group, config)
    first_state: list[int] = []
    num_states = 0
    for node, (begin, end) in enumerate(zip(begins, own_ends)):
        states = above[node] + chunks[node]
        first_state += [num_states + states * j for j in range(end - begin)]
        num_states += states * (end - begin)

    # By the tokens of a chunk, longest first; the sort is stable, so that the tiles of a chunk stay together.
    order = sorted(range(len(lengths)), key=lambda n: -min(lengths[n], chunk_tokens(lengths[n], most[n], config)))
    items: list[int] = []
    for node in order:
        of_chunk = tiles((ends[node] - begins[node]) * group, config)
        for chunk in range(chunks[node]):
            for first, tile in of_chunk:
                items += (node, first, chunk, tile)
    return Lists(items, above, first_state, num_states)


def work_size(nodes: list[list[int]], grows: list[int], spare: int, group: int, config: TreeConfig) -> tuple[int, int]:
    """(items, states) of work_lists, without making them."""
    begins, own_ends, ends = (nodes[i] for i in (OWN_BEGIN, OWN_END, ROWS_END))
    _, chunks, above = node_chunks(nodes, grows, spare, group, config)
    num_items = sum(c * num_tiles((e - b) * group, config) for c, b, e in zip(chunks, begins, ends))
    return num_items, sum((a + c) * (e - b) for a, c, b, e in zip(above, chunks, begins, own_ends))


def most_work(plan: TreePlan, group: int, config: TreeConfig) -> tuple[int, int]:
    """(items, states) of any tree of as many nodes and rows, as deep, with at most plan.most_tokens tokens."""
    packed = plan.num_rows * group
    chunks = plan.most_tokens // config.min_chunk + plan.num_nodes  # each node rounds up by less than one
    # Whole tiles of a path's nodes, and the last of each node; a narrow node has one.
    most = plan.depth * (packed // (config.tall_rows or config.wide_rows)) + plan.num_nodes
    num_items = min(chunks * num_tiles(packed, config), most * config.max_chunks)
    path = min(plan.depth * config.max_chunks, plan.most_tokens // config.min_chunk + plan.depth)
    return num_items, plan.num_rows * path


def work_of_lists(
    lists: Lists,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    config: TreeConfig,
    device: torch.device,
    most: tuple[int, int] | None = None,
    num_counters: int = 0,
) -> Work:
    num_items, num_states = most or (len(lists.items) // 4, lists.num_states)
    with torch.inference_mode(False):  # else it could not be used outside of inference mode
        table = table_of_lists(lists, num_items, config).to(device)
        numbers = num_states * num_q_heads * (head_dim + 2)
        scratch = torch.empty(numbers + num_counters, dtype=torch.float32, device=device)
        scratch[numbers:].zero_()
    return Work(config, table, scratch, num_items, num_states, num_q_heads // num_kv_heads)


def table_of_lists(lists: Lists, num_items: int, config: TreeConfig) -> Tensor:
    """On the CPU."""
    live = len(lists.items) // 4
    padding = (0, 0, config.max_chunks, 0) * (num_items - live)
    return int_tensor([*lists.items, *padding, *lists.above, *lists.first_state, live])
