"""What all searches share: their options, candidates that grow, and a run, which holds both trees of one question."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from tts_kernels.scoring import select
from tts_kernels.scoring.results import REDUCES
from tts_kernels.tree.checks import check_int, fail

from .answers import boxed, canonical, vote_groups
from .checks import check_sampling, check_text
from .record import Candidate, Cost, SearchResult

if TYPE_CHECKING:
    from tts_kernels.verifier import Verifier

    from .policy import Policy, Step


@dataclass(frozen=True)
class Options:
    """Keyword arguments that all searches take. Defaults of the sampling are search-and-learn's.

    max_new_tokens  sampled in one go at most: of a step where the search samples steps, else of the whole answer
    temperature     of the sampling; 0 takes the token of the highest logit
    top_p, top_k    of the sampling; 1.0 and 0 leave all tokens
    seed            of the sampling: the same seed, models and call give the same result on the same machine
    reduce          how the scores of steps become a candidate's score: "last", "min", "prod", "mean", "max" or
                    "log_prod". Default: as the verifier's recipe says
    answer          from a candidate's text to its answer, a string, or None. Default: what the last \\boxed{} holds
    canonical       from an answer to the form in which votes compare it
    progress        a progress bar on stderr: True, False, or None for where stderr is a terminal
    """

    max_new_tokens: int = 2048
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    reduce: str | None = None
    answer: Callable[[str], str | None] = boxed
    canonical: Callable[[str], str] = canonical
    progress: bool | None = None

    def __post_init__(self):
        check_sampling(self.max_new_tokens, self.temperature, self.top_p, self.top_k)
        check_int("seed", self.seed)
        if self.reduce is not None and self.reduce not in REDUCES:
            fail("reduce", f"one of {', '.join(REDUCES)}, or None", repr(self.reduce))
        for name in ("answer", "canonical"):
            if not callable(getattr(self, name)):
                fail(name, "a function", repr(getattr(self, name)), TypeError)
        if self.progress not in (True, False, None):
            fail("progress", "True, False or None", repr(self.progress), TypeError)


@dataclass
class Beam:
    """A candidate while it grows: the ends of its paths in the two trees, and what it has so far."""

    node: int  # in the policy's tree
    judged: int  # in the session's tree; -1 without one
    text: str = ""
    steps: tuple[str, ...] = ()
    step_scores: tuple[float, ...] = ()
    score: float = math.nan
    tokens: int = 0
    reason: str = "stop"
    unjudged: str = ""  # the end of the text that the verifier has not seen

    def extended(self, step: Step) -> Beam:
        return Beam(
            step.node, self.judged, self.text + step.text, self.steps, self.step_scores, self.score,
            self.tokens + len(step.ids), step.reason, step.text,
        )  # fmt: skip


class Run:
    """One search for one question: a context manager. Whatever it holds in the two trees is given back at its end.

    Policy and verifier are used by their interfaces alone: `Policy` and `Verifier` as they stand in this package, or
    anything like them. Without a verifier (None) nothing is scored.
    """

    def __init__(
        self, method: str, policy: Policy, verifier: Verifier | None, question: str, options: Mapping[str, Any], *,
        total: int, unit: str,
    ):  # fmt: skip
        known = [option.name for option in fields(Options)]
        for name in options:
            if name not in known:
                fail(method, f"its own arguments and {', '.join(known)}", name, TypeError)
        self.method, self.options = method, Options(**options)
        self.policy, self.verifier = policy, verifier
        self.question = check_text("question", question)
        self.reduce = self.options.reduce or (verifier.recipe.aggregate if verifier is not None else None)
        self.generator = torch.Generator(policy.device).manual_seed(self.options.seed)
        self.total, self.unit = total, unit  # of the progress bar: "candidate" or "step"
        self.session = None
        self.tokens = 0  # sampled
        self.encoded = 0  # by the verifier outside of the session
        self.seconds = dict.fromkeys(("prefill", "decode", "verify", "select"), 0.0)
        self._nodes: set[int] = set()  # held, in the policy's tree
        self._judged: Counter[int] = Counter()  # holds on nodes of the session's tree

    def __enter__(self) -> Run:
        from tqdm import tqdm

        self.begin, self.computed = time.perf_counter(), self.policy.tokens_computed
        with self.clock("prefill"):
            root = self.policy.start(self.policy.prompt(self.question))
        self.prompt_tokens = self.policy.tokens_computed - self.computed
        self._nodes.add(root)
        self.root = Beam(root, -1)
        shown = self.options.progress
        self.bar = tqdm(total=self.total, unit=self.unit, miniters=0, disable=None if shown is None else not shown)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.bar.close()
        self.policy.release(list(self._nodes))
        if self.session is not None:
            self.session.close()

    @contextlib.contextmanager
    def clock(self, part: str) -> Iterator[None]:
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        self.seconds[part] += time.perf_counter() - begin

    # --- growing and letting go --------------------------------------------------------------------------------------

    def grow(self, parents: Sequence[Beam], *, stop: tuple[str, ...] | None) -> list[Beam]:
        """A step under each of the parents, which may repeat; `stop` None: all that follows."""
        options = self.options
        with self.clock("decode"):
            steps = self.policy.sample_steps(
                [parent.node for parent in parents], stop=stop, max_new_tokens=options.max_new_tokens,
                temperature=options.temperature, top_p=options.top_p, top_k=options.top_k, generator=self.generator,
                progress=self._sampled,
            )  # fmt: skip
        self._nodes.update(step.node for step in steps)
        return [parent.extended(step) for parent, step in zip(parents, steps)]

    def judge(self, beams: Sequence[Beam]) -> None:
        """Scores what is new in the beams on a session: a step that several have under one parent is encoded once."""
        with self.clock("verify"):
            if self.session is None:
                self.session = self.verifier.session(self.question, when_full="recompute")
            new = [self._split(beam) for beam in beams]
            for level in range(max(map(len, new), default=0)):
                growing = [(beam, steps[level]) for beam, steps in zip(beams, new) if level < len(steps)]
                above = [self.session.root if beam.judged < 0 else beam.judged for beam, _ in growing]
                made = self.session.extend(above, [step for _, step in growing]).nodes
                self._judged.update(made)
                for (beam, step), node in zip(growing, made):
                    beam.judged = node
                    beam.steps += (step,)
            scored = [beam for beam in beams if beam.steps]
            for beam, scores in zip(scored, self._read(self.session.scores([beam.judged for beam in scored]))):
                beam.step_scores, beam.score = scores

    def judge_whole(self, beams: Sequence[Beam]) -> None:
        """Scores whole answers in one go, without a session: what a recipe that is not step-wise needs."""
        with self.clock("verify"):
            texts = [beam.unjudged for beam in beams]
            scores = self.verifier.score_batch([self.question], [texts])
            self.encoded += scores.tokens
            for beam, (step_scores, score) in zip(beams, self._read(scores)):
                beam.step_scores, beam.score = step_scores, score
                steps = self._split(beam)
                beam.steps = tuple(steps[len(steps) - len(step_scores) :])  # a long candidate may have lost its first

    def keep(self, beams: Sequence[Beam]) -> None:
        """Gives back, in both trees, what none of these beams needs."""
        dropped = self._nodes - {beam.node for beam in beams}
        self.policy.release(sorted(dropped))
        self._nodes -= dropped
        if self.session is not None:
            kept = {beam.judged for beam in beams}
            self.session.release([node for node in self._judged.elements() if node not in kept])
            self._judged = Counter({node: holds for node, holds in self._judged.items() if node in kept})

    # --- choosing ----------------------------------------------------------------------------------------------------

    def best(self, beams: Sequence[Beam], k: int) -> list[int]:
        """Indices of the k best, best first, or fewer: those whose score is nan are never among them."""
        with self.clock("select"):
            if not beams:
                return []
            chosen = select(_scores(beams), k=k, method="top_k")
            return [i for i in chosen.indices[0].tolist() if i >= 0]

    def best_of_each(self, beams: Sequence[Beam], size: int) -> list[int]:
        """The index of the best of each `size` beams on end; -1 where all scores of a group are nan."""
        with self.clock("select"):
            groups = torch.arange(0, len(beams) + 1, size)
            return select(_scores(beams), group_offsets=groups, method="best").indices[:, 0].tolist()

    def result(self, beams: Sequence[Beam], parameters: Mapping[str, Any], *, choose: str = "best") -> SearchResult:
        """The record, the choice among `beams` made by `choose`: a method of `select`."""
        with self.clock("select"):
            answers = [self._answer(beam) for beam in beams]
            choice = -1
            if beams:
                # Without a verifier votes count alike.
                scores = torch.zeros(len(beams)) if self.verifier is None else _scores(beams)
                votes = None
                if choose != "best":
                    self._warn_without_answers(answers)
                    votes = torch.tensor(vote_groups(answers, self.options.canonical))
                choice = int(select(scores, method=choose, answers=votes).indices[0, 0])
        candidates = [
            Candidate(beam.text, beam.steps, beam.step_scores, beam.score, answer, beam.reason, beam.tokens)
            for beam, answer in zip(beams, answers)
        ]
        settings = ("max_new_tokens", "temperature", "top_p", "top_k")
        given = {**parameters, **{name: getattr(self.options, name) for name in settings}, "reduce": self.reduce}
        cost = Cost(
            self.prompt_tokens, self.tokens, self.policy.tokens_computed - self.computed,
            self.encoded + (self.session.tokens_encoded if self.session is not None else 0),
            *self.seconds.values(), time.perf_counter() - self.begin,
        )  # fmt: skip
        return SearchResult(self.question, self.method, tuple(candidates), choice, self.options.seed, given, cost)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _split(self, beam: Beam) -> list[str]:
        text, beam.unjudged = beam.unjudged, ""
        return self.verifier.recipe.split(text)

    def _read(self, scores) -> list[tuple[tuple[float, ...], float]]:
        """(scores of the steps, aggregate) of each candidate of a StepScores."""
        probs, totals = scores.prob.tolist(), getattr(scores, self.reduce).tolist()
        ends = scores.count.cumsum(0).tolist()
        return [(tuple(probs[begin:end]), total) for begin, end, total in zip([0, *ends], ends, totals)]

    def _answer(self, beam: Beam) -> str | None:
        answer = self.options.answer(beam.text)
        if answer is not None and not isinstance(answer, str):
            fail("answer", "a function that returns a string or None", repr(answer), TypeError)
        return answer

    def _warn_without_answers(self, answers: Sequence[str | None]) -> None:
        if all(answer is None for answer in answers):
            name = getattr(self.options.answer, "__name__", self.options.answer)
            warnings.warn(
                f"answer: expected a function that finds an answer in some of {len(answers)} candidates, got {name}, "
                f"which finds none: {self.method} chooses nothing",
                stacklevel=5,  # where the vote was called
            )

    def _sampled(self, sampled: int, going: int) -> None:
        self.tokens += sampled
        self.bar.set_postfix(tokens=self.tokens, growing=going, refresh=False)
        self.bar.update(sampled - going if self.unit == "candidate" else 0)

    def _wait(self) -> None:
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize(self.policy.device)


def _scores(beams: Sequence[Beam]) -> torch.Tensor:
    return torch.tensor([beam.score for beam in beams], dtype=torch.float32)
