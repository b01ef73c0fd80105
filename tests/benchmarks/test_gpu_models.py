"""Whole-model runs, on a CPU: loops over tensors that stay where they are, shares of parts, what a record and a page
say of them."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # plain `pytest` does not have it

pytest.importorskip("transformers")
pytest.importorskip("tts_kernels.measure.compiling", exc_type=ImportError)
from benchmarks.gpu import loops, models, page, parts, record  # noqa: E402
from tts_kernels import KVTree, tree_attention  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield models.Models(models.DRY, CPU)
    torch.set_num_threads(threads)


@torch.no_grad()
def test_a_dry_run(small):
    """What a record holds of it, and the page's table; no graph on a CPU, and the record says so."""
    decode, score = small.decode(3, 32, 18), small.score(**models.DRY["score"])
    stage = {"status": "passed", "seconds": 1.0, "budget_s": 2.0, "lines": [], "decode": [decode], "score": [score]}
    record.check(stage, record.SCHEMA["$defs"]["models"], "models")
    for e in (decode, score["one_shot"], score["step_wise"]):
        assert set(e["methods"]) == {"ours", "not shared", "stock"} and not e["wrong"]
        assert set(e["missing"]) == {f"{name}, graph" for name in e["methods"]}
        for run in e["methods"].values():
            assert set(run["parts"]) >= {"linear layers", "attention", "head", "rest", "host gap"}
            assert sum(run["parts"].values()) == pytest.approx(run["eager_s"])
    assert set(decode["missing"].values()) == {models.NO_GRAPHS}
    assert score["step_wise"]["missing"]["stock, graph"] == models.STOCK_WAITS
    # Shared with stock: the very same scores. Each has KV of its own where steps are not its own.
    assert max(run["error"] for run in score["one_shot"]["methods"].values()) < 1e-5
    text = "\n".join(page.whole_models(stage))
    assert "| decode, N = 3, 32 + 18 tokens | ours | " in text and "no stock, graph: a CPU has no CUDA graphs" in text
    assert "| step-wise scores, 4 candidates of 3 x 16 tokens behind 16 | not shared | " in text
    assert page.whole_models({}) == []


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
def test_a_loop_follows_its_tree(small, shared):
    """Over pages' borders, and what it reads is what it was given: another token, other logits."""
    loop = loops.TreeDecode(small.model, 3, 32, 13, 8, shared)
    for _ in range(6):
        ids = loop.ids.clone()
        got = loop.step().clone()
        torch.testing.assert_close(got, loop.anew(ids), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(got, loop.anew((ids + 1) % 128), atol=1e-3)
        assert torch.equal(loop.ids, got.argmax(-1))
        loop.grow()


@torch.no_grad()
def test_a_loop_that_does_not_follow_has_no_time(small, monkeypatch):
    monkeypatch.setattr(loops.TreeDecode, "grow", lambda loop: loop.tree.kv.append(loop.leaves))
    entry = small.decode(3, 32, 18)
    assert entry["wrong"] == ["ours", "not shared"] and set(entry["methods"]) == {"stock"}
    assert entry["missing"]["ours"].startswith("Wrong: the advanced plan: off by")


@torch.no_grad()
def test_a_graph_that_is_wrong_has_no_time(small, monkeypatch):
    call = loops.Replayed.__call__
    monkeypatch.setattr(models.Replayed, "__call__", lambda replayed: call(replayed) * 1.5)
    entry = small.decode(3, 32, 18)
    assert set(entry["wrong"]) == {"ours", "not shared", "stock"}
    assert entry["missing"]["ours"].startswith("Wrong: the graph: off by 0.5")


@torch.no_grad()
def test_the_static_cache_can_be_run_again(small):
    loop = loops.StaticDecode(small.model, 3, 20, 48)
    ids = loop.ids.clone()
    first, second = loop.step().clone(), loop.step().clone()
    loop.ids.copy_(ids)
    loop.restart()
    assert torch.equal(loop.step(), first) and torch.equal(loop.step(), second)


def test_candidates_with_several_rows_without_sharing():
    """As shared, by the same pages; none of a path's nodes but the last may end inside a page."""
    tree = KVTree(1, 40, 16, 2, 16, dtype=torch.float32, device=CPU)
    caches = tree.k_cache[0].normal_(), tree.v_cache[0].normal_()
    root = tree.add(None, 32)
    leaves = tree.fork(root, 3)
    tree.append(leaves, [21, 16, 5])
    rows = dict.fromkeys(leaves, 5)
    plan, q = tree.plan(rows, reserve=20), torch.randn(15, 4, 16)
    alone = loops.unshared(plan)
    assert alone.num_nodes == 3 and alone.num_tokens == 3 * 32 + 42 and alone.depth == 1
    for _ in range(2):
        torch.testing.assert_close(tree_attention(q, *caches, alone), tree_attention(q, *caches, plan))
        plan.advance_(7), alone.advance_(7)
    odd = tree.add(None, 30)
    with pytest.raises(ValueError, match="expected whole pages, got 30 tokens in one"):
        loops.unshared(tree.plan({tree.add(odd, 3): 2}))
    with pytest.raises(ValueError, match="depth-first order"):
        loops.unshared(tree.plan({tree.add(root, 3): 2, tree.add(None, 3): 1, tree.add(root, 2): 1}))


class Events:
    """The clock of a device that takes 1 ms for each event."""

    def __init__(self):
        self.now = 0.0

    def __call__(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(time=None, synchronize=lambda: None)
        event.record = lambda: vars(event).update(time=self.tick(0.001))
        event.elapsed_time = lambda other: (other.time - event.time) * 1e3
        return event

    def tick(self, seconds):
        self.now += seconds
        return self.now


def test_ranges_of_events_exclude_what_is_inside():
    events = Events()
    clock = parts.EventClock(events)
    with clock("rest"):
        events.tick(0.5)
        with clock("attention"):
            events.tick(0.25)
        events.tick(0.125)
        with pytest.raises(RuntimeError), clock("attention"):
            raise RuntimeError
    events.tick(7.0)  # after the last
    assert clock.seconds == pytest.approx({"rest": 0.628, "attention": 0.252})


@pytest.mark.parametrize("whole, scale, gap", [(4.0, 1.0, 1.0), (1.5, 0.5, 0.0)])
def test_parts_sum_to_the_whole(whole, scale, gap):
    got = parts.summing_to(whole, {"rest": 1.0, "attention": 2.0})
    assert got == {"attention": 2 * scale, "rest": scale, "host gap": gap} and math.isclose(sum(got.values()), whole)


@torch.no_grad()
def test_every_range_is_met(small):
    """Ours has all parts; stock's cache grows in its own; afterwards everything is as before."""
    forward, append = torch.nn.Linear.forward, parts.transformers_attention.append_kv
    for loop, without in (
        (loops.TreeDecode(small.model, 2, 16, 4, 2, True), set()),
        (loops.StockDecode(small.model, 2, 20), set()),
    ):
        got = parts.parts_of(loop.step, small.model, CPU, 1.0)
        assert set(got) == set(parts.PARTS) - without and min(got[p] for p in parts.PARTS[:-1]) > 0
    assert torch.nn.Linear.forward is forward and parts.transformers_attention.append_kv is append
