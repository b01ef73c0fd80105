"""`tts-kernels tune` under the interpreter, whose times mean nothing: the table, what is skipped, what reads it."""

import argparse
import dataclasses
import importlib
import json
from types import SimpleNamespace

import emulated
import pytest
import torch
from pretend_gpu import PretendGpu

import tts_kernels as tts
from tts_kernels import configs, scoring
from tts_kernels.attention import api, tables
from tts_kernels.configs import TreeConfig, tree_config
from tts_kernels.dispatch import Backends
from tts_kernels.measure.inputs import Geometry
from tts_kernels.measured import row_on

tune = pytest.importorskip("tts_kernels.measure.tune", exc_type=ImportError)
tune_ops = pytest.importorskip("tts_kernels.measure.tune_ops", exc_type=ImportError)
backend = pytest.importorskip("tts_kernels.attention.triton", exc_type=ImportError)
logprobs = pytest.importorskip("tts_kernels.scoring.triton", exc_type=ImportError)
pytestmark = pytest.mark.skipif(not backend.INTERPRETED, reason="runs on CPU tensors under Triton's interpreter")

GEOMETRY = Geometry.parse("2/1 d16 fp32")
WIDTH = tune_ops.Width.parse("d40 V300 fp32")


def arguments(folder, op=("tree_attention",), **other):
    options = {"geometry": [GEOMETRY], "width": [WIDTH], "out": folder, "small": True, "jobs": 1, "seconds": None}
    return argparse.Namespace(op=list(op), **options | other)


def test_a_table_is_written_and_read(tmp_path, capsys, monkeypatch):
    """One config runs out of resources, and is named; another run replaces the row."""
    right = api.tree_attention

    def short_of_memory(q, k_cache, v_cache, plan, **options):
        if options["backend"] == "triton" and next(iter(plan.works.values())).config.min_chunk == 128:
            raise RuntimeError("out of resource: shared memory\nand more")
        return right(q, k_cache, v_cache, plan, **options)

    monkeypatch.setattr(api, "tree_attention", short_of_memory)
    monkeypatch.setattr(tune, "present_config", lambda *_: TreeConfig(32, 32, 16, 32, 64, 8, 4, 1))
    assert tune.main(arguments(tmp_path)) == tune.main(arguments(tmp_path)) == 0
    (path,) = tmp_path.iterdir()
    assert path.name == "tree_attention,device_name=interpreter.json"
    table = json.loads(path.read_text())
    (row,) = table["rows"]
    assert table["device"] == "interpreter" and row["searched"] == 2
    assert set(row["seconds"]) == set(tune.SMALL.trees) and min(row["seconds"].values()) > 0
    assert row["backend"] in row["backends"] and "triton" in row["backends"]
    (skipped,) = row["skipped"].items()
    assert "min_chunk=128" in skipped[0] and skipped[1] == "out of resource: shared memory"
    assert "1 skipped" in capsys.readouterr().out

    monkeypatch.setenv("TTS_KERNELS_CONFIGS", str(tmp_path))
    config = tree_config("interpreter", "interpreter", 16, 1, 4, 4, 2)
    assert config == TreeConfig(**row["config"])
    assert config.source == "tree_attention,device_name=interpreter.json, 2/1 heads"
    # Other heads are another geometry: nothing was measured for them.
    assert tree_config("interpreter", "interpreter", 16, 1, 4, 4, 4).source == "interpreter"
    assert configs.measured_row("tree_attention", "interpreter", 4, 1, 16, 4, 4) is None


