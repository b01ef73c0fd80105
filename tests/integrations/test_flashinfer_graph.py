"""FlashInfer's cascade in CUDA graph mode. On the CPU too: later plans land in the first one's tensors, which is what a
captured run reads."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from attention_cases import FP16, FP32
from attention_paths import Path
from flashinfer_cases import STEP, Cascade, Case, check, make_caches, options, place, random_inputs

from tts_kernels.integrations import flashinfer


def graph_wrapper(cascade: Cascade, case: Case, device="cpu", spare=8):
    arguments = cascade.arguments(device)
    spares = {"paged_kv_indices_arr": spare}
    buffers = {
        ("paged_kv_last_page_len_buf_arr" if "last" in name else name.replace("_arr", "_buf_arr")): [
            torch.full((len(t) + spares.get(name, 0),), -1, dtype=torch.int32, device=device) for t in tensors
        ]
        for name, tensors in arguments.items()
    }
    workspace = torch.empty(1, device=device)
    return flashinfer.MultiLevelCascadeAttentionWrapper(case.levels, workspace, case.layout, True, **buffers), buffers


def tables(wrapper):
    tree = wrapper._planned.tree
    return [tree.nodes, tree.pages, tree.rows, tree.grows]


NOW = place(random.Random(0), [[0, 3, 3, 6], [0, 1, 3, 6]], [[9, 5, 7], [3, 4, 6]], 4)
# Other lengths, pages and rows of the segments; the first of level 1 has none now.
NEXT = place(random.Random(1), [[0, 2, 2, 6], [0, 0, 2, 6]], [[12, 0, 3], [9, 5, 7]], 4)


def test_graph_mode_keeps_the_tensors():
    wrapper, buffers = graph_wrapper(NOW, STEP)
    assert wrapper.is_cuda_graph_enabled
    with torch.inference_mode():
        wrapper.plan(**NOW.arguments(), **options(NOW, STEP))
    check(NOW, STEP, Path("reference"), wrapper)
    before = [(table, table.data_ptr()) for table in tables(wrapper)]
    for cascade in (NEXT, NOW, NEXT):
        wrapper.plan(**cascade.arguments(), **options(cascade, STEP))
        assert all(now is table and now.data_ptr() == at for now, (table, at) in zip(tables(wrapper), before))
        served = [cascade.pages[level][j] for level, j, begin, end in cascade.segments() if end > begin]
        assert wrapper._planned.tree.max_page == max(map(max, filter(None, served)))
        check(cascade, STEP, Path("reference"), wrapper)
        for given, kept in zip(cascade.arguments().values(), buffers.values()):
            assert all(torch.equal(g, k[: len(g)]) for g, k in zip(given, kept))


@pytest.mark.parametrize(
    "cascade, changes, message",
    [
        (place(random.Random(2), [[0, 2, 5], [0, 0, 2, 5]], [[4, 4], [1, 1, 1]], 4), {}, "qo_indptr_arr.0.: .*4 ent"),
        (place(random.Random(2), [[0, 2, 2, 5], [0, 0, 2, 5]], [[4] * 3, [1] * 3], 4), {}, "qo_indptr_arr: .*6 rows"),
        (place(random.Random(2), [[0, 2, 2, 6], [0, 0, 3, 6]], [[4] * 3, [1] * 3], 4), {}, "qo_indptr_arr: .*6 nodes"),
        (
            place(random.Random(2), [[0, 2, 2, 6], [0, 0, 2, 6]], [[40, 0, 40], [1] * 3], 4), {},
            "paged_kv_indices_arr.0.: .*page ids",
        ),
        (NEXT, {"causal": False}, "causal"),
        (NEXT, {"sm_scale": 2.0}, "sm_scale"),
        (NEXT, {"window_left": -1}, "window_left"),
        (NEXT, {"logits_soft_cap": 3.0}, "logits_soft_cap"),
        (NEXT, {"q_data_type": FP16}, "q_data_type"),
        (NEXT, {"num_qo_heads": 4}, "num_qo_heads"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_graph_mode_refuses_what_a_captured_run_cannot_follow(cascade, changes, message):
    wrapper, buffers = graph_wrapper(NOW, STEP)
    wrapper.plan(**NOW.arguments(), **options(NOW, STEP))
    kept = [[buffer.clone() for buffer in level] for level in buffers.values()]
    with pytest.raises(ValueError, match=message):
        wrapper.plan(**cascade.arguments(), **{**options(cascade, STEP), **changes})
    check(NOW, STEP, Path("reference"), wrapper)
    for now, before in zip(buffers.values(), kept):
        assert all(map(torch.equal, now, before))


def test_graph_mode_counts_the_pages_of_cut_segments_twice():
    """Segment 1 of level 1 has 5 pages and is cut: 2 + 4 + 5 + 5 + 5. Buffers: 3 + 14, and one more on each level."""
    cut = place(random.Random(2), [[0, 2, 2, 6], [0, 1, 3, 6]], [[4] * 3, [16, 20, 20]], 4)
    wrapper, _ = graph_wrapper(cut, STEP, spare=0)
    with pytest.raises(ValueError, match=r"^paged_kv_indices_buf_arr: expected room for the 21 page ids .* got 19$"):
        wrapper.plan(**cut.arguments(), **options(cut, STEP))
    wrapper, _ = graph_wrapper(cut, STEP, spare=1)
    wrapper.plan(**cut.arguments(), **options(cut, STEP))
    check(cut, STEP, Path("reference"), wrapper)


@pytest.mark.parametrize("path", [Path("triton"), Path("cuda")], ids=str)
def test_graph_mode_writes_the_work_lists_anew(path, monkeypatch):
    """Chunks and tiles come and go with lengths and rows; a captured run reads one table of one size."""
    if path.missing():
        pytest.skip(path.missing())
    path.select(monkeypatch)
    case = replace(STEP, window=-1, dtype=path.takes(FP32))
    shapes = [
        ([[0, 3, 3, 6], [0, 1, 3, 6]], [[9, 5, 7], [3, 4, 6]]),
        ([[0, 1, 1, 6], [0, 0, 1, 6]], [[140, 0, 300], [9, 135, 7]]),
    ]
    cascades = [place(random.Random(i), *shape, 4) for i, shape in enumerate(shapes)]
    wrapper, _ = graph_wrapper(cascades[0], case, spare=120)
    wrapper.plan(**cascades[0].arguments(), **options(cascades[0], case))
    check(cascades[0], case, path, wrapper)
    (work,) = wrapper._planned.tree.works.values()
    before = work.table.clone()
    for cascade in (cascades[1], cascades[0]):
        wrapper.plan(**cascade.arguments(), **options(cascade, case))
        check(cascade, case, path, wrapper)
        assert list(wrapper._planned.tree.works.values()) == [work]
    assert torch.equal(work.table, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_captured_run_follows_later_plans():
    q, k, v = random_inputs(NOW, STEP)
    wrapper, _ = graph_wrapper(NOW, STEP, "cuda")
    wrapper.plan(**NOW.arguments("cuda"), **options(NOW, STEP))
    q_buffer = q.cuda()
    shape = (2, NOW.num_pages + NEXT.num_pages, 4, 1, STEP.head_dim)
    k_cache, v_cache = torch.full(shape, torch.nan, device="cuda").unbind(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wrapper.run(q_buffer, (k_cache, v_cache), backend="triton")  # compiles, and makes the work list
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = wrapper.run(q_buffer, (k_cache, v_cache), backend="triton")
    for cascade in (NOW, NEXT, NOW):
        wrapper.plan(**cascade.arguments("cuda"), **options(cascade, STEP))
        q, k, v = random_inputs(cascade, STEP)
        for cache, new in zip((k_cache, v_cache), make_caches(cascade, STEP, k, v)):
            cache.fill_(torch.nan)[: len(new)].copy_(new)
        q_buffer.copy_(q)
        graph.replay()
        eager = wrapper.run(q_buffer, (k_cache, v_cache), backend="reference")
        torch.testing.assert_close(out, eager, rtol=1e-3, atol=1e-3)
