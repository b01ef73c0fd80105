"""The scoring ops in plain torch: the specification that the other backends are held to. Any device, fp32 inside.

Why the rest of a batch changes no bit of a row: a BLAS may add in another order for another number of rows, so products
are made in blocks of one size, whatever the batch (the last is filled up), from one buffer, so that not even the
alignment differs. It may also add in another order at another place of the block where the length of a sum fills no
vector, so that length is filled up too, with zeros. All other sums run over one row or one segment. On a device
products are torch's: TF32 where the caller has switched it on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .results import one_group

HEAD_ROWS = 64  # of a product
VECTOR = 16  # what the length of a product's sums is a multiple of
TOKEN_ROWS = 256
MAX_WEIGHTS = 1 << 23  # elements of the LM head, widened to fp32 at a time
MAX_TOKENS = 1 << 14  # of the vocabulary at a time: TOKEN_ROWS * MAX_TOKENS logits are 16 MiB


def unsupported_reasons(op: str, *tensors: Tensor) -> list[str]:
    return []


def logits(
    hidden: Tensor,  # [T, d]
    positions: Tensor,  # [M]
    w1: Tensor | None,  # [h, d]
    b1: Tensor | None,  # [h]
    act: str,
    w2: Tensor,  # [C, h or d]
    b2: Tensor | None,  # [C]
    norm_weight: Tensor | None,  # [d]
    norm_eps: float,
) -> Tensor:
    num_steps, dim = positions.shape[0], hidden.shape[1]
    w1, b1, w2, b2, norm_weight = (None if w is None else w.to(torch.float32) for w in (w1, b1, w2, b2, norm_weight))
    w1, w2 = (None if w is None else filled_up(w) for w in (w1, w2))
    out = hidden.new_empty((num_steps, w2.shape[0]), dtype=torch.float32)
    rows = hidden.new_zeros((HEAD_ROWS, dim), dtype=torch.float32)
    # Autocast would round the products below to its own dtype.
    with torch.autocast(hidden.device.type, enabled=False):
        for begin in range(0, num_steps, HEAD_ROWS):
            block = positions[begin : begin + HEAD_ROWS]
            rows[: block.shape[0]] = hidden[block].to(torch.float32)
            x = rows
            if norm_weight is not None:
                x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm_eps) * norm_weight
            if w1 is not None:
                x = F.linear(filled_up(x), w1, b1)
                x = F.relu(x) if act == "relu" else F.gelu(x)
            out[begin : begin + HEAD_ROWS] = F.linear(filled_up(x), w2, b2)[: block.shape[0]]
    return out


def filled_up(rows: Tensor) -> Tensor:
    missing = -rows.shape[1] % VECTOR
    return F.pad(rows, (0, missing)) if missing else rows


def reduce(logits: Tensor, offsets: Tensor, activation: str, positive: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    margin, prob, log_prob = activate(logits, activation, positive)
    count = offsets.diff()
    if not margin.shape[0]:
        return margin, prob, margin.new_full((6, count.shape[0]), torch.nan), count.to(torch.int32)
    stats = [prob[(offsets[1:] - 1).clamp(min=0)]]
    for values, how in ((prob, "min"), (prob, "prod"), (prob, "mean"), (prob, "max"), (log_prob, "sum")):
        stats.append(segments(values, offsets, how))
    stats = torch.where(count > 0, torch.stack(stats), torch.nan)
    return margin, prob, stats, count.to(torch.int32)


def activate(logits: Tensor, activation: str, positive: int) -> tuple[Tensor, Tensor, Tensor]:
    """margin, prob and log(prob), each [M]."""
    margin = logits[:, positive].clone()
    if activation == "identity":
        return margin, margin.clone(), margin.log()
    if activation == "softmax":
        others = torch.cat([logits[:, :positive], logits[:, positive + 1 :]], 1)
        margin = margin - torch.logsumexp(others, 1)
    # torch.sigmoid rounds the last few elements of a tensor in another way than those before them.
    return margin, 1 / (1 + margin.neg().exp()), F.logsigmoid(margin)


def segments(values: Tensor, offsets: Tensor, how: str) -> Tensor:
    """One number for each segment, its values taken in their order. The lengths stay on the device."""
    # Two dimensions: with one, CUDA's sums depend on where in memory a segment begins.
    return torch.segment_reduce(values[:, None], how, offsets=offsets, axis=0, unsafe=True)[:, 0]


def select(
    scores: Tensor, group_offsets: Tensor | None, answers: Tensor | None, method: str, k: int
) -> tuple[Tensor, Tensor]:
    group_offsets = one_group(scores) if group_offsets is None else group_offsets
    num_candidates = scores.shape[0]
    if not num_candidates:
        shape = (group_offsets.shape[0] - 1, k)
        return group_offsets.new_full(shape, -1), scores.new_full(shape, torch.nan)
    index = torch.arange(num_candidates, device=scores.device)
    group = torch.searchsorted(group_offsets, index, right=True) - 1
    if answers is None:
        weight, nominated = scores, ~scores.isnan()
        order = descending(weight, ~nominated, group)
    else:
        weight, nominated, first = votes(scores, group, answers, method)
        # By the first voter's index before the stable sorts, so that it decides between answers that tie.
        order = first.argsort(stable=True)
        order = order[descending(weight[order], ~nominated[order], group[order])]
    place = group_offsets[:-1, None] + torch.arange(k, device=scores.device)
    chosen = order[place.clamp(max=num_candidates - 1)]
    valid = (place < group_offsets[1:, None]) & nominated[chosen]
    return torch.where(valid, chosen, -1), torch.where(valid, weight[chosen], torch.nan)


def descending(weight: Tensor, left_out: Tensor, group: Tensor) -> Tensor:
    """The order by group, then what is left out last, then the greatest first; ties stay as they come."""
    order = torch.where(left_out, -torch.inf, weight).argsort(descending=True, stable=True)
    return order[(2 * group + left_out)[order].argsort(stable=True)]


def votes(scores: Tensor, group: Tensor, answers: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """For each candidate the weight of its answer, whether it stands for that answer, and the answer's first voter."""
    num_candidates = scores.shape[0]
    index = torch.arange(num_candidates, device=scores.device)
    voter = ~scores.isnan() & (answers >= 0)

    # Voters of one group and answer side by side, best first; then one segment for each answer, and empty ones, so that
    # their number is known without looking.
    order = torch.where(voter, scores, -torch.inf).argsort(descending=True, stable=True)
    order = order[answers[order].argsort(stable=True)]
    order = order[(2 * group + ~voter)[order].argsort(stable=True)]
    keys = torch.stack([group[order], (~voter)[order].long(), answers[order]])
    new = torch.ones_like(index, dtype=torch.bool)
    new[1:] = (keys[:, 1:] != keys[:, :-1]).any(0)
    segment = new.cumsum(0) - 1  # of the place in `order`
    segment_of = torch.empty_like(index).index_copy_(0, order, segment)
    length = torch.zeros_like(index).index_add_(0, segment, torch.ones_like(index))
    offsets = F.pad(length.cumsum(0), (1, 0))

    by_index = index[segment_of.argsort(stable=True)]
    each = scores if method == "weighted_vote" else torch.ones_like(scores)
    total = segments(torch.where(voter, each, 0.0)[by_index], offsets, "sum")[segment_of]
    first = by_index[offsets[:-1].clamp(max=num_candidates - 1)][segment_of]
    best = torch.zeros_like(voter).index_copy_(0, order, new)
    return total, best & voter & ~total.isnan(), first


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """Blocks of the vocabulary one after the other; for each row the largest logit, the sum of exp(logit - largest) and
    the logit of the target. At most 52 MiB beside the result, where d is at most 8192 and fills
    vectors."""
    (num_rows, dim), vocabulary = hidden.shape, weight.shape[0]
    largest = hidden.new_full((num_rows,), -torch.inf, dtype=torch.float32)
    total, target_logit = torch.zeros_like(largest), torch.full_like(largest, torch.nan)
    rows = filled_up(hidden.new_zeros((TOKEN_ROWS, dim), dtype=torch.float32))
    block = max(1, min(MAX_TOKENS, MAX_WEIGHTS // dim))
    buffer = hidden.new_empty(TOKEN_ROWS * min(block, vocabulary), dtype=torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        for token in range(0, vocabulary, block):
            w = filled_up(weight[token : token + block]).to(torch.float32).t()
            b = None if bias is None else bias[token : token + block].to(torch.float32)
            logits = buffer[: TOKEN_ROWS * w.shape[1]].view(TOKEN_ROWS, -1)
            for begin in range(0, num_rows, TOKEN_ROWS):
                here = slice(begin, min(begin + TOKEN_ROWS, num_rows))
                count = here.stop - begin
                rows[:count, :dim] = hidden[here].to(torch.float32)
                torch.mm(rows, w, out=logits)
                if b is not None:
                    logits += b
                column = targets[here] - token
                inside = (column >= 0) & (column < logits.shape[1])
                picked = logits[:count].gather(1, column.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
                target_logit[here] = torch.where(inside, picked, target_logit[here])
                update(largest, total, here, logits)
    return target_logit - largest - total.log()


def update(largest: Tensor, total: Tensor, here: slice, logits: Tensor) -> None:
    """The online softmax takes in `logits` [TOKEN_ROWS, tokens], which are overwritten. All rows of the block take
    part, those that only fill it up too, so that the sums always have one shape."""
    count = here.stop - here.start
    most = torch.maximum(largest[here], logits.amax(1)[:count])
    # A row of -inf so far adds 0; one that holds +inf or nan becomes nan, as torch's log_softmax.
    base = F.pad(torch.where(most == -torch.inf, 0.0, most), (0, logits.shape[0] - count))
    sums = logits.sub_(base[:, None]).exp_().sum(1)[:count]
    total[here] = total[here] * torch.exp(largest[here] - base[:count]) + sums
    largest[here] = most