def test_the_cuda_kernels_are_searched_where_they_run(tmp_path, monkeypatch):
    """In emulation: their row has a config of their own, which is read, and a time beside triton's."""
    if emulated.missing():
        pytest.skip(emulated.missing())
    cuda = importlib.import_module("tts_kernels.attention.cuda")
    monkeypatch.setattr(cuda, "native", emulated.native())
    monkeypatch.setattr(cuda, "device_kind", lambda device: ("interpreter", 227 << 10))
    half = Geometry.parse("2/1 d16 fp16")
    assert tune.main(arguments(tmp_path, geometry=[half])) == 0
    (row,) = json.loads(next(tmp_path.iterdir()).read_text())["rows"]
    assert set(row["cuda"]) == {"min_chunk", "max_chunks", "num_stages", "warpgroups"}
    assert row["cuda"]["num_stages"] in (2, 3, 4) and row["cuda"]["warpgroups"] == 0
    assert set(row["cuda_seconds"]) == set(tune.SMALL.trees) and set(row["backends"]) >= {"cuda", "triton", "cpu"}
    assert row["backend"] == min(row["backends"], key=row["backends"].get)
    monkeypatch.setenv("TTS_KERNELS_CONFIGS", str(tmp_path))
    q, cache = tune.sample(half, torch.device("cpu"))
    config = cuda.config_of(q, cache)
    assert row["cuda"].items() <= vars(config).items()
    assert config.source == "tree_attention,device_name=interpreter.json, 2/1 heads"


def test_a_wrong_config_is_never_timed(tmp_path, monkeypatch, capsys):
    right = api.tree_attention

    def wrong(q, k_cache, v_cache, plan, **options):
        out = right(q, k_cache, v_cache, plan, **options)
        if options["backend"] == "triton" and next(iter(plan.works.values())).config.narrow_tokens == 16:
            out[0] *= 1.5
        return out

    monkeypatch.setattr(api, "tree_attention", wrong)
    assert tune.main(arguments(tmp_path)) == 1
    (row,) = json.loads(next(tmp_path.iterdir()).read_text())["rows"]
    assert row["config"]["narrow_tokens"] == 32
    assert any("narrow_tokens=16" in name and "wrong result" in why for name, why in row["skipped"].items())
    assert "wrong result of triton" in capsys.readouterr().err


@pytest.mark.parametrize(
    "points, saved",
    [
        ([(128, 0.9), (256, 0.8)], 0),
        ([(128, 1.3), (256, 1.1), (512, 1.01), (1024, 0.7)], 512),
        ([(128, 0.9), (256, 1.2), (512, 0.9)], 512),
        ([(128, 0.9), (256, 1.2)], 257),
    ],
)
def test_from_how_many_saved_tokens_sharing_pays(points, saved):
    assert tune.saving_from(points) == saved


ROW = {
    "for": "NVIDIA H200", "file": "tree_attention,device_name=NVIDIA_H200.json", "num_q_heads": 8, "num_kv_heads": 2,
    "block_dim": 64, "q_bytes": 2, "kv_bytes": 2, "config": {"num_warps": 8}, "backend": "reference",
    "least_saving": 300,
}  # fmt: skip


@pytest.fixture
def measured(monkeypatch):
    """As if the device of CPU tensors were a GPU with a table."""
    monkeypatch.setattr(configs, "shipped", lambda op: [ROW])

    def row(q, k_cache):
        return configs.measured_row(
            "tree_attention", "NVIDIA H200", q.shape[1], k_cache.shape[2], q.shape[2], q.element_size(),
            k_cache.element_size(),
        )  # fmt: skip

    monkeypatch.setattr(tables, "row", row)


def test_the_row_decides_backend_and_sharing_and_explain_names_it(measured):
    q, cache = torch.randn(2, 8, 64).bfloat16(), torch.randn(16, 16, 2, 64).bfloat16()
    assert api.BACKENDS.order("tree_attention", q, cache)[0] == "reference"
    assert api.BACKENDS.order("append_kv", cache[0], cache[0], cache, cache)[0] == "cpu"
    plan = tts.TreePlan.from_nodes([-1], [20], [[0, 1]], [2], page_size=16)
    told = tts.explain(plan, q, cache, bandwidth=1e9, flops=1e9)
    assert told.backend == "reference"
    assert "tree_attention,device_name=NVIDIA_H200.json, 8/2 heads" in told.why and "less than 300 tokens" in told.why
    # Another geometry has no row: the order of the backends.
    assert api.BACKENDS.order("tree_attention", q[:, :4], cache)[0] == "cpu"


