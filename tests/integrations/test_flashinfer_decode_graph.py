"""FlashInfer's decode wrapper in CUDA graph mode. On the CPU too: later plans land in the first one's tensors, which is
what a captured run reads."""

from __future__ import annotations

import random

import pytest
import torch
from attention_cases import FP16
from attention_paths import Path
from flashinfer_batches import Batch, Case, caches_of, check, queries, random_batch

from tts_kernels.integrations import flashinfer
from tts_kernels.integrations.flashinfer_decode import DEPTH
from tts_kernels.tree import block_table
from tts_kernels.tree.prefix import DeviceTable


def graph_wrapper(case: Case, most_pages: int, device="cpu"):
    sizes = {"indptr": case.requests + 1, "indices": most_pages, "last_page_len": case.requests}
    buffers = {
        f"paged_kv_{name}_buffer": torch.full((n,), -1, dtype=torch.int32, device=device) for name, n in sizes.items()
    }
    workspace = torch.empty(1, device=device)
    return flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, case.layout, True, **buffers), buffers


def test_graph_mode_keeps_the_tensors():
    """Batches that share in other ways, one of them deeper than the room."""
    case = Case(requests=DEPTH + 2, window=9)
    wrapper, buffers = graph_wrapper(case, 80)
    assert wrapper.is_cuda_graph_enabled
    chain = Batch([list(range(i + 1)) + [20 + i] for i in range(DEPTH + 2)], [4 * i + 6 for i in range(DEPTH + 2)], 60)
    alone = Batch([[i] for i in range(DEPTH + 2)], [1 + i % 4 for i in range(DEPTH + 2)], 60)
    batches = [alone, chain, *(random_batch(random.Random(seed), case) for seed in range(4)), alone]
    before = []
    for batch in batches:
        arguments = batch.arguments(4)
        wrapper.plan(**arguments, **case.options)
        tree = wrapper._planned.tree
        tables = [tree, tree.nodes, tree.pages, tree.rows, tree.grows]
        before = before or [(table, getattr(table, "data_ptr", int)()) for table in tables]
        assert all(now is table for now, (table, _) in zip(tables, before))
        assert all(getattr(table, "data_ptr", int)() == at for table, at in before)
        check(batch, case, Path("reference"), wrapper)
        for given, kept in zip(arguments.values(), buffers.values()):
            assert torch.equal(given, kept[: len(given)])


@pytest.mark.parametrize(
    "arrays, changes, message",
    [
        ({}, {"sm_scale": 2.0}, "sm_scale: expected 0.125 as in the first"),
        ({}, {"q_data_type": FP16}, "q_data_type: expected torch.float32 as in the first"),
        ({}, {"page_size": 8}, "page_size: expected 4 as in the first"),
        ({"indptr": [0, 1]}, {}, "indptr: expected 3 entries like paged_kv_indptr_buffer, got 2"),
        ({"indices": [0] * 7}, {}, "indices: expected at most the 6 page ids of paged_kv_indices_buffer, got 7"),
        ({"indices": [3, -1]}, {}, r"indices: block_table\[1, 0\]: expected a page id in"),
    ],
)
def test_graph_mode_refuses_what_a_captured_run_cannot_follow(arrays, changes, message):
    case = Case(requests=2)
    wrapper, buffers = graph_wrapper(case, 6)
    batch = Batch([[4, 1], [4, 2]], [7, 6], 60)
    wrapper.plan(**batch.arguments(4), **case.options)
    kept = [buffer.clone() for buffer in buffers.values()]
    given = {"indptr": [0, 1, 2], "indices": [3, 5], "last_page_len": [1, 1], **arrays}
    if len(given["indptr"]) == 2:
        given["last_page_len"] = [1]
    given = {name: torch.tensor(numbers, dtype=torch.int32) for name, numbers in given.items()}
    with pytest.raises(ValueError, match="^" + message):
        wrapper.plan(**given, **{**case.options, **changes})
    check(batch, case, Path("reference"), wrapper)
    assert all(map(torch.equal, buffers.values(), kept))


def test_a_table_on_a_device_needs_the_longest_of_each(monkeypatch):
    """There the table itself is what captured runs read: requests times the pages of the longest."""
    monkeypatch.setattr(block_table, "HostTable", DeviceTable)
    case = Case(requests=3)
    batch = Batch([[4, 1, 3], [4, 1, 2], [5]], [11, 10, 2], 60)
    wrapper, _ = graph_wrapper(case, 8)
    with pytest.raises(ValueError, match=r"^indices: room.pages: expected room for the 9 pages of the tree, got 8"):
        wrapper.plan(**batch.arguments(4), **case.options)
    wrapper, _ = graph_wrapper(case, 9)
    wrapper.plan(**batch.arguments(4), **case.options)
    check(batch, case, Path("reference"), wrapper)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_captured_run_follows_later_plans():
    case = Case(requests=6, heads=(2, 1))
    wrapper, _ = graph_wrapper(case, 200, "cuda")
    batches = [random_batch(random.Random(seed), case) for seed in range(3)]
    wrapper.plan(**batches[0].arguments(4, "cuda"), **case.options)
    q = queries(case).cuda()
    caches = tuple(cache.cuda() for cache in caches_of(batches[0], case))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wrapper.run(q, caches, backend="triton")  # compiles, and makes the work list
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = wrapper.run(q, caches, backend="triton")
    for batch in batches:
        wrapper.plan(**batch.arguments(4, "cuda"), **case.options)
        for cache, new in zip(caches, caches_of(batch, case)):
            cache.copy_(new)
        graph.replay()
        torch.testing.assert_close(out, wrapper.run(q, caches, backend="reference"), rtol=1e-3, atol=1e-3)
