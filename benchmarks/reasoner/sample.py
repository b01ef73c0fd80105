"""Samples answers of a policy to training problems, with the project's own decoding: what the verifiers learn from."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from tts_kernels.search import Policy

from . import models, task

TOGETHER = 8  # problems decoded side by side: their prompts are the roots of one forest


def policy(folder: Path, max_tokens: int = 65_536) -> Policy:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = models.load_policy(folder, device)
    return Policy(model, models.tokenizer(), max_tokens=max_tokens)


def sample_answers(
    policy: Policy, problems: Sequence[task.Problem], n: int, temperature: float, seed: int
) -> list[list[str]]:
    """`n` texts for each problem."""
    generator = torch.Generator(policy.device).manual_seed(seed)
    texts: list[list[str]] = []
    for begin in range(0, len(problems), TOGETHER):
        roots = [policy.start(policy.prompt(p.prompt)) for p in problems[begin : begin + TOGETHER]]
        steps = policy.sample_steps(roots, n=n, stop=None, max_new_tokens=160, temperature=temperature,
                                    generator=generator)  # fmt: skip
        texts += [[step.text for step in steps[i * n : (i + 1) * n]] for i in range(len(roots))]
        policy.release(roots + [step.node for step in steps])
    return texts


def main(args: argparse.Namespace) -> None:
    rng = random.Random(args.seed)
    batches = task.training(args.seed)
    problems = [next(next(batches)) for _ in range(args.problems)]
    rng.shuffle(problems)
    made, begin = policy(args.policy), time.perf_counter()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w") as file:
        for first in range(0, len(problems), 20 * TOGETHER):
            some = problems[first : first + 20 * TOGETHER]
            for problem, texts in zip(some, sample_answers(made, some, args.n, args.temperature, args.seed + first)):
                file.write(json.dumps({"start": problem.start, "steps": problem.steps, "texts": texts}) + "\n")
            print(f"{first + len(some)} problems, {time.perf_counter() - begin:.0f} s", flush=True)


def read(path: Path, count: int | None = None) -> list[tuple[task.Problem, list[str]]]:
    with path.open() as file:
        records = [json.loads(line) for line in islice(file, count)]
    return [(task.Problem(r["start"], tuple((op, n) for op, n in r["steps"])), r["texts"]) for r in records]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reasoner.sample", description=__doc__)
    add = parser.add_argument
    add("policy", type=Path, help="folder of its checkpoint")
    add("--out", type=Path, required=True, help="file for the samples, a problem per line")
    add("--problems", type=int, default=3000, help="default %(default)s")
    add("--n", type=int, default=8, help="samples of each (default %(default)s)")
    add("--temperature", type=float, default=1.0, help="default %(default)s")
    add("--seed", type=int, default=7, help="of the problems and of the draws (default %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main(arguments())
