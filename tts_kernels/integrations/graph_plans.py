"""Plans for the CUDA graphs of decode batches that an engine captures. Nothing here needs an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..attention.work import Work
from ..tree.plan import TreePlan
from ..tree.room import PlanWithRoom, Room, plan_with_room

# Nodes on a request's path: prompts of a system, of a question, of a turn, and its own tokens. What requests share
# deeper is read by each of them. Partial states take memory for all of it, beside an engine's own that is given away
# already: 270 MB for 256 requests with 32 heads of 128 (8 of KV), and as much again for twice the depth.
DEPTH = 4


class GraphPlans:
    """A plan with room for each number of requests that a graph is captured for, a token each.

    One graph runs at a time, and its plan is written before: all of them lie in the memory of the largest so far, and
    the partial states of their calls too. Engines capture the largest first; what is captured before a larger one goes
    on in the memory that it has.
    """

    def __init__(
        self, page_size: int, device: torch.device | str, make_works: Callable[[PlanWithRoom], object]
    ) -> None:
        """make_works: makes the work lists of a plan, which a capture could not, for each geometry of its calls."""
        self.page_size, self.device, self.make_works = page_size, torch.device(device), make_works
        self.plans: dict[int, PlanWithRoom] = {}  # by the number of requests
        self.memory = torch.empty(0, dtype=torch.int32, device=device)  # of the tables
        self.largest: dict[tuple, Work] = {}  # whose scratch the others use, by geometry

    def plan_for(self, num_requests: int, pages: int, causal: bool = True) -> PlanWithRoom:
        """The plan of so many requests, to be written now: the other plans no longer say anything. A new one says
        nothing of the requests, and has room for any with `pages` pages each."""
        if num_requests not in self.plans:
            # As good as any: a token for each request, in page 0.
            tree = [-1] * num_requests, [1] * num_requests, [[0]] * num_requests, [1] * num_requests
            plan = TreePlan.from_nodes(*tree, page_size=self.page_size, causal=causal)
            room = Room(2 * num_requests, num_requests, num_requests * pages, DEPTH)
            if self.memory.numel() < room.table_size:
                with torch.inference_mode(False):  # else it could not be written outside of inference mode
                    self.memory = torch.zeros(room.table_size, dtype=torch.int32, device=self.device)
            plan = plan_with_room(plan, room, self.device, self.memory)
            self.make_works(plan)
            for key, work in plan.works.items():
                plan.works[key] = self._share_scratch(key, work)
            self.plans[num_requests] = plan
        return self.plans[num_requests]

    def _share_scratch(self, key: tuple, work: Work) -> Work:
        """With the scratch of the largest, and as many places for states as that has: the counters behind them, which
        are 0 between calls, then lie where its own do, and no call's states lie there."""
        num_q_heads, _, head_dim, *_ = key
        state = num_q_heads * (head_dim + 2)
        counters = work.scratch.numel() - work.num_states * state
        largest = self.largest.get(key, work)
        size = largest.num_states * state + counters
        if largest.num_states < work.num_states or largest.scratch.numel() < size:
            largest, size = work, work.scratch.numel()
        self.largest[key] = largest
        return replace(work, scratch=largest.scratch[:size], num_states=largest.num_states)
