"""The backend for vLLM in full CUDA graphs, where neither vLLM nor a GPU is: what is captured once is repeated with the
very arguments of the first time, while the requests change.

On the CPU the kernels are interpreted (triton) and emulated (cuda). On a GPU that is not there (pretend_gpu.py) a
capture refuses what waits for the device, and a replay makes the same calls with the same tensors."""

import functools
import importlib
from types import SimpleNamespace

import pytest
import torch
import vllm_fakes
from attention_paths import Path
from pretend_gpu import PretendGpu
from vllm_batches import BATCH, FP8, HKV, HQ, D, builder_of, common_metadata, empty_cache
from vllm_steps import LAYERS, MOST, SIZES, WIDTH, Engine, life

from tts_kernels.tree import block_table
from tts_kernels.tree.prefix import DeviceTable, HostTable

FULL, PIECEWISE = vllm_fakes.CUDAGraphMode.FULL_AND_PIECEWISE, vllm_fakes.CUDAGraphMode.PIECEWISE


@pytest.fixture
def plugin(monkeypatch):
    with vllm_fakes.imported(monkeypatch) as module:
        yield module


class Calls:
    """The calls of a backend that a forward makes, which do nothing before a replay."""

    def __init__(self, backend, forward, monkeypatch):
        self.calls = []
        module = importlib.import_module(f"tts_kernels.attention.{backend}")
        attention = (module.TreeCall, "__call__") if backend == "cuda" else (module, "tree_attention")
        with monkeypatch.context() as patch:
            for owner, name in ((module, "append_kv"), attention):
                patch.setattr(owner, name, self.recorder(getattr(owner, name)))
            forward()

    def recorder(self, function):
        def record(*arguments):
            self.calls.append((function, arguments))

        return record

    def replay(self):
        for function, arguments in self.calls:
            function(*arguments)

    def reads(self):
        """Addresses, shapes and numbers: all that the launches are given."""
        return [[what(argument) for argument in arguments] for _, arguments in self.calls]


def what(argument):
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr(), argument.shape, argument.stride(), argument.dtype
    if isinstance(argument, tuple):
        return [what(each) for each in argument]
    return vars(argument) if hasattr(argument, "__dict__") else argument


@pytest.fixture
def take(plugin, monkeypatch):
    """take(backend): the backend by default, also where there is no GPU. Returns its path."""

    def on_cpu(backend):
        path = Path(backend)
        if path.missing():
            pytest.skip(path.missing())
        path.select(monkeypatch)
        api = plugin.api
        monkeypatch.setitem(api.BACKENDS.preference, "cpu", (backend,))
        for name in ("tree_attention", "append_kv"):
            monkeypatch.setattr(api, name, functools.partial(getattr(api, name), backend=backend))
        return path

    return on_cpu


def capture(engine, size, graph_of):
    """As vLLM 0.32 does it: warmed up by build(), captured with build_for_cudagraph_capture()."""
    warm = [b.build(0, common) for b, common in zip(engine.builders, engine.dummy(size))]
    engine.forward(size, warm)
    made = [b.build_for_cudagraph_capture(common) for b, common in zip(engine.builders, engine.dummy(size))]
    assert all(was.plan is now.plan for was, now in zip(warm, made))  # what is warmed up is what is captured
    return graph_of(lambda: engine.forward(size, made))


