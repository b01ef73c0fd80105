"""The nodes of a session, and in which order their keys and values are let go of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from torch import Tensor


@dataclass(eq=False)
class Node:
    """A step: its tokens stand behind those of its parent. A root is a question."""

    parent: int  # handle, -1 for a root
    step: str  # of a root, the question
    ids: list[int]
    length: int  # tokens from the beginning of the path to the end of the step
    under: int | None  # the node whose KV this one's follows; None: it begins anew
    response: int  # index of the first of `ids` that belongs to the answer
    margin: float | None = None  # the step's score before activation; None for a root, and until it was encoded
    kv: list[int] | None = None  # handles in the KV trees, one for each model; None: not there
    states: list[Tensor] | None = None  # of implicit rewards alone: the last hidden state of each model
    children: dict[str, int] = field(default_factory=dict)  # by step
    holds: int = 0
    used: int = 0  # when it was last read
    stub: list[int] | None = None  # ids of its step alone behind an empty question, which its children's begin with


def below_first(
    nodes: Mapping[int, Node], kept: Collection[int], order: Callable[[int], tuple[int, ...]]
) -> Iterator[int]:
    """Nodes with KV whose KV can be let go of, but those that are `kept`: no node before those whose KV stands on its
    own, and else by `order`. A root without tokens stays: nothing could bring it back."""
    going = {n for n, r in nodes.items() if r.kv and (r.parent >= 0 or r.ids) and n not in kept}
    standing = Counter(record.under for record in nodes.values() if record.kv)  # on each node
    ready = [(order(node), node) for node in going if not standing[node]]
    heapify(ready)
    while ready:
        node = heappop(ready)[1]
        yield node
        under = nodes[node].under
        standing[under] -= 1
        if under in going and not standing[under]:
            heappush(ready, (order(under), under))
