"""`python -m benchmarks.roofline`: what the Triton kernels' own bytes and FLOPs take at least on a GPU that need not be
here, for every case of the decode grid. A model, not a measurement: nothing runs.

The floor is that of any kernel that shares: each token's KV once, q and out, or the useful FLOPs. The roofline adds
what these kernels do besides: partial states written and read, as if no L2 held them, and the padding of tiles. Each
token's KV still counts once: the tiles that read the same chunk lie side by side in the launch, and the L2 answers all
but the first.
"""

from __future__ import annotations

import argparse
from unittest import mock

import torch

from tts_kernels.attention import triton as backend
from tts_kernels.attention.explain import explain
from tts_kernels.tree.plan import TreePlan

from .cases import DTYPES, GRIDS, HEAD_DIM, NUM_KV_HEADS, NUM_Q_HEADS, PAGE_SIZE, AttentionCase

# NVIDIA's data sheet of the H200 SXM: 4.8 TB/s, 989 TFLOP/s of dense bf16.
DEVICE, ARCH, BANDWIDTH, FLOPS = "NVIDIA H200", "sm_90", 4.8e12, 989e12


def roofline(case: AttentionCase, bandwidth: float = BANDWIDTH, flops: float = FLOPS) -> dict:
    """Bytes and FLOPs of the call, and seconds: of the floor, and of the kernels' own counts."""
    lengths = [case.prefix] + [case.suffix] * (case.num_samples if case.shared else 0)
    pages, first = [], 0
    for length in lengths:
        count = -(-length // PAGE_SIZE)
        pages.append(list(range(first, first + count)))
        first += count
    rows = [0 if case.shared else 1] + [1] * (len(lengths) - 1)
    plan = TreePlan.from_nodes([-1] + [0] * (len(lengths) - 1), lengths, pages, rows, page_size=PAGE_SIZE)
    dtype = DTYPES[case.dtype]
    q = torch.empty(case.num_samples, NUM_Q_HEADS, HEAD_DIM, dtype=dtype, device="meta")
    cache = torch.empty(first, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype=dtype, device="meta")
    with (
        mock.patch.object(backend, "device_kind", return_value=(DEVICE, ARCH)),
        mock.patch.object(backend, "unsupported_reasons", return_value=[]),
        mock.patch("tts_kernels.attention.checks.check_attention"),  # the plan is on the CPU, q on no device
    ):
        told = explain(plan, q, cache, backend="triton", bandwidth=bandwidth, flops=flops)
    own_bytes = told.bytes_read + told.state_bytes // 2 + q.numel() * q.element_size()
    own = max(own_bytes / bandwidth, told.issued_flops / flops)
    return {
        "items": told.work_items,
        "least_bytes": told.least_bytes,
        "own_bytes": own_bytes,
        "replicated_bytes": told.replicated_bytes,
        "flops": told.flops,
        "own_flops": told.issued_flops,
        "bound": "memory" if own_bytes / bandwidth >= told.issued_flops / flops else "compute",
        "floor_seconds": told.floor_seconds,
        "own_seconds": own,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="python -m benchmarks.roofline")
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="bytes per second (H200: %(default)g)")
    parser.add_argument("--flops", type=float, default=FLOPS, help="FLOP per second (H200, bf16: %(default)g)")
    given = parser.parse_args()
    print(f"model, not measured: {given.bandwidth / 1e12:g} TB/s, {given.flops / 1e12:g} TFLOP/s, {ARCH} configs")
    print("case                      items  least MB  own MB  copies MB  GFLOP    own  bound    floor us  roofline us")
    for case in GRIDS["full"].attention:
        if case.dtype == "bf16":
            r = roofline(case, given.bandwidth, given.flops)
            print(
                f"{case.name:24}{r['items']:7}{r['least_bytes'] / 1e6:10.1f}{r['own_bytes'] / 1e6:8.1f}"
                f"{r['replicated_bytes'] / 1e6:11.1f}{r['flops'] / 1e9:7.2f}{r['own_flops'] / 1e9:7.2f}  {r['bound']:8}"
                f"{r['floor_seconds'] * 1e6:9.1f}{r['own_seconds'] * 1e6:13.1f}"
            )


if __name__ == "__main__":
    main()
