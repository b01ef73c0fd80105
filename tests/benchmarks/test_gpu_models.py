"""Whole-model runs, on a CPU and on a GPU that is not there (tests/pretend_gpu.py): loops over tensors that stay where
they are, also when a captured step is replayed, shares of parts, what a record and a page say of them."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pretend_gpu import PretendGpu

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # plain `pytest` does not have it

pytest.importorskip("transformers")
pytest.importorskip("tts_kernels.measure.compiling", exc_type=ImportError)
from benchmarks.gpu import bench, cases, loops, models, page, parts, record  # noqa: E402
from benchmarks.peers import portable, unshared  # noqa: E402
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


@pytest.fixture
def gpu():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with PretendGpu() as gpu:
        yield gpu
    torch.set_num_threads(threads)


@torch.no_grad()
def test_on_a_gpu_steps_are_captured_and_replayed(gpu):
    """Everything is on the device, nothing waits for it while a graph is captured, and replays follow the tree."""
    given = models.Models(models.DRY, torch.device("cuda"))
    given.check()
    decode = given.decode(3, 32, 18)
    assert not decode["missing"] and not decode["wrong"]
    for run in decode["methods"].values():
        assert run["graph_s"] > 0 and run["graph_error"] < 0.05 and sum(run["parts"].values()) > 0
    # Three lengths of ours and of ours not shared, one of the static cache; a graph replays what is timed and compared.
    assert len(gpu.graphs) == 7 and all(graph.replays > given.calls * given.rounds for graph in gpu.graphs)
    score = given.score(**models.DRY["score"])
    assert not score["one_shot"]["wrong"] and not score["step_wise"]["wrong"]
    assert set(score["step_wise"]["missing"]) == {"stock, graph"} and len(gpu.graphs) == 13
    assert "graph_s" in score["step_wise"]["methods"]["not shared"]
    stage = {"status": "passed", "seconds": 1.0, "budget_s": 2.0, "lines": [], "decode": [decode], "score": [score]}
    record.check(stage, record.SCHEMA["$defs"]["models"], "models")


@torch.no_grad()
def test_a_step_of_a_loop_waits_for_nothing(gpu):
    given = models.Models(models.DRY, torch.device("cuda"))
    ids = torch.randint(128, (3, 16), device="cuda")
    whole = loops.StockScores(given.model, given.head, torch.randint(128, (3, 48), device="cuda"), 16, 2, 16)
    made = {
        "ours": loops.TreeDecode(given.model, 3, 32, 7, 4, True),
        "not shared": loops.TreeDecode(given.model, 3, 32, 7, 4, False),
        "default cache": loops.StockDecode(given.model, 3, 39),
        "static cache": loops.StaticDecode(given.model, 3, 39, 48),
        "step-wise": loops.TreeScores.increment(given.model, given.head, 3, 16, 16, ids, True),
    }
    for name, loop in made.items():
        loop.step()
        gpu.waits.clear()
        loop.step()
        if hasattr(loop, "grow"):
            loop.grow()
        assert not gpu.waits, name
    whole.step()
    assert gpu.waits, models.STOCK_WAITS


@torch.no_grad()
def test_a_step_that_cannot_be_captured_is_named(gpu, monkeypatch):
    step = loops.TreeDecode.step

    def looks(loop):
        out = step(loop)
        loop.ids.tolist()
        return out

    monkeypatch.setattr(loops.TreeDecode, "step", looks)
    entry = models.Models(models.DRY, torch.device("cuda")).decode(3, 32, 18)
    assert "tolist: operation not permitted when stream is capturing" in entry["missing"]["ours, graph"]
    assert entry["methods"]["ours"]["eager_s"] > 0 and "graph_s" in entry["methods"]["stock"]


@torch.no_grad()
def test_a_graph_that_keeps_what_python_computed_is_found(gpu, monkeypatch):
    """A length that a step asks Python for is the captured one for ever."""
    forward = models.TreeModel.forward

    def frozen(tree, rows, ids, *, plan=None):
        if plan is not None and gpu.capturing:
            plan = tree.kv.plan(rows)
        return forward(tree, rows, ids, plan=plan)

    monkeypatch.setattr(models.TreeModel, "forward", frozen)
    monkeypatch.setattr(PretendGpu, "wait", lambda gpu, what: None)
    entry = models.Models(models.DRY, torch.device("cuda")).decode(3, 32, 18)
    assert entry["wrong"] == ["ours", "not shared"] and "the advanced plan: off by" in entry["missing"]["ours"]


@pytest.mark.parametrize("case", bench.all_cases(cases.grid("dry"), "cuda"), ids=lambda case: case.name)
def test_cases_of_the_bench_on_a_gpu(gpu, case, monkeypatch):
    """Input sets, references, captures and replays, with peers: all on one device, and only what kernels there are for
    is missing."""
    monkeypatch.setattr(portable, "reason_against", lambda case: "interpreted, it takes long")
    ceilings = {"bytes_per_s": 1e12, "flops_per_s": {"fp32": 1e12}, "cache_bytes": 10 << 10}
    entry = bench.measure(case, torch.device("cuda"), ceilings, 2, False)
    assert entry["status"] == "ok" and not entry["wrong"] and "ours" in entry["methods"]
    for name, why in entry["missing"].items():
        assert name in ("two-pass flash", "sdpa cudnn", "compiled head") or "Error" not in why, f"{name}: {why}"
    record.check(entry | {"seconds": 1.0}, record.SCHEMA["$defs"]["case"], "case")


def test_a_peer_that_cannot_be_captured_costs_nobody_else_a_time(gpu, monkeypatch):
    case = next(case for case in bench.all_cases(cases.grid("dry"), "cuda") if case.op == "tree_attention")

    def prepare(inputs):
        attend = unshared.prepare(inputs)

        def run():
            torch.cuda.synchronize()
            return attend()

        return run

    waits = SimpleNamespace(NAME="waits", prepare=prepare, reason_against=lambda _: "", bytes_read=unshared.bytes_read)
    monkeypatch.setattr(type(case), "peers", (waits, unshared))
    ceilings = {"bytes_per_s": 1e12, "flops_per_s": {"fp32": 1e12}, "cache_bytes": 10 << 10}
    begun = []
    entry = bench.measure(case, torch.device("cuda"), ceilings, 2, False, begin=begun.append)
    assert list(entry["methods"]) == ["ours", "ours, not shared"] and begun == ["ours", "waits", "ours, not shared", ""]
    assert "synchronize: operation not permitted when stream is capturing" in entry["missing"]["waits"]
    left_out = bench.measure(case, torch.device("cuda"), ceilings, 2, False, {"waits": "it hangs"})
    assert left_out["missing"] == {"waits": "it hangs"} and len(left_out["methods"]) == 2


def test_what_the_gpu_that_is_not_there_finds(gpu):
    x, host = torch.arange(4.0, device="cuda"), torch.ones(4)
    with pytest.raises(RuntimeError, match="expected all tensors on cuda:0, got one on cpu"):
        x + host
    assert not gpu.waits
    x.to("cuda"), x * 2, x[1:], x.copy_(host, non_blocking=True)
    assert not gpu.waits
    x.tolist(), x.sum().item(), x[x > 0], x.cpu(), host.to(x.device), torch.tensor([1.0], device="cuda")
    assert len(gpu.waits) == 6
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
        z = y[1:] + 1
    with pytest.raises(RuntimeError, match="previous error"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="captures_underway"):  # as torch is, before 2.12
        torch.cuda.empty_cache()
    x.fill_(5.0)
    graph.replay()
    assert y.tolist() == [10.0] * 4 and z.tolist() == [11.0] * 3
