"""The cost of a query against a simulation that walks every step, candidate and token."""

from __future__ import annotations

import pytest
from cost_cases import DENSE, DEVICE, MODELS, pass_seconds, workloads
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tts_kernels.cost import ModelShape, Workload, query_cost
from tts_kernels.cost.query import REGIMES, SHARINGS


def simulate(work: Workload, model: ModelShape, sharing: str) -> dict[str, float]:
    """Decode of one batch, token by token: each candidate a list of token names along its path. A name stands for KV
    that lies in one place if it is shared; KV reads are counted by walking the paths."""
    totals = dict.fromkeys(("keys", "prefix_reads", "suffix_reads", "rows", "steps", "peak"), 0)

    def step(paths, shared):
        """paths: of the rows of this step, the row's own token last. shared: names that count as prefix."""
        seen: set = set()
        totals["steps"] += 1
        for path in paths:
            totals["keys"] += len(path)
            totals["rows"] += 1
            for name in path:
                part = "prefix_reads" if name in shared else "suffix_reads"
                if sharing != "tree" or name not in seen:
                    totals[part] += 1
                seen.add(name)
        held = sum(map(len, paths)) if sharing == "copies" else len(seen)
        totals["peak"] = max(totals["peak"], held)

    prompts = [[("prompt", q, i) for i in range(length)] for q, length in enumerate(work.prompts)]
    trunks = [[("trunk", q, i) for i in range(work.trunk)] for q in range(work.queries)]
    for t in range(1, work.trunk + 1):
        paths = [prompt + trunk[:t] for prompt, trunk in zip(prompts, trunks)]
        step(paths, {name for path in paths for name in path})
    prefixes = [prompt + trunk for prompt, trunk in zip(prompts, trunks)]
    if work.search == "best_of_n":
        lengths = [(q, i, s) for q, of in enumerate(work.suffixes) for i, s in enumerate(of)]
        for t in range(1, max(s for _, _, s in lengths) + 1):
            paths = [prefixes[q] + [(q, i, j) for j in range(t)] for q, i, s in lengths if s >= t]
            step(paths, {name for prefix in prefixes for name in prefix})
        return totals
    each = work.suffix // work.steps
    # DVTS: `keep` subtrees; in each step one candidate of each goes on, in n / keep continuations.
    history = {(q, s): [] for q in range(work.queries) for s in range(work.keep)}
    for k in range(work.steps):
        shared = {name for prefix in prefixes for name in prefix} | {name for path in history.values() for name in path}
        beams = [(q, s, c) for q in range(work.queries) for s in range(work.keep) for c in range(work.n // work.keep)]
        for t in range(1, each + 1):
            step([prefixes[q] + history[q, s] + [(k, q, s, c, j) for j in range(t)] for q, s, c in beams], shared)
        for q, s in history:
            history[q, s] = history[q, s] + [(k, q, s, 0, j) for j in range(each)]
    return totals


@settings(max_examples=150, deadline=None)
@given(workloads(), st.sampled_from(list(SHARINGS)), st.sampled_from(list(MODELS.values())))
def test_as_simulated(work, sharing, model):
    """KV reads, attention FLOPs, weights and memory of the decode steps, to the byte."""
    cost, seen = query_cost(work, model, DEVICE, sharing=sharing), simulate(work, model, sharing)
    kappa, queries = model.kv_bytes_per_token, work.queries
    parts = cost.parts
    assert parts["decode_attn_prefix"].bytes * queries == pytest.approx(kappa * seen["prefix_reads"])
    assert parts["decode_attn_suffix"].bytes * queries == pytest.approx(kappa * seen["suffix_reads"])
    flops = (parts["decode_attn_prefix"].flops + parts["decode_attn_suffix"].flops) * queries
    assert flops == pytest.approx(model.attention_flops_per_key * seen["keys"])
    assert parts["decode_linear"].flops * queries == pytest.approx(2 * model.active_body_weights * seen["rows"])
    assert cost.peak_kv_bytes == pytest.approx(kappa * seen["peak"])
    if model is DENSE:  # weights once a step, the KV of every new token written; logits written and read
        tokens = (parts["decode_linear"].bytes + parts["straggler_idle"].bytes + parts["head_sampling"].bytes) * queries
        copies = work.n if sharing == "copies" else 1
        prefill = bool(sum(work.prompts))
        logits = 8 * model.vocab_size * (seen["rows"] + prefill * queries * copies)
        head = 2 * model.head_weights * (seen["steps"] + prefill)
        assert tokens == pytest.approx(2 * model.body_weights * seen["steps"] + kappa * seen["rows"] + logits + head)


@settings(max_examples=100, deadline=None)
@given(workloads(), st.sampled_from(list(SHARINGS)), st.sampled_from(list(REGIMES)))
def test_seconds_as_simulated(work, sharing, regime):
    """Ceilings step by step, and the KV that lies there meanwhile: of best-of-n and trunk, dense."""
    assume(work.search == "best_of_n")
    cost = query_cost(work, DENSE, DEVICE, sharing=sharing, regime=regime)
    rate, bandwidth, kappa = DEVICE.bf16_flops, DEVICE.bandwidth, DENSE.kv_bytes_per_token
    a, filled = DENSE.attention_flops_per_key, rate / bandwidth  # rows that fill a bf16 pass: its ridge

    seconds = held_seconds = 0.0
    phases = [(t, [(p, t) for p in work.prompts]) for t in range(1, work.trunk + 1)]
    count = work.queries
    for t, rows in phases:
        took, held = _step(rows, t, False, a, kappa, rate, bandwidth, sharing)
        full = max(count, filled) if regime == "saturated" else count
        took += pass_seconds(count, full, DENSE.body_weights, kappa, rate, bandwidth)
        took += pass_seconds(count, full, DENSE.head_weights, 8 * DENSE.vocab_size, rate, bandwidth)
        seconds, held_seconds = seconds + took, held_seconds + took * held
    total = work.n * work.queries
    for t in range(1, max(map(max, work.suffixes)) + 1):
        rows = [(q, work.prompts[q] + work.trunk) for q, of in enumerate(work.suffixes) for s in of if s >= t]
        took, held = _step(rows, t, True, a, kappa, rate, bandwidth, sharing)
        full = max(total, filled) if regime == "saturated" else len(rows)
        took += pass_seconds(len(rows), full, DENSE.body_weights, kappa, rate, bandwidth)
        took += pass_seconds(len(rows), full, DENSE.head_weights, 8 * DENSE.vocab_size, rate, bandwidth)
        seconds, held_seconds = seconds + took, held_seconds + took * held
    first = 0.0
    if sum(work.prompts):
        rows = work.queries * (work.n if sharing == "copies" else 1)
        full = max(rows, filled) if regime == "saturated" else rows
        first = pass_seconds(rows, full, DENSE.head_weights, 8 * DENSE.vocab_size, rate, bandwidth)
    assert cost.decode_seconds * work.queries == pytest.approx(seconds + first)
    assert cost.kv_byte_seconds * work.queries == pytest.approx(held_seconds)


def _step(rows, t, forked, a, kappa, rate, bandwidth, sharing):
    """Seconds of a step's attention and the KV held in it; rows: (query, keys of its prefix)."""
    prefix = sum(p for _, p in rows) if forked else sum(p for p, _ in rows)
    distinct = sum(dict(rows).values()) if forked else prefix
    read = distinct if sharing == "tree" else prefix
    seconds = max(a * prefix / rate, kappa * read / bandwidth)
    seconds += max(a * len(rows) * t / rate, kappa * len(rows) * t / bandwidth)
    return seconds, kappa * ((prefix if sharing == "copies" else distinct) + len(rows) * t)


@settings(deadline=None)
@given(workloads(), st.sampled_from(list(SHARINGS)))
def test_prefill(work, sharing):
    """Prompts once, or once per candidate; their keys see what came before; KV written and read; weights once."""
    part = query_cost(work, DENSE, DEVICE, sharing=sharing).parts["prefill_prefix"]
    prompts = [length for length in work.prompts for _ in range(work.n if sharing == "copies" else 1)]
    keys = sum(token + 1 for length in prompts for token in range(length))
    tokens = sum(prompts)
    flops = 2 * DENSE.active_body_weights * tokens + DENSE.attention_flops_per_key * keys
    moved = (2 * DENSE.body_weights + 2 * DENSE.kv_bytes_per_token * tokens) if tokens else 0
    assert part.flops * work.queries == pytest.approx(flops)
    assert part.bytes * work.queries == pytest.approx(moved)
    assert part.seconds * work.queries == pytest.approx(max(flops / DEVICE.bf16_flops, moved / DEVICE.bandwidth))
