"""A policy and a verifier without models, for tests that say literally what a search has to do.

The policy reads its steps out of a script; the verifier's scores are a function of the steps alone. Both keep count of
what they were asked and of what is held, and refuse what the real ones refuse.
"""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import torch

from tts_kernels.search import Step

STEP, CUT = "\n\n", "<cut>"  # how a scripted step ends: at a stop string, or out of tokens; else with an end token


class FakePolicy:
    """`script[text so far]` is the list of what the model says next, taken in turn, from the beginning again when all
    was said. A token is a character."""

    device = torch.device("cpu")

    def __init__(self, script: dict[str, list[str]]):
        self.script = script
        self.said = defaultdict(int)
        self.texts: dict[int, str] = {}  # of the nodes that are held
        self.ended: set[int] = set()
        self.calls: list[tuple[list[str], object]] = []  # texts of the parents, stop
        self.tokens_computed = 0
        self._next = 0

    def prompt(self, question):
        return question

    def start(self, prompt):
        self.tokens_computed += len(prompt)
        return self._node("")

    def sample_steps(self, parents, *, n=1, stop, progress, generator, **sampling):
        assert n == 1 and not self.ended.intersection(parents)
        self.calls.append(([self.texts[parent] for parent in parents], stop))
        steps = []
        for parent in parents:
            before = self.texts[parent]
            says = self.script[before][self.said[before] % len(self.script[before])]
            self.said[before] += 1
            reason = "stop" if says.endswith(STEP) else "length" if says.endswith(CUT) else "eos"
            assert stop is not None or reason != "stop", f"to the end, but the script says {says!r}"
            says = says.removesuffix(CUT)
            node = self._node(before + says)
            if reason == "eos":
                self.ended.add(node)
            steps.append(Step(node, says, tuple(map(ord, says)), reason == "eos", reason))
            self.tokens_computed += len(says)
        progress(sum(len(step.ids) for step in steps), 0)
        return steps

    def release(self, nodes):
        for node in nodes:
            del self.texts[node]

    def _node(self, text):
        self._next += 1
        self.texts[self._next] = text
        return self._next


class FakeVerifier:
    """`scores["a/b"]` is the score of step b behind step a."""

    def __init__(self, scores: dict[str, float], *, aggregate: str = "last", stepwise: bool = True):
        self.scores = scores
        self.recipe = SimpleNamespace(
            name="fake", aggregate=aggregate, stepwise=stepwise, split=lambda text: [s for s in text.split(STEP) if s]
        )
        self.sessions: list[FakeSession] = []

    def session(self, question, **settings):
        assert self.recipe.stepwise
        self.sessions.append(FakeSession(self))
        return self.sessions[-1]

    def score_batch(self, questions, outputs):
        paths = [tuple(self.recipe.split(output)) for output in outputs[0]]
        prefixes = {path[:k] for path in paths for k in range(1, len(path) + 1)}
        return self.read(paths, tokens=len(questions[0]) + sum(len(prefix[-1]) for prefix in prefixes))

    def read(self, paths, **more):
        probs = [[self.scores["/".join(path[: k + 1])] for k in range(len(path))] for path in paths]
        aggregates = {
            "last": lambda p: p[-1], "min": min, "prod": math.prod, "mean": lambda p: sum(p) / len(p), "max": max
        }  # fmt: skip
        return SimpleNamespace(
            prob=torch.tensor([p for path in probs for p in path], dtype=torch.float32),
            count=torch.tensor([len(path) for path in probs], dtype=torch.int32),
            **{
                name: torch.tensor([reduce(p) if p else math.nan for p in probs], dtype=torch.float32)
                for name, reduce in aggregates.items()
            },
            **more,
        )


class FakeSession:
    def __init__(self, verifier: FakeVerifier):
        self.verifier = verifier
        self.root = 0
        self.paths: dict[int, tuple[str, ...]] = {0: ()}
        self.holds: dict[int, int] = defaultdict(int)
        self.encoded: list[tuple[str, ...]] = []  # paths, in the order in which their last step was encoded
        self.closed = False

    @property
    def tokens_encoded(self):
        return sum(len(path[-1]) for path in self.encoded)

    def extend(self, parents, steps):
        nodes = []
        known = {path: node for node, path in self.paths.items()}
        for parent, step in zip(parents, steps):
            path = (*self.paths[parent], step)
            if path not in known:
                self.encoded.append(path)
                known[path] = len(self.encoded)
                self.paths[known[path]] = path
            nodes.append(known[path])
            self.holds[known[path]] += 1
        return self.verifier.read([self.paths[node] for node in nodes], nodes=tuple(nodes))

    def scores(self, nodes):
        return self.verifier.read([self.paths[node] for node in nodes])

    def release(self, nodes):
        for node in nodes:
            assert self.holds[node] > 0
            self.holds[node] -= 1

    def close(self):
        self.closed = True


def texts(result) -> list[str]:
    return [candidate.text for candidate in result.candidates]


def nothing_is_held(policy: FakePolicy, verifier: FakeVerifier) -> bool:
    return not policy.texts and all(session.closed for session in verifier.sessions)
