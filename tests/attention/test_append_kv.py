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


def turned(x, angles, is_neox):
    """x [rows, heads, D], angles [rows, rotary_dim], in fp32: pair by pair, from the definition."""
    out, half = x.float().clone(), angles.shape[1] // 2
    for i in range(half):
        a, b = (i, i + half) if is_neox else (2 * i, 2 * i + 1)
        cos, sin = angles[:, None, i].float(), angles[:, None, half + i].float()
        out[..., a] = x[..., a].float() * cos - x[..., b].float() * sin
        out[..., b] = x[..., b].float() * cos + x[..., a].float() * sin
    return out


@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize("with_q", [True, False], ids=["q", "k"])
# Pairs that lie in no vector of 8, in several, and a part that is not turned; angles in fp32 and as rounded as k.
@pytest.mark.parametrize(
    "heads, head_dim, rotary_dim", [((1, 1), 3, 2), ((3, 5), 42, 26), ((2, 4), 128, 128), ((2, 2), 128, 64)], ids=str
)
@pytest.mark.parametrize(
    "dtypes",
    [(FP32, FP32, FP32), (FP16, FP16, FP32), (BF16, BF16, BF16), (BF16, FP8, FP32), (FP32, FP8, FP16)],
    ids=str,
)
def test_rope(path, dtypes, heads, head_dim, rotary_dim, with_q, is_neox):
    """Keys and queries are turned in fp32, product by product, and rounded once; values are not turned. A row that is
    skipped may stand at no position, unless its query is turned."""
    dtype, cache_dtype, angles_dtype = dtypes
    num_kv_heads, num_heads = heads
    gen = torch.Generator().manual_seed(0)
    slots, positions = torch.tensor([7, -1, 29, 0]), torch.tensor([5, 40 if with_q else 2**40, 0, 3])
    fused = torch.randn(4, 2 * num_kv_heads + num_heads, head_dim, generator=gen).to(dtype)
    k, v, q = fused.split([num_kv_heads, num_kv_heads, num_heads], 1)
    angle = torch.outer(torch.arange(41.0), 100.0 ** -(torch.arange(rotary_dim // 2) * 2 / rotary_dim))
    cos_sin = torch.cat([angle.cos(), angle.sin()], 1).to(angles_dtype)
    k_cache, v_cache = empty_caches(PAGES, PAGE, num_kv_heads, head_dim, cache_dtype, "HND")
    expected = [cache.clone() for cache in (k_cache, v_cache)]
    kept = slots >= 0
    for cache, new in zip(expected, (turned(k[kept], cos_sin[positions[kept]], is_neox), v[kept].float())):
        cache[slots[kept] // PAGE, slots[kept] % PAGE] = new.to(cache_dtype)
    before = fused.clone()
    k, v, q, k_cache, v_cache, cos_sin_at, slots, positions_at = (
        cases.on_device(x, path.device) for x in (k, v, q, k_cache, v_cache, cos_sin, slots, positions)
    )
    got = append_kv(
        k, v, k_cache, v_cache, slots, cos_sin_cache=cos_sin_at, positions=positions_at, is_neox=is_neox,
        q=q if with_q else None, backend=path.backend, check=True,
    )  # fmt: skip
    assert torch.equal(as_bits(k_cache), as_bits(expected[0]))
    assert torch.equal(as_bits(v_cache), as_bits(expected[1]))
    assert torch.equal(as_bits(fused), as_bits(before))
    if not with_q:
        assert got is None
        return
    wanted = turned(q.cpu(), cos_sin[positions], is_neox).to(dtype)
    assert got.dtype == dtype and torch.equal(as_bits(got), as_bits(wanted))


def test_rope_of_extremes(path):
    """Infinities and NaN turn as products and sums do; fp8 takes the sum, not its parts, to +-448."""
    k = torch.tensor([[[400.0, torch.inf, torch.nan, 1.0, 400.0, 1.0, 2.0, -torch.inf]]], device=path.device)
    cos_sin = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]], device=path.device)
    k_cache, v_cache = empty_caches(1, 1, 1, 8, FP8, "NHD", path.device)
    zero = torch.zeros(1, dtype=torch.int64, device=path.device)
    append_kv(k, k, k_cache, v_cache, zero, cos_sin_cache=cos_sin, positions=zero.int(), backend=path.backend)
    expected = torch.tensor([0.0, 448.0, torch.nan, 448.0, 400.0, 448.0, torch.nan, -448.0])
    torch.testing.assert_close(
        k_cache.float().flatten().cpu(), expected.to(FP8).float(), equal_nan=True, rtol=0, atol=0
    )


ROPE = {"cos_sin_cache": torch.ones(9, 4), "positions": torch.zeros(2, dtype=torch.int64)}


@pytest.mark.parametrize(
    "argument, error, changes, came",
    [
        ("positions", TypeError, {"cos_sin_cache": None}, "Tensor"),
        ("q", TypeError, {"cos_sin_cache": None, "positions": None, "q": torch.ones(2, 1, 4)}, "Tensor"),
        ("cos_sin_cache", TypeError, {"cos_sin_cache": [1.0]}, "list"),
        ("cos_sin_cache", TypeError, {"cos_sin_cache": torch.ones(9, 4).double()}, "float64"),
        ("cos_sin_cache", ValueError, {"cos_sin_cache": torch.ones(9, 3)}, r"\(9, 3\)"),
        ("cos_sin_cache", ValueError, {"cos_sin_cache": torch.ones(9, 6)}, r"\(9, 6\)"),
        ("cos_sin_cache", ValueError, {"cos_sin_cache": torch.ones(4, 9).t()}, "strides"),
        ("positions", TypeError, {"positions": None}, "NoneType"),
        ("positions", TypeError, {"positions": torch.zeros(2)}, "float32"),
        ("positions", ValueError, {"positions": torch.zeros(3, dtype=torch.int64)}, r"\(3,\)"),
        ("positions", ValueError, {"positions": torch.tensor([0, 9])}, "9 for row 1"),
        ("positions", ValueError, {"positions": torch.tensor([-1, 0])}, "-1 for row 0"),
        ("is_neox", TypeError, {"is_neox": "neox"}, "str"),
        ("q", TypeError, {"q": torch.ones(2, 1, 4).half()}, "float16"),
        ("q", ValueError, {"q": torch.ones(3, 1, 4)}, r"\(3, 1, 4\)"),
        ("q", ValueError, {"q": torch.ones(2, 1, 5)}, r"\(2, 1, 5\)"),
    ],
)
def test_bad_rope(argument, error, changes, came):
    k = torch.ones(2, 1, 4)
    caches = empty_caches(1, 4, 1, 4, FP32, "NHD")
    with pytest.raises(error, match=rf"^{argument}: expected .*{came}"):
        append_kv(k, k, *caches, torch.tensor([0, 1]), check=True, **{**ROPE, **changes})
    assert all(cache.isnan().all() for cache in caches)


def test_fp8_keys_are_not_turned():
    k = torch.ones(2, 1, 4).to(FP8)
    with pytest.raises(TypeError, match=r"^k: expected .*float8"):
        append_kv(k, k, *empty_caches(1, 4, 1, 4, FP8, "NHD"), torch.tensor([0, 1]), **ROPE)


def test_many_rows(path):
    """More than one thread's share."""
    rows = 300 if path.slow else 3000
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
