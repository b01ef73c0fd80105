"""The task: register programs modulo 100, run from left to right.

    85a-65b+21c*07d+11>         prompt: the start value, then a name, an operation and an operand per step
    a85-65=20                   chain of thought: the register's value before and after each step,
    b20+21=41                   steps parted by blank lines
    c41*07=87
    d87+11=98
    #98$                        the answer; $ ends the text

Every number has two digits, so a text's length follows from its number of steps. Operands of + and - are 01 to 29, of *
02 to 09: the tables that a model has to learn stay small, and the difficulty is in the length, 6 to 14 steps.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

MODULUS = 100
LEAST_STEPS, MOST_STEPS = 6, 14
REGISTERS = "abcdefghijklmn"
OPERANDS = {"+": (1, 29), "-": (1, 29), "*": (2, 9)}
BREAK = "\n\n"
END = "$"
ANSWER = re.compile(r"#(\d\d)\Z")
STEP = re.compile(r"([a-n])(\d\d)([-+*])(\d\d)=(\d\d)")
# Problems of a seed are in the split of that seed alone: `problems` leaves out those of the splits named before it.
SEEDS = {"test": 20_001, "dev": 20_002, "train": 20_003}
SIZES = {"test": 500, "dev": 400}


@dataclass(frozen=True)
class Problem:
    start: int
    steps: tuple[tuple[str, int], ...]  # operation, operand

    @property
    def prompt(self) -> str:
        return f"{self.start:02}" + "".join(f"{r}{op}{n:02}" for r, (op, n) in zip(REGISTERS, self.steps)) + ">"

    @property
    def values(self) -> list[int]:
        """The register before each step, and after the last."""
        values = [self.start]
        for op, operand in self.steps:
            values.append(apply(values[-1], op, operand))
        return values

    @property
    def answer(self) -> str:
        return f"{self.values[-1]:02}"

    @property
    def direct(self) -> str:
        """The answer alone."""
        return f"#{self.answer}"

    @property
    def lines(self) -> list[str]:
        """The steps of a right chain of thought, the answer the last."""
        values = self.values
        lines = [
            f"{r}{before:02}{op}{n:02}={after:02}"
            for r, (op, n), before, after in zip(REGISTERS, self.steps, values, values[1:])
        ]
        return [*lines, self.direct]

    @property
    def chain(self) -> str:
        return BREAK.join(self.lines)


def apply(value: int, op: str, operand: int) -> int:
    result = value + operand if op == "+" else value - operand if op == "-" else value * operand
    return result % MODULUS


def answer_of(text: str) -> str | None:
    """What a candidate answers: the two digits behind the # that ends it."""
    match = ANSWER.search(text)
    return match.group(1) if match else None


def right_until(problem: Problem, steps: list[str]) -> list[bool]:
    """For each step whether it and all before it are what they should be."""
    lines = problem.lines
    right, labels = True, []
    for k, step in enumerate(steps):
        right = right and k < len(lines) and step == lines[k]
        labels.append(right)
    return labels


def draw(rng: random.Random, num_steps: int | None = None) -> Problem:
    count = num_steps or rng.randint(LEAST_STEPS, MOST_STEPS)
    steps = []
    for _ in range(count):
        op = rng.choice("+-*")
        steps.append((op, rng.randint(*OPERANDS[op])))
    return Problem(rng.randrange(MODULUS), tuple(steps))


def split(name: str) -> list[Problem]:
    """The held-out problems of "test" or "dev": all different, none of dev in test."""
    if name not in SIZES:
        raise ValueError(f"name: expected one of {', '.join(SIZES)}, got {name!r}")
    taken = set(split("test")) if name == "dev" else set()
    rng, found = random.Random(SEEDS[name]), {}
    while len(found) < SIZES[name]:
        problem = draw(rng)
        if problem not in taken:
            found[problem] = None
    return list(found)


def training(seed: int) -> Iterator[Iterator[Problem]]:
    """Batches without an end, of equal length within a batch, none of their problems held out. `seed` tells one
    training run's problems from another's."""
    held_out = {*split("test"), *split("dev")}
    rng = random.Random(SEEDS["train"] * 1_000 + seed)
    while True:
        num_steps = rng.randint(LEAST_STEPS, MOST_STEPS)
        yield (problem for problem in _like(rng, num_steps) if problem not in held_out)


def _like(rng: random.Random, num_steps: int) -> Iterator[Problem]:
    while True:
        yield draw(rng, num_steps)
