"""The cpu backend: C++ kernels in csrc/cpu, called with addresses and strides.

Code path and threads are chosen as for attention: by what the CPU has or TTS_KERNELS_CPU_ISA says, and
torch.get_num_threads(). A row's results depend on neither the other rows of a call nor the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tts_kernels import _C
from tts_kernels.addresses import address

from .results import one_group

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ACTIVATIONS = {"": 0, "relu": 1, "gelu": 2}  # of a head's hidden layer
KINDS = {"softmax": 0, "sigmoid": 1, "identity": 2}
METHODS = {"best": 0, "top_k": 0, "weighted_vote": 1, "majority": 2}


def unsupported_reasons(op: str, *tensors: Tensor) -> list[str]:
    return [f"it runs on CPU tensors, got one on {t.device}" for t in tensors if t.device.type != "cpu"][:1]


def logits(
    hidden: Tensor,
    positions: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    act: str,
    w2: Tensor,
    b2: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
) -> Tensor:
    """The head's columns for the rows `positions` of `hidden`, fp32 [M, C]."""
    out = torch.empty(positions.shape[0], w2.shape[0], dtype=torch.float32)
    vectors = [_vector(x) for x in (norm_weight, b1, b2)]  # named, so that a converted copy lives as long as the call
    positions = positions.contiguous()
    _C.cpu_score_logits(
        out.data_ptr(),
        _matrix(hidden),
        positions.data_ptr(),
        _matrix(w1),
        _matrix(w2),
        [address(x) for x in vectors],
        (out.shape[0], hidden.shape[1], w2.shape[1], out.shape[1]),
        ACTIVATIONS[act],
        norm_eps,
        torch.get_num_threads(),
    )
    return out


def reduce(logits: Tensor, offsets: Tensor, activation: str, positive: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """margin and prob, fp32 [M]; last, min, prod, mean, max and log_prod of each candidate, fp32 [6, N]; count, int32
    [N]."""
    logits, offsets = logits.contiguous(), offsets.contiguous()
    num_rows, columns = logits.shape
    num_candidates = offsets.shape[0] - 1
    margin, prob = torch.empty(num_rows, dtype=torch.float32), torch.empty(num_rows, dtype=torch.float32)
    stats = torch.empty(6, num_candidates, dtype=torch.float32)
    count = torch.empty(num_candidates, dtype=torch.int32)
    _C.cpu_reduce_scores(
        [x.data_ptr() for x in (margin, prob, stats, count)],
        logits.data_ptr(),
        offsets.data_ptr(),
        (num_rows, columns, num_candidates),
        KINDS[activation],
        positive,
        torch.get_num_threads(),
    )
    return margin, prob, stats, count


def select(
    scores: Tensor, group_offsets: Tensor | None, answers: Tensor | None, method: str, k: int
) -> tuple[Tensor, Tensor]:
    """indices int64 [G, k] and their scores fp32 [G, k]; -1 and nan where a group has fewer. None: one group."""
    group_offsets = one_group(scores) if group_offsets is None else group_offsets
    scores, group_offsets = scores.contiguous(), group_offsets.contiguous()
    answers = None if answers is None else answers.contiguous()
    num_groups = group_offsets.shape[0] - 1
    indices = torch.empty(num_groups, k, dtype=torch.int64)
    selected = torch.empty(num_groups, k, dtype=torch.float32)
    _C.cpu_select(
        indices.data_ptr(),
        selected.data_ptr(),
        scores.data_ptr(),
        group_offsets.data_ptr(),
        address(answers),
        (num_groups, k),
        METHODS[method],
    )
    return indices, selected


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """log softmax(hidden weight^T + bias) at the targets, fp32 [T]; nan where a target is no row of `weight`."""
    out = torch.empty(hidden.shape[0], dtype=torch.float32)
    bias, targets = _vector(bias), targets.contiguous()
    _C.cpu_token_logprobs(
        out.data_ptr(),
        _matrix(hidden),
        _matrix(weight),
        address(bias),
        targets.data_ptr(),
        (hidden.shape[0], hidden.shape[1], weight.shape[0]),
        torch.get_num_threads(),
    )
    return out


def _matrix(x: Tensor | None) -> tuple[int, int, int]:
    """Address, stride of the rows in elements, dtype; rows are dense."""
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), DTYPES[x.dtype])


def _vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()
