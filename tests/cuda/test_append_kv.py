"""What is the cuda backend's own in append_kv and merge_states: addresses that no vector fits, and errors that tests
have to find. The tests in tests/attention run on it too."""

from __future__ import annotations

import attention_cases as cases
import attention_paths as paths
import emulated
import pytest
import torch
from attention_cases import BF16, FP8, FP16, FP32
from own_process import failure

from tts_kernels.attention import append_kv, merge_states

EMULATED = paths.Path("cuda")
SOURCES = ["csrc/bindings.cpp", "csrc/cuda/*.cu"]


@pytest.fixture(params=[param for param in paths.available() if param.values[0].backend == "cuda"], ids=str)
def path(request, monkeypatch):
    request.param.select(monkeypatch)
    return request.param


def framed(x: torch.Tensor, before: int, device: str) -> torch.Tensor:
    """The same tensor as a view into a larger one, its rows apart and `before` elements behind an aligned address."""
    width = x.shape[-1] + 2 * before + 1
    bytes_ = torch.full((*x.shape[:-1], width * x.element_size()), 0x7F, dtype=torch.uint8)
    frame = cases.on_device(bytes_, device).view(x.dtype)
    view = frame[..., before : before + x.shape[-1]]
    view.copy_(x)
    return view


@pytest.mark.parametrize("before", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (FP16, FP8), (FP32, FP8), (FP8, FP8)], ids=str)
@pytest.mark.parametrize("rotary_dim", [0, 16, 12])
def test_any_address(path, dtypes, before, rotary_dim):
    """Keys, caches and angles that begin at any element: the bits are those of aligned ones, nothing beside them is
    written."""
    dtype, cache_dtype = dtypes
    if dtype == FP8 and rotary_dim:
        pytest.skip("fp8 keys are not turned")
    gen = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(3, 2, 24, generator=gen) for _ in range(3))
    k, v, q = (x.to(dtype) for x in (k, v, q))
    slots, positions = torch.tensor([5, -1, 0]), torch.tensor([2, 0, 1])
    rope = {}
    results = []
    for offset in (0, before):
        caches = [framed(torch.zeros(2, 4, 2, 24).to(cache_dtype), offset, path.device) for _ in range(2)]
        if rotary_dim:
            angles = torch.randn(3, rotary_dim, generator=torch.Generator().manual_seed(1))
            rope = {
                "cos_sin_cache": framed(angles, offset, path.device),
                "positions": positions.to(path.device),
                "q": framed(q, offset, path.device),
            }
        got = append_kv(
            framed(k, offset, path.device), framed(v, offset, path.device), *caches, slots.to(path.device),
            backend="cuda", **rope,
        )  # fmt: skip
        for cache in caches:
            storage = torch.empty(0, dtype=torch.uint8, device=path.device).set_(cache.untyped_storage())
            rows = storage.view(2, 4, 2, -1).cpu()
            size = cache.element_size()
            assert (rows[..., : offset * size] == 0x7F).all() and (rows[..., (offset + 24) * size :] == 0x7F).all()
        results.append([cache.cpu().contiguous().view(torch.uint8) for cache in caches])
        if rotary_dim:
            results[-1].append(got.cpu().view(torch.uint8))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("before", [0, 1, 4])
def test_states_at_any_address(path, dtype, before):
    gen = torch.Generator().manual_seed(0)
    out, lse = torch.randn(3, 5, 2, 20, generator=gen).to(dtype), torch.randn(3, 5, 2, generator=gen)
    wanted = merge_states(out.to(path.device), lse.to(path.device), backend="cuda")
    got = merge_states(framed(out, before, path.device), framed(lse, before, path.device), backend="cuda")
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_no_states_rows(path):
    out, lse = merge_states(
        torch.empty(2, 0, 3, 8, device=path.device), torch.empty(2, 0, 3, device=path.device), backend="cuda"
    )
    assert out.shape == (0, 3, 8) and lse.shape == (0, 3)


