"""decode_attention: what it finds in a block table, padding, growth with `advance_`."""

import random

import attention_cases as cases
import pytest
import torch
from attention_cases import BF16, Case
from dense import assert_close, dense_attention
from forests import POISON_PAGE, Forest, empty_caches, write

from tts_kernels.attention import append_kv, decode_attention, tree_attention
from tts_kernels.tree.plan import TreePlan

PAGE = 4
HEADS, KV_HEADS, DIM = 6, 2, 32
OPTIONS = {"scale": 0.3, "softcap": 0.0, "sinks": None, "k_scale": None, "v_scale": None}

# Two groups that share pages on two levels, a lone sequence, padding, and two tables that are equal to the end.
TABLE = [
    [9, 4, 7, 0],
    [9, 4, 7, 11],
    [9, 4, 2],
    [9, 4, 3, 14],
    [5, 6],
    [5, 6],
    [13],
    [],
]
LENS = [13, 15, 9, 16, 8, 7, 2, 0]
NUM_PAGES = 20


def block_table(device="cpu"):
    table = torch.full((len(TABLE), 6), POISON_PAGE, dtype=torch.int32)
    for row, pages in enumerate(TABLE):
        table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
    return table.to(device), torch.tensor(LENS, dtype=torch.int32, device=device)


def filled_caches(dtype):
    """Caches with the tokens of every sequence written and NaN elsewhere, and those tokens."""
    gen = torch.Generator().manual_seed(0)
    k_cache, v_cache = empty_caches(NUM_PAGES, PAGE, KV_HEADS, DIM, dtype, "HND")
    for pages, length in zip(TABLE, LENS):
        slots = [pages[i // PAGE] * PAGE + i % PAGE for i in range(length)]
        write(k_cache, slots, torch.randn(length, KV_HEADS, DIM, generator=gen).to(dtype))
        write(v_cache, slots, torch.randn(length, KV_HEADS, DIM, generator=gen).to(dtype))
    return k_cache, v_cache


def read(cache, pages, length):
    return torch.stack([cache[pages[i // PAGE], i % PAGE] for i in range(length)]) if length else cache[0, :0]


def check(q, k_cache, v_cache, table, lens, out, lse, *, window=-1):
    """Each sequence on its own against the oracle."""
    for row, (pages, length) in enumerate(zip(table, lens)):
        k, v = read(k_cache, pages, length), read(v_cache, pages, length)
        visible = (
            torch.arange(length) >= length - 1 - window if window >= 0 else torch.ones(length, dtype=torch.bool)
        )[None]
        exact, plain = (
            dense_attention(q[row : row + 1], k, v, visible, dtype=dtype, **OPTIONS)
            for dtype in (torch.float64, q.dtype)
        )
        for i, (name, got) in enumerate((("out", out), ("lse", lse))):
            assert_close(f"{name} of {row}", got[row : row + 1], plain[i], exact[i], terms=length + DIM)


@pytest.mark.parametrize("window", [-1, 0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_against_each_sequence_alone(path, dtype, window):
    dtype = path.takes(dtype)
    q = torch.randn(len(TABLE), HEADS, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    k_cache, v_cache = filled_caches(dtype)
    caches = [cases.on_device(cache, path.device) for cache in (k_cache, v_cache)]
    table, lens = block_table(path.device)
    out, lse = decode_attention(
        q.to(path.device), *caches, table, lens, scale=0.3, window=window, return_lse=True, backend=path.backend
    )
    check(q, k_cache, v_cache, TABLE, LENS, out.cpu(), lse.cpu(), window=window)


def test_a_ready_plan_gives_the_same(path):
    dtype = path.takes(torch.float32)
    q = torch.randn(len(TABLE), HEADS, DIM, generator=torch.Generator().manual_seed(1)).to(path.device, dtype)
    caches = [cases.on_device(cache, path.device) for cache in filled_caches(dtype)]
    table, lens = block_table(path.device)
    plan = TreePlan.from_block_table(table, lens, page_size=PAGE)
    found = decode_attention(q, *caches, table, lens, backend=path.backend)
    assert torch.equal(found, decode_attention(q, *caches, table, lens, plan=plan, backend=path.backend))
    assert torch.equal(found, decode_attention(q, *caches, None, None, plan=plan, backend=path.backend))
    assert torch.equal(found, tree_attention(q, *caches, plan, backend=path.backend))


def test_growth(path):
    """One plan for eight steps: append, advance, attend; across page borders and from a full page on."""
    table = [[9, 4, 7, 0, 1], [9, 4, 2, 8, 15], [9, 4, 3, 14, 10]]
    lens = [12, 9, 11]
    gen, dtype = torch.Generator().manual_seed(3), path.takes(torch.float32)
    k_cache, v_cache = empty_caches(NUM_PAGES, PAGE, KV_HEADS, DIM, dtype, "NHD", path.device)
    for pages, length in zip(table, lens):
        slots = torch.tensor([pages[i // PAGE] * PAGE + i % PAGE for i in range(length)], device=path.device)
        k, v = torch.randn(2, length, KV_HEADS, DIM, generator=gen).to(path.device, dtype)
        append_kv(k, v, k_cache, v_cache, slots, backend=path.backend, check=True)
    plan = TreePlan.from_block_table(
        torch.tensor(table, dtype=torch.int32, device=path.device),
        torch.tensor(lens, dtype=torch.int32, device=path.device),
        page_size=PAGE,
        reserve=8,
    )
    for step in range(9):
        if step:
            slots = torch.tensor(
                [pages[n // PAGE] * PAGE + n % PAGE for pages, n in zip(table, lens)], device=path.device
            )
            k, v = torch.randn(2, 3, KV_HEADS, DIM, generator=gen).to(path.device, dtype)
            append_kv(k, v, k_cache, v_cache, slots, backend=path.backend)
            lens = [n + 1 for n in lens]
            plan.advance_()
        q = torch.randn(3, HEADS, DIM, generator=gen).to(dtype)
        for window in (-1, 6):
            out, lse = decode_attention(
                q.to(path.device), k_cache, v_cache, None, None, plan=plan, scale=0.3, window=window, return_lse=True,
                backend=path.backend, check=True,
            )  # fmt: skip
            check(q, k_cache.cpu(), v_cache.cpu(), table, lens, out.cpu(), lse.cpu(), window=window)


def test_growth_of_a_tree(path):
    """Leaves of from_nodes that own several rows: the rows move on with the end of the leaf."""
    case = Case(heads=(4, 2), head_dim=32, window=20, page_size=4)
    forest = Forest([-1, 0, 0, -1], [13, 6, 3, 4], [0, 3, 1, 2], case.page_size).place(random.Random(4))
    inputs = cases.make_inputs(case, forest, path)
    shorter = TreePlan.from_nodes(
        forest.parent, [13, 4, 1, 2], forest.pages, forest.rows, page_size=case.page_size, device=path.device
    )
    shorter.advance_(2)
    cases.check(inputs, path, plan=shorter)
