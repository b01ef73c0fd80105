"""What the emulated machine has of sm_90a: layouts and descriptors, and that it shows what kernels do wrong."""

from __future__ import annotations

import re

import emulated
import pytest
import torch

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))

SEEDS = range(13)


@pytest.fixture(scope="module")
def checks():
    return emulated.checks()


def product(checks, *, across, copied, dtype=torch.float16, omit=0):
    """Of small integers, which nothing rounds: whether all are where they belong."""
    a = torch.arange(64 * 64).reshape(64, 64).remainder(31).to(dtype)
    b = torch.arange(64 * 128).reshape((64, 128) if across else (128, 64)).remainder(29).to(dtype)
    d = torch.full((64, 128), torch.nan)
    checks.hopper_product(dtype == torch.bfloat16, across, copied, a.data_ptr(), b.data_ptr(), d.data_ptr(), omit)
    return d.equal(a.float() @ (b if across else b.mT).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("across", [False, True], ids=["along", "across"])
@pytest.mark.parametrize("copied", [False, True], ids=["boxes", "pieces"])
def test_product_is_the_matrix_product(checks, across, copied, dtype):
    for seed in SEEDS:
        checks.seed(seed, 1)
        assert product(checks, across=across, copied=copied, dtype=dtype), seed


# (the number, with boxes or pieces, what is found: results that are wrong, or what the error says)
BROKEN = [
    (1, False, "the barrier was not fenced for the async proxy", "the fence behind the barriers' making"),
    (2, False, None, "the wait for an empty place, before a box"),
    (2, True, None, "the wait for an empty place, before pieces"),
    (3, True, None, "the wait for a thread's copies"),
    (4, True, None, "the fence of a thread's copies"),
    (5, False, None, "the bytes that are expected"),
    (6, False, None, "the wait for a full place"),
    (7, False, None, "the parity of the wait"),
    (8, False, "no wgmma_fence since the registers", "the fence before the products"),
    (10, False, "a has changed before the product was made", "a that stays until the wait"),
    (11, False, None, "the wait before a place is given back"),
    (12, False, None, "the wait before d is read"),
    (14, False, "d of a product was written before it was waited for", "the wait before d is written"),
    (13, False, r"no thread can go on(.|\n)*0-31 at barrier_wait(.|\n)*waits for 4 arrivals, 0 bytes", "who arrives"),
]  # fmt: skip


@pytest.mark.parametrize("omit, copied, says, what", BROKEN, ids=[what for *_, what in BROKEN])
def test_what_a_kernel_lacks_shows(checks, omit, copied, says, what):
    found = 0
    for seed in SEEDS:
        checks.seed(seed, 1)
        try:
            found += not product(checks, across=False, copied=copied, omit=omit)
        except RuntimeError as error:
            found += says is None or re.search(says, str(error)) is not None
    assert found >= len(SEEDS) / 2, f"{found} of {len(SEEDS)} seeds show it"


def test_a_wrong_distance_of_panels_shows(checks):
    checks.seed(1, 1)
    assert not product(checks, across=True, copied=False, omit=9)
    assert product(checks, across=False, copied=False, omit=9)  # where there is one panel it means nothing
