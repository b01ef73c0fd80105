"""A decode loop over a tree that grows, branches and is pruned, captured once and replayed: every replay gives what an
eager call with a plan of its own gives, and what the reference gives.

On a GPU the loop's layers are one torch.cuda.CUDAGraph. On the CPU, where the kernels are emulated and interpreted, a
replay repeats the calls of the backend with the very arguments of the first time, which is what a graph keeps.
"""

from __future__ import annotations

import importlib
import random

import attention_paths as paths
import pytest
import torch

from tts_kernels import KVTree, Room, append_kv, tree_attention

ROOM = Room(nodes=40, rows=8, depth=12)
NUM_LAYERS, PAGE_SIZE, HEADS, KV_HEADS, DIM = 2, 4, 8, 2, 64
DTYPE = torch.float16


def kernels() -> list:
    found = paths.available(paths.ALL + paths.WARPGROUPS)
    return [param for param in found if param.values[0].backend in ("cuda", "triton")]


class Layers:
    """What is captured: for each layer the new tokens' KV is stored, and all rows attend."""

    def __init__(self, tree: KVTree, path: paths.Path) -> None:
        self.tree, self.backend, self.device = tree, path.backend, path.device
        self.plan = None
        self.slots = torch.full((ROOM.rows,), -1, dtype=torch.int64, device=self.device)
        self.q, self.out = (self.zeros(HEADS) for _ in range(2))
        self.k, self.v = (self.zeros(KV_HEADS) for _ in range(2))
        self.lse = None

    def zeros(self, heads: int) -> torch.Tensor:
        return torch.zeros(NUM_LAYERS, ROOM.rows, heads, DIM, dtype=DTYPE, device=self.device)

    def __call__(self) -> None:
        tree, lse = self.tree, []
        for layer in range(NUM_LAYERS):
            caches = tree.k_cache[layer], tree.v_cache[layer]
            append_kv(self.k[layer], self.v[layer], *caches, self.slots, backend=self.backend)
            _, of_layer = tree_attention(
                self.q[layer], *caches, self.plan, out=self.out[layer], return_lse=True, backend=self.backend
            )
            lse.append(of_layer)
        self.lse = lse


class CudaGraph:
    def __init__(self, layers: Layers) -> None:
        layers()  # compiles, and makes the work list
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            layers()

    def replay(self) -> None:
        self.graph.replay()