def test_decode_attention_shares_where_it_pays(measured, monkeypatch):
    seen = []
    build = tts.TreePlan.from_block_table.__func__
    monkeypatch.setattr(
        tts.TreePlan, "from_block_table",
        classmethod(lambda cls, *a, **k: seen.append(build(cls, *a, **k)) or seen[-1]),
    )  # fmt: skip
    cache = torch.randn(64, 16, 2, 64).bfloat16()
    for pages, nodes in ((10, 2), (20, 3)):  # two sequences: 160 tokens saved, 320 saved
        table = torch.arange(pages + 1, dtype=torch.int32).repeat(2, 1)
        table[1, -1] = 63
        lens = torch.full((2,), 16 * pages + 5, dtype=torch.int32)
        tts.decode_attention(torch.randn(2, 8, 64).bfloat16(), cache, cache, table, lens)
        assert seen[-1].num_nodes == nodes


def test_device_rows_stand_before_the_architecture(monkeypatch):
    arch = {"for": "sm_90", "block_dim": 64, "q_bytes": 2, "kv_bytes": 2, "config": {"num_warps": 4, "num_stages": 3}}
    monkeypatch.setattr(configs, "shipped", lambda op: [ROW, arch])
    config = tree_config("NVIDIA H200", "sm_90", 64, 2, 2, 2, 8)
    assert (config.num_warps, config.num_stages) == (8, 3) and config.source == configs.source(ROW)
    assert tree_config("NVIDIA H100", "sm_90", 64, 2, 2, 2, 8).source == "tree_attention.json, sm_90"


def test_no_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="there is no GPU here to tune for"):
        tune.main(SimpleNamespace(op=None, geometry=None, width=None, out=None, small=False, jobs=1, seconds=None))


# --- the other ops


@pytest.fixture
def as_a_gpu(monkeypatch):
    """Of a device with the name under which the interpreter's tables are written; what was looked up is forgotten."""
    row_on.cache_clear()
    logprobs.config_of.cache_clear()
    with PretendGpu(name="interpreter"):
        yield
    row_on.cache_clear()
    logprobs.config_of.cache_clear()


