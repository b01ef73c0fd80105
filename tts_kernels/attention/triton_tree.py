"""The two Triton kernels of tree attention: tiles of the tree, then the merge of each row's partial states.

Tiles. An item of the work list (work.py) is a node, a chunk of its tokens and a tile of its packed rows; a program owns
one item and one KV head. A packed row is a row and a query head of the group that shares the KV head, so K and V of a
token are loaded once for all of them, and the prefix of many samples fills tensor core tiles. The program walks the
chunk in blocks of tokens with an online softmax in base 2 and stores one fp32 state for each packed row: o not yet
divided, the largest score m, and the sum of the weights.

Merge. The states of a row lie side by side, root first, chunk after chunk: a program owns a row and BLOCK_HEADS query
heads, folds them in that order, lets the sink join the denominator, and writes out and lse.

Everything that a decode step changes (lengths) is read from device memory.
"""

import triton
import triton.language as tl

# Rows of TreePlan.nodes.
LENGTH = tl.constexpr(1)
POSITION = tl.constexpr(2)
PAGE_BEGIN = tl.constexpr(3)
OWN_BEGIN = tl.constexpr(4)
OWN_END = tl.constexpr(5)
ROWS_END = tl.constexpr(6)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def chunk_tokens(
    length,
    own_rows,
    GROUP: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """Tokens per chunk of a node, by its length and its own rows: a result does not depend on who else shares the node.
    The same as work.chunk_tokens."""
    most = tl.maximum(MAX_CHUNKS // tl.maximum(tl.cdiv(own_rows * GROUP, WIDE_ROWS), 1), 1)
    return tl.maximum(tl.cdiv(tl.cdiv(length, most), MIN_CHUNK), 1) * MIN_CHUNK


@triton.jit
def load_kv(pointer, mask, FP8_BITS: tl.constexpr, DOT: tl.constexpr):
    """A block of the cache in the dtype of the products. FP8_BITS: from the bits of e4m3 by integer arithmetic, for
    hardware without that conversion: its 7 low bits, as exponent and mantissa of fp16, are the number times 2^-8."""
    x = tl.load(pointer) if mask is None else tl.load(pointer, mask=mask, other=0.0)
    if FP8_BITS:
        magnitude = (x & 0x7F).to(tl.uint16)
        half = (((x & 0x80).to(tl.uint16) << 8) | (magnitude << 7)).to(tl.float16, bitcast=True)
        x = tl.where(magnitude == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    return x.to(DOT)


@triton.jit
def attend_block(
    acc,  # [BLOCK_ROWS, BLOCK_DIM] fp32
    m,  # [BLOCK_ROWS] fp32, base 2
    total,
    q,  # [BLOCK_ROWS, BLOCK_DIM]
    start,  # first token of the block
    first,  # [BLOCK_ROWS] tokens of the node that each row sees: [first, stop)
    stop,
    end,  # no row sees a token from here on
    k,  # of the KV head
    k_page,
    k_slot,
    v,
    v_page,
    v_slot,
    pages,  # of the node
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FP8_BITS: tl.constexpr,
    DOT: tl.constexpr,
):
    token = start + tl.arange(0, BLOCK_TOKENS)
    dim = tl.arange(0, BLOCK_DIM)
    if MASKED:
        # Tokens that no row sees are not loaded: their slots may hold anything.
        inside = token < end
        page = tl.load(pages + token // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
        mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
    else:
        page = tl.load(pages + token // PAGE_SIZE).to(tl.int64)
        if HEAD_DIM == BLOCK_DIM:
            mask = None
        else:
            mask = (dim < HEAD_DIM)[None, :]
    slot = (token % PAGE_SIZE).to(tl.int64)
    keys = load_kv(k + (page * k_page + slot * k_slot)[:, None] + dim[None, :], mask, FP8_BITS, DOT)
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee")  # [BLOCK_ROWS, BLOCK_TOKENS]
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), right at both infinities
        capped = 1.0 - 2.0 / (tl.exp2(scores * (scale / softcap) * (2.0 * LOG2E)) + 1.0)
        scores = capped * (softcap * LOG2E)
    else:
        scores = scores * (scale * LOG2E)
    if MASKED:
        visible = token[None, :] < tl.minimum(stop, end)[:, None]
        if WINDOW:
            visible = visible & (token[None, :] >= first[:, None])
        scores = tl.where(visible, scores, float("-inf"))

    largest = tl.maximum(m, tl.max(scores, 1))
    # A row that has seen no key yet: -inf - 0 stays -inf, and exp2 of it is 0.
    base = tl.where(largest == float("-inf"), 0.0, largest)
    weight = tl.exp2(scores - base[:, None])
    rescale = tl.exp2(m - base)
    total = total * rescale + tl.sum(weight, 1)
    values = load_kv(v + (page * v_page + slot * v_slot)[:, None] + dim[None, :], mask, FP8_BITS, DOT)
    acc = tl.dot(weight.to(DOT), values, acc * rescale[:, None], input_precision="ieee")
    return acc, largest, total


@triton.jit
def attend_tile(
    item,  # its first word in the work list
    begin,  # of the chunk, tokens of the node
    chunk_end,
    length,
    q,
    q_row,
    q_head,
    k,
    k_page,
    k_slot,
    v,
    v_page,
    v_slot,
    nodes,
    num_nodes,
    pages,
    rows,
    num_rows,
    path_chunks,
    first_state,
    states,
    sums,
    kv_head,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FP8_BITS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
):
    node = tl.load(item)
    packed = tl.load(item + 1) + tl.arange(0, BLOCK_ROWS)
    chunk = tl.load(item + 2)
    position = tl.load(nodes + POSITION * num_nodes + node)
    page_begin = tl.load(nodes + PAGE_BEGIN * num_nodes + node)
    own_begin = tl.load(nodes + OWN_BEGIN * num_nodes + node)
    own_end = tl.load(nodes + OWN_END * num_nodes + node)
    rows_end = tl.load(nodes + ROWS_END * num_nodes + node)

    row = own_begin + packed // GROUP
    head = (kv_head * GROUP + packed % GROUP).to(tl.int64)
    dim = tl.arange(0, BLOCK_DIM)
    valid = row < rows_end
    mine = valid[:, None] & (dim < HEAD_DIM)[None, :]
    source = tl.load(rows + row, mask=valid, other=0).to(tl.int64)
    queries = tl.load(q + (source * q_row + head * q_head)[:, None] + dim[None, :], mask=mine, other=0).to(DOT)

    # Own row j of c sees the first length - c + j + 1 tokens. The minimum lets descendants' rows see all.
    stop = tl.minimum(length, length - own_end + row + 1) if CAUSAL else tl.full([BLOCK_ROWS], 0, tl.int32) + length
    first = tl.zeros([BLOCK_ROWS], tl.int32)
    if WINDOW:
        owner = tl.load(rows + num_rows + row, mask=valid, other=0)
        last = tl.load(nodes + POSITION * num_nodes + owner) + tl.load(nodes + LENGTH * num_nodes + owner)
        row_position = last - tl.load(nodes + OWN_END * num_nodes + owner) + row
        # The inner maximum first: positions may be negative, and the window as large as int32 goes.
        first = tl.maximum(0, tl.maximum(row_position - position, 0) - window)
    end = tl.minimum(chunk_end, tl.max(tl.where(valid, stop, 0)))
    seen = begin
    if WINDOW:
        seen = tl.minimum(tl.maximum(tl.min(tl.where(valid, first, chunk_end)), begin), chunk_end)
        seen = begin + (seen - begin) // BLOCK_TOKENS * BLOCK_TOKENS

    acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    m = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    node_pages = pages + page_begin
    if WIDE:
        # Arithmetic counts here: blocks that every row sees whole, from `whole` to `border`, run without a mask.
        whole = begin
        if WINDOW:
            all_see = tl.minimum(tl.maximum(tl.max(tl.where(valid, first, 0)), begin), chunk_end)
            whole = begin + tl.cdiv(all_see - begin, BLOCK_TOKENS) * BLOCK_TOKENS
            for start in range(seen, tl.minimum(whole, end), BLOCK_TOKENS):
                acc, m, total = attend_block(
                    acc, m, total, queries, start, first, stop, end, k, k_page, k_slot, v, v_page, v_slot, node_pages,
                    scale, softcap, HEAD_DIM, BLOCK_DIM, BLOCK_TOKENS, PAGE_SIZE, True, WINDOW, SOFTCAP, FP8_BITS, DOT,
                )  # fmt: skip
        border = tl.minimum(chunk_end, tl.min(tl.where(valid, stop, chunk_end)))
        border = whole + tl.maximum(border - whole, 0) // BLOCK_TOKENS * BLOCK_TOKENS
        for start in range(whole, border, BLOCK_TOKENS):
            acc, m, total = attend_block(
                acc, m, total, queries, start, first, stop, end, k, k_page, k_slot, v, v_page, v_slot, node_pages,
                scale, softcap, HEAD_DIM, BLOCK_DIM, BLOCK_TOKENS, PAGE_SIZE, False, WINDOW, SOFTCAP, FP8_BITS, DOT,
            )  # fmt: skip
        seen = border
    for start in range(seen, end, BLOCK_TOKENS):
        acc, m, total = attend_block(
            acc, m, total, queries, start, first, stop, end, k, k_page, k_slot, v, v_page, v_slot, node_pages,
            scale, softcap, HEAD_DIM, BLOCK_DIM, BLOCK_TOKENS, PAGE_SIZE, True, WINDOW, SOFTCAP, FP8_BITS, DOT,
        )  # fmt: skip

    state = tl.load(first_state + row, mask=valid, other=0) + tl.load(path_chunks + node) + chunk
    place = state.to(tl.int64) * NUM_Q_HEADS + head
    tl.store(states + place[:, None] * HEAD_DIM + dim[None, :], acc, mask=mine)
    tl.store(sums + place * 2, m, mask=valid)
    tl.store(sums + place * 2 + 1, total, mask=valid)


# What changes from plan to plan makes no other kernel, by its value or its alignment. (`states` begins the scratch.)
@triton.jit(
    do_not_specialize=["num_nodes", "num_rows", "window"],
    do_not_specialize_on_alignment=["nodes", "pages", "rows", "items", "path_chunks", "first_state", "sums", "k_scale"],
)
def tree_tiles(
    q,  # [R, Hq, HEAD_DIM]
    q_row,
    q_head,
    k,  # [num_pages, PAGE_SIZE, Hkv, HEAD_DIM]; as uint8 for FP8_BITS
    k_page,
    k_slot,
    k_head,
    v,
    v_page,
    v_slot,
    v_head,
    k_scale,  # [Hkv] or None
    nodes,  # [7, num_nodes], pages, rows [2, num_rows]: TreePlan
    num_nodes,
    pages,
    rows,
    num_rows,
    items,  # [num_items, 4]: node, first packed row, chunk, whether the tile is wide
    path_chunks,  # [num_nodes]
    first_state,  # [num_rows]
    states,  # [num_states, Hq, HEAD_DIM] fp32, written
    sums,  # [num_states, Hq, 2] fp32, written: m, total
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FP8_BITS: tl.constexpr,
    DOT: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    WIDE_TOKENS: tl.constexpr,
    NARROW_ROWS: tl.constexpr,
    NARROW_TOKENS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    # Heads vary fastest: in an NHD cache the programs that run together read neighbouring memory.
    item = items + tl.program_id(0) // NUM_KV_HEADS * 4
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    node = tl.load(item)
    chunk = tl.load(item + 2)
    wide = tl.load(item + 3)
    length = tl.load(nodes + LENGTH * num_nodes + node)
    own_rows = tl.load(nodes + OWN_END * num_nodes + node) - tl.load(nodes + OWN_BEGIN * num_nodes + node)
    tokens = chunk_tokens(length, own_rows, GROUP, WIDE_ROWS, MIN_CHUNK, MAX_CHUNKS)
    begin = chunk * tokens
    end = tl.minimum(begin + tokens, length)
    if k_scale is not None:
        scale = scale * tl.load(k_scale + kv_head)
    k += kv_head.to(tl.int64) * k_head
    v += kv_head.to(tl.int64) * v_head
    # A growing node has items for the chunks that it may come to have.
    if begin < length:
        if NARROW_ROWS == 0 or wide != 0:
            attend_tile(
                item, begin, end, length, q, q_row, q_head, k, k_page, k_slot, v, v_page, v_slot,
                nodes, num_nodes, pages, rows, num_rows, path_chunks, first_state, states, sums,
                kv_head, scale, softcap, window, GROUP, GROUP * NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM, PAGE_SIZE,
                CAUSAL, WINDOW, SOFTCAP, FP8_BITS, DOT, WIDE_ROWS, WIDE_TOKENS, True,
            )  # fmt: skip
        elif NARROW_ROWS != 0:
            attend_tile(
                item, begin, end, length, q, q_row, q_head, k, k_page, k_slot, v, v_page, v_slot,
                nodes, num_nodes, pages, rows, num_rows, path_chunks, first_state, states, sums,
                kv_head, scale, softcap, window, GROUP, GROUP * NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM, PAGE_SIZE,
                CAUSAL, WINDOW, SOFTCAP, FP8_BITS, DOT, NARROW_ROWS, NARROW_TOKENS, False,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=["num_nodes", "num_rows"],
    do_not_specialize_on_alignment=[
        "lse", "nodes", "rows", "path_chunks", "first_state", "sums", "sinks", "v_scale",
    ],
)  # fmt: skip
def merge_tree(
    out,  # [R, Hq, HEAD_DIM], written
    out_row,
    out_head,
    lse,  # [R, Hq] fp32, written, or None
    nodes,
    num_nodes,
    rows,
    num_rows,
    path_chunks,
    first_state,
    states,
    sums,
    sinks,  # [Hq] or None
    v_scale,  # [Hkv] or None
    NUM_Q_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_STATES: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    row = tl.program_id(0)
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
    dim = tl.arange(0, BLOCK_DIM)
    heads = head < NUM_Q_HEADS
    source = tl.load(rows + row).to(tl.int64)
    owner = tl.load(rows + num_rows + row)
    length = tl.load(nodes + LENGTH * num_nodes + owner)
    own_rows = tl.load(nodes + OWN_END * num_nodes + owner) - tl.load(nodes + OWN_BEGIN * num_nodes + owner)
    tokens = chunk_tokens(length, own_rows, GROUP, WIDE_ROWS, MIN_CHUNK, MAX_CHUNKS)
    num_states = tl.load(path_chunks + owner) + tl.cdiv(length, tokens)
    begin = tl.load(first_state + row).to(tl.int64)

    acc = tl.zeros([BLOCK_HEADS, BLOCK_DIM], tl.float32)
    m = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    for i in range(0, num_states, BLOCK_STATES):
        state = i + tl.arange(0, BLOCK_STATES)
        mask = heads[:, None] & (state < num_states)[None, :]
        place = (begin + state)[None, :] * NUM_Q_HEADS + head[:, None]  # [BLOCK_HEADS, BLOCK_STATES]
        m_new = tl.load(sums + place * 2, mask=mask, other=float("-inf"))
        total_new = tl.load(sums + place * 2 + 1, mask=mask, other=0.0)
        block = tl.load(
            states + place[:, :, None] * HEAD_DIM + dim[None, None, :],
            mask=mask[:, :, None] & (dim < HEAD_DIM)[None, None, :],
            other=0.0,
        )
        # The online softmax over states instead of keys.
        largest = tl.maximum(m, tl.max(m_new, 1))
        base = tl.where(largest == float("-inf"), 0.0, largest)
        weight = tl.exp2(m_new - base[:, None])
        rescale = tl.exp2(m - base)
        acc = acc * rescale[:, None] + tl.sum(block * weight[:, :, None], 1)
        total = total * rescale + tl.sum(total_new * weight, 1)
        m = largest

    denominator = total
    weight = tl.full([BLOCK_HEADS], 1.0, tl.float32)
    if sinks is not None:
        # Once, and not in lse. A finite sink stays finite in base 2.
        sink = tl.minimum(tl.load(sinks + head, mask=heads, other=0.0) * LOG2E, LARGEST)
        largest = tl.maximum(m, sink)
        base = tl.where(largest == float("-inf"), 0.0, largest)
        weight = tl.exp2(m - base)
        denominator = total * weight + tl.exp2(sink - base)
    factor = weight / tl.where(denominator == 0.0, 1.0, denominator)
    if v_scale is not None:
        factor = factor * tl.load(v_scale + head // GROUP, mask=heads, other=0.0)
    place = source * out_row + head[:, None] * out_head + dim[None, :]
    result = (acc * factor[:, None]).to(out.dtype.element_ty)
    tl.store(out + place, result, mask=heads[:, None] & (dim < HEAD_DIM)[None, :])
    if lse is not None:
        tl.store(lse + source * NUM_Q_HEADS + head, (m + tl.log2(total)) * LN2, mask=heads)
