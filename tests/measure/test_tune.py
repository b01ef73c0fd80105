"""`tts-kernels tune` under the interpreter, whose times mean nothing: the table, what is skipped, what reads it."""

import argparse
import importlib
import json
from types import SimpleNamespace

import emulated
import pytest
import torch

import tts_kernels as tts
from tts_kernels import configs
from tts_kernels.attention import api, tables
from tts_kernels.configs import TreeConfig, tree_config
from tts_kernels.measure.inputs import Geometry

tune = pytest.importorskip("tts_kernels.measure.tune", exc_type=ImportError)
backend = pytest.importorskip("tts_kernels.attention.triton", exc_type=ImportError)
pytestmark = pytest.mark.skipif(not backend.INTERPRETED, reason="runs on CPU tensors under Triton's interpreter")

GEOMETRY = Geometry.parse("2/1 d16 fp32")


def arguments(folder):
    return argparse.Namespace(geometry=[GEOMETRY], out=folder, small=True, jobs=1)


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
    assert tune.main(argparse.Namespace(geometry=[half], out=tmp_path, small=True, jobs=1)) == 0
    (row,) = json.loads(next(tmp_path.iterdir()).read_text())["rows"]
    assert set(row["cuda"]) == {"min_chunk", "max_chunks", "num_stages"} and row["cuda"]["num_stages"] in (2, 3, 4)
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
    assert "wrong result of" in capsys.readouterr().err


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
        tune.main(SimpleNamespace(geometry=None, out=None, small=False, jobs=1))
