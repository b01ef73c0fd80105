"""FlashInfer's cascade by its own names against a dense float64 softmax."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from attention_cases import FP8, FP16
from attention_paths import Path
from flashinfer_cases import (
    ALL,
    CASES,
    CUTS,
    PLAIN,
    STEP,
    Cascade,
    Case,
    cascade_of,
    check,
    make_caches,
    options,
    params,
    place,
    random_inputs,
)  # fmt: skip
from forests import POISON_PAGE

from tts_kernels.integrations import flashinfer


@pytest.mark.parametrize("path", PLAIN)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_dense(case, path, monkeypatch):
    path.select(monkeypatch)
    check(cascade_of(case), case, path)


@pytest.mark.parametrize("path", ALL)
@pytest.mark.parametrize("case", CUTS, ids=lambda c: f"{c.levels}-causal{c.causal:d}-window{c.window}-{c.seed}")
def test_segments_that_cross_borders(case, path, monkeypatch):
    path.select(monkeypatch)
    check(cascade_of(case), case, path)


@pytest.mark.parametrize("path", ALL)
@pytest.mark.parametrize("window", [-1, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("borders", [[[0, 7], [0, 5, 7]], [[0, 3, 7], [0, 5, 7]]], ids=["nested", "cut"])
def test_more_rows_than_tokens(borders, causal, window, path, monkeypatch):
    """Five rows on two tokens: with causal the first three see the prefix only; two rows on none."""
    path.select(monkeypatch)
    lengths = [[6] * (len(borders[0]) - 1), [2, 0]]
    case = Case(causal=causal, window=window, page_size=4, heads=(2, 1))
    check(place(random.Random(0), borders, lengths, 4), case, path)


def test_window_does_not_know_levels():
    """The same 40 tokens as one level and cut into three give the same rows, window and all."""
    case = Case(levels=3, page_size=1, window=11, rows="decode")
    q, k, v = random_inputs(place(random.Random(0), [[0, 1]], [[40]], 1), case)
    results = []
    for lengths in ([40], [25, 10, 5], [39, 0, 1]):
        cascade = place(random.Random(1), [[0, 1]] * len(lengths), [[n] for n in lengths], 1)
        wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(len(lengths), torch.empty(0))
        wrapper.plan(**cascade.arguments(), **options(cascade, case))
        results.append(wrapper.run(q, make_caches(cascade, case, k, v)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[2], results[0], rtol=1e-5, atol=1e-6)


def test_none_is_no_window_and_no_softcap():
    case = replace(CUTS[0], window=-1, softcap=None)
    cascade = cascade_of(case)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(case.levels, torch.empty(0))
    wrapper.plan(**cascade.arguments(), **{**options(cascade, case), "window_left": None})
    check(cascade, case, Path("reference"), wrapper)


def test_no_rows_and_no_tokens():
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, torch.empty(0))
    for rows, expected in ((0, (0, 2, 64)), (3, (3, 2, 64))):
        cascade = Cascade([[0, rows], [0, rows]], [[0], [0]], 16, [[[]], [[]]], 1)
        wrapper.plan(**cascade.arguments(), **options(cascade, Case(heads=(2, 1))))
        cache = torch.full((1, 2, 16, 1, 64), torch.nan)
        out, lse = wrapper.run(torch.randn(rows, 2, 64), cache, return_lse=True)
        assert torch.equal(out, torch.zeros(expected)) and torch.equal(lse, torch.full(expected[:2], -torch.inf))


def test_plan_keeps_no_reference_to_its_arguments():
    """Index tensors may be written to after plan(), in which a caller keeps buffers for the next step."""
    case = CUTS[0]
    cascade = cascade_of(case)
    arguments = cascade.arguments()
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(case.levels, torch.empty(0))
    wrapper.plan(**arguments, **options(cascade, case))
    for tensors in arguments.values():
        for tensor in tensors:
            tensor.fill_(POISON_PAGE)
    check(cascade, case, Path("reference"), wrapper)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_dtypes_and_aliases(dtype):
    case = CUTS[0]
    cascade = cascade_of(case)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(case.levels, torch.empty(0))
    wrapper.begin_forward(**cascade.arguments(dtype=dtype), **options(cascade, case))
    check(cascade, case, Path("reference"), wrapper)
    q, k, v = random_inputs(cascade, case)
    cache = make_caches(cascade, case, k, v)
    assert torch.equal(wrapper.forward(q, cache), wrapper.run(q, cache))
    assert wrapper.end_forward() is None
    wrapper.reset_workspace_buffer(torch.empty(9), [torch.empty(1)] * case.levels)
    assert not wrapper.is_cuda_graph_enabled
    check(cascade, case, Path("reference"), wrapper)


def test_what_flashinfer_has_not():
    """fp8 caches with scales, sinks and a given `out`: passed on to tree_attention."""
    from tts_kernels import tree_attention

    case = Case(dtype=FP16, page_size=4)
    cascade = cascade_of(case)
    q, k, v = random_inputs(cascade, case)
    k_cache, v_cache = (cache.to(FP8) for cache in make_caches(cascade, case, k, v))
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, torch.empty(0))
    wrapper.plan(**cascade.arguments(), **options(cascade, case), kv_data_type="float8_e4m3fn")
    given = {"k_scale": 0.5, "v_scale": torch.tensor([2.0, 3.0]), "sinks": torch.randn(4), "backend": "reference"}
    out = torch.full_like(q, torch.nan)
    assert wrapper.run(q, (k_cache, v_cache), out=out, **given) is out
    expected = tree_attention(q, k_cache, v_cache, wrapper._planned.tree, **given)
    assert torch.equal(out, expected)
    assert not torch.equal(out, wrapper.run(q, (k_cache, v_cache), backend="reference"))


def run_shared_prefix_program(device):
    """A shared prompt, seven requests, four layers: as the documentation of FlashInfer lays its example out."""
    num_layers, num_qo_heads, num_kv_heads, head_dim, page_size, batch_size = 4, 8, 2, 64, 16, 7
    workspace_buffer = torch.empty(1024, dtype=torch.uint8, device=device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace_buffer, "NHD")
    shared_pages, unique_pages = 12, 20
    total_pages = shared_pages + unique_pages
    shared_indices = torch.arange(shared_pages).int().to(device)
    shared_indptr = torch.tensor([0, shared_pages], dtype=torch.int32, device=device)
    unique_indices = torch.arange(shared_pages, total_pages).int().to(device)
    unique_indptr = torch.tensor([0, 2, 5, 6, 9, 13, 16, unique_pages], dtype=torch.int32, device=device)
    shared_last_page_len = torch.tensor([page_size], dtype=torch.int32, device=device)
    unique_last_page_len = torch.tensor([1, 7, 14, 4, 3, 1, 16], dtype=torch.int32, device=device)
    kv_cache_at_layer = [
        torch.randn(total_pages, 2, page_size, num_kv_heads, head_dim, dtype=torch.float16, device=device)
        for _ in range(num_layers)
    ]
    qo_indptr_arr = [
        torch.tensor([0, batch_size], dtype=torch.int32, device=device),
        torch.arange(batch_size + 1, dtype=torch.int32, device=device),
    ]
    wrapper.plan(
        qo_indptr_arr,
        [shared_indptr, unique_indptr],
        [shared_indices, unique_indices],
        [shared_last_page_len, unique_last_page_len],
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
    )
    queries, outputs = [], []
    for layer in range(num_layers):
        queries.append(torch.randn(batch_size, num_qo_heads, head_dim).half().to(device))
        outputs.append(wrapper.run(queries[-1], kv_cache_at_layer[layer]))
    return queries, kv_cache_at_layer, unique_indptr, unique_last_page_len, outputs


@pytest.mark.parametrize("path", params(Path("reference"), Path("reference", "cuda")))
def test_flashinfer_program(path):
    """On the default backend, request by request against torch's attention over its own pages."""
    queries, caches, indptr, last, outputs = run_shared_prefix_program(path.device)
    for q, cache, out in zip(queries, caches, outputs):
        assert out.shape == (7, 8, 64) and out.dtype == FP16
        for i in range(7):
            tokens = int(indptr[i + 1] - indptr[i] - 1) * 16 + int(last[i])
            pages = torch.cat([cache[:12], cache[12 + int(indptr[i]) : 12 + int(indptr[i + 1])]])
            k, v = (pages[:, side].flatten(0, 1)[: 192 + tokens].double() for side in (0, 1))
            k, v = (x.repeat_interleave(4, 1).transpose(0, 1) for x in (k, v))  # [Hq, T, D]
            expected = torch.nn.functional.scaled_dot_product_attention(q[i][:, None].double(), k, v)[:, 0]
            torch.testing.assert_close(out[i].double(), expected, rtol=2e-3, atol=5e-4)


@pytest.mark.parametrize("path", ALL)
def test_a_window_as_large_as_int32_hides_nothing(path):
    """Rows beyond their segment's tokens have negative positions there: the two must not add up beyond int32."""
    cascade = place(random.Random(3), [[0, 6], [0, 6]], [[3], [1]], 4)
    case = replace(STEP, causal=True, window=2**31 - 1)
    check(cascade, case, path)