class Calls:
    def __init__(self, layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
        module = importlib.import_module(f"tts_kernels.attention.{layers.backend}")
        self.calls = []
        layers()
        attention = (module.TreeCall, "__call__") if layers.backend == "cuda" else (module, "tree_attention")
        for owner, name in ((module, "append_kv"), attention):
            monkeypatch.setattr(owner, name, self.recorder(getattr(owner, name)))
        layers()
        monkeypatch.undo()

    def recorder(self, function):
        def record(*args):
            self.calls.append((function, args))
            return function(*args)

        return record

    def replay(self) -> None:
        for function, args in self.calls:
            function(*args)


class Search:
    """Leaves grow by a token a step. Now and then one forks or is given up; most steps only advance the plan."""

    def __init__(self, tree: KVTree, seed: int) -> None:
        self.tree, self.rng = tree, random.Random(seed)
        trunk = tree.add(None, 150)
        self.leaves = tree.fork(trunk, 3)
        tree.append(self.leaves, 1)

    def step(self, plan, room=None):
        """(the plan of this step, whether it was only advanced)"""
        tree, rng = self.tree, self.rng
        what = rng.random() if plan else 0.0
        if what < 0.2 and len(self.leaves) < ROOM.rows - 1:
            parent = self.leaves.pop(rng.randrange(len(self.leaves)))
            self.leaves += tree.fork(parent, 2)
            tree.release(parent)
        elif what < 0.4 and len(self.leaves) > 1:
            tree.release(self.leaves.pop(rng.randrange(len(self.leaves))))
        elif what < 0.5:
            rng.shuffle(self.leaves)
        elif plan.capacity:
            tree.append(self.leaves)
            return plan.advance_(), True
        tree.append(self.leaves)
        return tree.plan(dict.fromkeys(self.leaves, 1), room=room, into=plan, reserve=6), False


@pytest.mark.parametrize("path", kernels(), ids=str)
def test_a_captured_decode_loop_follows_a_tree_that_grows_and_branches(path, monkeypatch):
    path.select(monkeypatch)
    on_gpu = path.device == "cuda"
    tree = KVTree(NUM_LAYERS, 600, PAGE_SIZE, KV_HEADS, DIM, dtype=DTYPE, device=path.device)
    generator = torch.Generator(path.device).manual_seed(0)

    def random_like(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator, device=path.device).to(DTYPE)

    for cache in (*tree.k_cache, *tree.v_cache):
        cache.copy_(random_like(cache))
    layers, search = Layers(tree, path), Search(tree, seed=7)
    layers.plan, _ = search.step(None, ROOM)
    layers.slots[: len(search.leaves)] = tree.slots(dict.fromkeys(search.leaves, 1))
    with monkeypatch.context() as patch:
        graph = CudaGraph(layers) if on_gpu else Calls(layers, patch)

    kinds = set()
    for _ in range(60 if on_gpu else 12):
        before = {id(work): work.table.data_ptr() for work in layers.plan.works.values()}
        plan, advanced = search.step(layers.plan)
        assert plan is layers.plan and before == {id(w): w.table.data_ptr() for w in plan.works.values()}
        rows = dict.fromkeys(search.leaves, 1)
        kinds.add((advanced, len(rows)))
        layers.slots.fill_(-1)
        layers.slots[: len(rows)] = tree.slots(rows)
        for x in (layers.q, layers.k, layers.v):
            x.copy_(random_like(x))
        layers.out.fill_(torch.nan)
        graph.replay()

        fresh, n = tree.plan(rows), len(rows)
        for layer in range(NUM_LAYERS):
            caches = tree.k_cache[layer], tree.v_cache[layer]
            got = layers.out[layer]
            assert not got[n:].any()
            eager = tree_attention(layers.q[layer, :n], *caches, fresh, backend=path.backend)
            right = tree_attention(layers.q[layer, :n], *caches, fresh, backend="reference")
            torch.testing.assert_close(got[:n], right, rtol=2e-3, atol=2e-3)
            if path.backend == "cuda":  # a row's result depends on its own path alone
                assert torch.equal(got[:n], eager)
            else:
                torch.testing.assert_close(got[:n], eager, rtol=2e-3, atol=2e-3)
            # The tokens of this step are in the caches: nothing before them was lost.
            page, offset = layers.slots[:n] // PAGE_SIZE, layers.slots[:n] % PAGE_SIZE
            assert torch.equal(caches[0][page, offset], layers.k[layer, :n])
    assert {advanced for advanced, _ in kinds} == {True, False} and len({count for _, count in kinds}) > 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("path", [p for p in kernels() if p.values[0].device == "cuda"], ids=str)
def test_writing_a_plan_waits_for_nothing(path):
    """While the stream is held up, a plan is written twice; both arrive in order."""
    tree = KVTree(1, 600, PAGE_SIZE, KV_HEADS, DIM, dtype=DTYPE, device="cuda")
    search = Search(tree, seed=1)
    layers = Layers(tree, path)
    layers.plan, _ = search.step(None, ROOM)
    layers()

    def write_twice() -> None:
        for _ in range(2):
            tree.append(search.leaves)
            tree.plan(dict.fromkeys(search.leaves, 1), into=layers.plan)

    # Held up here too, so that both writes take pinned memory of their own. Torch keeps it: taking more may wait.
    torch.cuda._sleep(10**8)
    write_twice()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(10**9)  # half a second: other processes may use the cores meanwhile
        held = torch.cuda.Event()
        held.record()
        write_twice()
        assert not held.query(), "the stream was waited for"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert layers.plan.nodes.cpu().equal(layers.plan.host[0])
    (work,) = layers.plan.works.values()
    before = work.table.clone()
    work.refresh(layers.plan)
    assert work.table.equal(before)
