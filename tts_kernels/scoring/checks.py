"""What the scoring ops accept. The first half looks at types and shapes alone and is traced away by torch.compile (so
no size goes into a text before something is wrong: that would compile anew for each size); the second half reads
values: the registered ops call it at run time, on a device only where asked to."""

from __future__ import annotations

import torch
from torch import Tensor

from tts_kernels.attention.checks import FLOATS, as_int64, check_tensor, fail

from .heads import ScoreHead
from .results import REDUCES

METHODS = ("best", "weighted_vote", "majority", "top_k")
VOTES = ("weighted_vote", "majority")


def check_floats(name: str, tensor: Tensor, shape: str, device: torch.device | None = None) -> None:
    check_tensor(name, tensor, shape, device)
    if tensor.dtype not in FLOATS:
        fail(name, "dtype float32, float16 or bfloat16", tensor.dtype, TypeError)


def check_integers(name: str, tensor: Tensor, shape: str, device: torch.device, least: int = 0) -> Tensor:
    """As contiguous int64, which is what the backends take."""
    if not isinstance(tensor, Tensor):
        fail(name, f"an int64 or int32 tensor {shape}", type(tensor).__name__, TypeError)
    if tensor.dtype not in (torch.int64, torch.int32):
        fail(name, "dtype int64 or int32", tensor.dtype, TypeError)
    if tensor.dim() != 1 or tensor.shape[0] < least:
        fail(name, f"a tensor {shape}", f"shape {tuple(tensor.shape)}")
    if tensor.device != device:
        fail(name, f"a tensor on {device}", f"one on {tensor.device}")
    return as_int64(tensor)


def check_head(hidden: Tensor, head: ScoreHead) -> None:
    check_floats("hidden", hidden, "[T, d]")
    if not isinstance(head, ScoreHead):
        fail("head", "a ScoreHead", type(head).__name__, TypeError)
    if head.dim != hidden.shape[1]:
        fail("hidden", f"shape [T, {head.dim}] for this head", f"shape {tuple(hidden.shape)}")
    for name, weight in head.weights.items():
        if weight.device != hidden.device:
            fail("head", f"weights on {hidden.device} like hidden", f"{name} on {weight.device}")
        if weight.requires_grad and torch.is_grad_enabled():
            fail("head", "weights that need no gradient (the op has no backward: call it under torch.no_grad())",
                 f"{name} with requires_grad=True")  # fmt: skip


def check_choice(method: str, k: int, answers: Tensor | None, num_candidates: int, device: torch.device):
    """`answers` as contiguous int64; None for the methods that do not read them."""
    if method not in METHODS:
        fail("method", f"one of {', '.join(METHODS)}", repr(method))
    if isinstance(k, bool) or not isinstance(k, int):
        fail("k", "an int", type(k).__name__, TypeError)
    if k < 1:
        fail("k", "at least 1", k)
    if method == "best" and k > 1:
        fail("k", "1 with method 'best' ('top_k' gives more)", k)
    if method not in VOTES:
        return None
    if answers is None:
        fail("answers", f"a tensor [N] for method {method!r}", "None", TypeError)
    answers = check_integers("answers", answers, "[N]", device)
    if answers.shape[0] != num_candidates:
        fail("answers", f"shape [{num_candidates}], one answer for each candidate", f"shape {tuple(answers.shape)}")
    return answers


def check_group_offsets(group_offsets: Tensor | None, device: torch.device) -> Tensor | None:
    if group_offsets is None:
        return None
    return check_integers("group_offsets", group_offsets, "[G + 1]", device, least=1)


def check_reduce(reduce: str) -> str:
    if reduce not in REDUCES:
        fail("reduce", f"one of {', '.join(REDUCES)}", repr(reduce))
    return reduce


def check_fp32(name: str, tensor: Tensor, shape: str) -> None:
    check_tensor(name, tensor, shape)
    if tensor.dtype != torch.float32:
        fail(name, "dtype torch.float32", tensor.dtype, TypeError)


def check_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """`targets` as contiguous int64."""
    check_floats("hidden", hidden, "[T, d]")
    check_floats("weight", weight, "[V, d]", hidden.device)
    if weight.shape[1] != hidden.shape[1] or 0 in weight.shape:
        fail("weight", f"shape [V, {hidden.shape[1]}] like hidden, V and d at least 1", f"shape {tuple(weight.shape)}")
    if bias is not None:
        check_floats("bias", bias, "[V]", hidden.device)
        if bias.shape[0] != weight.shape[0]:
            fail("bias", f"shape [{weight.shape[0]}] for the rows of weight", f"shape {tuple(bias.shape)}")
    targets = check_integers("targets", targets, "[T]", hidden.device)
    if targets.shape[0] != hidden.shape[0]:
        fail("targets", f"shape [{hidden.shape[0]}], one for each row of hidden", f"shape {tuple(targets.shape)}")
    return targets


# Checks of values.


def looked_at(tensor: Tensor, check: bool) -> bool:
    return check or tensor.device.type == "cpu"


def check_range(name: str, values: Tensor, least: int, end: int | None) -> None:
    """Of every value: least <= value, and < end if that is given."""
    if not values.numel():
        return
    low, high = (int(extreme) for extreme in torch.aminmax(values))
    if low >= least and (end is None or high < end):
        return
    wrong = values < least
    if end is not None:
        wrong |= values >= end
    i = int(wrong.nonzero()[0])
    fail(name, f"at least {least}" if end is None else f"numbers in [{least}, {end})", f"{int(values[i])} at {i}")


def check_offsets(name: str, offsets: Tensor, end: int, of: str) -> None:
    """0 first, then never less, `end` last."""
    less = offsets[1:] < offsets[:-1]  # differences might overflow
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0:
        fail(name, "0 first", first)
    if less.any():
        i = int(less.nonzero()[0])
        fail(name, "numbers that never become less", f"{int(offsets[i + 1])} after {int(offsets[i])} at {i + 1}")
    if last != end:
        fail(name, f"{end} last, the number of {of}", last)


def check_ordered(positions: Tensor, offsets: Tensor) -> None:
    """Within each candidate the positions ascend."""
    unordered = positions.diff() <= 0
    borders = offsets[(offsets > 0) & (offsets < positions.shape[0])] - 1  # from one candidate to the next
    unordered[borders] = False
    if unordered.any():
        i = int(unordered.nonzero()[0])
        fail("positions", "ascending ones within each candidate", f"{int(positions[i + 1])} after {int(positions[i])}")


def check_steps(hidden: Tensor, positions: Tensor, offsets: Tensor, ordered: bool, check: bool) -> None:
    if looked_at(positions, check):
        check_offsets("offsets", offsets, positions.shape[0], "positions")
        check_range("positions", positions, 0, hidden.shape[0])
        if ordered:
            check_ordered(positions, offsets)


def check_groups(num_candidates: int, group_offsets: Tensor | None, answers: Tensor | None, check: bool) -> None:
    if group_offsets is not None and looked_at(group_offsets, check):
        check_offsets("group_offsets", group_offsets, num_candidates, "candidates")
    if answers is not None and looked_at(answers, check):
        check_range("answers", answers, -1, None)
