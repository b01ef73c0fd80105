"""What our ops are measured against: one file for each peer, or for each library.

A peer is a module or an object with
    NAME                 what the table calls it
    reason_against(case) why it cannot run the case, or ""
    prepare(inputs)      a function without arguments that computes what our op does, [R, Hq, D] for tree_attention;
                         what it copies for that is not timed
    bytes_read(case)     bytes of the tensors it is handed and of its result, each once

What it raises in `prepare` or in its first call is named as the reason why it is missing. `case` and `inputs` are those
of benchmarks/cases.py on a CPU and of benchmarks/gpu/cases.py on a GPU.
"""

from . import (
    cascade,
    flashinfer,
    flex,
    full_logits,
    head_compiled,
    head_eager,
    portable,
    sdpa,
    sdpa_kernels,
    sdpa_packed,
    unshared,
)

PEERS = (cascade, sdpa_packed, sdpa)
GPU_PEERS = (
    flashinfer.Cascade("auto"),
    flashinfer.Cascade("fa2"),
    flashinfer.Unshared(),
    cascade,
    sdpa_kernels.FLASH,
    sdpa_kernels.CUDNN,
    flex,
    portable,
    unshared,
)
SCORING_PEERS = (head_eager, head_compiled, full_logits)
