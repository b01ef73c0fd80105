"""from_block_table against a naive expansion: every sequence still reads its own pages, and nothing that could be
shared is stored twice. Entries that may not be read hold a page id far outside of every cache."""

import pytest
import torch
from block_tables import POISON, batches
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_oracle import check_tables, rows_of

from tts_kernels.tree import plan as tree_plan
from tts_kernels.tree.plan import TreePlan


def naive_rows(table, seq_lens, q_lens, page_size, causal):
    seen = []
    for b, (tokens, count) in enumerate(zip(seq_lens, q_lens)):
        pages = table[b].tolist()
        for j in range(count):
            visible = tokens - count + j + 1 if causal else tokens
            seen.append((tokens - count + j, [(pages[t // page_size], t % page_size) for t in range(max(0, visible))]))
    return seen


def naive_tokens(table, seq_lens, q_lens, page_size):
    """Tokens stored when every shareable page is an edge of a trie."""
    trie, private = set(), 0
    for b, (tokens, count) in enumerate(zip(seq_lens, q_lens)):
        pages = tuple(table[b].tolist())
        share = max(0, tokens - count) // page_size
        shared = [d for d in range(1, share + 1) if any(
            c != b and max(0, seq_lens[c] - q_lens[c]) // page_size >= d and tuple(table[c, :d].tolist()) == pages[:d]
            for c in range(len(seq_lens))
        )]  # fmt: skip
        trie |= {pages[:d] for d in shared}
        private += tokens - len(shared) * page_size
    return len(trie) * page_size + private


def from_table(table, seq_lens, q_lens, page_size, **kwargs):
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    q = torch.tensor(q_lens, dtype=torch.int32)
    return TreePlan.from_block_table(table, lens, page_size=page_size, q_lens=q, **kwargs)


@settings(max_examples=200, deadline=None)
@given(batches(), st.booleans())
def test_every_sequence_reads_its_own_pages_and_all_sharing_is_found(batch, causal):
    table, seq_lens, q_lens, page_size, reserve = batch
    plan = from_table(table, seq_lens, q_lens, page_size, causal=causal, reserve=reserve)
    check_tables(plan)
    assert rows_of(plan) == naive_rows(table, seq_lens, q_lens, page_size, causal)
    assert plan.num_tokens == naive_tokens(table, seq_lens, q_lens, page_size)
    assert POISON not in plan.pages.tolist()
    if plan.num_growing:
        assert plan.capacity >= reserve
        longer = [t + reserve if t and c else t for t, c in zip(seq_lens, q_lens)]
        plan.advance_(reserve)
        assert rows_of(plan) == naive_rows(table, longer, q_lens, page_size, causal)


def test_two_levels_and_two_groups_of_scattered_members():
    table = torch.tensor(
        [
            [1, 2, 3, 10],
            [7, 8, 20, POISON],
            [1, 2, 4, 11],
            [7, 8, 21, POISON],
            [1, 2, 3, 12],
            [1, 2, 4, 13],
            [9, 2, 3, 14],
        ],
        dtype=torch.int32,
    )
    plan = TreePlan.from_block_table(table, torch.tensor([13, 9, 14, 10, 15, 16, 16]), page_size=4)
    parent, length, position = plan.nodes[: tree_plan.POSITION + 1].tolist()
    #         12  123  s0 s4  124 s2 s5  78 s1 s3 s6: siblings by their first sequence
    assert parent == [-1, 0, 1, 1, 0, 4, 4, -1, 7, 7, -1]
    assert length == [8, 4, 1, 3, 4, 2, 4, 8, 1, 2, 16]
    assert position == [0, 8, 12, 12, 8, 12, 12, 0, 8, 8, 0]
    assert plan.rows[0].tolist() == [0, 4, 2, 5, 1, 3, 6]
    assert plan.depth == 3 and plan.capacity == 0 and plan.max_page == 21


def test_less_than_a_page_is_not_shared_and_rows_stay_private():
    table = torch.tensor([[5, 6], [5, 6]], dtype=torch.int32)
    full = TreePlan.from_block_table(table, torch.tensor([8, 8]), page_size=4)
    assert full.num_nodes == 3 and full.num_tokens == 12  # the second page holds the rows
    part = TreePlan.from_block_table(table, torch.tensor([4, 4]), page_size=4)
    assert part.num_nodes == 2 and part.num_tokens == 8
    many = TreePlan.from_block_table(table, torch.tensor([8, 8]), page_size=4, q_lens=torch.tensor([5, 4]))
    assert many.num_nodes == 2


def test_unshared_batch_keeps_its_order():
    table = torch.arange(12, dtype=torch.int32).flip(0).view(4, 3)
    plan = TreePlan.from_block_table(table, torch.tensor([12, 5, 9, 1]), page_size=4)
    assert plan.rows.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert plan.pages.tolist() == [11, 10, 9, 8, 7, 5, 4, 3, 2]


def test_padding_never_grows():
    table = torch.tensor([[3, 4], [POISON, POISON]], dtype=torch.int32)
    plan = TreePlan.from_block_table(table, torch.tensor([4, 0]), page_size=4, reserve=4)
    assert plan.pages.tolist() == [3, 4] and plan.grows.tolist() == [1, 0] and plan.capacity == 4
    plan.advance_(4)
    assert rows_of(plan)[1] == (-1, [])


@pytest.mark.parametrize("shared", [0, 1, 2, 63, 64, 65, 98, 99])
def test_long_tables(shared):
    table = torch.arange(200, dtype=torch.int32).view(2, 100)
    table[1, :shared] = table[0, :shared]
    plan = TreePlan.from_block_table(table, torch.tensor([400, 399]), page_size=4)
    assert plan.num_tokens == 799 - 4 * shared
    assert rows_of(plan) == naive_rows(table, [400, 399], [1, 1], 4, True)


def test_strided_table_and_large_ids():
    wide = torch.full((2, 6), POISON, dtype=torch.int64)
    wide[:, ::2] = torch.tensor([[2**31 - 1, 5, 6], [2**31 - 1, 5, 7]])
    plan = TreePlan.from_block_table(wide[:, ::2], torch.tensor([3, 3]), page_size=1)
    assert plan.num_tokens == 4 and plan.max_page == 2**31 - 1
    assert sorted(plan.pages.tolist()) == [5, 6, 7, 2**31 - 1]


TABLE = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
GOOD = {"block_table": TABLE, "seq_lens": torch.tensor([5, 8]), "page_size": 4}


@pytest.mark.parametrize(
    "bad, error, message",
    [
        ({"block_table": TABLE.float()}, TypeError, r"block_table: expected dtype int32 or int64, got torch.float32"),
        ({"block_table": TABLE.bool()}, TypeError, r"block_table: expected dtype int32 or int64"),
        ({"block_table": TABLE[0]}, ValueError, r"block_table: expected a tensor \[B, max_pages\], got shape \(2,\)"),
        ({"block_table": [[0, 1], [2, 3]]}, TypeError, r"block_table: expected a tensor \[B, max_pages\], got list"),
        ({"block_table": torch.tensor([[0, 1], [2, -1]])}, ValueError, r"block_table\[1, 1\]: expected .* got -1"),
        ({"block_table": torch.tensor([[0, 2**31], [2, 3]])}, ValueError, r"block_table\[0, 1\]: expected a page id"),
        ({"seq_lens": [5, 8]}, TypeError, r"seq_lens: expected a tensor \[B\], got list"),
        ({"seq_lens": torch.tensor([5.0, 8])}, TypeError, r"seq_lens: expected dtype"),
        ({"seq_lens": torch.tensor([5, 8, 1])}, ValueError, r"seq_lens: expected 2 entries, .* got 3"),
        ({"seq_lens": torch.tensor([[5, 8]])}, ValueError, r"seq_lens: expected a tensor \[B\], got shape"),
        ({"seq_lens": torch.tensor([5, -8])}, ValueError, r"seq_lens\[1\]: expected at least 0, got -8"),
        ({"seq_lens": torch.tensor([5, 9])}, ValueError, r"seq_lens\[1\]: expected at most 2 pages .* got 9"),
        ({"reserve": 1}, ValueError, r"seq_lens\[1\]: expected .*, the reserve of 1 included"),
        ({"reserve": -1}, ValueError, r"reserve: expected at least 0, got -1"),
        ({"reserve": 1.0}, TypeError, r"reserve: expected an int"),
        ({"q_lens": torch.tensor([1])}, ValueError, r"q_lens: expected 2 entries"),
        ({"q_lens": torch.tensor([1, -1])}, ValueError, r"q_lens\[1\]: expected 0 <= q_lens .* got -1"),
        ({"q_lens": torch.tensor([6, 1])}, ValueError, r"q_lens\[0\]: expected .* got 6"),
        ({"q_lens": [1, 1]}, TypeError, r"q_lens: expected a tensor"),
        ({"page_size": -4}, ValueError, r"page_size: expected at least 1, got -4"),
        ({"causal": None}, TypeError, r"causal: expected a bool"),
    ],
)  # fmt: skip
def test_from_block_table_refuses(bad, error, message):
    TreePlan.from_block_table(**GOOD)
    with pytest.raises(error, match="^" + message):
        TreePlan.from_block_table(**(GOOD | bad))
