"""The roofline model of the Triton kernels, by hand."""

import subprocess
import sys

import pytest

from benchmarks.cases import GRIDS, AttentionCase
from benchmarks.roofline import roofline


def test_by_hand():
    """4 samples over 1,000 shared tokens and 10 of their own. The prefix serves 28 packed rows, a wide tile,
    a leaf 7, a narrow one. Chunks of 256 tokens, blocks of 64; 4 KV heads."""
    got = roofline(AttentionCase("bf16", 4, 1000, 10), bandwidth=1e12, flops=1e14)
    token = 2 * 4 * 128 * 2
    rows = 4 * 28 * 128 * 2  # q, or out
    states = 4 * 28 * (4 + 1) * (128 + 2) * 4
    assert got["items"] == 4 * (4 + 4)
    assert got["least_bytes"] == 1040 * token + 2 * rows
    assert got["own_bytes"] == 1040 * token + 2 * rows + 2 * states
    assert got["flops"] == 4 * 28 * 128 * 4 * 1010
    assert got["own_flops"] == 4 * 4 * 128 * (64 * 1024 + 4 * 16 * 64)
    assert got["own_seconds"] == pytest.approx(max(got["own_bytes"] / 1e12, got["own_flops"] / 1e14))


HALF = [case for case in GRIDS["full"].attention if case.dtype == "bf16"]


@pytest.mark.parametrize("case", HALF, ids=lambda case: case.name)
def test_no_shared_byte_counts_twice(case):
    got = roofline(case)
    assert got["least_bytes"] == case.least_bytes <= got["own_bytes"]
    states = got["own_bytes"] - case.least_bytes
    assert states <= 2 * case.num_samples * 28 * 130 * 4 * (16 + 2)  # at most 16 chunks of the prefix and 2 of a leaf
    assert got["floor_seconds"] <= got["own_seconds"]


def test_the_command_prints_a_table():
    done = subprocess.run([sys.executable, "-m", "benchmarks.roofline"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("model, not measured")
    assert sum(line.startswith("bf16 ") for line in done.stdout.splitlines()) == 14