def test_every_op_has_a_table_that_decides(tmp_path, monkeypatch, as_a_gpu, capsys):
    assert tune.main(arguments(tmp_path, tune_ops.OPS)) == 0  # under the interpreter, on the CPU
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(tune_ops.OPS)
    tables_of = {path.name.partition(",")[0]: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert set(tables_of) == set(tune_ops.OPS)
    for op, table in tables_of.items():
        (row,) = table["rows"]
        assert table["op"] == op and set(configs.KEYS[op]) <= set(row) and row["searched"] >= 2
        assert row["backend"] == min(row["backends"], key=row["backends"].get) and "triton" in row["backends"]
        assert not row["skipped"] and set(row["measured"]) == {"date", "tts_kernels", "torch", "triton"}
        row["backend"] = "reference"  # which no order begins with
        (tmp_path / configs.table_name(op, "interpreter")).write_text(json.dumps(table))
    assert tables_of["token_logprobs"]["rows"][0]["searched"] >= 5
    assert set(tables_of["token_logprobs"]["rows"][0]["config"]) == set(vars(configs.LogprobConfig(*[64] * 5, 1))) - {
        "source"
    }

    def leading(dim, heads):
        hidden, weight = torch.empty(5, dim, device="cuda"), torch.empty(300, dim, device="cuda")
        k, cache = torch.empty(5, 1, heads, device="cuda"), torch.empty(3, 16, 1, heads, device="cuda")
        return {
            "token_logprobs": (hidden, weight), "step_scores": (hidden, hidden), "verify": (hidden, hidden),
            "append_kv": (k, k, cache, cache), "merge_states": (torch.empty(2, 5, 2, heads, device="cuda"),),
        }  # fmt: skip

    for folder, dim, heads, measured_here in (("", 40, 16, False), (tmp_path, 40, 16, True), (tmp_path, 48, 32, False)):
        monkeypatch.setenv("TTS_KERNELS_CONFIGS", str(folder))
        row_on.cache_clear()
        for op, tensors in leading(dim, heads).items():
            family = scoring.api.BACKENDS if op in scoring.api.BACKENDS.ops else api.BACKENDS
            assert (family.order(op, *tensors)[0] == "reference") == measured_here, op
            assert family.order(op, *tensors)[-1] == ("triton" if measured_here else "reference")
    # The row's name, or that it was the order.
    assert "the first of cuda, triton" in scoring.explain("verify", *leading(48, 32)["verify"]).why
    told = scoring.explain("verify", *leading(40, 16)["verify"])
    assert told.why == "measured fastest here (step_scores,device_name=interpreter.json, dim 40, bytes 4)"
    assert str(told).startswith("reference: measured fastest here") and not told.refused and not told.config
    # The tiles too.
    device = torch.device("cuda", 0)
    assert logprobs.config_of(device, 40, 300, 4) == configs.LogprobConfig(
        **tables_of["token_logprobs"]["rows"][0]["config"]
    )
    assert logprobs.config_of(device, 40, 300, 4).source.endswith("dim 40, vocabulary 300, bytes 4")
    assert logprobs.config_of(device, 40, 301, 4).source == "rule"
    with pytest.raises(ValueError, match="op: expected one of step_scores"):
        scoring.explain("tree_attention", torch.empty(1))


@pytest.mark.parametrize("op", tune_ops.OPS)
def test_the_search_on_a_gpu(op, monkeypatch):
    """On one that is not there: all tensors are on it, and every way is captured, which refuses what waits."""

    def reasons(family, op, backend, *tensors):
        return [] if backend in ("cpu", "reference") else ["it is no backend of the CPU, on which all of this runs"]

    monkeypatch.setattr(Backends, "unsupported_reasons", reasons)
    op = tune_ops.OPS[op]
    with PretendGpu() as gpu:
        gpu.properties.L2_cache_size = 1 << 10
        points = list(op.points(WIDTH if op.by_width else GEOMETRY, torch.device("cuda", 0), True))
        trial = tune_ops.Trial(op, points, torch.device("cuda", 0), 2)
        assert trial.best([("cpu", None)]) == ("cpu", None)
        assert not trial.skipped and not trial.wrong and len(gpu.graphs) == len(points)


def test_tiles_that_are_wrong_or_do_not_fit_are_not_timed(tmp_path, monkeypatch, capsys):
    right, seen = logprobs.token_logprobs, []

    def broken(hidden, weight, targets, bias):
        config = logprobs.config_of(hidden.device, hidden.shape[1], weight.shape[0], 4)
        seen.append(config)
        if config.tokens == 64 and config.tile_tokens == 64:
            raise RuntimeError("out of resource: shared memory\nand more")
        return right(hidden, weight, targets, bias) + (config.tokens == 32)

    monkeypatch.setattr(logprobs, "token_logprobs", broken)
    assert tune.main(arguments(tmp_path, ["token_logprobs"])) == 1
    assert "token_logprobs, d40 V300 fp32: wrong result of triton rows=64 tokens=32" in capsys.readouterr().err
    (row,) = json.loads(next(tmp_path.iterdir()).read_text())["rows"]
    assert row["config"]["tokens"] == 64 and row["config"]["tile_tokens"] > 64
    reasons = {why for text, why in row["skipped"].items() if "tokens=64" in text}
    assert reasons == {"out of resource: shared memory"} and len(row["skipped"]) == 2
    assert {(c.tokens, c.tile_tokens) for c in seen} == {(64, 2048), (32, 2048), (64, 64), (64, 128)}


@pytest.mark.parametrize("op, broken", [("append_kv", "append_kv"), ("merge_states", "merge_states")])
def test_a_backend_that_is_wrong_is_not_taken(tmp_path, monkeypatch, op, broken, capsys):
    """A key that is not written, a merged row that is off."""
    cpu = importlib.import_module("tts_kernels.attention.cpu")
    right = getattr(cpu, broken)

    def wrong(*given):
        if op == "append_kv":
            slots = given[4].clone()
            slots[-1] = -1
            return right(*given[:4], slots, *given[5:])
        out, lse = right(*given)
        out[-1, -1] *= 1.5
        return out, lse

    monkeypatch.setattr(cpu, broken, wrong)
    assert tune.main(arguments(tmp_path, [op])) == 1
    (row,) = json.loads(next(tmp_path.iterdir()).read_text())["rows"]
    assert row["backend"] == "triton" and "wrong result" in row["skipped"]["cpu"]
    assert f"{op}, 2/1 d16 fp32: wrong result of cpu on " in capsys.readouterr().err


def test_what_no_time_is_left_for_is_named(tmp_path, capsys):
    """The first of all is searched in any case: no time is known yet."""
    widths = [tune_ops.Width.parse(text) for text in ("d40 V300 fp32", "d24 V300 fp32")]
    assert tune.main(arguments(tmp_path, ["merge_states", "step_scores"], width=widths, seconds=1e-3)) == 0
    out = capsys.readouterr().out
    assert "step_scores, d24 V300 fp32: not searched" in out and out.count("not searched") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["merge_states,device_name=interpreter.json"]


@pytest.mark.parametrize("text", ["d40", "40 V300", "d40 V300 fp8", "d40 V300 bf16 x", "dx V1"])
def test_widths(text):
    with pytest.raises(ValueError, match='width: expected text like "d3584 V152064"'):
        tune_ops.Width.parse(text)
    assert str(WIDTH) == "d40 V300 fp32" and str(tune_ops.Width.parse("d40 V300")) == "d40 V300"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": 48}, "rows: expected a power of two, got 48"),
        ({"tile_tokens": 96}, "tile_tokens: expected a multiple of tokens = 64, got 96"),
        ({"num_stages": 0}, "num_stages: expected at least 1, got 0"),
    ],
)
def test_tiles_that_no_kernel_has(change, message):
    fields = dataclasses.asdict(configs.logprob_config("", 64, 100, 4))
    with pytest.raises(ValueError, match=message):
        configs.LogprobConfig(**fields | change)


def test_warpgroups_are_searched_where_there_are_some(monkeypatch):
    if emulated.missing():
        pytest.skip(emulated.missing())
    cuda = importlib.import_module("tts_kernels.attention.cuda")
    monkeypatch.setattr(cuda, "native", emulated.native())
    cpu = torch.device("cpu")
    found = {text: tune.has_warpgroups(Geometry.parse(text), cpu) for text in
             ("8/2 d128", "8/2 d64", "8/2 d256", "8/2 d128 bf16+fp8")}  # fmt: skip
    assert found == {"8/2 d128": True, "8/2 d64": True, "8/2 d256": False, "8/2 d128 bf16+fp8": False}
    monkeypatch.setattr(cuda, "runs_warpgroups", lambda device: False)
    assert not tune.has_warpgroups(Geometry.parse("8/2 d128"), cpu)
    (fields,) = [fields for fields in tune.FULL.cuda_rounds if "warpgroups" in fields]
    base = configs.cuda_tree_config("", 128, 2, 2, 8, lambda *_: True, True)
    assert {(c.warpgroups, c.num_stages) for c in tune.variants(base, fields)} == {
        (w, s) for w in (0, 1) for s in (2, 3, 4)
    }
