"""explain: against brute force over the paths of random forests (the kinds that stress the plan), against a case
counted by hand on every backend, and against what the kernels do: their launches, their states, the work list."""

import dataclasses
import importlib
import random
import re
from pathlib import Path

import attention_cases as cases
import attention_paths as paths
import pytest
import torch
from attention_cases import BF16, FP8, FP16, FP32, Case, one_thread
from forests import Forest, star

import tts_kernels as tts
from tts_kernels.attention import api

ROOT = Path(__file__).resolve().parents[2]
RATES = {"bandwidth": 1e9, "flops": 1e9}


def needs(backend):
    reasons = "; ".join(tts.unsupported_reasons("tree_attention", backend, torch.empty(0, 1, 16)))
    return pytest.mark.skipif(bool(reasons), reason=reasons)


needs_cpu, needs_triton = needs("cpu"), needs("triton")


def tensors(plan, num_pages, heads=(4, 2), head_dim=32, dtypes=(FP32, FP32), page_size=4, device="cpu"):
    q = torch.zeros(plan.num_rows, heads[0], head_dim, dtype=dtypes[0], device=device)
    return q, torch.zeros(num_pages, page_size, heads[1], head_dim, device=device).to(dtypes[1])


def counted_by_hand(dtype=FP32):
    """A prefix of 100 tokens, under it two leaves of 10 with a row each; a root of 7 that no row sees."""
    forest = Forest([-1, 0, 0, -1], [100, 10, 10, 7], [0, 1, 1, 0]).place(random.Random(0))
    plan = forest.plan()
    return plan, *tensors(plan, forest.num_pages, dtypes=(dtype, dtype))


@pytest.mark.parametrize("kind", ["decode", "verify", "mixed", "chain", "roots"])
@pytest.mark.parametrize("dtypes, heads, head_dim", [((FP32, FP32), (6, 2), 32), ((BF16, FP8), (5, 1), 48)])
def test_against_brute_force(path, kind, dtypes, heads, head_dim):
    for seed in range(4):
        forest = cases.make_inputs(Case(kind=kind, page_size=4, seed=seed)).forest
        plan = forest.plan(device=path.device)
        dtypes = tuple(path.takes(dtype) for dtype in dtypes)
        q, k_cache = tensors(plan, forest.num_pages, heads, head_dim, dtypes, device=path.device)
        got = tts.explain(plan, q, k_cache, backend=path.backend, **RATES)

        tokens = [
            [(node, t) for node in forest.path(owner) for t in range(forest.length[node])]
            for owner in range(forest.num_nodes)
            for _ in range(forest.rows[owner])
        ]  # of each row
        distinct, all_reads = len(set().union(*tokens)), sum(map(len, tokens))
        token_bytes = 2 * heads[1] * head_dim * dtypes[1].itemsize
        q_bytes = forest.num_rows * heads[0] * head_dim * dtypes[0].itemsize
        assert got.backend == path.backend and got.why == "asked for" and got.refused == {}
        assert (got.num_rows, got.num_nodes, got.num_tokens) == (forest.num_rows, forest.num_nodes, forest.num_tokens)
        assert got.least_bytes == token_bytes * distinct + 2 * q_bytes
        assert got.replicated_bytes == token_bytes * all_reads + 2 * q_bytes
        assert got.flops == 4 * heads[0] * head_dim * all_reads
        assert got.bytes_read == token_bytes * distinct + q_bytes + got.state_bytes // 2
        # Every token of a node that rows see is loaded at least once, and has a state at least for each of them.
        assert got.kv_bytes_loaded >= token_bytes * distinct and got.kv_bytes_loaded % token_bytes == 0
        states = [len({node for node, _ in seen}) for seen in tokens]
        if path.backend == "cuda":  # what it finds in one node it writes out
            states = [count for count in states if count > 1]
        states = heads[0] * sum(states)
        assert got.state_bytes >= states * (head_dim + 2) * 4 * 2
        assert got.issued_flops >= got.flops
        assert got.work_items >= len({node for seen in tokens for node, _ in seen})
        if path.backend == "reference":
            assert got.kv_bytes_loaded == token_bytes * distinct
            assert got.state_bytes == states * (head_dim + 2) * 4 * 2
            assert got.issued_flops == got.flops


