"""from_block_table with least_saving: runs that save too little stay with their sequences, and every row still reads
the same slots."""

import pytest
import torch
from block_tables import batches
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_oracle import check_tables, rows_of

from tts_kernels.tree.plan import LENGTH, OWN_BEGIN, PARENT, ROWS_END, TreePlan


@settings(max_examples=100, deadline=None)
@given(batches(), st.integers(1, 60))
def test_rows_read_the_same_slots(batch, least):
    table, seq_lens, q_lens, page_size, reserve = batch
    arguments = {
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32),
        "q_lens": torch.tensor(q_lens, dtype=torch.int32),
        "page_size": page_size,
        "reserve": reserve,
    }
    whole = TreePlan.from_block_table(table, **arguments)
    plan = TreePlan.from_block_table(table, **arguments, least_saving=least)
    check_tables(plan)
    assert rows_of(plan) == rows_of(whole)
    assert plan.num_nodes <= whole.num_nodes


def nested():
    """Four sequences: one page of 4 tokens is everybody's, three more are those of the last two."""
    table = torch.tensor([[0, 1, 0, 0, 0], [0, 2, 0, 0, 0], [0, 3, 4, 5, 6], [0, 3, 4, 5, 7]], dtype=torch.int32)
    return table, torch.tensor([6, 7, 18, 19], dtype=torch.int32)


@pytest.mark.parametrize(
    "least, inner",
    [
        (0, [4, 12]),
        (12, [4, 12]),
        (13, [16]),  # the outer run saves 4 * 3; then the inner one has its page too, and saves 16 * 1
        (16, [16]),
        (17, []),
    ],
)
def test_by_hand(least, inner):
    table, lens = nested()
    plan = TreePlan.from_block_table(table, lens, page_size=4, least_saving=least)
    shared = [n for n in range(plan.num_nodes) if plan.nodes[ROWS_END, n] - plan.nodes[OWN_BEGIN, n] > 1]
    assert plan.nodes[LENGTH, shared].tolist() == inner
    assert plan.num_tokens == {2: 4 + 12 + 2 + 3 + 2 + 3, 1: 16 + 6 + 7 + 2 + 3, 0: 6 + 7 + 18 + 19}[len(inner)]
    assert (plan.nodes[PARENT] < torch.arange(plan.num_nodes)).all()


@pytest.mark.parametrize("value, error, expected", [(-1, ValueError, "at least 0"), (1.0, TypeError, "an int")])
def test_bad_values(value, error, expected):
    with pytest.raises(error, match=f"least_saving: expected {expected}"):
        TreePlan.from_block_table(*nested(), page_size=4, least_saving=value)
