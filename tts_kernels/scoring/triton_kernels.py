"""The Triton kernels of the scoring ops.

No block size depends on how many rows, candidates or groups there are, every sum has one order, and nothing is added
atomically: a row's bits do not depend on what else is in the call. Those counts are not specialised for either.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
COUNTS = ["num_rows", "num_candidates", "num_tiles"]
INDEX_LISTS = ["positions", "offsets", "group_offsets", "targets"]  # slices of these may begin anywhere


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def log(x):
    return tl.log2(x) * LN2


@triton.jit
def log1p(x):
    """Of x in [0, 1], to fp32 rounding for the smallest too: 2 atanh(z), z = x / (2 + x) at most 1/3, by its series."""
    z = x / (2.0 + x)
    q = z * z
    series = q * (1.0 / 15.0) + 1.0 / 13.0
    series = q * series + 1.0 / 11.0
    series = q * series + 1.0 / 9.0
    series = q * series + 1.0 / 7.0
    series = q * series + 1.0 / 5.0
    series = q * series + 1.0 / 3.0
    return 2.0 * z * (q * series + 1.0)


@triton.jit
def finite_or_zero(x):
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def above_minus_infinity(x):
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDEX_LISTS)
def linear_logits(
    hidden,  # [T, dim]
    hidden_row,
    positions,  # [M] int64
    weight,  # [C, dim]
    weight_row,
    bias,  # [C], or None
    norm_weight,  # [dim], or None
    norm_eps,
    out,  # [M, C] fp32, dense, written
    num_columns,
    dim,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A program owns a row and BLOCK_COLUMNS columns. The norm's factor is the same for all of a row, so it multiplies
    the sums, and one pass over the row does."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    lane = tl.arange(0, BLOCK_DIM)
    hidden += tl.load(positions + row) * hidden_row
    weight += column[:, None].to(tl.int64) * weight_row

    products = tl.zeros([BLOCK_COLUMNS, BLOCK_DIM], tl.float32)
    squares = tl.zeros([BLOCK_DIM], tl.float32)
    for begin in range(0, dim, BLOCK_DIM):
        inside = begin + lane < dim
        x = tl.load(hidden + begin + lane, mask=inside, other=0.0).to(tl.float32)
        if norm_weight is not None:
            squares += x * x
            x *= tl.load(norm_weight + begin + lane, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + (begin + lane)[None, :], mask=(column < num_columns)[:, None] & inside[None, :], other=0.0)
        products += x[None, :] * w.to(tl.float32)
    logits = tl.sum(products, 1)  # [BLOCK_COLUMNS]
    if norm_weight is not None:
        logits = logits / tl.sqrt_rn(tl.sum(squares, 0) / dim + norm_eps)
    if bias is not None:
        logits += tl.load(bias + column, mask=column < num_columns, other=0.0).to(tl.float32)
    tl.store(out + row * num_columns + column, logits, mask=column < num_columns)


@triton.jit
def activated(x, GELU: tl.constexpr):
    if GELU:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return tl.where(x < 0.0, 0.0, x)  # nan stays


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDEX_LISTS)
def mlp_tiles(
    hidden,  # [T, dim]
    hidden_row,
    positions,  # [M] int64
    num_rows,  # M
    w1,  # [h, dim]
    w1_row,
    b1,  # [h], or None
    w2,  # [C, h]
    w2_row,
    norm_weight,  # [dim], or None
    norm_eps,
    parts,  # [tiles of h, M, C] fp32, dense, written
    num_hidden,  # h
    num_columns,  # C
    dim,
    DOT: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A program owns BLOCK_ROWS rows and BLOCK_HIDDEN units of the hidden layer, and leaves what these units add to the
    logits. Products of half precision are exact in fp32, so they are made as they are where no norm comes first."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    unit = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    lane = tl.arange(0, BLOCK_DIM)
    row_inside, unit_inside = row < num_rows, unit < num_hidden
    position = tl.load(positions + row, mask=row_inside, other=0)
    hidden_rows = hidden + position[:, None] * hidden_row
    w1_rows = w1 + unit[:, None].to(tl.int64) * w1_row

    acc = tl.zeros([BLOCK_ROWS, BLOCK_HIDDEN], tl.float32)
    squares = tl.zeros([BLOCK_ROWS], tl.float32)
    for begin in range(0, dim, BLOCK_DIM):
        inside = begin + lane < dim
        x = tl.load(hidden_rows + begin + lane[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
        w = tl.load(w1_rows + begin + lane[None, :], mask=unit_inside[:, None] & inside[None, :], other=0.0)
        x, w = x.to(DOT), w.to(DOT)
        if norm_weight is not None:
            squares += tl.sum(x * x, 1)
            x *= tl.load(norm_weight + begin + lane, mask=inside, other=0.0).to(tl.float32)[None, :]
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    if norm_weight is not None:
        acc = acc / tl.sqrt_rn(squares / dim + norm_eps)[:, None]
    if b1 is not None:
        acc += tl.load(b1 + unit, mask=unit_inside, other=0.0).to(tl.float32)[None, :]
    acc = activated(acc, GELU)  # [BLOCK_ROWS, BLOCK_HIDDEN]

    parts += (tl.program_id(1).to(tl.int64) * num_rows + row) * num_columns
    for column in range(num_columns):
        w = tl.load(w2 + tl.cast(column, tl.int64) * w2_row + unit, mask=unit_inside, other=0.0).to(tl.float32)
        # Beyond the last unit w is 0 and acc finite.
        tl.store(parts + column, tl.sum(acc * w[None, :], 1), mask=row_inside)


@triton.jit(do_not_specialize=COUNTS)
def sum_parts(
    parts,  # [num_tiles, M, C] fp32, dense
    bias,  # [C], or None
    out,  # [M, C] fp32, dense, written
    num_rows,  # M
    num_columns,  # C
    num_tiles,
    BLOCK: tl.constexpr,
):
    """A program owns BLOCK logits."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = num_rows.to(tl.int64) * num_columns
    inside = place < size
    logits = tl.zeros([BLOCK], tl.float32)
    for tile in range(num_tiles):
        logits += tl.load(parts + tl.cast(tile, tl.int64) * size + place, mask=inside, other=0.0)
    if bias is not None:
        logits += tl.load(bias + place % num_columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, logits, mask=inside)


