"""The work list that the device makes: number by number the host's, which tests/attention/test_work.py looks at."""

import random
from dataclasses import replace

import emulated
import pytest
import torch
from forests import Forest, random_forest, star
from own_process import failure

from tts_kernels.attention.device_work import make_device_work
from tts_kernels.attention.work import make_work, work_lists
from tts_kernels.configs import TreeConfig
from tts_kernels.tree.kv_tree import KVTree
from tts_kernels.tree.plan import TreePlan
from tts_kernels.tree.room import Room

THREE = TreeConfig(32, 16, 16, 16, 32, 4, 4, 1, tall_rows=64)
CONFIGS = (
    THREE,
    replace(THREE, tall_rows=0),
    replace(THREE, tall_rows=0, narrow_rows=0),
    replace(THREE, max_chunks=64),
)
HEADS, KV_HEADS, DIM = 6, 2, 16


pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))


@pytest.fixture(scope="module")
def native():
    return emulated.native()


def check(plan: TreePlan, native, config=THREE, heads=(HEADS, KV_HEADS)) -> None:
    native.cuda_emulation_seed(plan.num_nodes)
    on_device = make_device_work(plan, *heads, DIM, config, native)
    on_host = make_work(plan, *heads, DIM, config)
    assert (on_device.num_items, on_device.num_states) == (on_host.num_items, on_host.num_states)
    assert on_device.table.tolist() == on_host.table.tolist()
    assert (
        on_device.tile == on_host.tile
        and on_device.scratch.numel() == on_host.scratch.numel() + plan.num_rows * heads[0]
    )
    assert not on_device.scratch[on_host.scratch.numel() :].any()


@pytest.mark.parametrize("kind", ["decode", "verify", "mixed", "chain", "roots"])
def test_it_is_the_hosts(kind, native):
    for seed in range(6):
        plan = random_forest(random.Random(seed), kind=kind, page_size=4).plan()
        for config in CONFIGS:
            check(plan, native, config)
        if plan.capacity:
            plan.advance_()
            check(plan, native)


def test_one_head_for_all_and_one_for_each(native):
    plan = random_forest(random.Random(0), kind="mixed", page_size=4).plan()
    for heads in ((1, 1), (16, 1), (8, 8)):
        check(plan, native, heads=heads)


def test_more_nodes_than_a_block_looks_at(native):
    """700 nodes: several tiles of nodes, several blocks, equal chunks in several of them; a chain among them."""
    rng = random.Random(1)
    parent = [-1] + [i if i < 40 else rng.randrange(-1, i) for i in range(699)]
    length = [rng.choice([0, 1, 5, 32, 33, 64, 200]) for _ in parent]
    rows = [min(t, rng.choice([0, 0, 1, 1, 7])) for t in length]
    check(Forest(parent, length, rows, 4).place(rng, reserve=3).plan(), native)


def test_no_nodes_no_rows_no_tokens(native):
    for parent, length, rows in (([], [], []), ([-1], [0], [0]), ([-1, 0], [5, 3], [0, 0])):
        check(Forest(parent, length, rows, 4).place(random.Random(0)).plan(), native)


def test_a_long_node_with_many_tiles(native):
    check(star(70, prefix=900, suffix=[3, 40], page_size=16).plan(), native, replace(THREE, max_chunks=64))


def test_it_follows_a_tree_that_grows_and_branches(native):
    """Written in place, by one launch for each list, with the rest of the table named as what no node has."""
    tree = KVTree(1, 300, 4, KV_HEADS, DIM, dtype=torch.float32, device="cpu")
    rng = random.Random(3)
    leaves = tree.fork(tree.add(None, 50), 2)
    plan = None
    for step in range(12):
        if step % 3 == 2:
            parent = leaves.pop(rng.randrange(len(leaves)))
            leaves += tree.fork(parent, 2)
            tree.release(parent)
        if len(leaves) > 4:
            tree.release(leaves.pop(0))
        tree.append(leaves, [rng.choice([1, 3, 30]) for _ in leaves])
        rows = dict.fromkeys(leaves, 1)
        room = None if plan else Room(nodes=30, rows=8)
        plan = tree.plan(rows, room=room, into=plan, reserve=rng.choice([0, 9]))
        if not plan.works:
            for config in CONFIGS:
                plan.works[config] = make_device_work(plan, HEADS, KV_HEADS, DIM, config, native)
        for config, work in plan.works.items():
            host = work_lists(*plan.host_tables(), HEADS // KV_HEADS, config)
            live = len(host.items) // 4
            assert live <= work.num_items and host.num_states <= work.num_states
            expected = [*host.items, *(0, 0, config.max_chunks, 0) * (work.num_items - live), *host.above,
                        *host.first_state, live]  # fmt: skip
            assert work.table.tolist() == expected


@pytest.mark.parametrize(
    "old, new",
    [
        ("bool earlier = begin + i < node", "bool earlier = begin + i <= node"),
        ("store_item(p, item, 0, 0, p.max_chunks, kNarrow)", "store_item(p, item, 0, 0, 0, kNarrow)"),
        ("shared.owned[mine] = {first_item, first_state, work};\n", "shared.owned[mine] = {first_item, 0, work};\n"),
    ],
)
def test_a_planted_error_is_found(old, new, native):
    wrong = emulated.edited({"csrc/cuda/work_list.cu": [(old, new)]}, ["csrc/bindings.cpp", "csrc/cuda/*.cu"])
    tree = KVTree(1, 300, 4, KV_HEADS, DIM, dtype=torch.float32, device="cpu")
    leaves = tree.fork(tree.add(None, 50), 3)
    tree.append(leaves, 40)
    plan = tree.plan(dict.fromkeys(leaves, 2), room=Room(nodes=6, rows=8))
    check(plan, native)
    assert failure(lambda: check(plan, wrong))
