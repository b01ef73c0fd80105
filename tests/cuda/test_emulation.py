"""The emulated machine itself: its numbers, its matrix layouts, and that it shows what kernels do wrong."""

from __future__ import annotations

import re

import emulated
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))

SEEDS = range(1, 25)


@pytest.fixture(scope="module")
def checks():
    return emulated.checks()


@pytest.fixture(params=[0, 1, 2, 3, 4])
def machine(checks, request):
    checks.seed(request.param, 3)
    return checks


def run(machine, name, *, grid=1, block=64, shared_bytes=4096, into=None, out=None, counter=None, size=0, omit=0):
    def address(tensor):
        return 0 if tensor is None else tensor.data_ptr()

    machine.kernel(name, grid, block, shared_bytes, address(into), address(out), address(counter), size, omit)
    return out


def test_conversions_for_every_pattern(checks):
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    exact = torch.cat([halves.view(torch.float16).float(), halves.view(torch.bfloat16).float()])
    # Around what is representable: the middles, and their neighbours in fp32.
    bits = exact.view(torch.int32)
    wide = torch.cat(
        [(bits + d).view(torch.float32) for d in (0, 1, -1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)]
    )
    random = torch.from_numpy(np.random.default_rng(0).integers(-(2**31), 2**31, 100_000, dtype=np.int32))
    small = torch.rand(50_000, generator=torch.Generator().manual_seed(0)) * 2.0**-13
    wide = torch.cat([wide, random.view(torch.float32), small]).contiguous()
    narrow = torch.empty(2, len(wide), dtype=torch.int16)
    from_16 = torch.empty(2, 65536)
    from_e4m3 = torch.empty(2, 4, 256, dtype=torch.int16)
    checks.convert(wide.data_ptr(), narrow.data_ptr(), from_16.data_ptr(), from_e4m3.data_ptr(), len(wide))

    e4m3 = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
    for row, dtype in enumerate((torch.float16, torch.bfloat16)):
        wanted = wide.to(dtype).view(torch.int16)
        nan = wide.isnan()
        assert narrow[row][~nan].equal(wanted[~nan])
        assert (narrow[row][nan] == 0x7FFF).all()
        assert same(from_16[row], halves.view(dtype).float())
        assert same(from_e4m3[row].view(dtype).float(), e4m3.expand(4, 256))  # by the kernels' own code


