"""Block tables compared by the Triton kernels: on the GPU where there is one, else under Triton's interpreter, which
takes CPU tensors. The oracles are lists of ints, and the plan of the same table on the CPU.

Under the interpreter a batch takes a tenth of a second or more, so batches are small; blocks of 2 to 4 make several
programs, several steps of each loop and ragged ends of them. The `gpu` tests have the blocks and sizes of real use.
"""

import functools
import operator
import os
import subprocess
import sys
from itertools import pairwise, takewhile

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from block_tables import POISON, batches
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_oracle import rows_of

import tts_kernels.tree
from tts_kernels.tree import block_table, prefix_triton
from tts_kernels.tree.plan import LENGTH, PAGE_BEGIN, TreePlan
from tts_kernels.tree.prefix import DeviceTable
from tts_kernels.tree.prefix_triton import COMMON, HIGH, LOW, ORDER, Q_LEN, SEQ_LEN, Blocks, compare_rows
from tts_kernels.tree.room import Room

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = [Blocks(2, 2, 4), Blocks(4, 4, 2), Blocks(2, 4, 16), Blocks()]


def on_device(blocks, *args, **kwargs):
    """The plan by way of the kernels, also for CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_table, "HostTable", DeviceTable)
        patch.setattr(prefix_triton, "compare_rows", functools.partial(compare_rows, blocks=blocks))
        return TreePlan.from_block_table(*args, **kwargs)


@st.composite
def strided(draw, table):
    """`table` with other strides, on the device; what lies between its entries is poison."""
    batch, width = table.shape
    kind = draw(st.sampled_from(["contiguous", "columns", "rows", "transposed"]))
    table = table.to(DEVICE)
    if kind == "columns":
        wide = table.new_full((batch, 2 * width), POISON)
        wide[:, ::2] = table
        return wide[:, ::2]
    if kind == "rows":
        wide = table.new_full((batch, width + 3), POISON)
        wide[:, 1 : width + 1] = table
        return wide[:, 1 : width + 1]
    return table.t().contiguous().t() if kind == "transposed" else table


def assert_same_plan(got, want, reserve):
    """Equal but for where the pages lie."""
    same = [row for row in range(7) if row != PAGE_BEGIN]
    assert torch.equal(got.nodes.cpu()[same], want.nodes[same])
    assert torch.equal(got.rows.cpu(), want.rows) and torch.equal(got.grows.cpu(), want.grows)
    for table in (got.nodes, got.pages, got.rows, got.grows):
        assert table.dtype == torch.int32 and table.is_contiguous() and table.device.type == DEVICE
        assert not table.is_inference()
    for name in ("num_nodes", "num_rows", "num_growing", "num_tokens", "capacity", "depth", "max_page", "causal"):
        assert getattr(got, name) == getattr(want, name), name
    assert rows_of(got) == rows_of(want)
    if want.num_growing:
        assert rows_of(got.advance_(reserve)) == rows_of(want.advance_(reserve))


@settings(max_examples=40, deadline=None)
@given(st.data(), batches(), st.sampled_from(SMALL), st.sampled_from([torch.int32, torch.int64]))
def test_the_plan_is_that_of_the_host_path(data, batch, blocks, dtype):
    table, seq_lens, q_lens, page_size, reserve = batch
    lens = torch.tensor(seq_lens, dtype=dtype).repeat_interleave(2)[::2], torch.tensor(q_lens, dtype=dtype)
    options = {"page_size": page_size, "reserve": reserve}
    want = TreePlan.from_block_table(table, lens[0], q_lens=lens[1], **options)
    before = table.clone()
    with torch.inference_mode(data.draw(st.booleans())):
        got = on_device(blocks, data.draw(strided(table)), lens[0].to(DEVICE), q_lens=lens[1].to(DEVICE), **options)
    assert torch.equal(table, before)
    assert_same_plan(got, want, reserve)


@settings(max_examples=15, deadline=None)
@given(st.lists(batches(), min_size=2, max_size=3))
def test_plans_with_room_are_written_on_the_device(made):
    """Nodes and rows come from the host, page ids from the table where it lies."""
    plan = None
    for table, seq_lens, q_lens, page_size, reserve in made:
        if page_size != made[0][3]:
            continue
        lens = [torch.tensor(values, dtype=torch.int64) for values in (seq_lens, q_lens)]
        options = {"page_size": page_size, "reserve": reserve}
        want = TreePlan.from_block_table(table, lens[0], q_lens=lens[1], **options)
        there = [tensor.to(DEVICE) for tensor in (table, *lens)]
        into = {"into": plan} if plan else {"room": Room(nodes=18, rows=30, pages=400)}
        plan = on_device(Blocks(2, 2, 4), *there[:2], q_lens=there[2], **options, **into)
        assert rows_of(plan)[: want.num_rows] == rows_of(want)
        assert plan.nodes.device.type == plan.pages.device.type == DEVICE
        for name in ("num_growing", "num_tokens", "capacity", "max_page"):
            assert getattr(plan, name) == getattr(want, name), name
        if want.capacity:
            assert rows_of(plan.advance_())[: want.num_rows] == rows_of(want.advance_())


@settings(max_examples=30, deadline=None)
@given(batches(), st.sampled_from(SMALL))
def test_order_common_pages_and_extremes(batch, blocks):
    table, seq_lens, q_lens, page_size, reserve = batch
    lens = [torch.tensor(values, dtype=torch.int64, device=DEVICE) for values in (seq_lens, q_lens)]
    facts = compare_rows(table.to(DEVICE), *lens, page_size, reserve, blocks).tolist()
    rows = table.tolist()
    keys = [row[: max(0, s - q) // page_size] for row, s, q in zip(rows, seq_lens, q_lens)]
    used = [row[: -(-(s + (reserve if s and q else 0)) // page_size)] for row, s, q in zip(rows, seq_lens, q_lens)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    common = [sum(takewhile(bool, map(operator.eq, keys[a], keys[b]))) for a, b in pairwise(order)]
    assert facts[ORDER] == order
    assert facts[COMMON] == common + [0] * bool(order)
    assert facts[SEQ_LEN] == seq_lens and facts[Q_LEN] == q_lens
    assert facts[LOW] == [0] * len(rows) and facts[HIGH] == [max(ids, default=-1) for ids in used]


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (1, 1)])
def test_empty_and_single(shape):
    table = torch.zeros(shape, dtype=torch.int32)
    lens = torch.full((shape[0],), shape[1], dtype=torch.int32)
    want = TreePlan.from_block_table(table, lens, page_size=2)
    assert_same_plan(on_device(Blocks(), table.to(DEVICE), lens, page_size=2), want, 0)


def test_wide_ids_differ_above_32_bits_and_below_zero():
    """The order is by value in the table's own dtype: no id that is refused later may look equal to another."""
    table = torch.tensor([[5, 1], [5 + 2**32, 1], [-1, 1], [5, 1]], device=DEVICE)
    facts = compare_rows(table, torch.full((4,), 3), torch.ones(4, dtype=torch.int32), 1, 0).tolist()
    assert facts[ORDER] == [2, 0, 3, 1] and facts[COMMON] == [0, 2, 0, 0]
    assert facts[LOW] == [0, 0, -1, 0] and facts[HIGH] == [5, 5 + 2**32, 1, 5]


