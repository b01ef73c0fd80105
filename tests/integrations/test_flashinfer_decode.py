"""FlashInfer's decode wrapper by its own names, against a dense float64 softmax, and what it refuses."""

from __future__ import annotations

import math
import random

import pytest
import torch
from attention_cases import BF16, FP8, FP16, FP32
from attention_paths import Path
from flashinfer_batches import CASES, LN2, Batch, Case, caches_of, check, planned, queries, random_batch
from flashinfer_cases import ALL, PLAIN
from forests import POISON_PAGE

from tts_kernels.integrations import flashinfer
from tts_kernels.tree import block_table
from tts_kernels.tree.prefix import DeviceTable


@pytest.mark.parametrize("path", PLAIN)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.seed}-D{c.head_dim}")
def test_against_dense(case, path, monkeypatch):
    path.select(monkeypatch)
    check(random_batch(random.Random(case.seed), case), case, path)


@pytest.mark.parametrize("path", ALL)
def test_small_batches(path, monkeypatch):
    path.select(monkeypatch)
    for seed in range(3):
        case = Case(heads=(2, 1), window=[-1, 5, None][seed], seed=seed)
        check(random_batch(random.Random(seed), case), case, path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_what_requests_share_is_found(dtype):
    """Three requests of one prompt of 2 pages, two of which share a third page; pages are read once, the last token's
    own page by each."""
    case = Case(requests=4)
    batch = Batch([[7, 3, 5, 1], [9], [7, 3, 8], [7, 3, 5, 2]], [15, 2, 10, 13], 60)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(0))
    wrapper.plan(**batch.arguments(4, dtype=dtype), **case.options)
    tree = wrapper._planned.tree
    assert sorted(tree.nodes[1].tolist()) == sorted([8, 4, 3, 1, 2, 2]) and tree.depth == 3
    check(batch, case, Path("reference"), wrapper)


def test_no_requests_and_no_tokens():
    for requests in (0, 3):
        wrapper = planned(Batch([[]] * requests, [0] * requests, 1), Case())
        cache = torch.full((1, 2, 4, 2, 64), torch.nan)
        out, lse = wrapper.run(torch.randn(requests, 4, 64), cache, return_lse=True)
        assert torch.equal(out, torch.zeros(requests, 4, 64))
        assert torch.equal(lse, torch.full((requests, 4), -torch.inf))


def test_what_run_takes():
    """fp8 caches with scales, q_scale, sinks, and tensors to write to."""
    from tts_kernels import tree_attention

    case = Case(dtype=FP16, scale=0.3)
    batch = random_batch(random.Random(0), case)
    q = queries(case)
    k_cache, v_cache = (cache.to(FP8) for cache in caches_of(batch, case))
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(0))
    wrapper.plan(**batch.arguments(4), **{**case.options, "kv_data_type": "float8_e4m3fn", "o_data_type": "float16"})
    given = {"k_scale": 0.5, "v_scale": 2.0, "sinks": torch.randn(4), "backend": "reference"}
    out, lse = torch.full_like(q, torch.nan), torch.full((7, 4), torch.nan)
    result = wrapper.run(q, (k_cache, v_cache), q_scale=2, out=out, lse=lse, return_lse=True, window_left=-1, **given)
    assert result[0] is out and result[1] is lse
    expected = tree_attention(q, k_cache, v_cache, wrapper._planned.tree, scale=0.6, return_lse=True, **given)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1] / LN2)
    again = torch.full_like(lse, torch.nan)
    only = wrapper.run(q, (k_cache, v_cache), q_scale=2.0, lse=again, **given)
    assert torch.equal(only, out) and torch.equal(again, lse)
    both = wrapper.run_return_lse(q, (k_cache, v_cache), q_scale=2.0, **given)
    assert torch.equal(both[0], out) and torch.equal(both[1], lse)


def test_data_type_stands_for_both():
    case = Case(requests=1)
    arguments = random_batch(random.Random(0), case).arguments(4)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(0))
    wrapper.plan(**arguments, **{**case.options, "q_data_type": None}, data_type="bfloat16")
    assert wrapper._planned.options.q_data_type == wrapper._planned.options.kv_data_type == BF16
    with pytest.raises(ValueError, match=r"^kv_data_type: "):  # q_data_type is float16 then, as in FlashInfer
        wrapper.plan(**arguments, **{**case.options, "q_data_type": FP16}, data_type=BF16)


def test_plan_keeps_no_reference_to_its_arguments():
    case = Case()
    batch = random_batch(random.Random(3), case)
    arguments = batch.arguments(4)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(0))
    wrapper.plan(**arguments, **case.options)
    for tensor in arguments.values():
        tensor.fill_(POISON_PAGE)
    check(batch, case, Path("reference"), wrapper)
    wrapper.reset_workspace_buffer(torch.empty(9), torch.empty(1))
    assert not wrapper.is_cuda_graph_enabled and not wrapper.use_tensor_cores


def test_a_table_that_is_compared_on_its_device(monkeypatch):
    """As on a GPU: by Triton kernels, here under the interpreter."""
    monkeypatch.setattr(block_table, "HostTable", DeviceTable)
    for seed in range(2):
        case = Case(seed=seed)
        check(random_batch(random.Random(seed), case), case, Path("reference"))


