"""Which config a device and geometry get."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from tts_kernels import configs
from tts_kernels.configs import TreeConfig, tree_config

VALUES = {
    "wide_rows": 64, "wide_tokens": 64, "narrow_rows": 16, "narrow_tokens": 32, "min_chunk": 256, "max_chunks": 16,
    "num_warps": 4, "num_stages": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"wide_rows": 48}, "wide_rows"),
        ({"narrow_rows": 24}, "narrow_rows"),
        ({"narrow_rows": 128}, "narrow_rows"),
        ({"narrow_tokens": 0}, "narrow_tokens"),
        ({"min_chunk": 96}, "min_chunk"),
        ({"max_chunks": 0}, "max_chunks"),
        ({"num_stages": 0}, "num_stages"),
        ({"warpgroups": 2}, "warpgroups"),
    ],
)
def test_wrong_values_are_refused(changes, name):
    TreeConfig(**VALUES)
    with pytest.raises(ValueError, match=name):
        TreeConfig(**VALUES | changes)


def test_device_before_architecture_before_rule():
    def entry(name, tokens):
        return {"for": name, "block_dim": 128, "q_bytes": 2, "kv_bytes": 2, "config": {"wide_tokens": tokens}}

    table = [entry("NVIDIA H200", 16), entry("sm_90", 32)]
    with mock.patch.object(configs, "shipped", return_value=table):
        assert tree_config("NVIDIA H200", "sm_90", 128, 8, 2, 2).wide_tokens == 16
        assert tree_config("NVIDIA H100", "sm_90", 100, 8, 2, 2).wide_tokens == 32
        assert "sm_90" in tree_config("NVIDIA H100", "sm_90", 128, 8, 2, 2).source
        assert tree_config("NVIDIA H100", "sm_90", 128, 8, 2, 1) == tree_config("other", "sm_86", 128, 8, 2, 1)
        assert tree_config("other", "sm_86", 128, 8, 2, 2).source == "rule"


def cuda_config(row, head_dim=128, kv_bytes=2, has_warpgroups=True, fits=lambda stages, warpgroups: True):
    entry = {"for": "NVIDIA H200", "file": "table", "num_q_heads": 32, "num_kv_heads": 8, "block_dim": 128, "cuda": row}
    with mock.patch.object(configs, "shipped", return_value=[entry | {"kv_bytes": kv_bytes}]):
        return configs.cuda_tree_config("NVIDIA H200", head_dim, 8, kv_bytes, 32, fits, lambda: has_warpgroups)


def test_a_measured_row_picks_the_kernels_of_warpgroups():
    assert cuda_config({}).warpgroups == 0 and cuda_config({}).num_stages == 4
    row = {"warpgroups": 1, "min_chunk": 512}
    assert (cuda_config(row).warpgroups, cuda_config(row).num_stages, cuda_config(row).min_chunk) == (1, 3, 512)
    assert cuda_config(row, fits=lambda stages, warpgroups: stages == 2).num_stages == 2
    # Not where there are none: the other kernels, with the rest of the row.
    assert cuda_config(row, has_warpgroups=False).warpgroups == 0
    assert cuda_config(row, has_warpgroups=False).min_chunk == 512
    with pytest.raises(ValueError, match=r"table, 32/8 heads: warpgroups: no such kernels are for .* KV of 1 bytes"):
        cuda_config(row, kv_bytes=1)
    with pytest.raises(ValueError, match="min_chunk: expected a multiple of 128 with warpgroups, got 64"):
        cuda_config(row | {"min_chunk": 64})


@pytest.mark.parametrize("heads, chunks", [(1, 64), (2, 32), (4, 16), (8, 16), (64, 16)])
def test_few_heads_get_more_chunks(heads, chunks):
    assert tree_config("other", "sm_86", 128, heads, 2, 2).max_chunks == chunks


def test_every_shipped_entry_makes_a_config():
    for entry in configs.shipped("tree_attention"):
        config = tree_config("", entry["for"], entry["block_dim"], 8, entry["q_bytes"], entry["kv_bytes"])
        assert config.source == f"tree_attention.json, {entry['for']}"
        for name, value in entry["config"].items():
            assert getattr(config, name) == value


def test_batch_invariant_configs_have_one_tile_shape(monkeypatch):
    monkeypatch.setenv("TTS_KERNELS_BATCH_INVARIANT", "1")
    assert tree_config("", "sm_90", 128, 8, 2, 2).narrow_rows == 0


@pytest.mark.parametrize(
    "hip, properties, expected",
    [
        # CUDA builds of torch fill gcnArchName with the device's name.
        (None, {"name": "NVIDIA H200", "gcnArchName": "NVIDIA H200", "major": 9, "minor": 0}, "sm_90"),
        (None, {"name": "NVIDIA B200", "gcnArchName": "NVIDIA B200", "major": 10, "minor": 0}, "sm_100"),
        ("6.4", {"name": "MI300X", "gcnArchName": "gfx942:sramecc+:xnack-", "major": 9, "minor": 4}, "gfx942"),
    ],
)
def test_the_architecture_of_a_device(hip, properties, expected, monkeypatch):
    backend = pytest.importorskip("tts_kernels.attention.triton", exc_type=ImportError)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    assert backend.device_kind.__wrapped__(torch.device("cuda", 0)) == (properties["name"], expected)
