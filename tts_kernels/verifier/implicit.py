"""Implicit process rewards: how much likelier the trained model finds a response's tokens than its reference does.

    reward of a step = sum over the response tokens up to the step's end of beta * (log p_model - log p_reference)

(Yuan et al., Free Process Rewards without Process Labels, 2024; EurusPRM). The logits are never stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tts_kernels.scoring import token_logprobs
from tts_kernels.tree.pack import PackedTree, pack

from .forward import packed_forwards
from .recipe import Encoded

if TYPE_CHECKING:
    from tts_kernels.integrations.transformers_tree import TreeModel


@dataclass(frozen=True)
class ImplicitHead:
    """What takes a score head's place: the whole LM heads of both models, [V, d] each, and beta."""

    weight: Tensor
    reference_weight: Tensor
    beta: float

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.reference_weight

    def ratio(self, logprobs: Sequence[Tensor]) -> Tensor:
        """beta * (log p_model - log p_reference), fp64."""
        model, reference = logprobs
        return self.beta * (model.double() - reference.double())


def pack_responses(sequences: Sequence[Encoded], device: torch.device) -> PackedTree:
    """Packed so that the "steps" of a candidate are all its response tokens, behind the token in front of them."""
    ends = [range(s.response - 1, len(s.ids)) for s in sequences]
    return pack([s.ids for s in sequences], step_ends=ends, device=device)


def packed_rewards(
    models: Sequence[TreeModel],
    head: ImplicitHead,
    packed: PackedTree,
    sequences: Sequence[Encoded],
    size: int,
    backend: str | None,
) -> Tensor:
    """[M] fp32, the reward of every step of all `sequences`, which `packed` holds as `pack_responses` packs them."""
    step_rows = packed.step_rows.cpu()
    previous = torch.full((len(packed.tokens),), -1)  # of each response token, on the CPU
    tokens = [step_rows[a:b] for a, b in pairwise(packed.offsets.tolist())]
    for rows in tokens:
        previous[rows[1:]] = rows[:-1]
    rows = (previous >= 0).nonzero()[:, 0]
    logprobs = []
    for model, weight in zip(models, head.weights):
        with model.switched(), closing(packed_forwards(model, packed, size)) as stream:
            logprobs.append(row_logprobs(weight, packed.tokens, rows, previous[rows], stream, backend))
    ratio = torch.zeros(len(previous), dtype=torch.float64)
    ratio[rows] = head.ratio(logprobs).cpu()
    sums = [ratio[rows[1:]].cumsum(0) for rows in tokens]
    at = [torch.tensor(s.positions, dtype=torch.int64) - s.response for s in sequences]
    return torch.cat([of_one[steps] for of_one, steps in zip(sums, at)] or [ratio[:0]]).float().to(packed.tokens.device)


def row_logprobs(
    weight: Tensor,
    tokens: Tensor,
    rows: Tensor,
    before: Tensor,
    states: Iterable[tuple[int, Tensor]],
    backend: str | None,
    known: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """log p(tokens[row] | its path), fp32, for ascending `rows` whose predecessors are `before`; `states` yields hidden
    states as `forwards` does. Of those only what a later forward needs is kept. `known` has the hidden states of
    predecessors that do not come by, under negative numbers."""
    kept = torch.tensor(sorted(known or {}), dtype=torch.int64)
    kept_states = torch.stack([known[r] for r in kept.tolist()]) if known else None
    logprobs, done = [], 0
    for first, hidden in states:
        end = first + len(hidden)
        stop = int(torch.searchsorted(rows, end))
        pool = hidden if kept_states is None else torch.cat([kept_states, hidden])
        if stop > done:
            source = pool[places(before[done:stop], kept, first).to(pool.device)]
            targets = tokens[rows[done:stop].to(tokens.device)]
            logprobs.append(token_logprobs(source, weight, targets, backend=backend))
        later = before[stop:]
        needed = later[later < end].unique()
        kept_states, kept, done = pool[places(needed, kept, first).to(pool.device)], needed, stop
    return torch.cat(logprobs) if logprobs else torch.empty(0, device=tokens.device)


def places(rows: Tensor, kept: Tensor, first: int) -> Tensor:
    """Of these rows among those that were kept, ascending, and those from `first` on behind them."""
    return torch.where(rows < first, torch.searchsorted(kept, rows), rows - first + len(kept))
