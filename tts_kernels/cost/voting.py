"""Votes over k of n samples of one question: expected correctness over all choices of k, exactly where it can be."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Hashable, Sequence

from tts_kernels.errors import check_int, fail

SUBSETS = 4096  # as many choices of k are enumerated; of more, DRAWS are drawn
DRAWS = 1000


def majority_of_k(answers: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> float:
    """The chance that the most frequent answer of k samples is a correct one (self-consistency, arXiv 2203.11171),
    exactly, over all choices of k without replacement. A tie goes to each of the tied answers as often: in random order
    each comes first as often, and `tts.select` lets the first voter decide. None: a sample that does not vote.

    Counted by a product of polynomials, answer by answer: the correct answer has j votes, t others have j too, the rest
    fewer.
    """
    k, right = _check(answers, correct, k), dict(zip(answers, correct))
    votes = Counter(answer for answer in answers if answer is not None)
    silent, choices, total = len(answers) - sum(votes.values()), math.comb(len(answers), k), 0.0
    for answer, count in votes.items():
        if not right[answer]:
            continue
        others = [votes[other] for other in votes if other != answer]
        for j in range(1, min(count, k) + 1):
            ways = _ways(others, silent, j, k - j)
            total += sum(math.comb(count, j) * way / (choices * (ties + 1)) for ties, way in ways.items())
    return total


def _ways(others: list[int], silent: int, j: int, chosen: int) -> dict[int, int]:
    """Choices of so many samples among the others and the silent in which no answer has more than j, by the number of
    answers that have exactly j."""
    quiet = silent + (others.count(1) if j > 1 else 0)  # single votes cannot tie with two
    ways = {(0, taken): math.comb(quiet, taken) for taken in range(min(quiet, chosen) + 1)}
    for count in others:
        if j > 1 and count == 1:
            continue
        after: dict[tuple[int, int], int] = {}
        for (ties, taken), way in ways.items():
            for more in range(min(count, j, chosen - taken) + 1):
                key = (ties + (more == j), taken + more)
                after[key] = after.get(key, 0) + way * math.comb(count, more)
        ways = after
    return {ties: way for (ties, taken), way in ways.items() if taken == chosen}


def weighted_vote_of_k(
    scores: Sequence[float], answers: Sequence[Hashable | None], correct: Sequence[bool], k: int, seed: int = 0
) -> tuple[float, bool]:
    """(the chance that the answer with the largest sum of scores among k samples is a correct one, whether that is
    exact). The vote is argmax_a of the sum of r_i [a_i = a] (Snell et al., arXiv 2408.03314). Sums of real numbers have
    no closed form: all choices of k are enumerated where they are at most 4,096, else 1,000 seeded ones drawn. Ties go
    to the answer whose first voter has the lower index; a sample with score nan or answer None does not vote."""
    k = _check(answers, correct, k)
    if len(scores) != len(answers):
        fail("scores", f"{len(answers)} entries, as many as answers", len(scores))
    voters = [score == score and answer is not None for score, answer in zip(scores, answers)]
    n, exact = len(answers), math.comb(len(answers), k) <= SUBSETS
    if exact:
        subsets = itertools.combinations(range(n), k)
    else:
        draw = random.Random(seed)
        subsets = (sorted(draw.sample(range(n), k)) for _ in range(DRAWS))
    won = count = 0
    for subset in subsets:
        count += 1
        weight: dict[Hashable, float] = {}
        first: dict[Hashable, int] = {}
        for i in subset:
            if voters[i]:
                weight[answers[i]] = weight.get(answers[i], 0.0) + scores[i]
                first.setdefault(answers[i], i)
        if weight:
            # Answers stand in the order of their first voters, and max takes the first of equals.
            won += bool(correct[first[max(weight, key=weight.__getitem__)]])
    return won / count, exact


def _check(answers: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> int:
    k = check_int("k", k, 1)
    if len(correct) != len(answers):
        fail("correct", f"{len(answers)} entries, as many as answers", len(correct))
    if k > len(answers):
        fail("k", f"at most {len(answers)}, the number of samples", k)
    known: dict[Hashable, bool] = {}
    for i, (answer, is_correct) in enumerate(zip(answers, correct)):
        if answer is not None and known.setdefault(answer, bool(is_correct)) != bool(is_correct):
            fail(f"correct[{i}]", f"{known[answer]}, as for the answer {answer!r} before", bool(is_correct))
    return k
