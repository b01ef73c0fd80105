"""What a backend says of a tree_attention call that it would run: the brick between the backends and explain.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkCounts:
    """At the lengths that the plan's nodes have now. Window and causal masks are not regarded: a kernel that skips what
    they hide does less.

    config      how: code path, threads, tile sizes and where they are from
    work_items  reference: blocks of rows of a node; cpu: items that threads take; triton: programs of the tile kernel
                that have a chunk to work on (one for each item of the work list and KV head; the launch also has
                programs for chunks that growing nodes may come to have)
    launches    of kernels; None where there is no such notion
    kv_loads    (token, KV head) pairs whose K and V are loaded from the caches, every load counted: two items that read
                the same chunk count it twice. What an item, once it has them, reads again is not counted
    states      fp32 partial states (row, query head) of head_dim + 2 numbers, written to memory once and read back
    flops       of the two products, q k^T and p v, as they are issued: with the padding of their tiles
    """

    config: str
    work_items: int
    launches: int | None
    kv_loads: int
    states: int
    flops: int
