"""A verifier's head in torch, eager, over all tokens; then the rows where steps end."""

import torch.nn.functional as F

NAME = "eager head"


def reason_against(case):
    return "no head of its own" if case.kind == "logprobs" else ""


def scores(hidden, positions, w1, b1, w2, b2, positive):
    x = hidden
    if w1 is not None:
        x = F.relu(F.linear(x, w1, b1))
    return F.linear(x, w2, b2).float().softmax(-1)[:, positive][positions]


def prepare(inputs, function=scores):
    head = inputs.head
    weights = head.w1, head.b1, head.w2, head.b2, head.positive
    return lambda: function(inputs.hidden, inputs.positions, *weights)


def bytes_read(case):
    """Hidden layers that are stored in between counted too."""
    layers = 3 if case.kind == "mlp" else 1
    return layers * case.tokens * case.dim * case.itemsize + case.weight_bytes