TABLE = torch.tensor([[7, 1, 4], [7, 1, 5], [7, 1, 6]], dtype=torch.int64)
LENS = torch.tensor([12, 9, 10])
GOOD = {"block_table": TABLE, "seq_lens": LENS, "page_size": 4}


def table_with(row, page, value):
    table = TABLE.clone()
    table[row, page] = value
    return table


@pytest.mark.parametrize(
    "bad",
    [
        {"block_table": table_with(0, 0, -1)},
        {"block_table": table_with(1, 2, -7)},
        {"block_table": table_with(2, 1, 2**31)},
        {"block_table": table_with(slice(None), 0, -3)},  # in a shared run
        {"block_table": table_with(2, 2, 2**31 + 6), "seq_lens": torch.tensor([4, 4, 8]), "reserve": 4},
        {"block_table": table_with(1, 0, -1), "seq_lens": torch.tensor([12, 13, 10])},  # the lengths first
        {"seq_lens": [12, 9, 10]},
        {"seq_lens": LENS.float()},
        {"seq_lens": LENS[:2]},
        {"seq_lens": LENS.view(1, 3)},
        {"seq_lens": torch.tensor([12, -9, 10])},
        {"seq_lens": torch.tensor([12, 2**62, 10])},
        {"seq_lens": torch.tensor([12, 13, 10])},
        {"seq_lens": torch.tensor([12, 2**31 - 1, 2**31 - 1]), "page_size": 2**63},
        {"reserve": 1},
        {"reserve": 2**70},
        {"reserve": -1},
        {"reserve": 1.0},
        {"q_lens": torch.tensor([1])},
        {"q_lens": torch.tensor([1, -(2**63), 1])},
        {"q_lens": torch.tensor([1, 2**63 - 1, 1])},
        {"q_lens": [1, 1, 1]},
        {"q_lens": torch.ones(3, dtype=torch.bool)},
        {"page_size": 0},
    ],
)
def test_refuses_with_the_words_of_the_host_path(bad):
    arguments = GOOD | bad
    with pytest.raises((TypeError, ValueError)) as want:
        TreePlan.from_block_table(**arguments)
    on = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    with pytest.raises((TypeError, ValueError)) as got:
        on_device(Blocks(2, 2, 2), **on)
    assert got.type is want.type and str(got.value) == str(want.value)


