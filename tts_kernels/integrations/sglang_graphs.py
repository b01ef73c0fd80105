"""Plans for SGLang's decode graphs: tables of one size, written before each replay. Nothing here needs SGLang."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..tree.plan import TreePlan
from ..tree.room import PlanWithRoom, Room, plan_with_room

DEPTH = 8  # of Room: what requests share deeper is read by each of them


class GraphPlans:
    """A plan for each batch size that is captured. One graph is replayed at a time, so that all of them lie in the same
    memory, and the partial states of their calls too: a plan is written before each replay of its graph."""

    def __init__(
        self,
        max_batch_size: int,
        pages: int,
        page_size: int,
        device: torch.device | str,
        attend: Callable[[PlanWithRoom], None],
    ) -> None:
        """
        Args:
            pages: of the longest request that there can be.
            attend: makes a call of each geometry with a plan.
        """
        self.pages, self.page_size, self.attend = pages, page_size, attend
        with torch.inference_mode(False):  # else it could not be written outside of inference mode
            size = self._room(max_batch_size).table_size
            self.memory = torch.zeros(size, dtype=torch.int32, device=device)
        self.plans: dict[int, PlanWithRoom] = {}
        self.scratch: dict[tuple, Tensor] = {}  # of the largest batch so far, by geometry

    def plan_for(self, batch_size: int) -> PlanWithRoom:
        """The plan of this batch size, to be written now: it says nothing of the requests yet, and the other plans no
        longer say anything. A new one gets its work lists, which a capture could not make."""
        if batch_size not in self.plans:
            # As good as any: a token for each request, in page 0.
            tree = [-1] * batch_size, [1] * batch_size, [[0]] * batch_size, [1] * batch_size
            plan = TreePlan.from_nodes(*tree, page_size=self.page_size)
            plan = plan_with_room(plan, self._room(batch_size), self.memory.device, self.memory)
            self.attend(plan)
            self._share_scratch(plan)
            self.plans[batch_size] = plan
        plan = self.plans[batch_size]
        for (num_q_heads, _, head_dim, *_), work in plan.works.items():
            # The counters, which are 0 between calls: those of another size hold states of this one's calls.
            work.scratch[work.num_states * num_q_heads * (head_dim + 2) :].zero_()
        return plan

    def _room(self, batch_size: int) -> Room:
        return Room(2 * batch_size, batch_size, batch_size * self.pages, DEPTH)

    def _share_scratch(self, plan: PlanWithRoom) -> None:
        for key, work in plan.works.items():
            size = work.scratch.numel()
            if key not in self.scratch or self.scratch[key].numel() < size:
                self.scratch[key] = work.scratch
            plan.works[key] = dataclasses.replace(work, scratch=self.scratch[key][:size])
