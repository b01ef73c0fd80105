"""What packing costs before one forward scores the candidates: finding what they share, and the plan."""

import random

import pytest
import torch

from tts_kernels.tree.pack import pack

from .cases import PAGE_SIZE

NUM_CANDIDATES, TOKENS, SHARED = 256, 4000, 1000
STEP_TOKENS = 40


@pytest.fixture(scope="module")
def candidates():
    rng = random.Random(0)
    shared = [rng.randrange(150_000) for _ in range(SHARED)]
    return [shared + [rng.randrange(150_000) for _ in range(TOKENS - SHARED)] for _ in range(NUM_CANDIDATES)]


@pytest.fixture(scope="module")
def step_ends():
    return [list(range(STEP_TOKENS - 1, TOKENS, STEP_TOKENS))] * NUM_CANDIDATES


def check(packed, candidates, step_ends):
    assert len(packed.tokens) <= SHARED + NUM_CANDIDATES * (TOKENS - SHARED)
    wanted = [tokens[end] for tokens, ends in zip(candidates, step_ends) for end in ends]
    assert packed.tokens[packed.step_rows].tolist() == wanted


@pytest.mark.parametrize("kind", ["lists", "tensors"])
def test_pack(benchmark, grid, candidates, step_ends, kind):
    given = candidates if kind == "lists" else [torch.tensor(tokens) for tokens in candidates]
    check(pack(given, step_ends=step_ends), candidates, step_ends)

    benchmark.group = "pack"
    benchmark.extra_info["what"] = f"pack, {NUM_CANDIDATES} {kind} of {TOKENS}"
    benchmark.pedantic(pack, (given,), {"step_ends": step_ends}, warmup_rounds=1, rounds=2 * grid.min_rounds)


def test_plan(benchmark, grid, candidates, step_ends):
    packed = pack(candidates, step_ends=step_ends)
    check(packed, candidates, step_ends)
    plan, slots = packed.plan(PAGE_SIZE)
    assert plan.num_rows == len(packed.tokens) and torch.equal(slots.sort().values, slots)

    benchmark.group = "pack"
    benchmark.extra_info["what"] = f"plan and slots of {NUM_CANDIDATES} packed"
    benchmark.pedantic(packed.plan, (PAGE_SIZE,), warmup_rounds=1, rounds=2 * grid.min_rounds)
