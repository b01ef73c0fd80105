"""Part of `make demo`: a few held-out problems, solved by the shipped models: steps written and scored, an answer out,
right or wrong, beside what the evaluation measured for the same way of answering."""

from __future__ import annotations

import argparse
from pathlib import Path

from tts_kernels.cost import claim
from tts_kernels.search import SearchResult, beam_search, majority, weighted_vote

from . import evaluate, models, task

WORST = 0.5  # a step below it is marked
INTRO = """
A reasoner of {parameters:.1f} M parameters and its process reward model, on programs that they have not seen.
85a-65b+21> is: begin with 85, take 65 away (step a), add 21 (step b), all modulo 100. A chain of thought writes the
register before and after each step, and #41 for its answer. For each problem: which answers {n} chains give; the chain
that the weighted vote chose, with the verifier's score of each step (? where it is below {worst}); and what five ways
of answering give."""


def main(args: argparse.Namespace) -> int:
    record = claim.read(args.results)
    problems = task.split("test")[args.first : args.first + args.problems]
    policy, verifier = evaluate.load("reasoner")
    direct, _ = evaluate.load("direct")
    parameters = models.load_policy(models.WEIGHTS / "reasoner").num_parameters() / 1e6
    print(INTRO.format(parameters=parameters, n=args.n, worst=WORST))
    right = dict.fromkeys(("one direct answer", "one chain", "majority", "weighted vote", "beam search"), 0)
    for number, problem in enumerate(problems, args.first):
        options = {"seed": number, **evaluate.OPTIONS}
        votes = weighted_vote(policy, verifier, problem.prompt, n=args.n, **options)
        results = {
            "one direct answer": majority(direct, problem.prompt, n=1, **options).chosen,
            "one chain": votes.candidates[0],
            "majority": majority_of(votes),
            "weighted vote": votes.chosen,
            "beam search": evaluate.search_once(
                beam_search, policy, verifier, problem, args.width, args.n // args.width, number
            ).chosen,
        }
        for name, candidate in results.items():
            right[name] += candidate is not None and candidate.answer == problem.answer
        show(problem, votes, results)
    report(record, right, len(problems), args)
    return 0


def majority_of(result: SearchResult):
    """The first candidate with the answer that most gave."""
    answers = [c.answer for c in result.candidates if c.answer is not None]
    if not answers:
        return None
    most = max(dict.fromkeys(answers), key=answers.count)
    return next(c for c in result.candidates if c.answer == most)


def show(problem: task.Problem, votes: SearchResult, results: dict) -> None:
    answers = [c.answer for c in votes.candidates]
    counts = {answer: answers.count(answer) for answer in dict.fromkeys(answers)}
    told = ", ".join(f"{answer or 'none'} x {count}" for answer, count in sorted(counts.items(), key=lambda x: -x[1]))
    print(f"\n{problem.prompt}  (right: {problem.answer})")
    print(f"  answers of {len(answers)} chains: {told}")
    chosen = votes.chosen
    if chosen:
        steps = "  ".join(f"{step} {score:.2f}{'?' if score < WORST else ''}"
                          for step, score in zip(chosen.steps, chosen.step_scores))  # fmt: skip
        print(f"  chosen, with the score of each step: {steps}")
    said = (
        f"{name} {c.answer if c else 'none'} {'right' if c and c.answer == problem.answer else 'wrong'}"
        for name, c in results.items()
    )
    print(f"  {'; '.join(said)}")


def report(record: dict, right: dict[str, int], count: int, args: argparse.Namespace) -> None:
    direct, reasoner, n = record["systems"]["direct"], record["systems"]["reasoner"], args.n
    searched = claim.at(reasoner, "beam_search", n)
    measured = {
        "one direct answer": claim.at(direct, "pass", 1),
        "one chain": claim.at(reasoner, "pass", 1),
        "majority": claim.at(reasoner, "majority", n),
        "weighted vote": claim.at(reasoner, f"weighted_vote {claim.AGGREGATES['reasoner']}", n),
        "beam search": searched if searched and searched["width"] == args.width else None,
    }
    print(f"\n{f'N = {n}':22}{'right here':>14}   accuracy in % on {record['problems']} problems (95% interval)")
    for name, hits in right.items():
        print(f"{name:22}{f'{hits} of {count}':>14}   {claim.percent(measured[name])}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reasoner.demo", description=__doc__)
    add = parser.add_argument
    add("--problems", type=int, default=4, help="default %(default)s")
    add("--first", type=int, default=0, help="the first one's number among the held-out (default %(default)s)")
    add("--n", type=int, default=16, help="samples, and candidates of the beam search (default %(default)s)")
    add("--width", type=int, default=4, help="beams that are kept (default %(default)s)")
    add("--results", type=Path, default=evaluate.HERE / "results.json", help="the evaluation's record")
    args = parser.parse_args()
    for name, least, most in (("n", 1, 1024), ("problems", 1, task.SIZES["test"]), ("first", 0, task.SIZES["test"] - 1),
                              ("width", 1, args.n)):  # fmt: skip
        if not least <= getattr(args, name) <= most:
            parser.error(f"--{name}: expected {least} to {most}, got {getattr(args, name)}")
    if args.n % args.width:
        parser.error(f"--n: expected a multiple of --width, {args.width}, got {args.n}")
    if not args.results.is_file():
        parser.error(
            f"--results: expected a file, as python -m benchmarks.reasoner.evaluate writes it, got {args.results}"
        )
    return args


if __name__ == "__main__":
    raise SystemExit(main(arguments()))
