"""The work list of a GPU call: every (node, packed row, token) in one item, states side by side, room for others."""

import random
from dataclasses import replace

import pytest
from forests import Forest, random_forest, star

from tts_kernels.attention.work import Lists, make_work, most_work, refresh, work_lists, work_size
from tts_kernels.configs import TreeConfig
from tts_kernels.tree.plan import TreePlan

CONFIG = TreeConfig(32, 16, 16, 16, 32, 4, 4, 1)
TALL = replace(CONFIG, tall_rows=64)
CONFIGS = pytest.mark.parametrize(
    "config", [CONFIG, CONFIG.invariant(), TALL], ids=["two shapes", "one shape", "three shapes"]
)
HEADS, KV_HEADS, DIM = 6, 2, 16


def lists_of(plan: TreePlan, config: TreeConfig = CONFIG) -> Lists:
    return work_lists(*plan.host_tables(), HEADS // KV_HEADS, config)


def chunk_of(length: int, own_rows: int, config: TreeConfig) -> int:
    """Written down from the rule: at most max_chunks, fewer by as many tiles as the node's own rows fill."""
    tiles = max(-(-own_rows * 3 // config.wide_rows), 1)
    chunk = config.min_chunk
    while chunk * max(config.max_chunks // tiles, 1) < length:
        chunk += config.min_chunk
    return chunk


@pytest.mark.parametrize("kind", ["decode", "verify", "mixed", "chain", "roots"])
@CONFIGS
def test_items_cover_the_tree_once(kind, config):
    for seed in range(20):
        plan = random_forest(random.Random(seed), kind=kind, page_size=4).plan()
        lists = lists_of(plan, config)
        items = [tuple(lists.items[i : i + 4]) for i in range(0, len(lists.items), 4)]
        covered = {}
        for node, first, chunk, tile in items:
            _, length, _, _, begin, own_end, end = plan.nodes[:, node].tolist()
            size = chunk_of(length, own_end - begin, config)
            rows = (config.narrow_rows, config.wide_rows, config.tall_rows)[tile]
            if config.tall_rows:  # the smallest that takes what is left, and only for the last
                left = (end - begin) * 3 - first
                assert rows == next((n for n in (16, 32) if left <= n), 64)
            assert first < (end - begin) * 3 and rows
            for packed in range(first, min(first + rows, (end - begin) * 3)):
                for token in range(chunk * size, min((chunk + 1) * size, length)):
                    key = (node, packed, token)
                    assert key not in covered
                    covered[key] = True
        nodes = plan.nodes.T.tolist()
        assert len(covered) == sum(length * 3 * (end - begin) for _, length, _, _, begin, _, end in nodes)
        assert work_size(*plan.host_tables(), 3, config) == (len(items), lists.num_states)


def test_states_of_a_row_are_its_paths_chunks():
    for seed in range(20):
        plan = random_forest(random.Random(seed), kind="mixed", page_size=4).plan()
        lists = lists_of(plan)
        nodes, expected, total = plan.nodes.T.tolist(), [], 0
        for owner in plan.rows[1].tolist():
            path, node = [], owner
            while node >= 0:
                path.append(node)
                node = nodes[node][0]
            chunks = [
                min(-(-n[1] // CONFIG.min_chunk), -(-n[1] // chunk_of(n[1], n[5] - n[4], CONFIG)))
                if not plan.grows[i]
                else min(max(4 // max(-(-(n[5] - n[4]) * 3 // 32), 1), 1), -(-(n[1] + plan.capacity) // 32))
                for i, n in ((i, nodes[i]) for i in path)
            ]
            expected.append(total)
            total += sum(chunks)
            assert lists.above[owner] == sum(chunks[1:])
        if not plan.capacity:
            assert lists.first_state == expected and lists.num_states == total


def test_a_prefill_keeps_few_states():
    """Many own rows fill the GPU without chunks; with chunks each would cost each row a state."""
    forest = Forest([-1], [8192], [8192], 16).place(random.Random(0))
    config = replace(CONFIG, wide_rows=64, min_chunk=256, max_chunks=16, wide_tokens=64, narrow_tokens=64)
    assert lists_of(forest.plan(), config).num_states == 8192
    decode = star(8, prefix=8192, suffix=[100], page_size=16)
    assert lists_of(decode.plan(), config).num_states == 8 * (16 + 1)


def test_most_work_holds_for_any_tree_of_as_many_nodes_and_rows():
    rng = random.Random(0)
    reached = 0
    for _ in range(400):
        num_nodes = rng.randrange(1, 7)
        parent = [rng.randrange(-1, i) if rng.random() < 0.8 else -1 for i in range(num_nodes)]
        length = [rng.choice([0, 1, 31, 32, 33, 100, 200, 1000]) for _ in range(num_nodes)]
        rows = [min(n, rng.choice([0, 1, 3, 20, 60])) for n in length]
        plan = Forest(parent, length, rows, 16).place(rng).plan()
        plan.most_tokens = sum(-(-n // 16) * 16 for n in length)
        for config in (CONFIG, CONFIG.invariant(), TALL):
            lists = lists_of(plan, config)
            num_items, num_states = most_work(plan, 3, config)
            assert len(lists.items) // 4 <= num_items and lists.num_states <= num_states
            reached += len(lists.items) // 4 == num_items
    assert reached  # or the bound is a guess


def test_refresh_writes_the_same_table_that_a_new_plan_makes():
    first, second = (star(3, prefix=p, suffix=[5, 70, 9], page_size=16, seed=p) for p in (200, 150))
    plan = first.plan()
    plan.most_tokens = 2000
    key = (HEADS, KV_HEADS, DIM, None, None)
    plan.works[key] = work = make_work(plan, HEADS, KV_HEADS, DIM, CONFIG)
    fresh = second.plan()
    fresh.most_tokens = 2000
    refresh(plan.works, fresh)
    assert work.table.equal(make_work(fresh, HEADS, KV_HEADS, DIM, CONFIG).table)