COMMON = {
    "why": "asked for",
    "refused": {},
    "num_rows": 2,
    "num_nodes": 4,
    "num_tokens": 127,
    "kv_bytes_loaded": 61440,  # 120 tokens, once: 2 * 2 * 32 * 4 = 512 bytes each
    "state_bytes": 4352,  # 4 heads, of 2 rows in the prefix and 1 in each leaf: 16 states of 34 numbers
    "bytes_read": 64640,  # 61440, q 1024, states read 2176
    "least_bytes": 63488,  # 61440, q and out
    "replicated_bytes": 114688,  # 2 * 110 tokens, q and out
    "flops": 112640,  # 4 * 4 * 32 * 220
    "bandwidth": 1e9,
    "bandwidth_from": "given",
    "flop_rate": 1e9,
    "flop_rate_from": "given",
    "floor_seconds": 112640 / 1e9,
    "bound": "compute",
}


def test_by_hand_reference():
    wanted = {"backend": "reference", "config": "plain torch", "work_items": 3, "launches": None}
    got = tts.explain(*counted_by_hand(), backend="reference", **RATES)
    assert dataclasses.asdict(got) == COMMON | wanted | {"issued_flops": 112640}
    # Ten times slower memory: 63.5 us to read, 11.3 us to compute at ten times the rate.
    got = tts.explain(*counted_by_hand(), backend="reference", bandwidth=1e9, flops=1e10)
    assert (got.bound, got.floor_seconds) == ("memory", 63488 / 1e9)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's tiles")
def test_by_hand_triton():
    """4 packed rows in the prefix, 2 in a leaf: tiles of 16 rows x 32 tokens, one chunk each, 2 KV heads. Issued:
    4 * 32 for each of 2 * 16 rows and 128 + 32 + 32 tokens."""
    got = tts.explain(*counted_by_hand(), backend="triton", **RATES)
    config = (
        "wide_rows=32, wide_tokens=64, narrow_rows=16, narrow_tokens=32, min_chunk=128, max_chunks=8, num_warps=4, "
        "num_stages=1, source=interpreter"
    )
    wanted = {"backend": "triton", "config": config, "work_items": 6, "launches": 2}
    assert dataclasses.asdict(got) == COMMON | wanted | {"issued_flops": 4 * 32 * 2 * 16 * 192}


