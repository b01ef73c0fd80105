"""A call of a search: its questions go in step, so that each forward of policy and verifier is one for all of them."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from tts_kernels.tree.checks import fail

from .checks import check_questions
from .record import Candidate, Cost, SearchBatch, SearchResult
from .run import Beam, Grow, Judge, Options, Run, Search

if TYPE_CHECKING:
    from tts_kernels.scoring import StepScores
    from tts_kernels.verifier import Verifier

    from .policy import Policy

PARTS = ("prefill", "decode", "verify", "select")


class Call:
    """What the searches of a call have in common: a context manager. What they hold in the two trees is given back at
    its end.

    search      of a Run: asks for what it needs (`Grow`, `Judge`) and returns its candidates
    parameters  of the method, for the record
    choose      among the candidates: a method of `select`
    total, unit of the progress bar, for one question: "candidate" or "step"

    Policy and verifier are used by their interfaces alone: `Policy` and `Verifier` as they stand in this package, or
    anything like them. Without a verifier (None) nothing is scored.
    """

    def __init__(
        self, method: str, policy: Policy, verifier: Verifier | None, question: str | Sequence[str],
        options: Mapping[str, Any], search: Callable[[Run], Search], parameters: Mapping[str, Any], *,
        total: int, unit: str, choose: str = "best",
    ):  # fmt: skip
        known = [option.name for option in fields(Options)]
        for name in options:
            if name not in known:
                fail(method, f"its own arguments and {', '.join(known)}", name, TypeError)
        self.method, self.options, self.search, self.choose = method, Options(**options), search, choose
        self.policy, self.verifier = policy, verifier
        self.single = isinstance(question, str)
        self.questions = check_questions("question", question)
        self.reduce = self.options.reduce or (verifier.recipe.aggregate if verifier is not None else None)
        settings = ("max_new_tokens", "temperature", "top_p", "top_k")
        given = {name: getattr(self.options, name) for name in settings}
        self.parameters = {**parameters, **given, "reduce": self.reduce}
        device, seed = policy.device, self.options.seed
        self.generators = [torch.Generator(device).manual_seed(seed) for _ in self.questions]
        self.total, self.unit = total * len(self.questions), unit
        self.session = None
        self.shown = 0  # tokens, on the progress bar
        self.encoded = 0  # by the verifier outside of the session
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.runs: list[Run] = []

    def __enter__(self) -> Call:
        from tqdm import tqdm

        self.begin, self.computed = time.perf_counter(), self.policy.tokens_computed
        shown = self.options.progress
        self.bar = tqdm(total=self.total, unit=self.unit, miniters=0, disable=None if shown is None else not shown)
        try:
            with self.clock("prefill"):
                roots = self.policy.start_all([self.policy.prompt(question) for question in self.questions])
                self.runs = [Run(self, i, root) for i, root in enumerate(roots)]
        except BaseException:
            self.bar.close()
            raise
        self.prompt_tokens = self.policy.tokens_computed - self.computed
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.policy.release([node for run in self.runs for node in run.nodes])
        finally:
            if self.session is not None:
                self.session.close()
            self.bar.close()

    @contextlib.contextmanager
    def clock(self, part: str) -> Iterator[None]:
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        self.seconds[part] += time.perf_counter() - begin

    def results(self) -> SearchResult | SearchBatch:
        """Runs all searches to their ends."""
        going = [(run, self.search(run)) for run in self.runs]
        found: dict[Run, list[Beam]] = {}
        answers: Sequence[Sequence[Beam] | None] = [None] * len(going)
        while going:
            asked = []
            for (run, search), answer in zip(going, answers):
                try:
                    asked.append((run, search, search.send(answer)))
                except StopIteration as end:
                    found[run] = end.value
            going = [(run, search) for run, search, _ in asked]
            # They go in step: all ask for the same kind of thing.
            requests = [(run, request) for run, _, request in asked]
            if requests:
                answers = (self._grow if isinstance(requests[0][1], Grow) else self._judge)(requests)
        with self.clock("select"):
            chosen = [run.choose(found[run]) for run in self.runs]
        self._warn_without_answers([candidates for candidates, _ in chosen])
        cost = Cost(
            self.prompt_tokens, sum(run.tokens for run in self.runs), self.policy.tokens_computed - self.computed,
            self.encoded + (self.session.tokens_encoded if self.session is not None else 0),
            *self.seconds.values(), time.perf_counter() - self.begin,
        )  # fmt: skip
        results = [
            SearchResult(
                run.question, self.method, candidates, choice, self.options.seed, self.parameters,
                cost if self.single else Cost(new_tokens=run.tokens),
            )
            for run, (candidates, choice) in zip(self.runs, chosen)
        ]  # fmt: skip
        return results[0] if self.single else SearchBatch(tuple(results), cost)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _grow(self, requests: Sequence[tuple[Run, Grow]]) -> list[list[Beam]]:
        options = self.options
        with self.clock("decode"):
            steps = self.policy.sample_steps(
                [parent.node for _, request in requests for parent in request.parents], stop=requests[0][1].stop,
                max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_p=options.top_p,
                top_k=options.top_k, generator=[run.generator for run, request in requests for _ in request.parents],
                progress=self._sampled,
            )  # fmt: skip
        each = iter(steps)
        return [run.grown(parents, list(islice(each, len(parents)))) for run, (parents, _) in requests]

    def _judge(self, requests: Sequence[tuple[Run, Judge]]) -> list[None]:
        with self.clock("verify"):
            (self._judge_whole if requests[0][1].whole else self._judge_steps)(requests)
        return [None] * len(requests)

    def _judge_steps(self, requests: Sequence[tuple[Run, Judge]]) -> None:
        """On the session: a step that several beams have under one parent is encoded once."""
        if self.session is None:
            question = self.questions[0] if self.single else self.questions
            self.session = self.verifier.session(question, when_full="recompute")
        beams = [(run, beam) for run, request in requests for beam in request.beams]
        new = [self._split(beam) for _, beam in beams]
        for level in range(max(map(len, new), default=0)):
            growing = [(run, beam, steps[level]) for (run, beam), steps in zip(beams, new) if level < len(steps)]
            above = [self.session.roots[run.index] if beam.judged < 0 else beam.judged for run, beam, _ in growing]
            made = self.session.extend(above, [step for _, _, step in growing]).nodes
            for (run, beam, step), node in zip(growing, made):
                run.judged[node] += 1
                beam.judged = node
                beam.steps += (step,)
        scored = [beam for _, beam in beams if beam.steps]
        for beam, scores in zip(scored, self._read(self.session.scores([beam.judged for beam in scored]))):
            beam.step_scores, beam.score = scores

    def _judge_whole(self, requests: Sequence[tuple[Run, Judge]]) -> None:
        texts = [[beam.unjudged for beam in request.beams] for _, request in requests]
        scores = self.verifier.score_batch([run.question for run, _ in requests], texts)
        self.encoded += scores.tokens
        beams = [beam for _, request in requests for beam in request.beams]
        for beam, (step_scores, score) in zip(beams, self._read(scores)):
            beam.step_scores, beam.score = step_scores, score
            steps = self._split(beam)
            beam.steps = tuple(steps[len(steps) - len(step_scores) :])  # a long candidate may have lost its first

    def _split(self, beam: Beam) -> list[str]:
        text, beam.unjudged = beam.unjudged, ""
        return self.verifier.recipe.split(text)

    def _read(self, scores: StepScores) -> list[tuple[tuple[float, ...], float]]:
        """(scores of the steps, aggregate) of each candidate."""
        probs, totals = scores.prob.tolist(), getattr(scores, self.reduce).tolist()
        ends = scores.count.cumsum(0).tolist()
        return [(tuple(probs[begin:end]), total) for begin, end, total in zip([0, *ends], ends, totals)]

    def _warn_without_answers(self, candidates: Sequence[tuple[Candidate, ...]]) -> None:
        silent = [i for i, of_one in enumerate(candidates) if all(c.answer is None for c in of_one)]
        if self.choose == "best" or not silent:
            return
        of = "" if self.single else f" of question {', '.join(map(str, silent))}"
        find = self.options.answer
        warnings.warn(
            f"answer: expected a function that finds an answer in some of {len(candidates[silent[0]])} candidates{of}, "
            f"got {getattr(find, '__name__', find)}, which finds none: {self.method} chooses nothing",
            stacklevel=5,  # where the vote was called
        )

    def _sampled(self, sampled: int, going: int) -> None:
        self.shown += sampled
        self.bar.set_postfix(tokens=self.shown, growing=going, refresh=False)
        self.bar.update(sampled - going if self.unit == "candidate" else 0)

    def _wait(self) -> None:
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize(self.policy.device)
