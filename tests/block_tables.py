"""Random block tables for TreePlan.from_block_table."""

import torch
from hypothesis import strategies as st

POISON = 2_147_480_000


@st.composite
def batches(draw):
    """A batch whose rows are grown from one another: nested groups whose members lie anywhere in the batch."""
    page_size = draw(st.sampled_from([1, 2, 4]))
    batch = draw(st.integers(0, 9))
    reserve = draw(st.integers(0, 2 * page_size))
    fresh = iter(range(10_000))
    rows, seq_lens, q_lens = [], [], []
    for b in range(batch):
        source = rows[draw(st.integers(0, b - 1))] if b and draw(st.booleans()) else []
        row = source[: draw(st.integers(0, len(source)))]
        row = row + [next(fresh) for _ in range(draw(st.integers(0, 4)))]
        tokens = max(0, len(row) * page_size - draw(st.integers(0, page_size - 1)))
        row += [next(fresh) for _ in range(-(-(tokens + reserve) // page_size) - len(row))]
        rows.append(row)
        seq_lens.append(tokens)
        q_lens.append(draw(st.integers(0, min(tokens, 3))) if tokens else draw(st.integers(0, 2)))
    width = max(map(len, rows), default=0) + draw(st.integers(0, 2))
    table = torch.full((batch, width), POISON, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    for b, row in enumerate(rows):
        read = seq_lens[b] + (reserve if seq_lens[b] and q_lens[b] else 0)
        used = -(-read // page_size)
        table[b, :used] = torch.tensor(row[:used])
    return table, seq_lens, q_lens, page_size, reserve