def same(x, y):
    """Equal bits, and NaN where there is NaN."""
    nan = y.isnan()
    return x.isnan().equal(nan) and x[~nan].view(torch.int32).equal(y[~nan].view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_product_is_the_matrix_product(machine, dtype):
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(16, 16, generator=generator).to(dtype)
    b = torch.randn(16, 8, generator=generator).to(dtype)
    d = torch.randn(16, 8, generator=generator)
    wanted = d.double() + a.double() @ b.double()
    machine.product(dtype == torch.bfloat16, a.data_ptr(), b.data_ptr(), d.data_ptr())
    torch.testing.assert_close(d.double(), wanted, rtol=1e-6, atol=1e-5)
    # Small integers: nothing is rounded, so a wrong place shows even where values are alike.
    a = torch.arange(256).reshape(16, 16).remainder(31).to(dtype)
    b = torch.arange(128).reshape(16, 8).remainder(29).to(dtype)
    d = torch.arange(128.0).reshape(16, 8)
    wanted = d + a.float() @ b.float()
    machine.product(dtype == torch.bfloat16, a.data_ptr(), b.data_ptr(), d.data_ptr())
    assert d.equal(wanted)


def test_transposing_load(machine):
    matrices = torch.arange(256, dtype=torch.int16).reshape(4, 8, 8)
    out = run(machine, "transpose", block=32, into=matrices, out=torch.empty_like(matrices))
    assert out.equal(matrices.mT)


def test_exchanges(machine):
    out = run(machine, "exchanges", block=96, out=torch.empty(8, 96))
    lane = torch.arange(96) % 32
    assert out[0].equal((lane ^ 5).float())
    assert (out[1] == 7).all()
    assert out[2].equal(torch.where(lane < 29, lane + 3, lane).float())
    assert out[3].equal(torch.where(lane >= 3, lane - 3, lane).float())
    assert (out[4] == 11).all()
    assert (out[5] == 3).all()
    assert (out[6] == 20).all()
    assert (out[7] == 1).all()


def test_barriers(machine):
    out = run(machine, "rounds", grid=7, block=128, out=torch.empty(7, 128, dtype=torch.int32), size=9)
    assert out.equal(((torch.arange(128) + 9 * 37) % 128 + 9).int().expand(7, 128))
    out = run(machine, "halves", block=128, out=torch.empty(128, dtype=torch.int32))
    i = torch.arange(64)
    assert out.equal(torch.cat([(i + 3 * 33) % 64, (i + 7 * 33) % 64]).int())


def pipeline(machine, omit):
    into = torch.randn(9, 64, 4, generator=torch.Generator().manual_seed(2))
    out = run(machine, "pipeline", into=into, out=torch.empty_like(into), size=9, omit=omit)
    wanted = into.roll(-40, 1)
    wanted[2::3] = 0
    return out.equal(wanted)


def last_arriver(machine, omit):
    states, out = torch.zeros(8, 64), torch.empty(64)
    counter = torch.zeros(1, dtype=torch.int32)
    good = True
    for _ in range(2):  # the counter wraps to zero by itself
        run(machine, "last_arriver", grid=8, into=states, out=out.fill_(-1), counter=counter, omit=omit)
        good = good and bool((out == 36).all()) and counter.item() == 0
    return good


def rounds(machine, omit):
    out = run(machine, "rounds", block=128, out=torch.empty(128, dtype=torch.int32), size=9, omit=omit)
    return out.equal(((torch.arange(128) + 9 * 37) % 128 + 9).int())


def test_pipeline_and_last_arriver(machine):
    assert pipeline(machine, 0)
    assert last_arriver(machine, 0)


BROKEN = [
    (rounds, 1, "a barrier between writing and reading"),
    (rounds, 2, "a barrier between reading and writing again"),
    (pipeline, 1, "the wait for a copy"),
    (pipeline, 2, "the barrier behind the wait"),
    (pipeline, 3, "the barrier before a stage is filled again"),
    (last_arriver, 1, "the barrier before the fence"),
    (last_arriver, 2, "the fence"),
    (last_arriver, 3, "the right count"),
    (last_arriver, 4, "the barrier behind the atomic"),
]


@pytest.mark.parametrize("kernel, omit, what", BROKEN, ids=[what for *_, what in BROKEN])
def test_what_a_kernel_lacks_shows(checks, kernel, omit, what):
    """In most seeds, so that a handful of launches finds it."""
    found = 0
    for seed in SEEDS:
        checks.seed(seed, 3)
        found += not kernel(checks, omit)
    assert found >= len(SEEDS) / 2, f"{found} of {len(SEEDS)} seeds show it"


def test_right_kernels_are_right_for_many_seeds(checks):
    for seed in SEEDS:
        checks.seed(seed, 3)
        assert all(kernel(checks, 0) for kernel in (rounds, pipeline, last_arriver)), seed


def test_a_seed_gives_the_same_again(checks):
    def run_once():
        checks.seed(5, 3)
        out = torch.zeros(128, dtype=torch.int32)
        return [run(checks, "rounds", block=128, out=out, size=9, omit=1).clone() for _ in range(3)]

    first, second = run_once(), run_once()
    assert all(x.equal(y) for x, y in zip(first, second))
    assert not first[0].equal(first[1])  # another launch, another order


ERRORS = [
    r"sync_warp \(checks.cu:\d+\)",  # a lane has ended
    r"at (sync_warp|ballot) \(checks.cu:\d+\) while lanes [\d -]+ of its warp are at (ballot|sync_warp) \(checks",
    r"no thread can go on:\n  block \d+:\n    warp 0: lanes 0-31 ended\n    warp 1: lanes 0-31 at sync_block.*\n"
    r"    barrier 0: 32 of 64 threads",
    r"sync_block \(checks.cu:\d+\)",
    r"no thread can go on:(.|\n)*barrier 1: 32 of 64 threads\n    barrier 2: 32 of 64 threads",
    r"(no thread can go on|other warps wait there for)",
    r"the thread ends with copies under way",
    r"copy_async_16 \(checks.cu:\d+\): an address is not a multiple of 16",
    r"copy_async_16 \(checks.cu:\d+\): the target is not in the block's shared memory",
    r"the launch goes on without end",
    r"block \d+ wrote outside of its shared memory",
]


@pytest.mark.parametrize("error", range(len(ERRORS)))
def test_errors_say_who_waits_where(machine, error):
    if error == len(ERRORS) - 1 and emulated.SANITIZED:
        pytest.skip("AddressSanitizer ends the process")
    into = torch.zeros(8)
    with pytest.raises(RuntimeError, match=ERRORS[error]) as failure:
        run(machine, "wrong", shared_bytes=1024, into=into, size=error)
    assert re.search(r"^wrong: (.|\n)*emulation, seed \d, launch 1.*blocks of 64 threads", str(failure.value))
    # The machine is as good as before.
    assert rounds(machine, 0)


@pytest.mark.parametrize(
    "shape, what",
    [
        ({"block": 48}, "whole warps"),
        ({"block": 2048}, "whole warps"),
        ({"shared_bytes": 300 << 10}, "too much shared memory"),
        ({"grid": -1}, "too many blocks"),
    ],
)
def test_impossible_launches(checks, shape, what):
    with pytest.raises(RuntimeError, match=what):
        run(checks, "rounds", **shape)