APPEND, MERGE, ELEMENTS = "csrc/cuda/append_kv.cu", "csrc/cuda/merge_states.cu", "csrc/cuda/elements.cuh"

# (what goes wrong, the file, what stands there, what it becomes)
PLANTED = [
    ("slots: -1 is one", APPEND, "if (slot >= 0) {", "if (slot >= -1) {"),
    ("slots: the offset is the page", APPEND, "offset = slot % rows", "offset = slot / rows"),
    ("heads: V of head 0", APPEND, "is_v ? head - num_kv_heads : head", "is_v ? 0 : head"),
    ("rope: the angle of the pair after", APPEND, "!p.is_neox ? d / 2", "!p.is_neox ? (d + 1) / 2"),
    ("rope: sines for cosines", APPEND, "sines = cosines + half", "sines = cosines"),
    ("rope: V is turned", APPEND, "convert(is_v ? nullptr : rope", "convert(rope"),
    ("fp8: half away from zero", ELEMENTS, "0x7ffff + (magnitude >> 20 & 1)", "0x80000"),
    ("fp8: no subnormal numbers", ELEMENTS, "if (magnitude < 0x3c800000)", "if (magnitude < 0x3b800000)"),
    ("tail: its last is left out", ELEMENTS, "count) break;\n    if (dtype", "count - 1) break;\n    if (dtype"),
    ("merge: empty states count", MERGE, "if (weight == 0.0f) continue;", ""),
    ("merge: the last state is left out", MERGE, "states.num_states; ++s) {", "states.num_states - 1; ++s) {"),
]  # fmt: skip


def compare(native, monkeypatch) -> None:
    EMULATED.select(monkeypatch)
    monkeypatch.setattr("tts_kernels.attention.cuda.native", native)
    gen = torch.Generator().manual_seed(0)
    slots, positions = torch.tensor([5, -1, 1, 10]), torch.tensor([2, 0, 1, 3])
    for dtype, cache_dtype in ((BF16, BF16), (FP32, FP8)):
        for is_neox in (True, False):
            k, q = ((torch.randn(4, 2, 27, generator=gen) * 0.3).to(dtype) for _ in range(2))
            v = torch.randint(-31, 32, (4, 2, 27), generator=gen).to(dtype)  # odd ones from 17 on are ties in fp8
            rope = {"cos_sin_cache": torch.randn(4, 22, generator=gen), "positions": positions, "is_neox": is_neox}
            results = []
            for backend in ("cuda", "reference"):
                # With pages around them: some planted errors write there.
                caches = [torch.full((5, 4, 2, 27), 7.0).to(cache_dtype) for _ in range(2)]
                turned = append_kv(k, v, *(cache[1:-1] for cache in caches), slots, **rope, q=q, backend=backend)
                results.append([x.view(torch.uint8) for x in (*caches, turned)])
            assert all(torch.equal(a, b) for a, b in zip(*results))
    out, lse = torch.randn(3, 4, 2, 16, generator=gen), torch.randn(3, 4, 2, generator=gen)
    out[1], lse[1] = torch.nan, -torch.inf
    got, wanted = (merge_states(out, lse, backend=backend) for backend in ("cuda", "reference"))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(EMULATED.missing() is not None, reason=str(EMULATED.missing()))
def test_without_an_error_all_is_well(monkeypatch):
    compare(emulated.native(), monkeypatch)


@pytest.mark.skipif(EMULATED.missing() is not None, reason=str(EMULATED.missing()))
@pytest.mark.parametrize("what, file, line, planted", PLANTED, ids=[what for what, *_ in PLANTED])
def test_a_planted_error_is_found(what, file, line, planted, monkeypatch):
    native = emulated.edited({file: [(line, planted)]}, SOURCES)
    found = failure(lambda: compare(native, monkeypatch))
    assert found
    print(found)