@triton.jit
def multiply(a, b):
    return a * b


@triton.jit
def log_sum_of_others(logits, inside, num_columns, POSITIVE: tl.constexpr, BLOCK: tl.constexpr):
    """log(sum of exp) of every column but POSITIVE; `logits` [BLOCK] point to rows. Exact for two columns."""
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for column in range(num_columns):
        if column != POSITIVE:
            largest = tl.maximum(largest, tl.load(logits + column, mask=inside, other=0.0))
    base = finite_or_zero(largest)
    total = tl.zeros([BLOCK], tl.float32)
    for column in range(num_columns):
        if column != POSITIVE:
            total += exp(tl.load(logits + column, mask=inside, other=0.0) - base)
    return base + log(total)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=[*INDEX_LISTS, "logits", "margin", "prob"])
def reduce_steps(
    logits,  # [M, C] fp32, dense
    offsets,  # [N + 1] int64
    margin,  # [M] fp32, written
    prob,  # [M] fp32, written
    stats,  # [6, N] fp32, dense, written: last, min, prod, mean, max, log_prod
    count,  # [N] int32, written
    num_columns,
    num_candidates,  # N
    POSITIVE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program owns a candidate. Lane l takes its steps l, l + BLOCK, ...; the lanes are joined at the end."""
    candidate = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets + candidate), tl.load(offsets + candidate + 1)
    lane = tl.arange(0, BLOCK)
    smallest = tl.full([BLOCK], float("inf"), tl.float32)
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    product = tl.full([BLOCK], 1.0, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    log_total = tl.zeros([BLOCK], tl.float32)
    last = tl.zeros([BLOCK], tl.float32)
    missing = tl.zeros([BLOCK], tl.int32)  # a nan, which tl.minimum and tl.maximum pass over
    for first in range(begin, end, BLOCK):
        step = tl.cast(first, tl.int64) + lane
        inside = step < end
        m = tl.load(logits + step * num_columns + POSITIVE, mask=inside, other=1.0)
        if ACTIVATION == "softmax":
            m -= log_sum_of_others(logits + step * num_columns, inside, num_columns, POSITIVE, BLOCK)
        if ACTIVATION == "identity":
            p = m
            log_p = log(p)
        else:
            # Both from exp(-|m|), which cannot overflow.
            small = exp(-tl.abs(m))
            p = tl.where(m < 0.0, small, 1.0) / (1.0 + small)
            log_p = tl.minimum(m, 0.0) - log1p(small)
        tl.store(margin + step, m, mask=inside)
        tl.store(prob + step, p, mask=inside)
        missing |= (inside & (p != p)).to(tl.int32)
        smallest = tl.minimum(smallest, tl.where(inside, p, float("inf")))
        greatest = tl.maximum(greatest, tl.where(inside, p, float("-inf")))
        product *= tl.where(inside, p, 1.0)
        total += tl.where(inside, p, 0.0)
        log_total += tl.where(inside, log_p, 0.0)
        last = tl.where(step == end - 1, p, 0.0)

    steps = (end - begin).to(tl.int32)
    none = steps == 0
    unknown = none | (tl.max(missing, 0) > 0)
    mean = tl.sum(total, 0) / tl.maximum(steps, 1).to(tl.float32)
    stats += candidate
    size = num_candidates.to(tl.int64)
    nan = float("nan")
    tl.store(stats, tl.where(none, nan, tl.sum(last, 0)))
    tl.store(stats + size, tl.where(unknown, nan, tl.min(smallest, 0)))
    tl.store(stats + 2 * size, tl.where(none, nan, tl.reduce(product, 0, multiply)))
    tl.store(stats + 3 * size, tl.where(none, nan, mean))
    tl.store(stats + 4 * size, tl.where(unknown, nan, tl.max(greatest, 0)))
    tl.store(stats + 5 * size, tl.where(none, nan, tl.sum(log_total, 0)))
    tl.store(count + candidate, steps)


BIG = tl.constexpr(1 << 62)  # above any index


@triton.jit(do_not_specialize_on_alignment=[*INDEX_LISTS, "scores", "answers"])
def count_votes(
    scores,  # [N] fp32
    answers,  # [N] int64, -1: none
    group_offsets,  # [G + 1] int64
    totals,  # [N] fp32, written: the answer's total at its first voter, nan elsewhere
    nominees,  # [N] int64, written: at the first voter, who stands for the answer
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program owns every num_programs(1)-th BLOCK of a group's candidates and looks at all of the group for each, one
    after the other."""
    group = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(group_offsets + group), tl.load(group_offsets + group + 1)
    first_block = begin + tl.program_id(1).to(tl.int64) * BLOCK
    for own_block in range(first_block, end, tl.num_programs(1) * BLOCK):
        own = tl.cast(own_block, tl.int64) + tl.arange(0, BLOCK)
        inside = own < end
        own_answer = tl.load(answers + own, mask=inside, other=-1)
        total = tl.zeros([BLOCK], tl.float32)
        first = tl.full([BLOCK], BIG, tl.int64)
        best = tl.full([BLOCK], -1, tl.int64)
        best_score = tl.full([BLOCK], float("-inf"), tl.float32)
        for other in range(begin, end):
            score, answer = tl.load(scores + other), tl.load(answers + other)
            answer = tl.where((answer >= 0) & (score == score), answer, -2)  # nobody's
            same = own_answer == answer
            vote = score if WEIGHTED else 1.0
            total += tl.where(same, vote, 0.0)
            place = tl.cast(other, tl.int64)
            first = tl.minimum(first, tl.where(same, place, BIG))
            better = same & ((score > best_score) | (best < 0))
            best = tl.where(better, place, best)
            best_score = tl.where(better, score, best_score)
        # Never for one who does not vote: `first` is a voter.
        tl.store(totals + own, tl.where(first == own, total, float("nan")), mask=inside)
        tl.store(nominees + own, best, mask=inside)


@triton.jit(do_not_specialize=["k"], do_not_specialize_on_alignment=[*INDEX_LISTS, "scores"])
def select_best(
    scores,  # [N] fp32, nan: not to be selected
    group_offsets,  # [G + 1] int64
    nominees,  # [N] int64, whom to select in place of a candidate; None: itself
    indices,  # [G, k] int64, dense, written
    selected,  # [G, k] fp32, dense, written
    k,
    BLOCK: tl.constexpr,
):
    """A program owns a group: k passes, each for what comes next after the one before (less, or equal and later)."""
    group = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(group_offsets + group), tl.load(group_offsets + group + 1)
    lane = tl.arange(0, BLOCK)
    score_before = float("inf")
    index_before = begin - 1
    for rank in range(k):
        best_score = float("-inf")
        best = begin * 0 + BIG
        for first in range(begin, end, BLOCK):
            index = tl.cast(first, tl.int64) + lane
            score = tl.load(scores + index, mask=index < end, other=float("nan"))
            left = (score < score_before) | ((score == score_before) & (index > index_before))
            most = tl.max(tl.where(left, score, float("-inf")), 0)
            which = tl.min(tl.where(left & (score == most), index, BIG), 0)
            better = (which < BIG) & ((most > best_score) | (best == BIG))
            best_score = tl.where(better, most, best_score)
            best = tl.where(better, which, best)
        place = group * k + rank
        found = best < BIG
        chosen = best
        if nominees is not None:
            chosen = tl.load(nominees + best, mask=found, other=-1)
        tl.store(indices + place, tl.where(found, chosen, -1))
        tl.store(selected + place, tl.where(found, best_score, float("nan")))
        # Nothing left: nothing comes after minus infinity at BIG.
        score_before = best_score
        index_before = best


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDEX_LISTS)
def vocabulary_tiles(
    hidden,  # [T, dim]
    hidden_row,
    weight,  # [V, dim]
    weight_row,
    bias,  # [V], or None
    targets,  # [T] int64
    parts,  # [3, tiles, T] fp32, dense, written: largest logit, sum of exp(logit - largest), the target's logit or 0
    num_rows,  # T
    num_tokens,  # V
    dim,
    DOT: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A program owns BLOCK_ROWS rows and TILE_TOKENS tokens of the vocabulary. Rows vary first, so that what runs at a
    time reads the same weights."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = tl.program_id(1)
    lane = tl.arange(0, BLOCK_DIM)
    row_inside = row < num_rows
    hidden_rows = hidden + row[:, None] * hidden_row
    target = tl.load(targets + row, mask=row_inside, other=-1)

    largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    picked = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(tile * TILE_TOKENS, tl.minimum((tile + 1) * TILE_TOKENS, num_tokens), BLOCK_TOKENS):
        token = first + tl.arange(0, BLOCK_TOKENS)
        token_inside = token < num_tokens
        weight_rows = weight + token[:, None].to(tl.int64) * weight_row
        logits = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32)
        for begin in range(0, dim, BLOCK_DIM):
            inside = (begin + lane < dim)[None, :]
            x = tl.load(hidden_rows + begin + lane[None, :], mask=row_inside[:, None] & inside, other=0.0)
            w = tl.load(weight_rows + begin + lane[None, :], mask=token_inside[:, None] & inside, other=0.0)
            logits = tl.dot(x.to(DOT), tl.trans(w.to(DOT)), logits, input_precision="ieee")
        if bias is not None:
            logits += tl.load(bias + token, mask=token_inside, other=0.0).to(tl.float32)[None, :]
        logits = tl.where(token_inside[None, :], logits, float("-inf"))
        picked += tl.sum(tl.where(token[None, :] == target[:, None], logits, 0.0), 1)
        most = tl.maximum(largest, tl.max(logits, 1))
        base = above_minus_infinity(most)
        total = total * exp(largest - base) + tl.sum(exp(logits - base[:, None]), 1)
        largest = most
    parts += tile.to(tl.int64) * num_rows + row
    size = tl.num_programs(1).to(tl.int64) * num_rows
    tl.store(parts, largest, mask=row_inside)
    tl.store(parts + size, total, mask=row_inside)
    tl.store(parts + 2 * size, picked, mask=row_inside)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDEX_LISTS)
def join_vocabulary(
    parts,  # [3, num_tiles, T] fp32, dense
    targets,  # [T] int64
    out,  # [T] fp32, written
    num_rows,  # T
    num_tokens,  # V
    num_tiles,
    BLOCK: tl.constexpr,
):
    """A program owns BLOCK rows. A target outside of the vocabulary gives nan."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    target = tl.load(targets + row, mask=inside, other=-1)
    size = num_tiles * num_rows.to(tl.int64)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    picked = tl.zeros([BLOCK], tl.float32)
    for tile in range(num_tiles):
        part = parts + tl.cast(tile, tl.int64) * num_rows + row
        other = tl.load(part, mask=inside, other=0.0)
        most = tl.maximum(largest, other)
        base = above_minus_infinity(most)
        total = total * exp(largest - base) + tl.load(part + size, mask=inside, other=0.0) * exp(other - base)
        largest = most
        picked += tl.load(part + 2 * size, mask=inside, other=0.0)
    known = (target >= 0) & (target < num_tokens)
    tl.store(out + row, tl.where(known, picked - largest - log(total), float("nan")), mask=inside)
