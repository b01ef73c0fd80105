"""The Triton kernels of append_kv and merge_states."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def to_e4m3_bits(x):
    """fp32 to the bits of float8_e4m3fn, rounded to nearest even, beyond +-448 to +-448, NaN kept: the same on every
    architecture, whether it has the conversion or not."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    magnitude = tl.minimum(bits, 0x43E00000)  # 448.0
    # Normal: drop 20 bits of mantissa, half to even, and move the exponent's bias from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6: adding 2^14, whose last place is the smallest subnormal 2^-9, rounds to multiples of it.
    subnormal = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    code = tl.where(bits > 0x7F800000, 0x7F, code)
    return (code | sign).to(tl.uint8)


@triton.jit
def append_rows(
    new,  # [R, Hkv, HEAD_DIM]: of the cache's dtype, as integers of its size; or fp32, fp16, bf16 with TO_FP8
    new_row,
    new_head,
    cache,  # [num_pages, PAGE_SIZE, Hkv, HEAD_DIM], as integers
    cache_page,
    cache_slot,
    cache_head,
    row,
    slot,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TO_FP8: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    head = tl.arange(0, BLOCK_HEADS)[:, None].to(tl.int64)
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    mask = (head < NUM_KV_HEADS) & (dim < HEAD_DIM)
    x = tl.load(new + row.to(tl.int64) * new_row + head * new_head + dim, mask=mask)
    if TO_FP8:
        x = to_e4m3_bits(x.to(tl.float32))
    place = cache + (slot // PAGE_SIZE) * cache_page + (slot % PAGE_SIZE) * cache_slot
    tl.store(place + head * cache_head + dim, x, mask=mask)


@triton.jit
def append_kv(
    k,
    k_row,
    k_head,
    v,
    v_row,
    v_head,
    k_cache,
    k_cache_page,
    k_cache_slot,
    k_cache_head,
    v_cache,
    v_cache_page,
    v_cache_slot,
    v_cache_head,
    slots,  # [R] int64, -1 skips
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TO_FP8: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A program owns a row: all its heads, K and V."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    if slot >= 0:
        append_rows(
            k, k_row, k_head, k_cache, k_cache_page, k_cache_slot, k_cache_head, row, slot,
            NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, TO_FP8, BLOCK_HEADS, BLOCK_DIM,
        )  # fmt: skip
        append_rows(
            v, v_row, v_head, v_cache, v_cache_page, v_cache_slot, v_cache_head, row, slot,
            NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, TO_FP8, BLOCK_HEADS, BLOCK_DIM,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_states", "num_heads", "num_pairs"])
def merge_states(
    out,  # [S, R, H, HEAD_DIM]
    out_state,
    out_row,
    out_head,
    lse,  # [S, R, H] fp32
    lse_state,
    lse_row,
    lse_head,
    merged_out,  # [R, H, HEAD_DIM], dense, written
    merged_lse,  # [R, H] fp32, dense, written
    num_states,
    num_heads,
    num_pairs,  # R * H
    HEAD_DIM: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A program owns BLOCK_PAIRS pairs of a row and a head. The largest lse first, then the weighted sum: a state whose
    weight is 0 counts for nothing, whatever its `out` holds."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    inside = pair < num_pairs
    row = pair // num_heads
    head = pair % num_heads
    dim = tl.arange(0, BLOCK_DIM)
    out += row[:, None] * out_row + head[:, None] * out_head + dim[None, :]
    lse += row * lse_row + head * lse_head

    largest = tl.full([BLOCK_PAIRS], float("-inf"), tl.float32)
    for state in range(num_states):
        x = tl.load(lse + tl.cast(state, tl.int64) * lse_state, mask=inside, other=float("-inf"))
        largest = tl.maximum(largest, x)
    largest = tl.where(largest == float("-inf"), 0.0, largest)

    total = tl.zeros([BLOCK_PAIRS], tl.float32)
    acc = tl.zeros([BLOCK_PAIRS, BLOCK_DIM], tl.float32)
    for state in range(num_states):
        x = tl.load(lse + tl.cast(state, tl.int64) * lse_state, mask=inside, other=float("-inf"))
        weight = tl.exp2((x - largest) * LOG2E)
        block = tl.load(
            out + tl.cast(state, tl.int64) * out_state,
            mask=(inside & (weight != 0.0))[:, None] & (dim < HEAD_DIM)[None, :],
            other=0.0,
        )
        total += weight
        acc += block.to(tl.float32) * weight[:, None]
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    place = pair[:, None] * HEAD_DIM + dim[None, :]
    tl.store(
        merged_out + place,
        acc.to(merged_out.dtype.element_ty),
        mask=inside[:, None] & (dim < HEAD_DIM)[None, :],
    )
    tl.store(merged_lse + pair, largest + tl.log2(total) * LN2, mask=inside)
