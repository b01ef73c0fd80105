"""tree_attention for one decode step: against its peers, round by round, and against what the machine can do."""

import pytest

from tts_kernels.attention import api
from tts_kernels.measure.inputs import error, tolerance

from .cases import DTYPES, GRIDS, AttentionCase, AttentionInputs
from .measure import OURS, interleave
from .peers import PEERS


def pytest_generate_tests(metafunc):
    cases = GRIDS[metafunc.config.getoption("grid")].attention
    metafunc.parametrize("case", cases, ids=lambda case: case.name.replace(" ", "-").replace("=", ""))


def test_tree_attention(benchmark, case: AttentionCase, grid, ceilings, evict_caches):
    inputs = AttentionInputs(case)
    methods = {OURS: lambda: api.tree_attention(inputs.q, inputs.k_cache, inputs.v_cache, inputs.plan)}
    bytes_read = {OURS: case.least_bytes}
    missing = {}
    for peer in PEERS:
        reason = peer.reason_against(case)
        if reason:
            missing[peer.NAME] = reason
        else:
            methods[peer.NAME] = peer.prepare(inputs)
            bytes_read[peer.NAME] = peer.bytes_read(case)

    # Nothing is timed before every method has been seen to be right.
    reference, limit = inputs.reference(), tolerance(DTYPES[case.dtype])
    errors = {name: error(method(), reference) for name, method in methods.items()}
    wrong = {name: e for name, e in errors.items() if not e <= limit}
    if wrong:
        pytest.fail(f"wrong result, not timed: error {wrong}, allowed {limit:.2g}")

    memory_floor = case.least_bytes / ceilings["read_bytes_per_s"]
    compute_floor = case.flops / ceilings["flops_per_s"][case.dtype]
    benchmark.group = "tree_attention"
    benchmark.extra_info |= {
        "case": {"dtype": case.dtype, "N": case.num_samples, "P": case.prefix, "S": case.suffix},
        "least_bytes": case.least_bytes,
        "bytes_read": bytes_read,
        "flops": case.flops,
        "floor_s": max(memory_floor, compute_floor),
        "bound_by": "memory" if memory_floor >= compute_floor else "compute",
        "ceilings": ceilings,
        "errors": errors,
        "tolerance": limit,
        "missing_peers": missing,
    }
    interleave(benchmark, methods, evict_caches, grid)
    median = benchmark.stats["median"]
    benchmark.extra_info["time_over_floor"] = median / benchmark.extra_info["floor_s"]
    for peer in benchmark.extra_info["peers"].values():
        peer["times_ours"] = peer["median"] / median
