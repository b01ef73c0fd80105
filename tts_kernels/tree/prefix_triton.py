"""Comparing the rows of a block table where it lies, on the device: Triton kernels. Nothing but integers per sequence
leaves them.

A sequence's key is its row up to its last page that may be shared. Keys are ordered page by page, a key before its
extensions, equal keys as in the batch. Each pair of sequences is compared once, and the earlier of a pair counts
towards the other's place in that order (its rank), so there is no sort and no matrix of pairs. Sequences of one prompt
tend to stand together in a batch and to share most of their pages: what two of them share is at least the least that
neighbours between them share, and pairs are compared from there on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

ORDER, COMMON, SEQ_LEN, Q_LEN, LOW, HIGH = range(6)  # rows of what compare_rows returns


@dataclass(frozen=True)
class Blocks:
    """Block sizes, powers of two. Never tuned at run time: a plan is built once for many calls.

    A tile of rank_rows compares sequences * sequences pairs over tile_pages pages, 64 entries for each of its 128
    threads; compiled for sm_90 that takes 80 registers. A tile's row is tile_pages int32 ids, a line of 128 bytes.
    """

    sequences: int = 16
    tile_pages: int = 32
    row_pages: int = 1024  # where a program has a single row or pair: 8 entries for each thread
    num_warps: int = 4


@triton.jit(do_not_specialize=[
    "seq_lens", "seq_stride", "q_lens", "q_stride", "seq_len", "q_len", "low", "high", "shareable",
    "page_size", "reserve", "max_pages",
])  # fmt: skip
def scan_rows(
    table, seq_lens, q_lens,  # [B, max_pages], [B], [B]: int32 or int64
    seq_len, q_len, low, high, shareable,  # outputs, [B] int64
    row_stride, page_stride, seq_stride, q_stride, page_size, reserve, max_pages,
    PAGES: tl.constexpr,
):  # fmt: skip
    """One program per sequence: its lengths, min(0, ids) and max(-1, ids) of the entries that it uses, and how many of
    its pages may be shared. Lengths are not checked yet: any value gives counts within the row."""
    b = tl.program_id(0).to(tl.int64)
    tokens = tl.load(seq_lens + b * seq_stride).to(tl.int64)
    rows = tl.load(q_lens + b * q_stride).to(tl.int64)
    tl.store(seq_len + b, tokens)
    tl.store(q_len + b, rows)

    tokens = tl.minimum(tl.maximum(tokens, 0), 2147483647)  # no plan holds more; sums do not overflow
    rows = tl.maximum(rows, 0)
    tl.store(shareable + b, tl.minimum(tl.maximum(tokens - rows, 0) // page_size, max_pages))
    read = tokens + tl.where((tokens > 0) & (rows > 0), reserve, 0)
    used = tl.minimum((read + page_size - 1) // page_size, max_pages)

    least = tl.full([PAGES], 0, tl.int64)
    most = tl.full([PAGES], -1, tl.int64)
    for page in range(0, used, PAGES):
        at = (page + tl.arange(0, PAGES)).to(tl.int64)
        ids = tl.load(table + b * row_stride + at * page_stride, mask=at < used, other=-1).to(tl.int64)
        least = tl.minimum(least, tl.where(at < used, ids, 0))
        most = tl.maximum(most, ids)
    tl.store(low + b, tl.min(least, axis=0))
    tl.store(high + b, tl.max(most, axis=0))


@triton.jit(do_not_specialize=["shareable", "order", "common"])
def compare_neighbours(
    table, shareable, order,  # [B, max_pages], [B] int64, [B] int64
    common,  # output, [B] int64; the last is left as it is
    row_stride, page_stride,
    PAGES: tl.constexpr,
):  # fmt: skip
    """One program per pair of neighbours in `order`: the leading pages that they share."""
    i = tl.program_id(0)
    a, b = tl.load(order + i), tl.load(order + i + 1)
    end = tl.minimum(tl.load(shareable + a), tl.load(shareable + b))
    page = end * 0
    while page < end:
        at = page + tl.arange(0, PAGES)
        a_page = tl.load(table + a * row_stride + at * page_stride, mask=at < end, other=0)
        b_page = tl.load(table + b * row_stride + at * page_stride, mask=at < end, other=0)
        end = tl.minimum(end, tl.min(tl.where(a_page != b_page, at, end), axis=0))  # where they part
        page += PAGES
    tl.store(common + i, end)


@triton.jit(do_not_specialize=["shareable", "link", "rank", "batch"])
def rank_rows(
    table, shareable, link,  # [B, max_pages], [B] int64, [B] int64: pages that b and b + 1 share
    rank,  # output, [B] int64, zeros before
    row_stride, page_stride, batch,
    ROWS: tl.constexpr, PAGES: tl.constexpr, LINKS: tl.constexpr,
):  # fmt: skip
    """One program per ROWS sequences b and ROWS sequences a. Of each pair a < b in the batch, the one whose key comes
    later counts the other."""
    if tl.program_id(1) > tl.program_id(0):
        return
    b_first, a_first = tl.program_id(0) * ROWS, tl.program_id(1) * ROWS
    b, a = b_first + tl.arange(0, ROWS), a_first + tl.arange(0, ROWS)
    pairs = (a[None, :] < b[:, None]) & (b[:, None] < batch)  # [b, a]
    b_end = tl.load(shareable + b, mask=b < batch, other=0).to(tl.int32)
    a_end = tl.load(shareable + a, mask=a < batch, other=0).to(tl.int32)
    end = tl.minimum(b_end[:, None], a_end[None, :])  # [b, a]
    b_row, a_row = table + b.to(tl.int64) * row_stride, table + a.to(tl.int64) * row_stride

    least = tl.full([LINKS], 2147483647, tl.int64)
    last = tl.minimum(b_first + ROWS, batch) - 1
    for first in range(a_first, last, LINKS):
        at = first + tl.arange(0, LINKS)
        least = tl.minimum(least, tl.load(link + at, mask=at < last, other=2147483647))
    page = tl.min(least, axis=0).to(tl.int32)

    common = tl.zeros([ROWS, ROWS], tl.int32) + page  # [b, a]; `page` where a pair has not parted yet
    together = tl.max(tl.max((pairs & (common < end)).to(tl.int32), axis=1), axis=0)
    while together > 0:
        at = page + tl.arange(0, PAGES)
        offset = at.to(tl.int64) * page_stride
        b_page = tl.load(b_row[:, None] + offset[None, :], mask=at[None, :] < b_end[:, None], other=0)
        a_page = tl.load(a_row[:, None] + offset[None, :], mask=at[None, :] < a_end[:, None], other=0)
        differ = b_page[:, None, :] != a_page[None, :, :]  # [b, a, PAGES]
        parted = page + tl.min(tl.where(differ, tl.arange(0, PAGES)[None, None, :], PAGES), axis=2)
        common = tl.where(common == page, tl.minimum(parted, end), common)
        page += PAGES
        together = tl.max(tl.max((pairs & (common == page) & (common < end)).to(tl.int32), axis=1), axis=0)

    differ = pairs & (common < end)
    offset = common.to(tl.int64) * page_stride
    b_page = tl.load(b_row[:, None] + offset, mask=differ, other=0)
    a_page = tl.load(a_row[None, :] + offset, mask=differ, other=0)
    a_before = tl.where(differ, a_page < b_page, a_end[None, :] <= b_end[:, None])
    tl.atomic_add(rank + b, tl.sum((pairs & a_before).to(tl.int64), axis=1), mask=b < batch, sem="relaxed")
    tl.atomic_add(rank + a, tl.sum((pairs & (a_before == 0)).to(tl.int64), axis=0), mask=a < batch, sem="relaxed")


def compare_rows(
    table: torch.Tensor,
    seq_lens: torch.Tensor,
    q_lens: torch.Tensor | None,
    page_size: int,
    reserve: int,
    blocks: Blocks = Blocks(),
) -> torch.Tensor:
    """[6, B] int64 on the table's device, without waiting for it:

    ORDER    the sequences in the order of their keys
    COMMON   pages that ORDER[i] and ORDER[i + 1] share; the last is 0
    SEQ_LEN  seq_lens as given
    Q_LEN    q_lens as given, ones for None
    LOW      min(0, ids) of the entries of `table` that sequence b uses, the reserve's included
    HIGH     max(-1, ids) of the same

    table [B, max_pages], seq_lens [B] and q_lens [B] are int32 or int64 with any strides, the lengths on any device.
    Lengths that are not valid, and ids that are not, give some result and nothing out of bounds.
    """
    batch, max_pages = table.shape
    device = table.device
    facts = torch.zeros((9, batch), dtype=torch.int64, device=device)
    if not batch:
        return facts[:6]
    order, common, seq_len, q_len, low, high, shareable, link, rank = facts.unbind()
    seq_lens = seq_lens.to(device, non_blocking=True)
    q_lens = torch.ones_like(seq_lens) if q_lens is None else q_lens.to(device, non_blocking=True)
    page_size, reserve = min(page_size, 2**62), min(reserve, 2**61)  # int64; a reserve this large is refused later
    strides = table.stride()
    in_batch = torch.arange(batch, dtype=torch.int64, device=device)
    tiles = triton.cdiv(batch, blocks.sequences)
    with torch.cuda.device_of(table):
        scan_rows[(batch,)](
            table, seq_lens, q_lens, seq_len, q_len, low, high, shareable,
            *strides, seq_lens.stride(0), q_lens.stride(0), page_size, reserve, max_pages,
            PAGES=blocks.row_pages, num_warps=blocks.num_warps,
        )  # fmt: skip
        compare_neighbours[(batch - 1,)](
            table, shareable, in_batch, link, *strides, PAGES=blocks.row_pages, num_warps=blocks.num_warps
        )
        rank_rows[(tiles, tiles)](
            table, shareable, link, rank, *strides, batch,
            ROWS=blocks.sequences, PAGES=blocks.tile_pages, LINKS=blocks.row_pages, num_warps=blocks.num_warps,
        )  # fmt: skip
        order.scatter_(0, rank, in_batch)
        compare_neighbours[(batch - 1,)](
            table, shareable, order, common, *strides, PAGES=blocks.row_pages, num_warps=blocks.num_warps
        )
    return facts[:6]
