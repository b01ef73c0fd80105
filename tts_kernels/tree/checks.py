"""What the plan and the KV tree accept. Aggregate checks first; the culprit is looked for only when one fails."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch

from tts_kernels.errors import check_int, fail

INT32_MAX = 2**31 - 1


def int_list(name: str, values: Sequence[int]) -> list[int]:
    """`values` as a list of ints; lists are returned as they are. Tensors and arrays of integers serve too."""
    if type(values) is not list:
        if hasattr(values, "tolist"):
            values = values.tolist()
        elif isinstance(values, Sequence) and not isinstance(values, (str, bytes)):
            values = list(values)
        if type(values) is not list:
            fail(name, "a list of ints", repr(values), TypeError)
    if not [v for v in values if type(v) is not int]:
        return values
    return [check_int(f"{name}[{i}]", v) for i, v in enumerate(values)]


def is_one(value: object) -> bool:
    """Whether it stands for one int, not for a list of them. Arrays and tensors of any shape have __index__."""
    return hasattr(value, "__index__") and not getattr(value, "ndim", 0)


def one_or_more(name: str, values: int | Sequence[int]) -> list[int]:
    return [check_int(name, values)] if is_one(values) else int_list(name, values)


def check_options(page_size: int, causal: bool) -> None:
    check_int("page_size", page_size, 1)
    if not isinstance(causal, bool):
        fail("causal", "a bool", repr(causal), TypeError)


def check_device(device: torch.device | str) -> torch.device:
    if not isinstance(device, (torch.device, str)):  # Tensor.to would take a dtype too
        fail("device", "a torch.device or its name", repr(device), TypeError)
    try:
        return torch.device(device)
    except RuntimeError:
        fail("device", "a torch.device or its name", repr(device))


def page_lists(pages: Sequence[Sequence[int]]) -> list[list[int]]:
    """`pages` as lists, or the error that says why not."""
    if not isinstance(pages, Iterable):
        fail("pages", "a list of lists of page ids", repr(pages), TypeError)
    return [int_list(f"pages[{i}]", p) for i, p in enumerate(pages)]


def check_nodes(parent: list[int], length: list[int], page_count: list[int], rows: list[int]) -> None:
    num_nodes = len(parent)
    for name, values in (("length", length), ("pages", page_count), ("rows", rows)):
        if len(values) != num_nodes:
            fail(name, f"{num_nodes} entries, as many as parent", len(values))
    if not num_nodes:
        return
    if min(parent) < -1 or not all(map(operator.lt, parent, range(num_nodes))):
        i = next(i for i, p in enumerate(parent) if not -1 <= p < i)
        fail(f"parent[{i}]", "-1 or the index of an earlier node", parent[i])
    if min(rows) < 0 or not all(map(operator.le, rows, length)):
        for i, (tokens, count) in enumerate(zip(length, rows)):
            if tokens < 0:
                fail(f"length[{i}]", "at least 0", tokens)
            if not 0 <= count <= tokens:
                fail(f"rows[{i}]", f"0 <= rows <= length[{i}] = {tokens}", count)


def check_page_ids(ids: torch.Tensor | None, values: list[int], pages: list[list[int]]) -> int:
    """The largest id, -1 where there is none.

    pages   the ids node by node
    values  the same in one list
    ids     the same in one int32 tensor; None where that could not be made
    """
    if not values:
        return -1
    if ids is not None:
        low, high = (int(extreme) for extreme in torch.aminmax(ids))
        # A bool passes for an int in the tensor, and could only be 0 or 1.
        if low > 1 or (low >= 0 and not [v for v in values if type(v) is bool]):
            return high
    for node, of_node in enumerate(pages):
        for i, page in enumerate(of_node):
            page = check_int(f"pages[{node}][{i}]", page)
            if not 0 <= page <= INT32_MAX:
                fail(f"pages[{node}][{i}]", f"a page id in [0, {INT32_MAX}]", page)
    raise AssertionError("a page id was refused and none is wrong")


def check_lens(
    seq_lens: torch.Tensor, q_lens: torch.Tensor | None, reserve: int, batch: int, max_pages: int, page_size: int
) -> tuple[list[int], list[int]]:
    check_lens_tensors(seq_lens, q_lens, reserve, batch)
    lens = seq_lens.tolist(), [1] * batch if q_lens is None else q_lens.tolist()
    for b, (tokens, count) in enumerate(zip(*lens)):
        if tokens < 0:
            fail(f"seq_lens[{b}]", "at least 0", tokens)
        if count < 0 or count > tokens > 0:
            fail(f"q_lens[{b}]", f"0 <= q_lens <= seq_lens[{b}] = {tokens}", count)
        if tokens + (reserve if tokens and count else 0) > max_pages * page_size:
            expected = f"at most {max_pages} pages of {page_size} tokens, the reserve of {reserve} included"
            fail(f"seq_lens[{b}]", expected, tokens)
    return lens


def check_lens_tensors(seq_lens: torch.Tensor, q_lens: torch.Tensor | None, reserve: int, batch: int) -> None:
    """Types and shapes alone: no value is looked at."""
    check_int("reserve", reserve, 0)
    for name, lens in (("seq_lens", seq_lens), ("q_lens", q_lens)):
        if name == "seq_lens" or lens is not None:
            check_integers(name, lens, "[B]")
            if lens.shape[0] != batch:
                fail(name, f"{batch} entries, as many as block_table has rows", lens.shape[0])


def check_integers(name: str, tensor: torch.Tensor, shape: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        fail(name, f"a tensor {shape}", type(tensor).__name__, TypeError)
    if tensor.dtype not in (torch.int32, torch.int64):
        fail(name, "dtype int32 or int64", tensor.dtype, TypeError)
    if tensor.dim() != shape.count(",") + 1:
        fail(name, f"a tensor {shape}", f"shape {tuple(tensor.shape)}")