INTS = {"dtype": torch.int32}
VALID = {
    "indptr": torch.tensor([0, 2, 3, 3], **INTS),
    "indices": torch.tensor([4, 0, 1], **INTS),
    "last_page_len": torch.tensor([2, 4, 0], **INTS),
    "num_qo_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "page_size": 4,
    "q_data_type": FP32,
}
PLANS = [
    # argument named, exception, what it is replaced with, part of the message that says what came
    ("indptr", TypeError, [0, 2, 3, 3], "list"),
    ("indptr", TypeError, torch.tensor([0.0, 2, 3, 3]), "float32"),
    ("indptr", ValueError, torch.tensor([1, 2, 3, 3]), "[1]"),
    ("indptr[2]", ValueError, torch.tensor([0, 2, 1, 3]), "1"),
    ("last_page_len", ValueError, torch.tensor([2, 4]), "2"),
    ("last_page_len[0]", ValueError, torch.tensor([0, 4, 0]), "0"),
    ("last_page_len[1]", ValueError, torch.tensor([2, 5, 0]), "5"),
    ("indices", TypeError, [4, 0, 1], "list"),
    ("indices", ValueError, torch.tensor([4, 0]), "2"),
    ("indices: block_table[1, 0]", ValueError, torch.tensor([4, 0, -3]), "-3"),
    ("num_qo_heads", ValueError, 3, "3"),
    ("page_size", ValueError, 0, "0"),
    ("pos_encoding_mode", ValueError, "ROPE_LLAMA", "'ROPE_LLAMA'"),
    ("sm_scale", ValueError, math.nan, "nan"),
    ("window_left", ValueError, -2, "-2"),
    ("window_left", TypeError, 1.5, "1.5"),
    ("logits_soft_cap", TypeError, "30", "str"),
    ("q_data_type", ValueError, "float8_e4m3fn", "float8_e4m3fn"),
    ("kv_data_type", ValueError, FP16, "float16"),
    ("o_data_type", ValueError, BF16, "bfloat16"),
]


@pytest.mark.parametrize("argument, error, value, came", PLANS, ids=[f"{row[0]}-{row[3]}" for row in PLANS])
def test_bad_plan_leaves_the_one_before(argument, error, value, came):
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(0))
    wrapper.plan(**VALID)
    q, caches = torch.randn(3, 4, 32), torch.randn(2, 5, 4, 2, 32).unbind(0)
    before = wrapper.run(q, caches)
    with pytest.raises(error) as raised:
        wrapper.plan(**{**VALID, argument.partition("[")[0].partition(":")[0]: value})
    message = str(raised.value)
    assert message.startswith(f"{argument}: expected ") and came in message.rpartition("got")[2]
    assert torch.equal(wrapper.run(q, caches), before)


GOOD = {"q": torch.zeros(3, 4, 32), "paged_kv_cache": torch.zeros(5, 2, 4, 2, 32)}
RUNS = [
    ("q", ValueError, torch.zeros(2, 4, 32), "(2, 4, 32)"),
    ("paged_kv_cache", ValueError, torch.zeros(5, 4, 2, 32), "(5, 4, 2, 32)"),
    ("k_cache of paged_kv_cache", ValueError, torch.zeros(5, 2, 2, 4, 32), "(5, 2, 4, 32)"),
    ("q_scale", TypeError, torch.ones(1), "Tensor"),
    ("lse", TypeError, torch.zeros(3, 4, dtype=FP16), "float16"),
    ("lse", ValueError, torch.zeros(3, 2), "(3, 2)"),
    ("window_left", ValueError, 3, "3"),
    ("q_len_per_req", ValueError, 2, "2"),
    ("skip_softmax_threshold_scale_factor", ValueError, 500.0, "500.0"),
]


@pytest.mark.parametrize("argument, error, value, came", RUNS, ids=[f"{row[0]}-{row[3]}" for row in RUNS])
def test_bad_run(argument, error, value, came):
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(0))
    wrapper.plan(**VALID)
    assert wrapper.run(**GOOD).shape == (3, 4, 32)
    with pytest.raises(error) as raised:
        wrapper.run(**{**GOOD, argument.rpartition(" ")[2]: value})
    message = str(raised.value)
    assert message.startswith(f"{argument}: expected ") and came in message.rpartition("got")[2]


def test_run_before_plan():
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(0))
    with pytest.raises(RuntimeError, match="plan"):
        wrapper.run(**GOOD)


BUFFERS = {
    "paged_kv_indptr_buffer": torch.zeros(4, **INTS),
    "paged_kv_indices_buffer": torch.zeros(8, **INTS),
    "paged_kv_last_page_len_buffer": torch.zeros(3, **INTS),
}
WRAPPERS = [
    ("float_workspace_buffer", TypeError, 1024, "int"),
    ("kv_layout", ValueError, "NDH", "'NDH'"),
    ("backend", ValueError, "trtllm-gen", "'trtllm-gen'"),
    ("jit_args", ValueError, ["mine"], "['mine']"),
    ("paged_kv_indices_buffer", TypeError, None, "NoneType"),
    ("paged_kv_indptr_buffer", ValueError, torch.zeros(3, **INTS), "3"),
    ("paged_kv_last_page_len_buffer", ValueError, torch.zeros(0, **INTS), "0"),
]


@pytest.mark.parametrize("argument, error, value, came", WRAPPERS, ids=[f"{row[0]}-{row[3]}" for row in WRAPPERS])
def test_bad_wrapper(argument, error, value, came):
    given = {"float_workspace_buffer": torch.empty(0), "use_cuda_graph": True, **BUFFERS}
    flashinfer.BatchDecodeWithPagedKVCacheWrapper(**given)
    with pytest.raises(error) as raised:
        flashinfer.BatchDecodeWithPagedKVCacheWrapper(**{**given, argument: value})
    message = str(raised.value)
    assert message.startswith(f"{argument}: expected ") and came in message.rpartition("got")[2]
