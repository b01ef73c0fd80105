"""The attention backend for SGLang: its parts on plain tensors, against a plain softmax."""

from __future__ import annotations

import importlib.util
import random
import types

import pytest
import torch
from dense import assert_close
from sglang_requests import FP8, HKV, HQ, LENS, D, Requests, tensors

from tts_kernels import tree_attention
from tts_kernels.integrations import sglang as plugin

INSTALLED = importlib.util.find_spec("sglang") is not None


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("kind", LENS)
def test_page_table(kind, page_size):
    requests = Requests(random.Random(0), page_size, LENS[kind])
    longest = max(tokens for tokens, _ in requests.lens)
    table = plugin.page_table(requests.req_to_token(), torch.tensor(requests.at), longest, page_size)
    assert table.shape == (len(requests.lens), -(-longest // page_size))
    assert table.dtype == torch.int32
    assert [row[: len(pages)].tolist() for row, pages in zip(table, requests.pages)] == requests.pages


@pytest.mark.parametrize("window", [-1, 0, 40])
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("kind", LENS)
def test_attention_over_the_page_tables(kind, page_size, window):
    """Decode, a prefill behind cached tokens, chunks of one: shared slots are read once, each request sees its own."""
    requests = Requests(random.Random(page_size), page_size, LENS[kind])
    q, k, v = tensors(requests)
    plan = requests.plan(q_lens=None if kind == "decode" else requests.q_lens)
    assert plan.num_rows == len(q)
    assert plan.num_tokens == requests.distinct
    caches = [plugin.as_pages(cache, page_size) for cache in (k, v)]
    out = tree_attention(q, *caches, plan, window=window, check=True)
    plain, exact = (requests.dense(q, k, v, dtype=dtype, window=window) for dtype in (torch.float32, torch.float64))
    assert_close("out", out, plain, exact, terms=max(requests.seq_lens))


def test_samples_of_a_prompt_are_read_once():
    """64 tokens in common by twos of 80, and all by 48: 48 + 2 * 16 + 4 * 16 tokens instead of 4 * 80."""
    table = torch.zeros((5, 90), dtype=torch.int32)
    pages = [[1, 2, 3, 4, 10], [1, 2, 3, 4, 11], [1, 2, 3, 5, 12], [1, 2, 3, 5, 13]]
    for row, own in enumerate(pages):
        table[row, :80] = torch.tensor([page * 16 + i for page in own for i in range(16)])
    plan = plugin.make_plan(table, torch.arange(4), torch.full((4,), 80), page_size=16)
    assert plan.num_tokens == 48 + 2 * 16 + 4 * 16
    assert plan.num_nodes == 7
    apart = plugin.make_plan(table, torch.arange(4), torch.full((4,), 80), page_size=16, least_saving=10**6)
    assert apart.num_tokens == 4 * 80


def test_longest_need_not_be_the_whole_table():
    """Columns behind the longest request are not looked at, with the length from the host or not."""
    requests = Requests(random.Random(3), 4, LENS["decode"])
    asked, told = requests.plan(), requests.plan(longest=200)
    assert torch.equal(asked.nodes, told.nodes)
    assert torch.equal(asked.pages, told.pages)


def test_rows_that_pad_a_batch():
    """Requests that pad a batch: row 0 of the table, one token, in slot 0."""
    table = torch.zeros((3, 8), dtype=torch.int32)
    table[2, :5] = torch.arange(4, 9)
    plan = plugin.make_plan(table, torch.tensor([2, 0, 0]), torch.tensor([5, 1, 1]), page_size=1)
    assert plan.num_rows == 3
    k = torch.randn(9, HKV, D)
    q = torch.randn(3, HQ, D)
    out = tree_attention(q, plugin.as_pages(k, 1), plugin.as_pages(k, 1), plan, check=True)
    alone = plugin.make_plan(table, torch.tensor([2]), torch.tensor([5]), page_size=1)
    assert torch.equal(out[:1], tree_attention(q[:1], plugin.as_pages(k, 1), plugin.as_pages(k, 1), alone))


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_pool_for_window_layers(page_size):
    """Its slots are others; those before every window are freed, marked by 0 or -1. Page 0 holds anything finite."""
    window = 20
    requests = Requests(random.Random(page_size), page_size, LENS["decode"])
    q, k, v = tensors(requests)
    needed = {
        slot // page_size for own, (tokens, _) in zip(requests.slots, requests.lens) for slot in own[-window - 1 :]
    }  # pages
    order = list(range(1, 1 + len(needed)))
    random.Random(1).shuffle(order)
    window_slots = torch.zeros(requests.num_slots + 1, dtype=torch.int64)
    window_slots[-1] = -1  # what SGLang appends
    window_slots[page_size : page_size * 4 : 2] = -1
    caches = [torch.zeros(((1 + len(needed)) * page_size, HKV, D)) for _ in range(2)]
    for to, page in zip(order, sorted(needed)):
        slots, targets = (torch.arange(number * page_size, (number + 1) * page_size) for number in (page, to))
        window_slots[slots] = targets
        for cache, full in zip(caches, (k, v)):
            cache[targets] = full[slots]
    options = {"page_size": page_size, "window_slots": window_slots}
    plan = plugin.make_plan(requests.req_to_token(fill=0), torch.tensor(requests.at), requests.seq_lens, **options)
    out = tree_attention(q, *(plugin.as_pages(cache, page_size) for cache in caches), plan, window=window, check=True)
    plain, exact = (requests.dense(q, k, v, dtype=dtype, window=window) for dtype in (torch.float32, torch.float64))
    assert_close("out", out, plain, exact, terms=max(requests.seq_lens))


def test_as_pages():
    buffer = torch.arange(10 * 2 * 3).view(10, 2, 3)
    pages = plugin.as_pages(buffer, 4)
    assert pages.shape == (2, 4, 2, 3)
    assert pages.data_ptr() == buffer.data_ptr()
    assert torch.equal(pages[1, 2], buffer[6])
    heads_first = torch.randn(5, 2, 4, 3)
    assert torch.equal(plugin.as_pages(heads_first, 4)[3, 1], heads_first[3, :, 1])


def test_scales_are_for_fp8_alone():
    scale = torch.tensor(0.5)
    assert plugin.scale_of(scale, FP8) is scale
    assert plugin.scale_of(scale, torch.bfloat16) is None
    assert plugin.scale_of(None, FP8) is None


GOOD_ARGUMENTS = {
    "speculative_algorithm": None, "dllm_algorithm": None, "dcp_size": 1, "attn_cp_size": 1, "kv_cache_dtype": "auto",
}  # fmt: skip


@pytest.mark.parametrize(
    "name, value",
    [
        ("speculative_algorithm", "EAGLE"),
        ("dllm_algorithm", "LowConfidence"),
        ("dcp_size", 2),
        ("attn_cp_size", 4),
        ("kv_cache_dtype", "fp8_e5m2"),
        ("kv_cache_dtype", "nvfp4"),
    ],
)
def test_refused_arguments(name, value):
    assert plugin.unsupported_arguments(types.SimpleNamespace(**GOOD_ARGUMENTS)) == []
    assert plugin.unsupported_arguments(types.SimpleNamespace()) == []
    reasons = plugin.unsupported_arguments(types.SimpleNamespace(**{**GOOD_ARGUMENTS, name: value}))
    assert len(reasons) == 1
    assert reasons[0].startswith(f"{name} {value}")
    with pytest.raises(ValueError, match=f"attention backend tts_kernels does not support {name} {value}"):
        plugin.refuse(reasons)


GOOD_LAYER = {
    "is_cross_attention": False, "attn_type": "decoder", "v_head_dim": 64, "qk_head_dim": 64,
    "pos_encoding_mode": "NONE", "logit_cap": 30.0, "logit_capping_method": "tanh", "xai_temperature_len": -1,
}  # fmt: skip


@pytest.mark.parametrize(
    "name, value, word",
    [
        ("is_cross_attention", True, "cross attention"),
        ("attn_type", "encoder_only", "attn_type encoder_only"),
        ("v_head_dim", 32, "v_head_dim 32"),
        ("pos_encoding_mode", "ALIBI", "pos_encoding_mode ALIBI"),
        ("logit_capping_method", "clip", "logit_capping_method clip"),
        ("xai_temperature_len", 1024, "xai_temperature_len 1024"),
    ],
)
def test_refused_layers(name, value, word):
    assert plugin.unsupported_layer(types.SimpleNamespace(**GOOD_LAYER)) == []
    assert plugin.unsupported_layer(types.SimpleNamespace(**{**GOOD_LAYER, "logit_cap": None})) == []
    reasons = plugin.unsupported_layer(types.SimpleNamespace(**{**GOOD_LAYER, name: value}))
    assert len(reasons) == 1
    assert word in reasons[0]


@pytest.mark.skipif(INSTALLED, reason="sglang is installed")
def test_without_sglang():
    with pytest.raises(ImportError, match="sglang"):
        plugin.register()