@needs_cpu
@pytest.mark.parametrize(
    "isa, dtype, issued",
    [
        # First product: packed rows padded to lanes. Second: 4 packed rows in the prefix, 2 in a leaf. 2 KV heads.
        ("portable", FP32, 2 * 2 * 32 * (100 * (4 + 4) + 2 * 10 * (4 + 2))),
        ("avx2", FP32, 2 * 2 * 32 * (100 * (8 + 4) + 2 * 10 * (8 + 2))),
        ("avx512", FP16, 2 * 2 * 32 * (100 * (16 + 4) + 2 * 10 * (16 + 2))),
        ("amx-emulated", FP16, 2 * 2 * 32 * (100 * (16 + 4) + 2 * 10 * (16 + 2))),
        # 16 rows; 112 and 16 tokens in the first product, 128 and 32 in the second.
        ("amx-emulated", BF16, 2 * 2 * 32 * 16 * ((112 + 128) + 2 * (16 + 32))),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_by_hand_cpu(isa, dtype, issued, threads, monkeypatch):
    """An item for each node, with both KV heads; where there are two threads one for each head of the prefix, which
    alone is more than an eighth of the work. One thread: the call is too small to wake another."""
    path = next(path for path in paths.ALL if path.isa == isa)
    if path.missing():
        pytest.skip(path.missing())
    path.select(monkeypatch)
    torch.set_num_threads(threads)
    plan, q, k_cache = counted_by_hand(dtype)
    got = tts.explain(plan, q, k_cache, backend="cpu", **RATES)
    note = " (FMA items: q is not bfloat16)" if isa.startswith("amx") and dtype != BF16 else ""
    assert got.config == f"{isa}{note}, 1 thread" and got.launches is None
    assert got.work_items == {1: 3, 2: 4}[threads]
    assert got.kv_bytes_loaded == 61440 * dtype.itemsize // 4
    assert (got.state_bytes, got.flops, got.issued_flops) == (4352, 112640, issued)


@needs_cpu
def test_cpu_schedules_by_hand():
    """A node of 600 rows is cut into parts of 150, which read its KV four times. A node of 2048 tokens and one row has
    4 chunks of 512: one thread folds them into one state, two threads keep them apart."""

    def counts(length, rows, threads):
        torch.set_num_threads(threads)
        forest = Forest([-1], [length], [rows]).place(random.Random(0))
        plan = forest.plan()
        got = tts.explain(plan, *tensors(plan, forest.num_pages, heads=(1, 1)), backend="cpu", **RATES)
        threads = int(re.search(r"(\d) thread", got.config)[1])
        return threads, got.work_items, got.kv_bytes_loaded // 256, got.state_bytes // (34 * 8)

    assert counts(600, 600, threads=1) == (1, 4, 2400, 600)
    assert counts(2048, 1, threads=1) == (1, 1, 2048, 1)
    assert counts(2048, 1, threads=2) == (2, 4, 2048, 4)


@needs_cpu
@pytest.mark.parametrize("kind", ["decode", "verify", "mixed", "chain", "roots"])
def test_cpu_items_cover_the_work_once(kind):
    """Whatever the threads: each (row, head, token) of a path is in one item, and more threads never read less."""
    native = importlib.import_module("tts_kernels._C")
    for seed, (num_heads, num_kv_heads) in enumerate([(8, 2), (28, 4), (3, 3)]):
        forest = cases.make_inputs(Case(kind=kind, page_size=4, seed=seed)).forest
        plan = forest.plan()
        nodes = plan.nodes.tolist()
        served = [(t, end - begin) for t, begin, end in zip(nodes[1], nodes[4], nodes[6]) if t and end > begin]
        shape = (plan.num_rows, num_heads, num_kv_heads, 64, plan.num_nodes)
        loads = []
        for threads in (1, 2, 3, 16):
            _, states, items = native.cpu_count_work(plan.nodes.data_ptr(), shape, threads)
            assert sum(h * packed * t for h, packed, t in items) == num_heads * sum(t * r for t, r in served)
            assert states >= num_heads * sum(r for _, r in served)
            loads.append(sum(h * t for h, _, t in items))
            assert all(0 < h <= num_kv_heads and packed > 0 and t > 0 for h, packed, t in items)
        assert loads[0] >= num_kv_heads * sum(t for t, _ in served) and loads == sorted(loads)


@needs_cpu
def test_vector_widths_are_those_of_the_code_paths():
    cpu = importlib.import_module("tts_kernels.attention.cpu")
    folder = ROOT / "csrc" / "cpu" / "isa"
    if not folder.is_dir():
        pytest.skip("the C++ sources are not here")
    sources = "\n".join(file.read_text() for file in folder.glob("*.cpp"))
    widths = {}
    for text in sources.split("#define TTS_VECTOR_WIDTH ")[1:]:
        widths[re.search(r'code_path\("([^"]+)"\)', text)[1]] = int(text.split()[0])
    assert widths == {name: cpu.LANES.get(name, 16) for name in cpu.isa_report()}


@needs_cpu
def test_the_code_path_of_the_environment(monkeypatch):
    call = counted_by_hand()
    for path in paths.ALL:
        if path.isa and not path.missing():
            path.select(monkeypatch)
            assert tts.explain(*call, **RATES).config.startswith(path.isa)
    monkeypatch.setenv("TTS_KERNELS_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match="sse9"):
        tts.explain(*call, **RATES)


class Spy:
    """A kernel that writes down the grids that it is launched with."""

    def __init__(self, kernel):
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


def replayed(plan, q, k_cache, work):
    """What the programs of the work list do at the plan's lengths, item after item."""
    config, group = work.config, q.shape[1] // k_cache.shape[2]
    nodes = plan.nodes.tolist()
    count = {"items": 0, "loads": 0, "states": 0, "products": 0}
    for node, first, chunk, wide in work.table[: 4 * work.num_items].view(-1, 4).tolist():
        length, packed = nodes[1][node], (nodes[6][node] - nodes[4][node]) * group
        rows, tokens = (config.wide_rows, config.wide_tokens) if wide else (config.narrow_rows, config.narrow_tokens)
        size = config.min_chunk
        while size * config.max_chunks < length:
            size += config.min_chunk
        present = range(length)[chunk * size : (chunk + 1) * size]
        if present:
            count["items"] += 1
            count["loads"] += len(present)
            count["states"] += len(range(packed)[first : first + rows])
            count["products"] += rows * tokens * len(present[::tokens])
    return {name: value * k_cache.shape[2] for name, value in count.items()}


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="replays the interpreter's tiles")
@pytest.mark.parametrize("steps", [0, 60])
@pytest.mark.parametrize("invariant", ["0", "1"])
def test_triton_does_what_is_said(steps, invariant, monkeypatch):
    """A prefix of 3 chunks and 40 packed rows, two wide tiles; 10 leaves of one chunk, two after 60 more tokens, with
    items for all the chunks that they may come to have; a tree of mixed nodes beside it."""
    monkeypatch.setenv("TTS_KERNELS_BATCH_INVARIANT", invariant)
    beside = cases.make_inputs(Case(kind="mixed", page_size=4, seed=3)).forest
    shared = star(10, prefix=300, suffix=[100], page_size=4)
    parent = shared.parent + [p + shared.num_nodes if p >= 0 else -1 for p in beside.parent]
    forest = Forest(parent, shared.length + beside.length, shared.rows + beside.rows).place(
        random.Random(0), reserve=64
    )
    plan = forest.plan()
    q, k_cache = tensors(plan, forest.num_pages, heads=(8, 2), head_dim=8)
    api.work_of(plan, q, k_cache, k_cache, "triton")
    plan.advance_(steps)

    (work,) = plan.works.values()
    work.scratch.fill_(torch.nan)
    module = importlib.import_module("tts_kernels.attention.triton_tree")
    spies = {name: Spy(getattr(module, name)) for name in ("tree_tiles", "merge_tree")}
    for name, spy in spies.items():
        monkeypatch.setattr(module, name, spy)
    got = tts.explain(plan, q, k_cache, backend="triton", **RATES)
    assert not any(spy.grids for spy in spies.values()), "explain launches nothing"
    assert work.scratch.isnan().all()
    with one_thread():
        out = tts.tree_attention(q, k_cache, k_cache, plan, backend="triton")
    assert not out.isnan().any()

    count = replayed(plan, q, k_cache, work)
    assert got.launches == sum(len(spy.grids) for spy in spies.values())
    assert spies["tree_tiles"].grids == [(work.num_items * 2,)]
    assert 0 < got.work_items == count["items"] < work.num_items * 2, "not all the chunks there may be are there"
    assert got.kv_bytes_loaded == count["loads"] * 2 * 8 * 4
    assert got.issued_flops == count["products"] * 4 * 16  # head_dim 8 is padded to 16
    written = work.scratch[-work.num_states * 8 * 2 :].view(-1, 2)[:, 0].isnan().logical_not().sum().item()
    assert got.state_bytes == count["states"] * (8 + 2) * 4 * 2 and count["states"] == written
    # Every state that is written is read: a row's states are the chunks of its path.
    nodes, chunks = plan.nodes.tolist(), []
    for node, length in enumerate(nodes[1]):
        above = chunks[nodes[0][node]] if nodes[0][node] >= 0 else 0
        chunks.append(above + -(-length // max(128, -(-length // 8 // 128) * 128)))
    assert written == 8 * sum(chunks[owner] for owner in plan.rows[1].tolist())


@needs_triton
def test_triton_names_the_config_that_the_plan_keeps(monkeypatch):
    plan, q, k_cache = counted_by_hand()
    if torch.cuda.is_available():
        plan, q, k_cache = (
            Forest([-1], [9], [1]).place(random.Random(0)).plan(device="cuda"),
            q[:1].cuda(),
            k_cache.cuda(),
        )
    api.work_of(plan, q, k_cache, k_cache, "triton")
    monkeypatch.setenv("TTS_KERNELS_BATCH_INVARIANT", "1")
    assert "batch-invariant" not in tts.explain(plan, q, k_cache, backend="triton", **RATES).config
    plan.works.clear()
    config = tts.explain(plan, q, k_cache, backend="triton", **RATES).config
    assert "narrow_rows=0" in config and config.endswith("batch-invariant")


@pytest.mark.parametrize("head_dim", [32, 300])
def test_the_default_is_what_runs(head_dim, monkeypatch):
    """300: the first backend of the CPU refuses it."""
    forest = star(3, prefix=9, suffix=[2])
    plan = forest.plan()
    q, k_cache = tensors(plan, forest.num_pages, head_dim=head_dim)
    ran = []
    for name in api.BACKENDS.preference["cpu"]:
        module = api.BACKENDS.load(name)
        if not isinstance(module, str):
            monkeypatch.setattr(module, "tree_attention", lambda *arguments, name=name: ran.append(name))
    got = tts.explain(plan, q, k_cache, **RATES)
    assert ran == []
    tts.tree_attention(q, k_cache, k_cache, plan)
    assert ran == [got.backend]
    assert got.why == "the first of cpu, reference that can run here"
    before = api.BACKENDS.preference["cpu"][: api.BACKENDS.preference["cpu"].index(got.backend)]
    assert got.refused == {
        name: tts.unsupported_reasons("tree_attention", name, q, k_cache, k_cache) for name in before
    }
    if head_dim == 300:
        assert got.backend == "reference" and list(got.refused) == ["cpu"]
        assert "  refused cpu: " in str(got) and got.refused["cpu"][0] in str(got)


def test_a_named_backend_that_cannot_run_raises():
    plan, q, k_cache = counted_by_hand()
    errors = []
    for call in (
        lambda: tts.explain(plan, q, k_cache, backend="cuda"),
        lambda: tts.tree_attention(q, k_cache, k_cache, plan, backend="cuda"),
    ):
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot run tree_attention: ") as error:
            call()
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_nothing_is_changed(path):
    forest = cases.make_inputs(Case(seed=1, page_size=4)).forest
    plan = forest.plan(device=path.device)
    dtypes = (path.takes(FP32), path.takes(FP32))
    q, k_cache = tensors(plan, forest.num_pages, dtypes=dtypes, device=path.device)
    q.normal_(), k_cache.normal_()
    held = [plan.nodes, plan.pages, plan.rows, plan.grows, *plan.host, q, k_cache]
    before = [tensor.clone() for tensor in held]
    fields = {name: getattr(plan, name) for name in ("capacity", "advanced", "num_tokens")}
    random_state = torch.get_rng_state()
    got = tts.explain(plan, q, k_cache, backend=path.backend)
    assert got.bandwidth_from == got.flop_rate_from == "measured here"
    assert all(torch.equal(a, b) for a, b in zip(before, held))
    assert fields == {name: getattr(plan, name) for name in fields} and plan.works == {}
    assert torch.equal(random_state, torch.get_rng_state())
    assert tts.explain(plan, q, k_cache, q.new_empty(k_cache.shape), backend=path.backend) == got


def test_lengths_are_those_of_the_moment(path):
    forest = Forest([-1, 0, 0], [9, 2, 3], [0, 1, 1]).place(random.Random(0), reserve=2)
    plan = forest.plan(device=path.device)
    dtypes = (path.takes(FP32), path.takes(FP32))
    q, k_cache = tensors(plan, forest.num_pages, dtypes=dtypes, device=path.device)
    before = tts.explain(plan, q, k_cache, backend=path.backend, **RATES)
    plan.advance_(5)
    after = tts.explain(plan, q, k_cache, backend=path.backend, **RATES)
    assert after.num_tokens == before.num_tokens + 10 == plan.num_tokens
    assert after.least_bytes == before.least_bytes + 10 * 2 * 2 * 32 * k_cache.itemsize
    assert after.flops == before.flops + 4 * 4 * 32 * 10


def test_without_rows(path):
    forest = Forest([-1], [9], [0]).place(random.Random(0))
    plan = forest.plan(device=path.device)
    dtypes = (path.takes(FP32), path.takes(FP32))
    q, k_cache = tensors(plan, forest.num_pages, dtypes=dtypes, device=path.device)
    got = tts.explain(plan, q, k_cache, backend=path.backend, **RATES)
    assert (got.work_items, got.bytes_read, got.least_bytes, got.flops, got.issued_flops) == (0, 0, 0, 0, 0)
    assert got.floor_seconds == 0 and got.launches in (0, None) and "0 rows" in str(got)


def test_printed():
    printed = str(tts.explain(*counted_by_hand(), backend="reference", **RATES))
    assert printed.splitlines() == [
        "reference: asked for",
        "  config  plain torch",
        "  tree    2 rows, 4 nodes, 127 tokens",
        "  work    3 items",
        "  reads   0.06464 MB; the least is 0.06349 MB, one read per row 0.1147 MB (1.81x the least)",
        "  loads   0.06144 MB of KV, repeated ones counted",
        "  states  4,352 B, written and read",
        "  FLOPs   1.126e+05, issued 1.126e+05",
        "  floor   0.1126 ms, bound by compute: 1 GB/s (given), 1 GFLOP/s (given)",
    ]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"bandwidth": 0}, ValueError, "bandwidth: expected None"),
        ({"bandwidth": "fast"}, TypeError, "bandwidth: expected a number"),
        ({"flops": -1.0}, ValueError, "flops: expected None"),
        ({"flops": float("nan")}, ValueError, "flops: expected a finite"),
        ({"flops": True}, TypeError, "flops: expected a number"),
        ({"backend": "abacus"}, ValueError, "backend: expected None or one of"),
        ({"plan": None}, TypeError, "plan: expected a TreePlan, got NoneType"),
        ({"q": torch.zeros(3, 4, 32)}, ValueError, "q: expected the 2 rows of plan"),
        ({"k_cache": torch.zeros(9, 8, 2, 32)}, ValueError, "plan: expected page_size 8"),
        ({"v_cache": torch.zeros(9, 4, 1, 32)}, ValueError, "v_cache: expected shape"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = dict(zip(("plan", "q", "k_cache"), counted_by_hand())) | change
    with pytest.raises(error, match=message):
        tts.explain(**arguments)
