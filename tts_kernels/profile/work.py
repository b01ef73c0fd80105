"""What an attention call sees and reads, whoever makes it: the counts that parts are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from tts_kernels.cost.account import triangle
from tts_kernels.tree.plan import LENGTH, OWN_BEGIN, OWN_END, POSITION, ROWS_END, TreePlan


@dataclass
class Work:
    """Of one attention call: runs of tokens as (position of the first, how many, how often).

    rows   query tokens; one at position x sees x + 1 keys
    reads  keys that are read
    """

    rows: list[tuple[int, int, int]]
    reads: list[tuple[int, int, int]]

    @classmethod
    def of_plan(cls, plan: TreePlan) -> Work:
        """At the lengths of the moment, without asking the device: every node once for all rows in and below it."""
        nodes, grows, _ = plan.host_tables()
        more = 0 if plan.device.type == "cpu" else plan.advanced  # on the CPU the host's tables are the plan's
        work = cls([], [])
        for node, grow in zip(zip(*nodes), grows):
            position, length, rows = node[POSITION], node[LENGTH] + more * grow, node[OWN_END] - node[OWN_BEGIN]
            if rows:
                work.rows.append((position + length - rows, rows, 1))
            if node[ROWS_END] > node[OWN_BEGIN]:
                work.reads.append((position, length, 1))
        return work

    @property
    def num_rows(self) -> int:
        return sum(count * times for _, count, times in self.rows)

    @property
    def pairs(self) -> int:
        """Of a row and a key that it sees."""
        return sum((count * first + triangle(count)) * times for first, count, times in self.rows)

    def below(self, border: int) -> Work:
        """The same of rows and keys at positions below the border."""
        cut = ([(f, min(c, border - f), t) for f, c, t in runs if f < border] for runs in (self.rows, self.reads))
        return Work(*cut)

    @property
    def tokens_read(self) -> int:
        return sum(count * times for _, count, times in self.reads)


@dataclass
class Forward:
    """What the layers of one forward were seen to do. kappa: KV bytes of a token; flops: of a row and a key."""

    seen: TreePlan | Work | None = None
    kappa: int = 0
    flops: int = 0
    attention_seconds: float = 0.0

    def see(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if self.seen is None:
            layer, (batch, _, rows, _), keys = getattr(key, "tts_kernels_layer", None), query.shape, key.shape[2]
            self.seen = layer.tree.plan if layer else Work([(keys - rows, rows, batch)], [(0, keys, batch)])
        self.kappa += (key.shape[1] * key.shape[3] + value.shape[1] * value.shape[3]) * key.element_size()
        self.flops += 2 * query.shape[1] * (key.shape[3] + value.shape[3])

    @property
    def work(self) -> Work:
        return Work.of_plan(self.seen) if isinstance(self.seen, TreePlan) else self.seen


def matrices(decoder: torch.nn.Module) -> tuple[int, int]:
    """(elements, bytes) of the matrices of the layers."""
    weights = [module.weight for module in decoder.modules() if isinstance(module, torch.nn.Linear)]
    return sum(w.numel() for w in weights), sum(w.nbytes for w in weights)


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences)))
