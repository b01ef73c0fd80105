"""Work lists that the native module makes on the device, from the plan's tables there: number by number what work.py
makes on the host, which here only counts the items and states that there is to be room for."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch

from tts_kernels.configs import TreeConfig
from tts_kernels.nvidia import place
from tts_kernels.tree.plan import TreePlan

from .work import Work, most_work, work_size


@dataclass(frozen=True)
class DeviceWork(Work):
    native: ModuleType

    def refresh(self, plan: TreePlan) -> None:
        """One launch on the current stream."""
        c = self.config
        self.native.cuda_work_list(
            place(self.table.device),
            self.table.data_ptr(),
            (plan.nodes.data_ptr(), plan.grows.data_ptr()),
            (plan.num_nodes, plan.num_rows, self.num_items),
            self.group,
            plan.capacity,  # the tables on the device hold the lengths of now
            (c.wide_rows, c.narrow_rows, c.tall_rows, c.min_chunk, c.max_chunks),
        )


def make_device_work(
    plan: TreePlan, num_q_heads: int, num_kv_heads: int, head_dim: int, config: TreeConfig, native: ModuleType
) -> DeviceWork:
    """For kernels that merge as they go. Waits for nothing."""
    group = num_q_heads // num_kv_heads
    if plan.most_tokens is None:
        num_items, num_states = work_size(*plan.host_tables(), group, config)
    else:
        num_items, num_states = most_work(plan, group, config)
    table_size = 4 * num_items + plan.num_nodes + plan.num_rows + 1
    states_size = num_states * num_q_heads * (head_dim + 2)
    with torch.inference_mode(False):  # else it could not be used outside of inference mode
        table = torch.empty(table_size, dtype=torch.int32, device=plan.device)
        scratch = torch.empty(states_size + plan.num_rows * num_q_heads, dtype=torch.float32, device=plan.device)
        scratch[states_size:].zero_()  # the counters
    work = DeviceWork(config, table, scratch, num_items, num_states, group, native)
    work.refresh(plan)
    return work
