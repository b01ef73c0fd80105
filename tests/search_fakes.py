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
    was said. A token is a character. The text of a prompt is "" where it is the only one, else the prompt."""

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

    def start_all(self, prompts):
        self.tokens_computed += sum(map(len, prompts))
        return [self._node(prompt if len(prompts) > 1 else "") for prompt in prompts]

    def sample_steps(self, parents, *, n=1, stop, progress, generator, **sampling):
        assert n == 1 and not self.ended.intersection(parents) and len(generator) == len(parents)
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
    """`scores["a/b"]` is the score of step b behind step a; of several questions q, `scores["q/a/b"]`."""

    def __init__(self, scores: dict[str, float], *, aggregate: str = "last", stepwise: bool = True):
        self.scores = scores
        self.recipe = SimpleNamespace(
            name="fake", aggregate=aggregate, stepwise=stepwise, split=lambda text: [s for s in text.split(STEP) if s]
        )
        self.sessions: list[FakeSession] = []

    def session(self, question, **settings):
        assert self.recipe.stepwise
        self.sessions.append(FakeSession(self, [""] if isinstance(question, str) else question))
        return self.sessions[-1]

    def score_batch(self, questions, outputs):
        names = questions if len(questions) > 1 else [""]
        paths = [
            (name, *self.recipe.split(output)) for name, texts in zip(names, outputs, strict=True) for output in texts
        ]
        prefixes = {path[:k] for path in paths for k in range(2, len(path) + 1)}
        return self.read(paths, tokens=sum(map(len, questions)) + sum(len(prefix[-1]) for prefix in prefixes))

    def read(self, paths, **more):
        keys = [["/".join(path[: k + 1]).removeprefix("/") for k in range(1, len(path))] for path in paths]
        probs = [[self.scores[key] for key in of_path] for of_path in keys]
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
    def __init__(self, verifier: FakeVerifier, questions: list[str]):
        self.verifier = verifier
        self.roots = tuple(-i for i in range(len(questions)))
        self.paths: dict[int, tuple[str, ...]] = {root: (q,) for root, q in zip(self.roots, questions)}
        self.holds: dict[int, int] = defaultdict(int)
        self._made: list[tuple[str, ...]] = []  # paths, in the order in which their last step was encoded
        self.calls = 0
        self.closed = False

    @property
    def encoded(self):
        return [path[path[0] == "" :] for path in self._made]

    @property
    def tokens_encoded(self):
        return sum(len(path[-1]) for path in self._made)

    def extend(self, parents, steps):
        nodes = []
        self.calls += 1
        known = {path: node for node, path in self.paths.items()}
        for parent, step in zip(parents, steps):
            path = (*self.paths[parent], step)
            if path not in known:
                self._made.append(path)
                known[path] = len(self._made)
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
