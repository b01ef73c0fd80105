"""The ceilings: their arithmetic with a clock that is known, what is kept, and that the real ones are numbers."""

import math

import pytest
import torch

from tts_kernels import ceilings


@pytest.fixture
def clock(monkeypatch):
    """Every call takes so many seconds."""
    seconds = {"now": 0.0, "call": 0.5}

    def tick():
        return seconds["now"]

    monkeypatch.setattr(ceilings.time, "perf_counter", tick)
    return seconds


@pytest.fixture
def fresh():
    for kept in (ceilings.device_bandwidth, ceilings.device_gemm_rate):
        kept.cache_clear()
    yield
    for kept in (ceilings.device_bandwidth, ceilings.device_gemm_rate):
        kept.cache_clear()


def test_best_time_is_the_fastest(clock):
    durations = iter([0.5, 0.25, 0.75, 0.5, 0.125])

    def function():
        clock["now"] += next(durations)

    assert ceilings.best_time(function, least_seconds=1.0, least_calls=2) == 0.25
    assert list(durations) == [0.5, 0.125], "it stops when the time is up"
    durations = iter([2.0, 3.0, 1.0, 4.0])
    assert ceilings.best_time(function, least_seconds=0.0) == 1.0, "four calls at least"


def test_gemm_rate_counts_a_product_as_two(monkeypatch):
    """Sizes of 2, 4 and 8 in 0.01, 0.2 and 0.001 s: the second takes too long for the third to be tried."""
    times = {2: 0.01, 4: 0.2, 8: 0.001}
    seen = []

    def best_time(function, least_seconds, device):
        product = function()
        assert product.dtype == torch.float64
        seen.append(len(product))
        return times[len(product)]

    monkeypatch.setattr(ceilings, "best_time", best_time)
    assert ceilings.gemm_rate(torch.float64, (2, 4, 8)) == 16 / 0.01
    assert seen == [2, 4]
    seen.clear()
    assert ceilings.gemm_rate(torch.float64, (2, 4, 8), least_seconds=3.0) == 1024 / 0.001
    assert seen == [2, 4, 8]


def test_read_bandwidth_takes_the_faster_reduction(monkeypatch):
    times = iter([0.5, 0.25])
    monkeypatch.setattr(ceilings, "best_time", lambda function, least_seconds: (function(), next(times))[1])
    assert ceilings.read_bandwidth(4096) == 4096 / 0.25


def test_measured_once_per_device_dtype_and_threads(monkeypatch, fresh):
    measured = []
    rates = {torch.float32: 3.0, torch.bfloat16: 1.0, torch.float16: 5.0}
    monkeypatch.setattr(ceilings, "read_bandwidth", lambda *_: measured.append("read") or 7.0)
    monkeypatch.setattr(ceilings, "gemm_rate", lambda dtype, *_: measured.append(dtype) or rates[dtype])
    torch.set_num_threads(1)
    assert ceilings.measured("cpu", torch.bfloat16) == ceilings.Ceilings(7.0, {"bfloat16": 3.0}), "fp32's rate at least"
    assert ceilings.measured(torch.device("cpu"), torch.float16) == ceilings.Ceilings(7.0, {"float16": 5.0})
    assert ceilings.measured("cpu", torch.float32) == ceilings.Ceilings(7.0, {"float32": 3.0})
    assert sorted(map(str, measured)) == ["read", "torch.bfloat16", "torch.float16", "torch.float32"]
    torch.set_num_threads(2)
    ceilings.measured("cpu", torch.float32)
    assert measured[-2:] == [torch.float32, "read"] and len(measured) == 6


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_real_ones(device, fresh):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    state = torch.get_rng_state()
    got = ceilings.measured(device, torch.bfloat16)
    assert 1e8 < got.bandwidth < 1e14 and list(got.flops) == ["bfloat16"]
    assert 1e8 < got.flops["bfloat16"] < 1e17 and math.isfinite(got.flops["bfloat16"])
    assert ceilings.measured(device, torch.bfloat16) == got, "kept, not measured again"
    assert torch.equal(state, torch.get_rng_state())


def test_autocast_does_not_narrow_the_products(monkeypatch):
    dtypes = []
    monkeypatch.setattr(ceilings, "best_time", lambda function, *_, **__: dtypes.append(function().dtype) or 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ceilings.gemm_rate(torch.float32, (4,))
    assert dtypes == [torch.float32]


def test_a_device_that_cannot_be_measured():
    with pytest.raises(ValueError, match=r"device: expected cpu or cuda.*got meta"):
        ceilings.measured("meta", torch.float32)