def test_unused_entries_are_not_refused():
    table = torch.tensor([[3, -1], [-5, 2**40]], device=DEVICE)
    plan = on_device(Blocks(), table, torch.tensor([4, 0]), page_size=4)
    assert plan.max_page == 3 and plan.num_tokens == 4


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.delattr(tts_kernels.tree, "prefix_triton")
    monkeypatch.setitem(sys.modules, "tts_kernels.tree.prefix_triton", None)
    with pytest.raises(RuntimeError, match=r"^block_table on .*: triton cannot be imported"):
        DeviceTable(TABLE.to(DEVICE), LENS, None, page_size=4, reserve=0)


def test_a_table_on_the_cpu_needs_no_triton():
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "from tts_kernels import TreePlan\n"
        "plan = TreePlan.from_block_table(torch.tensor([[1, 2], [1, 3]]), torch.tensor([8, 8]), page_size=4)\n"
        "assert plan.num_nodes == 3\n"
        "assert 'tts_kernels.tree.prefix_triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def large(batch, max_pages, dtype):
    """Eight scattered groups that share from nothing to all but the last page, each in two halves that share more."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(2**31 - 1, (batch, max_pages), generator=generator, dtype=torch.int64)
    group, half = torch.arange(batch) % 8, torch.arange(batch) // 8 % 2
    for g in range(8):
        members = (group == g).nonzero()[:, 0]
        shared = g * max_pages // 8
        table[members, :shared] = table[members[0], :shared]
        for h in range(2):
            of_half = members[half[members] == h]
            table[of_half, : (shared + max_pages) // 2] = table[of_half[0], : (shared + max_pages) // 2]
            table[of_half, :shared] = table[members[0], :shared]
    seq_lens = torch.randint(max_pages * 16 // 2, max_pages * 16, (batch,), generator=generator)
    seq_lens[::37] = 0
    return table.to(dtype), seq_lens


def check_large(batch, max_pages, dtype):
    table, seq_lens = large(batch, max_pages, dtype)
    want = TreePlan.from_block_table(table, seq_lens, page_size=16)
    for lens in (seq_lens, seq_lens.to(DEVICE, torch.int32)):
        got = on_device(Blocks(), table.to(DEVICE), lens, page_size=16)
        same = [row for row in range(7) if row != PAGE_BEGIN]
        assert torch.equal(got.nodes.cpu()[same], want.nodes[same])
        assert torch.equal(got.rows.cpu(), want.rows) and torch.equal(got.grows.cpu(), want.grows)
        assert got.max_page == want.max_page and torch.equal(got.pages.cpu(), table.to(torch.int32).view(-1))
        begins = zip(want.nodes[LENGTH].tolist(), got.nodes[PAGE_BEGIN].tolist(), want.nodes[PAGE_BEGIN].tolist())
        mine, other = got.pages.cpu(), want.pages
        for length, begin, at in begins:
            assert torch.equal(mine[begin : begin + -(-length // 16)], other[at : at + -(-length // 16)])


def test_several_tiles_of_the_blocks_in_use():
    check_large(37, 70, torch.int32)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("batch, max_pages", [(1, 40_000), (100, 777), (512, 4096), (3000, 64)])
def test_large_batches(batch, max_pages, dtype):
    check_large(batch, max_pages, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_only_integers_per_sequence_leave_the_device(monkeypatch):
    """The kernels' part does not wait, and of all that the plan asks of the device only its result is copied."""
    table, seq_lens = large(64, 500, torch.int32)
    table, seq_lens = table.cuda(), seq_lens.cuda()
    TreePlan.from_block_table(table, seq_lens, page_size=16)  # compiles
    made = []

    def watched(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            made.append(compare_rows(*args))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return made[-1]

    monkeypatch.setattr(prefix_triton, "compare_rows", watched)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        TreePlan.from_block_table(table, seq_lens, page_size=16)
        torch.cuda.synchronize()
    assert [facts.shape for facts in made] == [(6, 64)]
    assert sum("Memcpy DtoH" in event.name for event in profile.events()) == 1
