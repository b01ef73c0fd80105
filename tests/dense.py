"""Attention over a forest as one dense masked softmax: the oracle of the attention tests.

It knows nothing of pages, plans, tiles or partial states and shares no code with the backends: who sees what is written
down from the rule (a row sees all tokens of the nodes above its own, and of its own node those up to its own token).
`dense_attention` in float64 is the truth; in the dtype of the inputs it is the plain torch that the error rule compares
with.
"""

from __future__ import annotations

import math

import torch
from forests import Forest


def visibility(forest: Forest, *, causal: bool, window: int) -> torch.Tensor:
    """bool [R, T]: rows node by node, tokens node by node, both in the forest's order."""
    start = [sum(forest.length[a] for a in forest.path(node)[:-1]) for node in range(forest.num_nodes)]
    token_node = torch.tensor([n for n in range(forest.num_nodes) for _ in range(forest.length[n])], dtype=torch.long)
    token_index = torch.tensor([i for n in range(forest.num_nodes) for i in range(forest.length[n])], dtype=torch.long)
    token_position = torch.tensor(start, dtype=torch.long)[token_node] + token_index
    visible = torch.zeros(forest.num_rows, forest.num_tokens, dtype=torch.bool)
    row = 0
    for node in range(forest.num_nodes):
        above = torch.isin(token_node, torch.tensor(forest.path(node)[:-1], dtype=torch.long))
        for j in range(forest.rows[node]):
            own_token = forest.length[node] - forest.rows[node] + j
            own = (token_node == node) & ((token_index <= own_token) | (not causal))
            near = token_position >= start[node] + own_token - window
            visible[row] = (above | own) & (near | (window < 0))
            row += 1
    return visible


def dense_attention(q, k, v, visible, *, dtype, scale, softcap, sinks, k_scale, v_scale):
    """q [R, Hq, D], k and v [T, Hkv, D] -> out [R, Hq, D] and lse [R, Hq], all of it computed in `dtype`."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if k_scale is not None:
        k = k * k_scale.to(dtype)[:, None]
    if v_scale is not None:
        v = v * v_scale.to(dtype)[:, None]
    q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)  # [H, R or T, D]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = (q @ k.transpose(1, 2)) * scale  # [Hq, R, T]
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, -math.inf)
    lse = torch.logsumexp(scores, -1)
    if sinks is not None:
        sink = sinks.to(dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, sink], -1)
    weight = torch.softmax(scores, -1)[..., : k.shape[1]]
    weight = torch.where(visible.any(-1)[:, None], weight, 0.0)
    return (weight @ v).transpose(0, 1), lse.transpose(0, 1)


def assert_close(name: str, got, plain, exact, *, terms: int) -> None:
    """The error rule: against float64, at most twice the error of plain torch in the same dtype, plus what `terms` fp32
    additions may lose. For the largest error and for the root mean square, which few lucky elements do not sway."""
    got, plain, exact = got.double(), plain.double(), exact.double()
    infinite = torch.isinf(exact)
    assert torch.equal(got[infinite], exact[infinite]), f"{name}: {got[infinite]} where {exact[infinite]} was expected"
    if infinite.all():
        return
    got, plain, exact = got[~infinite], plain[~infinite], exact[~infinite]
    assert torch.isfinite(got).all(), f"{name}: {int((~torch.isfinite(got)).sum())} of {got.numel()} are not finite"
    epsilon = 2.0**-24 * math.sqrt(terms) * exact.abs().max()
    for norm, measure in (("max", lambda x: x.abs().max()), ("rms", lambda x: x.square().mean().sqrt())):
        error, allowed = measure(got - exact), 2 * measure(plain - exact) + epsilon
        assert error <= allowed, (
            f"{name}: {norm} error {error:.3e}, allowed {allowed:.3e} (reach {exact.abs().max():.2e})"
        )
