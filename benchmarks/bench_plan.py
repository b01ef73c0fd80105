"""What a decode step costs beside its attention: building a plan, advancing it, storing the new keys and values."""

import torch

from tts_kernels.attention import api
from tts_kernels.tree.plan import LENGTH, POSITION, TreePlan

from .cases import DTYPES, HEAD_DIM, NUM_KV_HEADS, PAGE_SIZE
from .measure import OURS, interleave

LEVELS = [(1, 2048), (16, 512), (256, 64)]  # nodes and tokens in each
NUM_ROWS = LEVELS[-1][0]


def three_levels(page_size: int, pages_each: int) -> dict:
    """The arguments of from_nodes for 256 leaves on three levels; a node has `pages_each` pages more than it needs."""
    parent, length, pages = [], [], []
    above, next_page = range(-1, 0), 0
    for count, tokens in LEVELS:
        own = -(-tokens // page_size) + pages_each
        here = range(len(parent), len(parent) + count)
        for i in range(count):
            parent.append(above[i * len(above) // count])
            length.append(tokens)
            pages.append(list(range(next_page, next_page + own)))
            next_page += own
        above = here
    rows = [0] * (len(parent) - NUM_ROWS) + [1] * NUM_ROWS
    return {"parent": parent, "length": length, "pages": pages, "rows": rows, "page_size": page_size}


def test_from_nodes(benchmark, grid):
    arguments = three_levels(PAGE_SIZE, 0)
    plan = TreePlan.from_nodes(**arguments)
    leaves = plan.nodes[:, plan.rows[1].long()]
    assert plan.num_rows == NUM_ROWS and plan.depth == len(LEVELS)
    assert (leaves[POSITION] == sum(tokens for _, tokens in LEVELS[:-1])).all()

    benchmark.group = "plan"
    benchmark.extra_info["what"] = "from_nodes, 256 leaves on 3 levels"
    benchmark.pedantic(
        TreePlan.from_nodes, kwargs=arguments, warmup_rounds=3, rounds=10 * grid.min_rounds, iterations=10
    )


def test_advance(benchmark, grid):
    rounds, iterations = 10 * grid.min_rounds, 100
    plan = TreePlan.from_nodes(**three_levels(1 << 16, 0))  # a page of a leaf has room for all these steps
    length = plan.nodes[LENGTH].clone()
    plan.advance_()
    assert torch.equal(plan.nodes[LENGTH], length + plan.grows) and plan.grows.sum() == NUM_ROWS

    benchmark.group = "plan"
    benchmark.extra_info["what"] = "advance_, 256 leaves on 3 levels"
    benchmark.pedantic(plan.advance_, warmup_rounds=3, rounds=rounds, iterations=iterations)


def test_append_kv(benchmark, grid, evict_caches):
    rows, num_pages = 64, 4096
    k, v = torch.randn(2, rows, NUM_KV_HEADS, HEAD_DIM).to(DTYPES["bf16"])
    k_cache, v_cache = torch.zeros(2, num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype=k.dtype)
    slots = torch.randperm(num_pages * PAGE_SIZE)[:rows]
    api.append_kv(k, v, k_cache, v_cache, slots)
    for new, cache in ((k, k_cache), (v, v_cache)):
        flat = cache.view(-1, NUM_KV_HEADS, HEAD_DIM)
        assert torch.equal(flat[slots], new) and flat.count_nonzero() == new.count_nonzero()

    def assign():
        k_cache.view(-1, NUM_KV_HEADS, HEAD_DIM)[slots] = k
        v_cache.view(-1, NUM_KV_HEADS, HEAD_DIM)[slots] = v

    benchmark.group = "plan"
    benchmark.extra_info["what"] = f"append_kv, {rows} rows in bf16, caches evicted"
    methods = {OURS: lambda: api.append_kv(k, v, k_cache, v_cache, slots), "torch indexing": assign}
    interleave(benchmark, methods, evict_caches, grid)
