"""The cuda backend: CUDA C++ kernels in csrc/cuda, on NVIDIA GPUs since sm_80.

step_scores, aggregate, select and verify are one launch each, whatever the head's columns and the numbers of steps,
candidates and groups; a head with a hidden layer takes two, with torch's product in between. Nothing synchronises, and
nothing is allocated but results and that product. The counters by which a launch's blocks find the last of them belong
to the stream, and are zero between calls.

`native` is the compiled module. Tests put the module of tests/emulation in its place, which runs the same kernels on
CPU tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tts_kernels.addresses import address
from tts_kernels.nvidia import captures, place, reasons_of

from .results import REDUCES

try:
    from tts_kernels import _C as native
except ImportError:
    native = None

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = {F32: 0, F16: 1, BF16: 2}
ACTIVATIONS = {"": 0, "relu": 1, "gelu": 2}  # of a head's hidden layer
KINDS = {"softmax": 0, "sigmoid": 1, "identity": 2}
METHODS = {"best": 0, "top_k": 0, "weighted_vote": 1, "majority": 2}
HIDDEN, PRODUCTS, LOGITS = range(3)  # RowsOf in csrc/params.h
NONE = (0, 0, 0)

# Rows of a product: always as many, the last block filled up, since cuBLAS may add in another order for another number.
PRODUCT_ROWS = 128
SHARED_COLUMNS = 1024  # logits of a row that are kept in shared memory
SHARED_CANDIDATES = 4096  # of a group that is sorted there, at 24 bytes each
MOST_PASSES = 8  # a longer list is sorted: kMostPasses in csrc/cuda/selection.cuh

_counters: dict[tuple[int, int], Tensor] = {}  # by device and stream


def unsupported_reasons(op: str, *tensors: Tensor) -> list[str]:
    if op == "token_logprobs":
        return ["token_logprobs is triton's: nothing is won by a second kernel for one product with the vocabulary"]
    return reasons_of(native, "cuda_step_scores", *tensors)


def verdict(
    hidden: Tensor,
    positions: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    act: str,
    w2: Tensor,
    b2: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    offsets: Tensor,
    activation: str,
    positive: int,
    choice: tuple | None = None,
) -> tuple[Tensor, ...]:
    """margin, prob, stats and count as `reduce` returns them. With choice = (reduce, group_offsets, answers, method,
    k), what `select` returns behind them."""
    columns, width = w2.shape
    b1, b2, norm_weight = (None if x is None else x.contiguous() for x in (b1, b2, norm_weight))
    norm = vector(norm_weight), norm_eps
    if w1 is None:
        rows = HIDDEN, matrix(hidden), positions.data_ptr(), *norm, NONE, (0, 0), 0
    else:
        products = hidden_layer(hidden, positions, w1, norm_weight, norm_eps)
        parts = products.data_ptr(), products.shape[1], products.shape[2]
        rows = PRODUCTS, NONE, 0, (0, 0), 0.0, parts, vector(b1), ACTIVATIONS[act]
    logits = hidden.new_empty(positions.shape[0], columns, dtype=F32) if columns > SHARED_COLUMNS else None
    return launched(
        (*rows, matrix(w2), vector(b2), address(logits)), positions.shape[0], width, columns, offsets, activation,
        positive, choice,
    )  # fmt: skip


def reduce(logits: Tensor, offsets: Tensor, activation: str, positive: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = logits.contiguous()
    rows = LOGITS, NONE, 0, (0, 0), 0.0, NONE, (0, 0), 0, NONE, (0, 0), logits.data_ptr()
    return launched(rows, logits.shape[0], 0, logits.shape[1], offsets, activation, positive)


def launched(
    rows: tuple, num_rows: int, width: int, columns: int, offsets: Tensor, activation: str, positive: int,
    choice: tuple | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    device, num_candidates = offsets.device, offsets.shape[0] - 1
    margin, prob = (torch.empty(num_rows, dtype=F32, device=device) for _ in range(2))
    stats = torch.empty(len(REDUCES), num_candidates, dtype=F32, device=device)
    count = torch.empty(num_candidates, dtype=torch.int32, device=device)
    results, chosen = (margin, prob, stats, count), NO_CHOICE
    if choice is not None:
        chosen = choices(stats[REDUCES.index(choice[0])], *choice[1:])
        results = (*results, chosen.indices, chosen.selected)
    at = place(device)
    counters = counters_of(at, device, num_candidates + chosen.shape[1])
    native.cuda_step_scores(
        at, *rows, [x.data_ptr() for x in (margin, prob, stats, count, counters)], offsets.data_ptr(),
        (num_rows, width, columns, num_candidates), KINDS[activation], positive, *chosen.arguments,
    )  # fmt: skip
    return results


def select(
    scores: Tensor, group_offsets: Tensor | None, answers: Tensor | None, method: str, k: int
) -> tuple[Tensor, Tensor]:
    chosen = choices(scores, group_offsets, answers, method, k)
    native.cuda_select(place(scores.device), *chosen.arguments)
    return chosen.indices, chosen.selected


class Choices(NamedTuple):
    """What a selection writes, and how the native module is told of it."""

    indices: Tensor | None
    selected: Tensor | None
    scratch: Tensor | None
    addresses: tuple[int, ...]
    shape: tuple[int, ...]  # candidates, groups, k, candidates that are sorted in shared memory
    method: int

    @property
    def arguments(self) -> tuple:
        return self.addresses, self.shape, self.method


NO_CHOICE = Choices(None, None, None, (0,) * 6, (0,) * 4, 0)


def choices(scores: Tensor, group_offsets: Tensor | None, answers: Tensor | None, method: str, k: int) -> Choices:
    device, num_candidates = scores.device, scores.shape[0]
    num_groups = 1 if group_offsets is None else group_offsets.shape[0] - 1
    indices = torch.empty(num_groups, k, dtype=torch.int64, device=device)
    selected = torch.empty(num_groups, k, dtype=F32, device=device)
    in_order = answers is not None or k > MOST_PASSES
    shared = min(num_candidates, SHARED_CANDIDATES) if in_order else 0
    scratch = None
    if in_order and num_candidates > shared:
        scratch = torch.empty(3 * num_candidates, dtype=torch.int64, device=device)
    addresses = tuple(address(x) for x in (indices, selected, scores, group_offsets, answers, scratch))
    return Choices(indices, selected, scratch, addresses, (num_candidates, num_groups, k, shared), METHODS[method])


def hidden_layer(hidden: Tensor, positions: Tensor, w1: Tensor, norm_weight: Tensor | None, norm_eps: float) -> Tensor:
    """w1 norm(x) in fp32, [blocks, parts, PRODUCT_ROWS, h], to be added up over the parts. Where x is no more than w1's
    bfloat16 can hold, it is the sum of three of its numbers (of fp16 x two), whose products are exact."""
    dim, num_blocks = hidden.shape[1], -(-positions.shape[0] // PRODUCT_ROWS)
    exact = hidden.dtype == w1.dtype and norm_weight is None
    parts = 1 if exact or w1.dtype != BF16 else 2 if hidden.dtype == F16 and norm_weight is None else 3
    if w1.dtype == F16 and not exact:
        w1 = w1.to(F32)  # whose range is too small for parts
    x = torch.empty(num_blocks, parts, PRODUCT_ROWS, dim, dtype=w1.dtype, device=hidden.device)
    native.cuda_gather_rows(
        place(hidden.device), x.data_ptr(), DTYPES[w1.dtype], matrix(hidden), positions.data_ptr(), vector(norm_weight),
        norm_eps, (positions.shape[0], dim, PRODUCT_ROWS, parts),
    )  # fmt: skip
    out = torch.empty(num_blocks, parts, PRODUCT_ROWS, w1.shape[0], dtype=F32, device=hidden.device)
    # Autocast would round to its own dtype.
    with torch.autocast(hidden.device.type, enabled=False):
        for block, result in zip(x.flatten(1, 2), out.flatten(1, 2)):
            product(block, w1, result)
    return out


def product(x: Tensor, w: Tensor, out: Tensor) -> None:
    """[rows, d] times [h, d] transposed, fp32. In fp32 torch multiplies in TF32 where the caller has switched it on."""
    if x.dtype == F32:
        torch.mm(x, w.t(), out=out)
    else:
        torch.mm(x, w.t(), out_dtype=F32, out=out)


def counters_of(at: tuple[int, int], device: torch.device, count: int) -> Tensor:
    if captures(device):
        # A graph may be replayed on any stream, beside others: it has counters of its own.
        return torch.zeros(count, dtype=torch.int32, device=device)
    kept = _counters.get(at)
    if kept is None or kept.numel() < count:
        kept = _counters[at] = torch.zeros(max(2 * count, 4096), dtype=torch.int32, device=device)
    return kept


def matrix(x: Tensor) -> tuple[int, int, int]:
    """Address, stride of the rows in elements, dtype; rows are dense."""
    return x.data_ptr(), x.stride(0), DTYPES[x.dtype]


def vector(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), DTYPES[x.dtype])
