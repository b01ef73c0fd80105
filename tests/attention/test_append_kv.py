"""append_kv: exactly the rounding of a cast, exactly the slots named, nothing else."""

import attention_cases as cases
import pytest
import torch
from attention_cases import BF16, FP8, FP16, FP32
from forests import LAYOUTS, empty_caches

from tts_kernels.attention import append_kv

PAGES, PAGE = 6, 5


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Equal where the bits are, NaN included."""
    return tensor.cpu().contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtypes", [(FP32, FP32), (FP16, FP16), (BF16, BF16), (FP32, FP8), (FP16, FP8), (BF16, FP8), (FP8, FP8)], ids=str
)
# A head smaller than a vector, one with a tail, one of the usual size.
@pytest.mark.parametrize("heads, head_dim", [(1, 7), (3, 40), (2, 128)])
def test_writes_the_named_slots_alone(path, layout, dtypes, heads, head_dim):
    dtype, cache_dtype = dtypes
    gen = torch.Generator().manual_seed(0)
    slots = torch.tensor([7, -1, 29, 0, 4, 5, -1, 13])
    # k and v as slices of one fused projection: strided rows and heads.
    k, v = (torch.randn(8, 2, heads, head_dim, generator=gen) * 3).to(dtype).unbind(1)
    k_cache, v_cache = empty_caches(PAGES, PAGE, heads, head_dim, cache_dtype, layout)
    expected = [cache.clone() for cache in (k_cache, v_cache)]
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            for cache, new in zip(expected, (k, v)):
                cache[slot // PAGE, slot % PAGE] = new[row].to(cache_dtype)
    caches = [cases.on_device(cache, path.device) for cache in (k_cache, v_cache)]
    on_path = [x.to(path.device) for x in (k, v)]
    assert append_kv(*on_path, *caches, slots.to(path.device), backend=path.backend, check=True) is None
    for got, wanted in zip(caches, expected):
        assert torch.equal(as_bits(got), as_bits(wanted))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_fp8_rounding(path, dtype):
    """Ties to even, subnormals, and numbers beyond the range, which become the largest one."""
    numbers = torch.tensor([0.0, -0.0, 1.0625, 1.1875, 447.0, 463.0, 464.0, 465.0, 1e4, -1e4, torch.inf, -torch.inf])
    tiny = torch.tensor([2.0**-9, 2.0**-10, 1.5 * 2.0**-10, 3 * 2.0**-10, 2.0**-6, 0.99 * 2.0**-6, -(2.0**-8), 1e-5])
    values = torch.cat([numbers, tiny, torch.tensor([torch.nan])]).to(dtype)
    k = values.view(1, 1, -1).to(path.device)
    k_cache, v_cache = empty_caches(1, 1, 1, values.numel(), FP8, "NHD", path.device)
    append_kv(k, -k, k_cache, v_cache, torch.tensor([0], device=path.device), backend=path.backend)
    expected = values.float().clamp(-448, 448).to(FP8).float()
    torch.testing.assert_close(k_cache.cpu().float().flatten(), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(v_cache.cpu().float().flatten(), -expected, rtol=0, atol=0, equal_nan=True)


def test_many_rows(path):
    """More than one thread's share."""
    rows = 300 if path.interpreted else 3000
    k, v = torch.randn(2, rows, 4, 64, generator=torch.Generator().manual_seed(0)).to(BF16).to(path.device)
    k_cache, v_cache = empty_caches(rows // 16 + 1, 16, 4, 64, BF16, "NHD", path.device)
    slots = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).to(path.device)
    append_kv(k, v, k_cache, v_cache, slots, backend=path.backend)
    assert torch.equal(k_cache.reshape(-1, 4, 64)[slots], k)
    assert torch.equal(v_cache.reshape(-1, 4, 64)[slots], v)
    assert torch.isnan(k_cache.reshape(-1, 4, 64)[rows:]).all()


def test_no_rows(path):
    empty = torch.empty(0, 2, 8, device=path.device)
    k_cache, v_cache = empty_caches(2, 4, 2, 8, FP32, "NHD", path.device)
    append_kv(
        empty, empty, k_cache, v_cache, torch.empty(0, dtype=torch.int64, device=path.device), backend=path.backend
    )
    assert torch.isnan(k_cache).all()
