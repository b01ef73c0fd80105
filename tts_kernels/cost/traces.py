"""Traces of scored samples, the accuracy that N of them buy, and what N of them cost.

A trace file is JSON Lines, one sample a line, in any order, with the fields

    question       an id: a string or a number
    sample         an id, unique within the question
    tokens         decoded tokens of the sample, at least 1
    step_scores    a list of numbers, one for each step of the sample; [] where it was not scored
    correct        true or false
    answer         optional; votes need it: equal answers are one candidate of the vote, null does not vote
    prompt_tokens  optional; of the question, the same in all its samples; costs need it (or a length for all)

To convert a published set: one line for each generation, its grade as `correct`, its extracted answer as `answer`, the
scores of its PRM (or one score, of an ORM or a mean confidence) as `step_scores`.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tts_kernels.errors import check_int, fail

from .account import Efficiency
from .checks import check_choice, check_number
from .formulas import best_of_k, pass_at_k
from .hardware import Hardware
from .query import Price, query_cost
from .shapes import ModelShape
from .voting import majority_of_k, weighted_vote_of_k
from .workload import Workload

METHODS = ("pass", "best_of_n", "majority", "weighted_vote")
AGGREGATES = {
    "last": lambda scores: scores[-1],
    "min": min,
    "prod": math.prod,
    "mean": lambda scores: sum(scores) / len(scores),
    "max": max,
}
GROUPS = 8  # of N samples of a question, over which the cost of N is averaged
RESAMPLES = 1000


@dataclass(frozen=True)
class Sample:
    """A line of a trace file."""

    question: str
    sample: str
    tokens: int
    step_scores: tuple[float, ...]
    correct: bool
    answer: str | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class Accuracy:
    """Of a method of choosing among n samples: the mean over questions, and its interval.

    exact: over all choices of n samples; else some of them were drawn (weighted votes)
    """

    method: str
    n: int
    value: float
    low: float
    high: float
    exact: bool


@dataclass(frozen=True)
class Point:
    """N samples: what they cost a query, and how often the answer is right."""

    n: int
    cost: float
    accuracy: Accuracy

    @property
    def per_solved(self) -> float:
        """Cost of a solved query: cost / accuracy."""
        return self.cost / self.accuracy.value if self.accuracy.value else math.inf


class Traces:
    """Samples by question."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self.questions: dict[str, list[Sample]] = {}
        for sample in samples:
            self.questions.setdefault(sample.question, []).append(sample)
        if not self.questions:
            fail("traces", "at least one sample", "none")

    @classmethod
    def read(cls, path: str | Path) -> Traces:
        """Raises ValueError or TypeError that names the file, the line and the field of what is wrong."""
        samples, seen = [], {}
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path} line {number}"
                sample = _sample(line, where)
                key = sample.question, sample.sample
                if key in seen:
                    fail(f"{where}, sample", f"an id that line {seen[key]} does not have", repr(sample.sample))
                seen[key] = number
                samples.append((where, sample))
        _check_questions(samples)
        if not samples:
            fail(str(path), "at least one sample", "none")
        return cls(sample for _, sample in samples)

    def write(self, path: str | Path) -> None:
        with open(path, "w", encoding="utf-8") as file:
            for samples in self.questions.values():
                for sample in samples:
                    fields = {name: value for name, value in vars(sample).items() if value is not None}
                    file.write(json.dumps(fields) + "\n")

    @property
    def samples_per_question(self) -> int:
        """That every question has at least: N can be as large."""
        return min(map(len, self.questions.values()))

    def accuracy(
        self, n: int, method: str = "best_of_n", *, aggregate: str = "last", resamples: int = RESAMPLES, seed: int = 0
    ) -> Accuracy:
        """The chance that the choice among n samples of a question is right, over all choices of n of its samples, the
        mean over questions; with a percentile bootstrap interval of 95% over questions.

        method     "pass" (any of them is right), "best_of_n" (the best-scored), "majority", "weighted_vote"
        aggregate  of a sample's step scores: "last", "min", "prod", "mean", "max"

        The order of samples in the file decides nothing: of equal scores each is chosen as often, and where two answers
        have equal sums of scores, a seeded order decides.
        """
        values, exact = self.chances(n, method, aggregate=aggregate, seed=seed)
        return Accuracy(method, n, *mean_interval(values, resamples, seed), exact)

    def chances(
        self, n: int, method: str = "best_of_n", *, aggregate: str = "last", seed: int = 0
    ) -> tuple[list[float], bool]:
        """(of each question, the chance that the choice is right, whether all choices of n were regarded): what
        `accuracy` takes the mean of, and what differences between methods are paired by."""
        check_choice("method", method, METHODS)
        check_choice("aggregate", aggregate, AGGREGATES)
        n = self._check_n(n)
        values, exact = [], True
        for samples in self.questions.values():
            value, of_all = _chance(samples, n, method, AGGREGATES[aggregate], seed)
            values.append(value)
            exact &= of_all
        return values, exact

    def cost(
        self,
        n: int,
        model: ModelShape | str,
        hardware: Hardware | str,
        *,
        price: Price | str,
        sharing: str = "tree",
        regime: str = "saturated",
        efficiency: Efficiency | None = None,
        prompt: int | None = None,
        verifier: str = "prm",
        verifier_model: ModelShape | str | None = None,
        verifier_head: str = "vocab",
    ) -> float:
        """The modelled cost of a query with n samples of these lengths, in the price's currency: the mean over
        questions and over at most 8 groups of n samples of each, from all over its samples. prompt: tokens, where the
        traces do not say."""
        n, price, total = self._check_n(n), Price.parse(price), 0.0
        for question, samples in self.questions.items():
            length = samples[0].prompt_tokens if prompt is None else check_int("prompt", prompt, 0)
            if length is None:
                fail("prompt", f"a length, since the samples of question {question!r} have no prompt_tokens", "none")
            starts, costs = range(0, len(samples) - n + 1, n), []
            starts = [starts[i * len(starts) // GROUPS] for i in range(GROUPS)] if len(starts) > GROUPS else starts
            for start in starts:
                group = samples[start : start + n]
                steps = max(1, round(sum(len(s.step_scores) for s in group) / n))
                work = Workload(n, length, tuple(s.tokens for s in group), steps=steps, verifier=verifier,
                                verifier_model=verifier_model, verifier_head=verifier_head)  # fmt: skip
                cost = query_cost(
                    work, model, hardware, sharing=sharing, regime=regime, price=price, efficiency=efficiency
                )
                costs.append(cost.money)
            total += sum(costs) / len(costs)
        return total / len(self.questions)

    def curve(
        self, counts: Iterable[int], model: ModelShape | str, hardware: Hardware | str, *, method: str = "best_of_n",
        aggregate: str = "last", **of_cost,
    ) -> list[Point]:  # fmt: skip
        """Accuracy against cost, for each number of samples."""
        return [
            Point(n, self.cost(n, model, hardware, **of_cost), self.accuracy(n, method, aggregate=aggregate))
            for n in counts
        ]

    def counts(self) -> list[int]:
        """1, 2, 4 .. and all."""
        most = self.samples_per_question
        return sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | {most})

    def _check_n(self, n: int) -> int:
        n = check_int("n", n, 1)
        if n > self.samples_per_question:
            short = min(self.questions, key=lambda q: len(self.questions[q]))
            fail("n", f"at most {self.samples_per_question}, the samples of question {short!r}", n)
        return n


def mean_interval(values: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): a percentile bootstrap interval of 95%; without resamples its ends are nan."""
    draw = random.Random(seed)
    means = sorted(sum(draw.choices(values, k=len(values))) / len(values) for _ in range(resamples))
    low, high = (means[int(q * (len(means) - 1))] if means else math.nan for q in (0.025, 0.975))
    return sum(values) / len(values), low, high


def best_n(points: Iterable[Point], value: float) -> Point:
    """Of these N the one that is worth most: argmax of value * accuracy(N) - cost(N), value per solved query. (Choose N
    while a further sample's v dA is at least its dC; the stopping rule of Stroebl et al., arXiv 2411.17501, in
    money.)"""
    value = check_number("value", value, least=0)
    return max(points, key=lambda point: (value * point.accuracy.value - point.cost, -point.n))


def synthetic(questions: int = 20, samples: int = 16, seed: int = 0, steps: int = 4) -> Traces:
    """A seeded set for tests and for trying out: questions of different difficulty, scores that tell right from wrong
    with some error, long samples on hard questions. It says nothing about any model."""
    draw = random.Random(seed)
    made = []
    for q in range(questions):
        chance, prompt = draw.betavariate(0.8, 0.9), draw.randint(60, 400)
        for s in range(samples):
            correct = draw.random() < chance
            answer = "right" if correct else f"wrong {min(int(draw.expovariate(0.8)), 5)}"
            scores = [1 / (1 + math.exp(-draw.gauss(1.0 if correct else -0.6, 1.3))) for _ in range(steps)]
            tokens = max(1, round(draw.lognormvariate(7.0 - chance, 0.5)))
            made.append(Sample(f"q{q}", str(s), tokens, tuple(scores), correct, answer, prompt))
    return Traces(made)


def _chance(samples: list[Sample], n: int, method: str, aggregate, seed: int) -> tuple[float, bool]:
    """Of one question: (chance that the choice is right, whether exact)."""
    samples = random.Random(seed).sample(samples, len(samples))
    correct = [sample.correct for sample in samples]
    if method == "pass":
        return pass_at_k(len(samples), sum(correct), n), True
    scores = [aggregate(sample.step_scores) if sample.step_scores else math.nan for sample in samples]
    if method == "best_of_n":
        equal: dict[float, list[bool]] = {}
        for score, right in zip(scores, correct):
            equal.setdefault(score, []).append(right)
        return best_of_k(scores, [sum(equal[score]) / len(equal[score]) for score in scores], n), True
    answers = [sample.answer for sample in samples]
    if all(answer is None for answer in answers):
        fail(
            "method", f"pass or best_of_n, since the samples of question {samples[0].question!r} have no answer", method
        )
    if method == "majority":
        return majority_of_k(answers, correct, n), True
    return weighted_vote_of_k(scores, answers, correct, n, seed)


def _sample(line: str, where: str) -> Sample:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        fail(where, "JSON", error)
    if not isinstance(data, dict):
        fail(where, "an object with the fields of a sample", repr(data), TypeError)
    for key in ("question", "sample", "tokens", "step_scores", "correct"):
        if key not in data:
            fail(f"{where}, {key}", "a value", "no such field")
    for key in ("question", "sample"):
        if isinstance(data[key], bool) or not isinstance(data[key], (str, int)):
            fail(f"{where}, {key}", "a string or a whole number", repr(data[key]), TypeError)
    tokens = check_int(f"{where}, tokens", data["tokens"], 1)
    if not isinstance(data["step_scores"], list):
        fail(f"{where}, step_scores", "a list of numbers", repr(data["step_scores"]), TypeError)
    scores = tuple(check_number(f"{where}, step_scores[{i}]", s) for i, s in enumerate(data["step_scores"]))
    if not isinstance(data["correct"], bool):
        fail(f"{where}, correct", "true or false", repr(data["correct"]), TypeError)
    answer, prompt = data.get("answer"), data.get("prompt_tokens")
    if answer is not None and not isinstance(answer, (str, int, float)):
        fail(f"{where}, answer", "a string, a number or null", repr(answer), TypeError)
    if prompt is not None:
        prompt = check_int(f"{where}, prompt_tokens", prompt, 0)
    answer = None if answer is None else str(answer)
    return Sample(str(data["question"]), str(data["sample"]), tokens, scores, data["correct"], answer, prompt)


def _check_questions(samples: list[tuple[str, Sample]]) -> None:
    """That lines of one question agree: on the prompt's length, and on which answers are right."""
    prompts: dict[str, int | None] = {}
    right: dict[tuple[str, str], bool] = {}
    for where, sample in samples:
        known = prompts.setdefault(sample.question, sample.prompt_tokens)
        if known != sample.prompt_tokens:
            fail(f"{where}, prompt_tokens", f"{known}, as in the question's first sample", sample.prompt_tokens)
        if sample.answer is not None:
            before = right.setdefault((sample.question, sample.answer), sample.correct)
            if before != sample.correct:
                fail(f"{where}, correct", f"{before}, as for the answer {sample.answer!r} before", sample.correct)
