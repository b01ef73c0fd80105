"""What the scoring ops return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

REDUCES = ("last", "min", "prod", "mean", "max", "log_prod")  # rows of the statistics that the backends return


@dataclass(frozen=True)
class StepScores:
    """Scores of M steps and of the N candidates that they belong to; fp32, `count` int32.

        margin    [M] the score before the activation. Softmax: the positive logit less the log-sum-exp of the others,
                  so that prob = sigmoid(margin). Probabilities near 1 tie where margins do not
        prob      [M] after the activation
        last, min, prod, mean, max   [N] of the candidate's `prob`, in the order of its positions
        log_prod  [N] sum of log(prob), from the margins: finite where `prod` underflows
        count     [N] steps of the candidate

    A candidate without steps has count 0 and nan everywhere else. A step whose score is nan makes nan of what it
    enters.
    """

    margin: Tensor
    prob: Tensor
    last: Tensor
    min: Tensor
    prod: Tensor
    mean: Tensor
    max: Tensor
    log_prod: Tensor
    count: Tensor


@dataclass(frozen=True)
class Selection:
    """For each group the k best, best first.

    indices   [G, k] int64, of candidates over all groups; -1 where there is none
    scores    [G, k] fp32: the candidate's score; for the vote methods the answer's sum or count; nan where there
              is none
    """

    indices: Tensor
    scores: Tensor


def one_group(scores: Tensor) -> Tensor:
    """The offsets of a group of all candidates. Made on the device: a copy from the host would wait for it."""
    return torch.arange(2, device=scores.device) * scores.shape[0]