@pytest.mark.parametrize(
    "backend, table, sizes",
    [
        pytest.param("triton", HostTable, SIZES, id="triton"),
        pytest.param("cuda", HostTable, SIZES[::-1], id="cuda-smallest first"),
        pytest.param("cuda", DeviceTable, SIZES, id="cuda-table on a device"),  # its kernels are interpreted
    ],
)
def test_captured_sizes_follow_the_requests(plugin, take, monkeypatch, backend, table, sizes):
    path = take(backend)
    dtype = path.takes(torch.float32)
    monkeypatch.setattr(block_table, "HostTable", table)
    engine = Engine(plugin, dtype, layers=(0, 1) if path.interpreted else LAYERS)  # slow: one of each group
    graphs = {}
    for size in sizes:
        graphs[size] = capture(engine, size, lambda forward: Calls(backend, forward, monkeypatch))
    seen = set()
    for _ in life(engine):
        n = len(engine.requests)
        size = min(size for size in SIZES if size >= n)
        seen.add((n, size))
        engine.grow()
        made = [b.build(0, common) for b, common in zip(engine.builders, engine.metadata(size))]
        forward = functools.partial(engine.forward, size, made)
        again = Calls(backend, forward, monkeypatch)
        assert again.reads() == graphs[size].reads()
        engine.out.fill_(torch.nan)
        graphs[size].replay()
        engine.check(size, 2e-5 if dtype == torch.float32 else 4e-3)
    assert seen == {(3, 3), (6, 6), (4, 6), (2, 3), (1, 1)}


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_the_list_made_before_a_capture_is_the_one_that_calls_take(plugin, take, kv_dtype):
    take("cuda")
    bytes_of_cache = torch.uint8 if kv_dtype == "fp8" else torch.float16  # as vLLM keeps fp8
    builder = builder_of(plugin, torch.float16, bytes_of_cache, mode=FULL, sizes=SIZES)
    made = builder.build_for_cudagraph_capture(common_metadata([([5], 1, 1)]))
    (work,) = made.plan.works.values()
    layer = SimpleNamespace(_k_scale=torch.tensor(1.0), _v_scale=torch.tensor(1.0))
    cache = empty_cache(FP8 if kv_dtype == "fp8" else torch.float16, "tokens first").fill_(0)
    q, out = torch.zeros(2, 1, HQ, D, dtype=torch.float16)
    plugin.TreeImpl(HQ, D, 0.2, HKV, kv_cache_dtype=kv_dtype).forward(layer, q, None, None, cache, made, out)
    assert list(made.plan.works.values()) == [work] and work.calls


def test_a_capture_waits_for_nothing_and_replays_follow_the_requests(plugin, monkeypatch):
    monkeypatch.setattr(block_table, "DeviceTable", HostTable)  # whose kernels are not the matter here
    with PretendGpu() as gpu:
        engine = Engine(plugin, device="cuda")
        graphs = {}

        def graph_of(forward):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                forward()
            return graph

        for size in SIZES:
            graphs[size] = capture(engine, size, graph_of)
        assert len(gpu.graphs) == len(SIZES) and all(graph.calls for graph in gpu.graphs)
        for _ in life(engine):
            size = min(size for size in SIZES if size >= len(engine.requests))
            engine.grow()
            for builder, common in zip(engine.builders, engine.metadata(size)):
                builder.build(0, common)
            engine.out.fill_(torch.nan)
            graphs[size].replay()
            engine.check(size, 2e-5)


def test_what_is_not_captured_has_plans_of_its_own(plugin):
    """Mixed batches, sizes that are not captured, and every batch where vLLM captures no full graphs."""
    decode = [(blocks, tokens, 1) for blocks, tokens, _ in BATCH[:3]]
    builder = builder_of(plugin, mode=FULL, sizes=SIZES)
    captured = builder.build(0, common_metadata(decode)).plan
    assert captured.room.rows == 3 and builder.build(0, common_metadata(decode)).plan is captured
    assert builder.build(0, common_metadata(BATCH[:3])).plan.num_rows == 1 + 1 + 8
    assert type(builder.build(0, common_metadata(decode[:2])).plan) is plugin.TreePlan
    for mode in (None, PIECEWISE):
        other = builder_of(plugin, mode=mode, sizes=SIZES)
        assert type(other.build(0, common_metadata(decode)).plan) is plugin.TreePlan


def test_a_size_that_vllm_captures_unasked_is_followed_too(plugin):
    """Halves of a batch, say, which no list names."""
    builder = builder_of(plugin, mode=FULL, sizes=SIZES)
    common = common_metadata([([7, 3], 6, 1), ([7, 4], 7, 1)])
    plan = builder.build_for_cudagraph_capture(common).plan
    assert builder.build(0, common).plan is plan and plan.num_tokens == 4 + 2 + 3


def test_only_single_tokens_are_captured(plugin):
    assert plugin.TreeBuilder._cudagraph_support is vllm_fakes.AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    with pytest.raises(NotImplementedError, match="max_query_len: expected 1 in a batch that is captured, got 9"):
        builder_of(plugin).build_for_cudagraph_capture(common_metadata(BATCH))


def test_room_is_for_as_many_blocks_as_the_table_is_wide(plugin):
    engine = Engine(plugin)
    plan = engine.builders[0].build_for_cudagraph_capture(engine.dummy(MOST)[0]).plan
    assert (plan.room.rows, plan.room.pages) == (MOST, MOST * WIDTH)
