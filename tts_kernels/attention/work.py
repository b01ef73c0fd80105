"""The work list of a tree on a GPU: what the tile programs do, and where each row's partial states lie.

It depends on the plan's nodes, on the heads and on a config, never on the lengths of the moment: nodes that can grow
have items for all the chunks that they may come to have, and the kernels read the lengths. So it stays valid under
`advance_` and inside a captured graph, and is kept with the plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tts_kernels.configs import TreeConfig
from tts_kernels.tree.plan import LENGTH, OWN_BEGIN, OWN_END, PARENT, ROWS_END, TreePlan, int_tensor


@dataclass(frozen=True)
class Work:
    """table    int32 [4 * num_items + num_nodes + num_rows], one behind the other:
                items: node, first packed row, chunk, 1 for a wide tile. Longest first; the tiles of one chunk side by
                side, since they read the same KV
                for each node, the chunks of its strict ancestors
                for each row (depth-first), its first state. The states of a row are those of its path, root first: as
                many as the chunks of its ancestors, then its own node's
    scratch  fp32 [num_states * Hq * (head_dim + 2)]: o of each state and query head, then its m and sum of weights. A
             call writes what it reads; calls on two streams at a time need two plans
    """

    config: TreeConfig
    table: Tensor
    scratch: Tensor
    num_items: int
    num_states: int

    @property
    def tile(self) -> list[int]:
        """The config as the registered op takes it."""
        c = self.config
        return [c.wide_rows, c.wide_tokens, c.narrow_rows, c.narrow_tokens, c.min_chunk, c.max_chunks, c.num_warps,
                c.num_stages]  # fmt: skip


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


def make_work(plan: TreePlan, num_q_heads: int, num_kv_heads: int, head_dim: int, config: TreeConfig) -> Work:
    """Reads the plan's tables on the host, where the plan keeps a copy."""
    nodes, grows, spare = plan.host_tables()
    group = num_q_heads // num_kv_heads
    lists = work_lists(nodes, grows, spare, group, config)
    most = None
    if plan.most_tokens is not None:
        most = most_work(plan, group, config)
    return work_of_lists(lists, num_q_heads, head_dim, config, plan.device, most)


def refresh(works: dict, plan: TreePlan) -> None:
    """Makes the work lists of another plan with as many nodes and rows, made with room for it, those of `plan`: in
    place, so that a captured graph reads them."""
    nodes, grows, spare = plan.host_tables()
    for (num_q_heads, num_kv_heads, *_), work in works.items():
        lists = work_lists(nodes, grows, spare, num_q_heads // num_kv_heads, work.config)
        work.table.copy_(table_of_lists(lists, work.num_items, work.config))


@dataclass(frozen=True)
class Lists:
    items: list[int]
    above: list[int]
    first_state: list[int]
    num_states: int


def work_lists(
    nodes: list[list[int]],  # [7][num_nodes]
    grows: list[int],
    spare: int,  # tokens by which growing nodes may be longer than LENGTH says
    group: int,
    config: TreeConfig,
) -> Lists:
    parents, lengths, begins, own_ends, ends = (nodes[i] for i in (PARENT, LENGTH, OWN_BEGIN, OWN_END, ROWS_END))
    own_rows = [end - begin for begin, end in zip(begins, own_ends)]
    most = [most_chunks(count, group, config) for count in own_rows]
    chunks = [chunks_within(length, spare * grow, m, config) for length, grow, m in zip(lengths, grows, most)]
    above: list[int] = []  # chunks of the strict ancestors; parents come first
    for parent in parents:
        above.append(above[parent] + chunks[parent] if parent >= 0 else 0)

    first_state: list[int] = []
    num_states = 0
    for node in range(len(parents)):
        states = above[node] + chunks[node]
        first_state += [num_states + states * j for j in range(own_rows[node])]
        num_states += states * own_rows[node]

    # By the tokens of a chunk, longest first; the sort is stable, so that the tiles of a chunk stay together.
    order = sorted(range(len(parents)), key=lambda n: -min(lengths[n], chunk_tokens(lengths[n], most[n], config)))
    items: list[int] = []
    for node in order:
        packed = (ends[node] - begins[node]) * group
        wide = int(not config.narrow_rows or packed > config.narrow_rows)
        tiles = range(0, packed, config.wide_rows if wide else config.narrow_rows)
        for chunk in range(chunks[node]):
            for first in tiles:
                items += (node, first, chunk, wide)
    return Lists(items, above, first_state, num_states)


def most_work(plan: TreePlan, group: int, config: TreeConfig) -> tuple[int, int]:
    """(items, states) of any tree of as many nodes and rows, as deep, with at most plan.most_tokens tokens."""
    packed = plan.num_rows * group
    chunks = plan.most_tokens // config.min_chunk + plan.num_nodes  # each node rounds up by less than one
    tiles = plan.depth * (packed // config.wide_rows) + plan.num_nodes  # the last of a node; a narrow node has one
    num_items = min(chunks * -(-packed // config.wide_rows), tiles * config.max_chunks)
    path = min(plan.depth * config.max_chunks, plan.most_tokens // config.min_chunk + plan.depth)
    return num_items, plan.num_rows * path


def work_of_lists(
    lists: Lists,
    num_q_heads: int,
    head_dim: int,
    config: TreeConfig,
    device: torch.device,
    most: tuple[int, int] | None = None,
) -> Work:
    num_items, num_states = most or (len(lists.items) // 4, lists.num_states)
    with torch.inference_mode(False):  # else it could not be used outside of inference mode
        table = table_of_lists(lists, num_items, config).to(device)
        scratch = torch.empty(num_states * num_q_heads * (head_dim + 2), dtype=torch.float32, device=device)
    return Work(config, table, scratch, num_items, num_states)


def table_of_lists(lists: Lists, num_items: int, config: TreeConfig) -> Tensor:
    """On the CPU. Items beyond those there are name a chunk that no node has."""
    none = (0, 0, config.max_chunks, 0)
    padding = none * (num_items - len(lists.items) // 4)
    return int_tensor([*lists.items, *padding, *lists.above, *lists.first_state])
