"""What the cascade refuses, and that a refused plan() leaves the one before."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import FP16, FP32

from tts_kernels.integrations import flashinfer


def levels(first, second):
    return [torch.tensor(first, dtype=torch.int32), torch.tensor(second, dtype=torch.int32)]


# The valid ones: rows [0, 3) share a page and a half, then have a page each.
VALID = {
    "qo_indptr_arr": levels([0, 3], [0, 1, 2, 3]),
    "paged_kv_indptr_arr": levels([0, 2], [0, 1, 2, 3]),
    "paged_kv_indices_arr": levels([4, 0], [1, 2, 3]),
    "paged_kv_last_page_len": levels([2], [1, 4, 3]),
    "num_qo_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "page_size": 4,
    "q_data_type": FP32,
}
PLANS = [
    # argument named, exception, what it is replaced with, part of the message that says what came
    ("qo_indptr_arr", TypeError, torch.arange(2), "Tensor"),
    ("qo_indptr_arr", ValueError, VALID["qo_indptr_arr"][:1], "1"),
    ("qo_indptr_arr[1]", TypeError, [VALID["qo_indptr_arr"][0], [0, 1, 2, 3]], "list"),
    ("qo_indptr_arr[0]", TypeError, [torch.tensor([0.0, 3.0]), VALID["qo_indptr_arr"][1]], "float32"),
    ("qo_indptr_arr[0]", ValueError, [torch.tensor([[0, 3]]), VALID["qo_indptr_arr"][1]], r"\(1, 2\)"),
    ("qo_indptr_arr[0]", ValueError, levels([1, 3], [0, 1, 2, 3]), r"\[1\]"),
    ("qo_indptr_arr[0]", ValueError, levels([], [0, 1, 2, 3]), r"\[\]"),
    ("qo_indptr_arr[1][2]", ValueError, levels([0, 3], [0, 2, 1, 3]), "1"),
    ("qo_indptr_arr[1]", ValueError, levels([0, 3], [0, 1, 2, 4]), "4"),
    ("paged_kv_indptr_arr", ValueError, VALID["paged_kv_indptr_arr"] * 2, "4"),
    ("paged_kv_indptr_arr[1]", ValueError, levels([0, 2], [0, 1, 3]), "3"),
    ("paged_kv_indptr_arr[0]", ValueError, levels([1, 2], [0, 1, 2, 3]), r"\[1\]"),
    ("paged_kv_indptr_arr[1][3]", ValueError, levels([0, 2], [0, 1, 2, 1]), "1"),
    ("paged_kv_indices_arr[0]", ValueError, levels([4], [1, 2, 3]), "1"),
    ("paged_kv_indices_arr[1][2]", ValueError, levels([4, 0], [1, 2, -3]), "-3"),
    ("paged_kv_indices_arr[0][0]", ValueError, [torch.tensor([2**31, 0]), torch.tensor([1, 2, 3])], "2147483648"),
    ("paged_kv_last_page_len[1]", ValueError, levels([2], [1, 4]), "2"),
    ("paged_kv_last_page_len[0][0]", ValueError, levels([0], [1, 4, 3]), "0"),
    ("paged_kv_last_page_len[1][1]", ValueError, levels([2], [1, 5, 3]), "5"),
    ("num_qo_heads", ValueError, 3, "3"),
    ("num_qo_heads", TypeError, 4.0, "4.0"),
    ("num_kv_heads", ValueError, 0, "0"),
    ("head_dim", ValueError, 0, "0"),
    ("page_size", ValueError, 0, "0"),
    ("causal", TypeError, "yes", "yes"),
    ("pos_encoding_mode", ValueError, "ROPE_LLAMA", "'ROPE_LLAMA'"),
    ("pos_encoding_mode", ValueError, "ALIBI", "'ALIBI'"),
    ("sm_scale", TypeError, "1", "str"),
    ("sm_scale", ValueError, math.nan, "nan"),
    ("window_left", ValueError, -2, "-2"),
    ("window_left", TypeError, 1.5, "1.5"),
    ("logits_soft_cap", ValueError, math.inf, "inf"),
    ("q_data_type", ValueError, "float8_e5m2", "float8_e5m2"),
    ("q_data_type", ValueError, "half precision", "half precision"),
    ("q_data_type", TypeError, 16, "16"),
    ("kv_data_type", ValueError, FP16, "float16"),
]


def planned_wrapper():
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, torch.empty(0))
    wrapper.plan(**VALID)
    return wrapper


@pytest.mark.parametrize("argument, error, value, came", PLANS, ids=[f"{row[0]}-{row[3]}" for row in PLANS])
def test_bad_plan_leaves_the_one_before(argument, error, value, came):
    wrapper = planned_wrapper()
    q, caches = torch.randn(3, 4, 32), torch.randn(2, 5, 4, 2, 32).unbind(0)
    before = wrapper.run(q, caches)
    name = argument.partition("[")[0]
    with pytest.raises(error) as raised:
        wrapper.plan(**{**VALID, name: value})
    message = str(raised.value)
    assert message.startswith(f"{argument}: expected ") and came.replace("\\", "") in message.rpartition("got")[2]
    assert torch.equal(wrapper.run(q, caches), before)


GOOD = {"q": torch.zeros(3, 4, 32), "paged_kv_cache": torch.zeros(5, 2, 4, 2, 32)}
RUNS = [
    ("q", TypeError, [1.0], "list"),
    ("q", TypeError, torch.zeros(3, 4, 32, dtype=FP16), "float16"),
    ("q", ValueError, torch.zeros(2, 4, 32), "(2, 4, 32)"),
    ("q", ValueError, torch.zeros(3, 8, 32), "(3, 8, 32)"),
    ("q", ValueError, torch.zeros(3, 4, 32, device="meta"), "meta"),
    ("paged_kv_cache", TypeError, None, "None"),
    ("paged_kv_cache", TypeError, (torch.zeros(5, 4, 2, 32),), "1 of them"),
    ("paged_kv_cache", ValueError, torch.zeros(5, 4, 2, 32), "(5, 4, 2, 32)"),
    ("paged_kv_cache", ValueError, torch.zeros(2, 5, 4, 2, 32), "(2, 5, 4, 2, 32)"),
    ("k_cache of paged_kv_cache", ValueError, torch.zeros(5, 2, 2, 4, 32), "(5, 2, 4, 32)"),
    ("k_cache of paged_kv_cache", TypeError, torch.zeros(5, 2, 4, 2, 32, dtype=FP16), "float16"),
    ("v_cache of paged_kv_cache", ValueError, (torch.zeros(5, 4, 2, 32), torch.zeros(5, 4, 2, 16)), "(5, 4, 2, 16)"),
    ("v_cache of paged_kv_cache", TypeError, (torch.zeros(5, 4, 2, 32), 3), "int"),
    ("plan", ValueError, torch.zeros(4, 2, 4, 2, 32), "4 as page 0 of node 0"),  # the cache has 4 pages
]


@pytest.mark.parametrize("argument, error, value, came", RUNS, ids=[f"{row[0]}-{row[3]}" for row in RUNS])
def test_bad_run(argument, error, value, came):
    wrapper = planned_wrapper()
    assert wrapper.run(**GOOD).shape == (3, 4, 32)
    given = {**GOOD, ("q" if argument == "q" else "paged_kv_cache"): value}
    with pytest.raises(error) as raised:
        wrapper.run(**given)
    message = str(raised.value)
    assert message.startswith(f"{argument}: expected ") and came in message.rpartition("got")[2]


def test_run_before_plan():
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, torch.empty(0))
    with pytest.raises(RuntimeError, match="plan"):
        wrapper.run(**GOOD)
    with pytest.raises(ValueError, match="sm_scale"):
        wrapper.plan(**VALID, sm_scale=math.nan)
    with pytest.raises(RuntimeError, match="plan"):
        wrapper.run(**GOOD)


INTS = {"dtype": torch.int32}
BUFFERS = {
    "qo_indptr_buf_arr": [torch.zeros(2, **INTS), torch.zeros(4, **INTS)],
    "paged_kv_indptr_buf_arr": [torch.zeros(2, **INTS), torch.zeros(4, **INTS)],
    "paged_kv_indices_buf_arr": [torch.zeros(8, **INTS), torch.zeros(8, **INTS)],
    "paged_kv_last_page_len_buf_arr": [torch.zeros(1, **INTS), torch.zeros(3, **INTS)],
}
WRAPPERS = [
    ("num_levels", ValueError, 0, "0"),
    ("num_levels", TypeError, 2.0, "2.0"),
    ("float_workspace_buffer", TypeError, 1024, "int"),
    ("kv_layout", ValueError, "NDH", "'NDH'"),
    ("qo_indptr_buf_arr", TypeError, None, "NoneType"),
    ("qo_indptr_buf_arr", ValueError, BUFFERS["qo_indptr_buf_arr"][:1], "1"),
    ("qo_indptr_buf_arr[0]", TypeError, [None, None], "NoneType"),
    ("qo_indptr_buf_arr[0]", ValueError, [torch.zeros(0, **INTS)] * 2, "0"),
    ("paged_kv_indices_buf_arr[0]", TypeError, [torch.zeros(8)] * 2, "float32"),
    ("paged_kv_indptr_buf_arr[0]", ValueError, [torch.zeros(3, **INTS)] * 2, "3"),
    ("paged_kv_last_page_len_buf_arr[1]", ValueError, [torch.zeros(1, **INTS)] * 2, "1"),
]


@pytest.mark.parametrize("argument, error, value, came", WRAPPERS, ids=[f"{row[0]}-{row[3]}" for row in WRAPPERS])
def test_bad_wrapper(argument, error, value, came):
    given = {"num_levels": 2, "float_workspace_buffer": torch.empty(0), "use_cuda_graph": True, **BUFFERS}
    flashinfer.MultiLevelCascadeAttentionWrapper(**given)
    with pytest.raises(error) as raised:
        flashinfer.MultiLevelCascadeAttentionWrapper(**{**given, argument.partition("[")[0]: value})
    message = str(raised.value)
    assert message.startswith(f"{argument}: expected ") and came in message.rpartition("got")[2]


def test_bad_workspace_reset():
    wrapper = planned_wrapper()
    with pytest.raises(ValueError, match=r"^int_workspace_buffers: expected 2 tensors"):
        wrapper.reset_workspace_buffer(torch.empty(1), [torch.empty(1)])
    with pytest.raises(TypeError, match=r"^float_workspace_buffer: "):
        wrapper.reset_workspace_buffer(None, [torch.empty(1)] * 2)
