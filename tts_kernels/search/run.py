"""One search for one question: its candidates while they grow, what it holds in the two trees, and its result."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from tts_kernels.scoring import select
from tts_kernels.scoring.results import REDUCES
from tts_kernels.tree.checks import check_int, fail

from .answers import boxed, canonical, vote_groups
from .checks import check_sampling
from .record import Candidate

if TYPE_CHECKING:
    from .drive import Call
    from .policy import Step


@dataclass(frozen=True)
class Options:
    """Keyword arguments that all searches take. Defaults of the sampling are search-and-learn's.

    max_new_tokens  sampled in one go at most: of a step where the search samples steps, else of the whole answer
    temperature     of the sampling; 0 takes the token of the highest logit
    top_p, top_k    of the sampling; 1.0 and 0 leave all tokens
    seed            of the sampling: the same seed, models and call give the same result on the same machine. Each of
                    several questions has draws of its own, from this seed, as if it were searched alone
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


class Grow(NamedTuple):
    """A search asks for a step under each of the parents, which may repeat; `stop` None: all that follows. It gets the
    new beams."""

    parents: Sequence[Beam]
    stop: tuple[str, ...] | None


class Judge(NamedTuple):
    """A search asks for scores of what is new in the beams, and gets them in the beams. `whole`: of whole answers in
    one go, without a session, which is what a recipe that is not step-wise needs."""

    beams: Sequence[Beam]
    whole: bool = False


# What a search is: asks for growth and scores until it has its candidates, which it returns.
Search = Generator[Grow | Judge, Sequence[Beam] | None, list[Beam]]


class Run:
    """One search for one question, one of the questions of a call."""

    def __init__(self, call: Call, index: int, root: int):
        self.call, self.index, self.question = call, index, call.questions[index]
        self.root = Beam(root, -1)
        self.generator = call.generators[index]
        self.tokens = 0  # sampled
        self.nodes = {root}  # held, in the policy's tree
        self.judged: Counter[int] = Counter()  # holds on nodes of the session's tree

    def grown(self, parents: Sequence[Beam], steps: Sequence[Step]) -> list[Beam]:
        """The beams that have these steps under the parents."""
        self.nodes.update(step.node for step in steps)
        self.tokens += sum(len(step.ids) for step in steps)
        return [parent.extended(step) for parent, step in zip(parents, steps)]

    def keep(self, beams: Sequence[Beam]) -> None:
        """Gives back, in both trees, what none of these beams needs."""
        dropped = self.nodes - {beam.node for beam in beams}
        self.nodes -= dropped
        self.call.policy.release(sorted(dropped))
        if self.call.session is not None:
            kept = {beam.judged for beam in beams}
            given_back = [node for node in self.judged.elements() if node not in kept]
            self.judged = Counter({node: holds for node, holds in self.judged.items() if node in kept})
            self.call.session.release(given_back)

    def step_done(self) -> None:
        """For the progress bar of a search that goes by steps."""
        self.call.bar.update()

    # --- choosing ----------------------------------------------------------------------------------------------------

    def best(self, beams: Sequence[Beam], k: int) -> list[int]:
        """Indices of the k best, best first, or fewer: those whose score is nan are never among them."""
        with self.call.clock("select"):
            if not beams:
                return []
            chosen = select(_scores(beams), k=k, method="top_k")
            return [i for i in chosen.indices[0].tolist() if i >= 0]

    def best_of_each(self, beams: Sequence[Beam], size: int) -> list[int]:
        """The index of the best of each `size` beams on end; -1 where all scores of a group are nan."""
        with self.call.clock("select"):
            groups = torch.arange(0, len(beams) + 1, size)
            return select(_scores(beams), group_offsets=groups, method="best").indices[:, 0].tolist()

    def choose(self, beams: Sequence[Beam]) -> tuple[tuple[Candidate, ...], int]:
        """The candidates of these beams, and the index of the one that the call's method chooses."""
        call = self.call
        answers = [self._answer(beam) for beam in beams]
        choice = -1
        if beams:
            # Without a verifier votes count alike.
            scores = torch.zeros(len(beams)) if call.verifier is None else _scores(beams)
            votes = None
            if call.choose != "best":
                votes = torch.tensor(vote_groups(answers, call.options.canonical))
            choice = int(select(scores, method=call.choose, answers=votes).indices[0, 0])
        candidates = tuple(
            Candidate(beam.text, beam.steps, beam.step_scores, beam.score, answer, beam.reason, beam.tokens)
            for beam, answer in zip(beams, answers)
        )
        return candidates, choice

    def _answer(self, beam: Beam) -> str | None:
        answer = self.call.options.answer(beam.text)
        if answer is not None and not isinstance(answer, str):
            fail("answer", "a function that returns a string or None", repr(answer), TypeError)
        return answer


def _scores(beams: Sequence[Beam]) -> torch.Tensor:
    return torch.tensor([beam.score for beam in beams], dtype=torch.float32)
