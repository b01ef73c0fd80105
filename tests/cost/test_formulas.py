"""Closed forms: the published figures they have to give, and brute force for the estimators."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_kernels.cost import (
    Hardware,
    ModelShape,
    best_of_k,
    break_even,
    imperfect_verifier_limit,
    kinetics,
    kv_saving,
    pass_at_k,
    prefix_speedup_limit,
    train_flops,
)

# --- KV saving ------------------------------------------------------------------------------------------------------


# The saving of 64 samples, by hand.
@pytest.mark.parametrize(
    "prefix, suffix, printed",
    [(200, 12_000, "1.03"), (250, 700, "1.70"), (2048, 4096, "1.97"), (9200, 3000, "6.51"), (32_000, 2000, "22.00"),
     (32_000, 8000, "8.00"), (4096, 512, "13.60")],
)  # fmt: skip
def test_kv_saving_by_hand(prefix, suffix, printed):
    assert f"{kv_saving(64, prefix, suffix):.2f}" == printed


@settings(deadline=None)
@given(st.integers(1, 4096), st.integers(0, 10**6), st.integers(1, 10**6))
def test_kv_saving_bounds(n, prefix, suffix):
    ratio = kv_saving(n, prefix, suffix)
    assert ratio * (1 + 1e-12) >= 1 and ratio <= min(n, 1 + 2 * prefix / suffix) * (1 + 1e-12)
    assert kv_saving(1, prefix, suffix) == kv_saving(n, 0, suffix) == 1


def test_kv_saving_tends_to_its_limit():
    for prefix, suffix in ((200, 12_000), (32_000, 2000)):
        assert kv_saving(10**9, prefix, suffix) == pytest.approx(1 + 2 * prefix / suffix, rel=1e-6)
        # Sharing halves the reads only from P = N S / (2 (N - 2)) on: about half the suffix.
        for n in (8, 64):
            assert kv_saving(n, n * suffix / (2 * (n - 2)), suffix) == pytest.approx(2)


# --- published figures ----------------------------------------------------------------------------------------------


def test_kinetics_golden():
    """Qwen3-8B, context 256, 8,192 tokens, one trial: 155.2 + 2957.1, from their code."""
    compute, memory = kinetics("qwen3-8b", 1, 256, 8192)
    assert compute == pytest.approx(155.2, rel=1e-3) and memory == pytest.approx(2957.1, rel=1e-3)


# Their parameters, in 1e9 (cost_model_ntrial.py), and what their `dense_cost` gives for them, worked out by hand: two
# terms each, in units of 1e12.
@pytest.mark.parametrize(
    "name, billions, heads, kv_heads, layers",
    [("qwen3-0.6b", 0.752, 16, 8, 28), ("qwen3-1.7b", 2.03, 16, 8, 28), ("qwen3-4b", 4.02, 32, 8, 36),
     ("qwen3-8b", 8.19, 32, 8, 36), ("qwen3-14b", 14.77, 40, 8, 40), ("qwen3-32b", 32.76, 64, 8, 64)],
)  # fmt: skip
@pytest.mark.parametrize("n, context, generated", [(1, 256, 8192), (8, 300, 16384), (32, 1000, 4096)])
def test_kinetics_as_published(name, billions, heads, kv_heads, layers, n, context, generated):
    compute, memory = kinetics(name, n, context, generated, parameters=billions * 1e9)
    keys = context * generated + generated**2 / 2
    assert compute == pytest.approx(n * (2e-3 * billions * generated + 4e-12 * keys * heads * 128 * layers))
    shared = context * generated + n * generated**2 / 2  # the prompt is read once for all trials
    assert memory == pytest.approx(562.5e-12 * 4 * shared * kv_heads * 128 * layers)
    own = kinetics(name, n, context, generated)
    assert own[1] == memory
    if name not in ("qwen3-0.6b", "qwen3-1.7b"):  # where they count the tied embedding twice
        assert own[0] == pytest.approx(compute, rel=1e-3)
    else:
        model = ModelShape.preset(name)
        assert (model.num_parameters + model.head_weights) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_kinetics_memory_is_ideal_sharing():
    """Its memory term grows with N as our KV reads of a tree do: their ratio to N separate trials is kv_saving."""
    for n in (2, 32):
        apart = n * kinetics("qwen3-8b", 1, 32_000, 2000)[1]
        assert apart / kinetics("qwen3-8b", n, 32_000, 2000)[1] == pytest.approx(kv_saving(n, 32_000, 2000))


# Liu et al. (arXiv 2502.06703), figures of training: 6 N D with all parameters, not the active ones.
@pytest.mark.parametrize(
    "parameters, tokens, printed",
    [(3e9, 9e12, "1.62e+23"), (405e9, 15e12, "3.65e+25"), (7e9, 18e12, "7.56e+23"), (671e9, 14.8e12, "5.96e+25")],
)
def test_train_flops(parameters, tokens, printed):
    assert f"{train_flops(parameters, tokens):.2e}" == printed


# Ceilings of sharing a prefix read: min(N, ridge / g), with ridges of 206, 295 and 281.
@pytest.mark.parametrize(
    "model, hardware, ceiling",
    [("qwen2.5-7b", "h200", 29), ("qwen3-8b", "h200", 52), ("qwen3-32b", "h200", 26), ("deepseek-r1", "h200", 1.0),
     ("deepseek-r1", "h100", 1.2), ("deepseek-r1", "b200", 1.16)],
)  # fmt: skip
def test_ceiling_of_sharing(model, hardware, ceiling):
    found = prefix_speedup_limit(model, hardware, 1024)
    assert found == pytest.approx(ceiling, rel=0.02)
    assert prefix_speedup_limit(model, hardware, 4) == min(4, found)
    assert prefix_speedup_limit(model, hardware, 1) == 1


def test_shape_of_published_cascades():
    """TensorRT-LLM PR #14396 (L20, 128 beams, suffix 3, us without and with the cascade). What a formula predicts: the
    time without grows as the keys read, and the gain stays under the ratio of reads and doubles with the prefix while
    the cascade is bound by its fixed cost. What none does: that fixed cost, which loses at P = 128."""
    without = {256: 199, 512: 386, 1024: 754, 2048: 1494, 4096: 2965}
    gain = {128: 0.52, 256: 2.21, 512: 4.23, 1024: 8.39, 2048: 16.54, 4096: 31.95}
    for prefix in (256, 512, 1024, 2048):
        keys = (2 * prefix + 3) / (prefix + 3)
        assert without[2 * prefix] / without[prefix] == pytest.approx(keys, rel=0.04)
        assert gain[2 * prefix] / gain[prefix] == pytest.approx(keys, rel=0.05)
    for prefix, times in gain.items():
        step = 128 * (prefix + 3) / (prefix + 128 * 3)  # the reads of one step, in which every suffix has 3 tokens
        assert times < step
        assert step == pytest.approx(kv_saving(128, prefix, 2 * 3))  # a step reads as a generation of twice as many
    # FlashInfer's cascade: 31x over vLLM's PagedAttention, 26x over itself, at 256 samples of 256 tokens behind 32,768.
    assert 31 < 256 * (32768 + 256) / (32768 + 256 * 256)


# --- break-even -----------------------------------------------------------------------------------------------------


def test_break_even():
    # The fine-tuning of s1 at $14, a query for $0.00078 inside, $0.00180 or $0.00141 outside: 14k and 22k queries.
    assert round(break_even(14, 0.00180, 0.00078), -3) == 14_000
    assert round(break_even(14, 0.00141, 0.00078), -3) == 22_000
    assert break_even(14, 0.00180, 0.00078, 0.00180 / 0.00141) == pytest.approx(break_even(14, 0.00141, 0.00078))
    # R1's RL stage at $294k: 0.29 and 0.47 billion.
    assert f"{break_even(294e3, 0.00180, 0.00078) / 1e9:.2f}" == "0.29"
    assert f"{break_even(294e3, 0.00141, 0.00078) / 1e9:.2f}" == "0.47"
    assert break_even(14, 0.001, 0.001) == break_even(14, 0.001, 0.002) == break_even(14, 0.003, 0.002, 1.5) == math.inf
    assert break_even(0, 2, 1) == 0


@settings(deadline=None)
@given(*[st.floats(0.001, 1e6)] * 3, st.floats(1, 100))
def test_at_break_even_both_sides_cost_the_same(train, external, internal, speedup):
    queries = break_even(train, external, internal, speedup)
    if math.isinf(queries):
        assert external / speedup <= internal
    elif queries < 1e12:  # beyond it the difference of the two costs is rounding
        assert queries * external / speedup == pytest.approx(train + queries * internal, rel=1e-3)
        assert queries >= break_even(train, external, internal)


# --- estimators -----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k(case):
    n, c, k = case
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(max, subsets)) / len(subsets))


SCORES = st.one_of(st.sampled_from([0.0, 0.5, 1.0, math.nan]), st.floats(-3, 3))


@settings(deadline=None)
@given(st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=8), st.data())
def test_best_of_k(samples, data):
    scores, correct = zip(*samples)
    k = data.draw(st.integers(1, len(samples)))
    total = count = 0
    for subset in itertools.combinations(range(len(samples)), k):
        scored = [i for i in subset if not math.isnan(scores[i])]
        total += correct[max(scored, key=lambda i: (scores[i], -i))] if scored else 0
        count += 1
    assert best_of_k(scores, correct, k) == pytest.approx(total / count)


def test_best_of_k_limits():
    scores, correct = [0.1, 0.9, 0.5, 0.7], [True, False, True, True]
    assert best_of_k(scores, correct, 1) == 0.75 and best_of_k(scores, correct, 4) == 0
    assert best_of_k(scores, [0.25, 0.5, 0.75, 1.0], 4) == 0.5
    perfect = best_of_k(list(map(float, correct)), correct, 2)
    assert perfect == pass_at_k(4, 3, 2)


def test_best_of_k_of_many_samples():
    """C(3000, 1500) is beyond a float."""
    scores = [i / 3000 for i in range(3000)]
    assert best_of_k(scores, [0.5] * 3000, 1500) == 0.5
    assert best_of_k(scores, [i >= 1500 for i in range(3000)], 1500) == 1
    assert best_of_k(scores, [0.25 + (i % 2) / 2 for i in range(3000)], 1) == pytest.approx(0.5)


def test_imperfect_verifier():
    assert imperfect_verifier_limit(0.3, 1, 0) == 1
    assert imperfect_verifier_limit(0.3, 0.5, 0.5) == pytest.approx(0.3)
    assert imperfect_verifier_limit(0.1, 0.9, 0.1) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kv_saving(0, 1, 1), "n: expected at least 1, got 0"),
        (lambda: kv_saving(2, -1, 1), "prefix: expected at least 0, got -1"),
        (lambda: kv_saving(2, 0, 0), "suffix: expected a prefix or a suffix"),
        (lambda: kv_saving(2, math.nan, 1), "prefix: expected a finite number, got nan"),
        (lambda: kinetics("qwen3-8", 1, 1, 1), "model: expected one of .* nearest: qwen3-8b"),
        (lambda: kinetics("deepseek-r1", 1, 1, 1), "model: expected one with keys and values per head.*deepseek-r1"),
        (lambda: break_even(1, 1, 1, 0), "speedup: expected more than 0, got 0"),
        (lambda: break_even("1", 1, 1), "train_cost: expected a number, got '1'"),
        (lambda: pass_at_k(3, 4, 1), "c: expected at most n = 3, got 4"),
        (lambda: pass_at_k(3, 1, 4), "k: expected at most n = 3, got 4"),
        (lambda: best_of_k([0.5], [True, False], 1), "correct: expected 1 entries, as many as scores, got 2"),
        (lambda: best_of_k([0.5], [2], 1), r"correct\[0\]: expected at most 1, got 2"),
        (lambda: best_of_k([None], [True], 1), r"scores\[0\]: expected a number, got None"),
        (lambda: best_of_k([0.5], [True], 2), "k: expected at most 1, the number of scores, got 2"),
        (lambda: imperfect_verifier_limit(0.5, 0, 0), "tpr: expected a verifier that accepts some"),
        (lambda: imperfect_verifier_limit(1.5, 0, 0), "p: expected at most 1, got 1.5"),
        (lambda: prefix_speedup_limit("qwen3-8b", "h2000", 2), "hardware: expected one of .* nearest: h200"),
        (lambda: prefix_speedup_limit("qwen3-8b", 3, 2), "hardware: expected a Hardware or the name of a preset"),
        (lambda: Hardware("x", 0, 1), "x: bf16_flops: expected at least 1, got 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
