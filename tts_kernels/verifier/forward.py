"""Tokens of tree nodes through a model, in forwards of bounded size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tts_kernels.tree.kv_tree import OutOfPages
from tts_kernels.tree.pack import PackedTree

if TYPE_CHECKING:
    from tts_kernels.integrations.transformers_tree import TreeModel


def forwards(
    model: TreeModel, pieces: Iterable[tuple[int, Tensor]], size: int, reclaim: Callable[[], None] = lambda: None
) -> Iterator[tuple[int, Tensor]]:
    """Appends the tokens of each piece, (node, ids [t]), to its node and runs them through the model, parents before
    children. Yields (first, hidden states [R, d]): of the pieces' tokens, one behind the other, first to first + R, at
    most `size` at a time.

    A piece may be cut between forwards. `reclaim` is called after each one, to release what is not needed any more.
    Raises OutOfPages where the next token has no room though nothing waits to be run.
    """
    kv, first = model.kv, 0
    rows: dict[int, int] = {}
    ids: list[Tensor] = []
    count = 0
    for node, tokens in pieces:
        while len(tokens):
            take = min(len(tokens), size - count, kv.room(node))
            if take:
                kv.append(node, take)
                rows[node] = rows.get(node, 0) + take
                ids.append(tokens[:take])
                tokens = tokens[take:]
                count += take
            elif count:
                yield first, model.forward(rows, torch.cat(ids))
                rows, ids, first, count = {}, [], first + count, 0
                reclaim()
            else:
                raise OutOfPages(f"no room for more tokens: {kv.free_pages} of {kv.num_pages} pages are free")
    if count:
        yield first, model.forward(rows, torch.cat(ids))


def gather(states: Iterable[tuple[int, Tensor]], rows: Tensor, into: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Hands on what `forwards` yields, and puts the hidden states of these ascending rows into a list as they pass."""
    borders, done = rows.tolist(), 0
    for first, hidden in states:
        begin, done = done, bisect_left(borders, first + len(hidden), done)
        into.append(hidden[rows[begin:done].to(hidden.device) - first])
        yield first, hidden


def packed_forwards(model: TreeModel, packed: PackedTree, size: int) -> Iterator[tuple[int, Tensor]]:
    """The packed tokens through the model, in their order, as `forwards` does.

    A node's KV is released as soon as nothing below it is left to be run, so the tree holds one path and the tokens of
    one forward at most; when this generator ends, nothing.
    """
    kv = model.kv
    handles: dict[int, int] = {}  # of the nodes that hold KV
    path: list[int] = []
    done: list[int] = []

    def pieces() -> Iterator[tuple[int, Tensor]]:
        for node, (parent, tokens) in enumerate(zip(packed.parent, packed.tokens.split(packed.length))):
            while path and path[-1] != parent:
                done.append(path.pop())
            path.append(node)
            handles[node] = kv.add(handles[parent] if parent >= 0 else None, 0)
            yield handles[node], tokens

    def reclaim() -> None:
        kv.release([handles.pop(node) for node in done])
        done.clear()

    try:
        yield from forwards(model, pieces(), size, reclaim)
    finally:
        kv.release(list(handles.values()))
