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
from tts_kernels.tree.plan import LENGTH, OWN_BEGIN, PARENT, ROWS_END, TreePlan, int_tensor


@dataclass(frozen=True)
class Work:
    """items   int32 [num_items, 4]: node, first packed row, chunk, 1 for a wide tile. Longest first; the tiles of one
            chunk side by side, since they read the same KV.
    table   int32 [4 * num_items + num_nodes + num_rows]: items; for each node, the chunks of its strict ancestors; for
            each row (depth-first), its first state. The states of a row are those of its path, root first: as many as
            the chunks of its ancestors, then its own node's.
    scratch fp32 [num_states * Hq * (head_dim + 2)]: o of each state and query head, then its m and l
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


def chunk_tokens(length: int, config: TreeConfig) -> int:
    """Tokens per chunk of a node, by its length alone."""
    blocks = -(-length // config.max_chunks)
    return max(-(-blocks // config.min_chunk), 1) * config.min_chunk


def num_chunks(length: int, config: TreeConfig) -> int:
    return -(-length // chunk_tokens(length, config))


def most_chunks(length: int, spare: int, config: TreeConfig) -> int:
    """Of a node whose length may become anything from `length` to `length + spare`."""
    if spare == 0:
        return num_chunks(length, config)
    return min(config.max_chunks, -(-(length + spare) // config.min_chunk))


def make_work(plan: TreePlan, num_q_heads: int, num_kv_heads: int, head_dim: int, config: TreeConfig) -> Work:
    """Reads the plan's tables on the host, where the plan keeps a copy."""
    nodes, grows, spare = plan.host_tables()
    return work_of_nodes(nodes, grows, spare, plan.num_rows, num_q_heads, num_kv_heads, head_dim, config, plan.device)


def work_of_nodes(
    nodes: list[list[int]],  # [7][num_nodes]
    grows: list[int],
    spare: int,  # tokens by which growing nodes may be longer than LENGTH says
    num_rows: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    config: TreeConfig,
    device: torch.device,
) -> Work:
    group = num_q_heads // num_kv_heads
    parents, lengths, begins, ends = (nodes[i] for i in (PARENT, LENGTH, OWN_BEGIN, ROWS_END))
    chunks = [most_chunks(length, spare * grow, config) for length, grow in zip(lengths, grows)]
    above: list[int] = []  # chunks of the strict ancestors; parents come first
    for parent in parents:
        above.append(above[parent] + chunks[parent] if parent >= 0 else 0)

    first_state: list[int] = []
    num_states = 0
    for node, count in enumerate(own_rows(nodes)):
        for _ in range(count):
            first_state.append(num_states)
            num_states += above[node] + chunks[node]

    # (cost, node) of each chunk; a sort by cost keeps the tiles of a chunk together.
    order = sorted(range(len(parents)), key=lambda n: -min(lengths[n], chunk_tokens(lengths[n], config)))
    items: list[int] = []
    for node in order:
        packed = (ends[node] - begins[node]) * group
        wide = int(packed > config.narrow_rows)
        for chunk in range(chunks[node]):
            for first in range(0, packed, config.wide_rows if wide else config.narrow_rows):
                items += (node, first, chunk, wide)
    with torch.inference_mode(False):
        table = int_tensor([*items, *above, *first_state]).to(device)
        scratch = torch.empty(num_states * num_q_heads * (head_dim + 2), dtype=torch.float32, device=device)
    return Work(config, table, scratch, len(items) // 4, num_states)


def own_rows(nodes: list[list[int]]) -> list[int]:
    return [end - begin for begin, end in zip(nodes[OWN_BEGIN], nodes[OWN_BEGIN + 1])]
