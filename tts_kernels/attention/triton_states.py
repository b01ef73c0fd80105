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
def to_bf16_bits(x):
    """fp32 to the bits of bfloat16, rounded to nearest even, NaN kept: Triton's interpreter rounds otherwise."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.int16)


@triton.jit
def to_bits(x, TO: tl.constexpr):
    """fp32 as integers of the size of TO."""
    if TO == "fp8":
        bits = to_e4m3_bits(x)
    elif TO == "bf16":
        bits = to_bf16_bits(x)
    elif TO == "fp16":
        bits = x.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
    return bits


@triton.jit
def turned(x, heads, dim, mask, angles, ROTARY_DIM: tl.constexpr, NEOX: tl.constexpr):
    """x [heads, dim] in fp32, read from `heads` [heads, 1] + dim: RoPE of its first ROTARY_DIM dimensions. Angles are
    those of the row's position, cosines, then sines."""
    half: tl.constexpr = ROTARY_DIM // 2
    if NEOX:
        lower = dim < half
        partner = tl.where(lower, dim + half, dim - half)
        angle = tl.where(lower, dim, dim - half)
    else:
        lower = dim % 2 == 0
        partner = dim ^ 1
        angle = dim // 2
    inside = dim < ROTARY_DIM
    other = tl.load(heads + partner, mask=mask & inside, other=0.0).to(tl.float32)
    cosine = tl.load(angles + angle, mask=inside, other=1.0).to(tl.float32)
    sine = tl.load(angles + half + angle, mask=inside, other=0.0).to(tl.float32)
    across = other * sine
    return tl.where(inside, tl.where(lower, x * cosine - across, x * cosine + across), x)


@triton.jit
def append_rows(
    new,  # [R, H, HEAD_DIM]: of the cache's dtype, as integers of its size; where TO is not "", fp32, fp16 or bf16
    new_row,
    new_head,
    cache,  # [num_pages, PAGE_SIZE, H, HEAD_DIM], as integers
    cache_page,
    cache_slot,
    cache_head,
    angles,  # of the row's position; read where ROTARY_DIM is not 0
    row,
    slot,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TO: tl.constexpr,  # the cache's dtype, where it is not copied
    ROTARY_DIM: tl.constexpr,
    NEOX: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    head = tl.arange(0, BLOCK_HEADS)[:, None].to(tl.int64)
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    mask = (head < NUM_HEADS) & (dim < HEAD_DIM)
    heads = new + row.to(tl.int64) * new_row + head * new_head
    x = tl.load(heads + dim, mask=mask)
    if TO != "":
        x = x.to(tl.float32)
        if ROTARY_DIM > 0:
            x = turned(x, heads, dim, mask, angles, ROTARY_DIM, NEOX)
        x = to_bits(x, TO)
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
    cos_sin,  # [max_position, ROTARY_DIM], or None
    cos_sin_row,
    positions,  # [R] int64, or None
    q,  # [R, NUM_Q_HEADS, HEAD_DIM], or None
    q_row,
    q_head,
    q_out,  # like q, as integers
    q_out_row,
    q_out_head,
    NUM_KV_HEADS: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    K_TO: tl.constexpr,
    V_TO: tl.constexpr,
    Q_TO: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    NEOX: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_Q_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A program owns a row: all its heads, K, V and Q."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    angles = cos_sin
    if ROTARY_DIM > 0:
        read = (slot >= 0) | (NUM_Q_HEADS > 0)
        angles += tl.load(positions + row, mask=read, other=0) * cos_sin_row
    if slot >= 0:
        append_rows(
            k, k_row, k_head, k_cache, k_cache_page, k_cache_slot, k_cache_head, angles, row, slot,
            NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, K_TO, ROTARY_DIM, NEOX, BLOCK_HEADS, BLOCK_DIM,
        )  # fmt: skip
        append_rows(
            v, v_row, v_head, v_cache, v_cache_page, v_cache_slot, v_cache_head, angles, row, slot,
            NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, V_TO, 0, NEOX, BLOCK_HEADS, BLOCK_DIM,
        )  # fmt: skip
    if NUM_Q_HEADS > 0:
        append_rows(
            q, q_row, q_head, q_out, q_out_row, 0, q_out_head, angles, row, row.to(tl.int64),
            NUM_Q_HEADS, HEAD_DIM, 1, Q_TO, ROTARY_DIM, NEOX, BLOCK_Q_HEADS, BLOCK_DIM,
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
