"""The plan of a paged batch, from its block table: TreePlan.from_block_table."""

from __future__ import annotations

from itertools import accumulate

import torch

from tts_kernels.tree.checks import check_int, check_integers, check_options
from tts_kernels.tree.plan import TreePlan, build
from tts_kernels.tree.prefix import DeviceTable, HostTable, shared_runs, worthwhile
from tts_kernels.tree.room import PlanWithRoom, Room, plan_with_room, room_of


def plan_of_block_table(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    q_lens: torch.Tensor | None,
    *,
    page_size: int,
    causal: bool,
    reserve: int,
    least_saving: int,
    room: Room | None,
    into: PlanWithRoom | None,
) -> TreePlan:
    check_options(page_size, causal)
    least_saving = check_int("least_saving", least_saving, 0)
    check_integers("block_table", block_table, "[B, max_pages]")
    device = block_table.device
    room = room_of(room, into, page_size=page_size, causal=causal, device=device, pages=max(block_table.numel(), 1))
    table = (HostTable if device.type == "cpu" else DeviceTable)(
        block_table, seq_lens, q_lens, page_size=page_size, reserve=reserve
    )
    seq_lens, q_lens = table.seq_lens, table.q_lens
    runs = shared_runs(table.order, table.common)
    if least_saving or room is not None:
        runs = worthwhile(runs, -(-least_saving // page_size), room and room.depth)
    first_row = list(accumulate(q_lens, initial=0))
    length, rows, source, pages = [], [], [], []
    for run in runs:
        end = run.end
        tokens = (end - run.begin) * page_size
        count = 0
        if run.leaf:
            tokens, count = seq_lens[run.member], q_lens[run.member]
            end = -(-(tokens + (reserve if tokens and count else 0)) // page_size)
            tokens -= run.begin * page_size
        length.append(tokens)
        rows.append(count)
        source.append(first_row[run.member])
        pages.append((run.member, run.begin, end))
    page_ids, page_begin, max_page = table.pages(pages)
    page_count = [end - begin for _, begin, end in pages]
    spare = [c * page_size - t for c, t in zip(page_count, length)]
    plan = build(
        [run.parent for run in runs], length, spare, rows, source, page_count,
        page_ids if room is None else page_ids.new_empty(0), max_page,
        page_begin=page_begin, page_size=page_size, causal=causal, device=device if room is None else "cpu",
    )  # fmt: skip
    if room is None:
        return plan
    plan.pages = page_ids  # which stay where they are
    return plan_with_room(plan, room, device) if into is None else into.update_(plan)
