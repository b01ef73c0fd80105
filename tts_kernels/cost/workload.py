"""What one query asks for: how many candidates, how long, searched and verified how."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from tts_kernels.errors import check_int, fail

from .checks import check_choice, check_number
from .shapes import ModelShape, as_model

SEARCHES = ("best_of_n", "beam", "dvts")
VERIFIERS = ("none", "orm", "prm")
HEADS = ("vocab", "mlp", "linear")


@dataclass(frozen=True)
class Lognormal:
    """Lengths that vary: lognormal with this mean and coefficient of variation, cut at cap, from a seed. The first n
    draws are the same whatever is drawn after them, on every machine and version of Python."""

    mean: float
    cv: float = 0.0
    cap: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("mean", self.mean, least=1)
        check_number("cv", self.cv, least=0)
        check_int("seed", self.seed, 0)
        if self.cap is not None:
            check_int("cap", self.cap, 1)

    def draw(self, count: int) -> list[int]:
        """So many lengths, at least 1 each."""
        uniform, normal = random.Random(self.seed), NormalDist()
        sigma = math.sqrt(math.log(1 + self.cv**2))
        middle = math.log(self.mean) - sigma**2 / 2
        most = math.inf if self.cap is None else self.cap
        return [
            int(min(most, max(1, round(math.exp(middle + sigma * normal.inv_cdf(uniform.random() or 0.5))))))
            for _ in range(count)
        ]


@dataclass(frozen=True)
class Workload:
    """n candidates for a query, and their verifier.

    n        candidates of a query
    prompt   tokens of the prompt, which is prefilled; several numbers: of the queries, in turn; a Lognormal: drawn for
             each query (with a seed other than the suffix's, or long ones go together)
    suffix   tokens that each candidate decodes for itself: a number, a Lognormal, or n * queries numbers. They are
             decode steps: the first new token comes from the prefill, the last is not computed, so a sample of T new
             tokens has T - 1; taking T for it adds one step to each
    trunk    tokens that the query decodes once, alone, before it forks into n candidates that share them; a Lognormal,
             where there is one query: drawn once
    search   "best_of_n"; "beam" or "dvts": `keep` of n are kept after each of `steps` steps and n / keep continue each.
             The kept ones are taken to share the prefix alone: exact for dvts, whose subtrees do, too dear for a beam
    steps    of a candidate: positions that a PRM scores
    verifier "none"; "orm": one score at the end; "prm": one for each step, after each step of a search. A single
             candidate is not verified: there is nothing to choose from
    verifier_model   a ModelShape or the name of a preset; None: a model of the policy's shape
    verifier_head    what stacks that do not read rows compute at every token: "vocab" (the LM head, as RLHFlow's PRMs),
                     "mlp" (as Qwen2.5-Math-PRM), "linear" (as Skywork's)
    queries  decoded in one batch, in lockstep; the cost is the mean of one of them
    """

    n: int
    prompt: int | Lognormal | tuple[int, ...]
    suffix: int | Lognormal | tuple[int, ...]
    trunk: int | Lognormal = 0
    search: str = "best_of_n"
    keep: int | None = None
    steps: int = 1
    verifier: str = "none"
    verifier_model: ModelShape | str | None = None
    verifier_head: str = "vocab"
    queries: int = 1
    name: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.trunk, Lognormal):
            if self.queries != 1:
                fail("trunk", "a number with several queries, which decode theirs in lockstep", self.trunk)
            object.__setattr__(self, "trunk", self.trunk.draw(1)[0])
        for field, least in (("n", 1), ("trunk", 0), ("steps", 1), ("queries", 1)):
            check_int(field, getattr(self, field), least)
        check_choice("search", self.search, SEARCHES)
        check_choice("verifier", self.verifier, VERIFIERS)
        check_choice("verifier_head", self.verifier_head, HEADS)
        if self.verifier_model is not None:
            object.__setattr__(self, "verifier_model", as_model(self.verifier_model))
        if isinstance(self.prompt, (list, tuple)):
            if not self.prompt:
                fail("prompt", "at least one length", "none")
            object.__setattr__(
                self, "prompt", tuple(check_int(f"prompt[{i}]", p, 0) for i, p in enumerate(self.prompt))
            )
        elif not isinstance(self.prompt, Lognormal):
            check_int("prompt", self.prompt, 0)
        if isinstance(self.suffix, (list, tuple)):
            if len(self.suffix) != self.n * self.queries:
                fail("suffix", f"n * queries = {self.n * self.queries} lengths", len(self.suffix))
            object.__setattr__(
                self, "suffix", tuple(check_int(f"suffix[{i}]", s, 1) for i, s in enumerate(self.suffix))
            )
        elif not isinstance(self.suffix, Lognormal):
            check_int("suffix", self.suffix, 1)
        self._check_search()

    def _check_search(self) -> None:
        if self.search == "best_of_n":
            if self.keep is not None:
                fail("keep", "none with search best_of_n", self.keep)
            return
        if self.keep is None:
            fail("keep", f"the number of candidates that {self.search} keeps", "none", TypeError)
        if self.n % check_int("keep", self.keep, 1):
            fail("keep", f"a divisor of n = {self.n}", self.keep)
        if isinstance(self.suffix, (tuple, Lognormal)):
            fail("suffix", f"one number with search {self.search}, whose steps end together", self.suffix)
        if self.suffix % self.steps:
            fail("suffix", f"a multiple of steps = {self.steps} with search {self.search}", self.suffix)
        if self.verifier == "orm":
            fail("verifier", f"prm or none with search {self.search}, which scores unfinished candidates", "orm")

    @functools.cached_property
    def prompts(self) -> tuple[int, ...]:
        """Of each query."""
        if isinstance(self.prompt, Lognormal):
            return tuple(self.prompt.draw(self.queries))
        prompts = self.prompt if isinstance(self.prompt, tuple) else (self.prompt,)
        return tuple(prompts[i % len(prompts)] for i in range(self.queries))

    @functools.cached_property
    def suffixes(self) -> tuple[tuple[int, ...], ...]:
        """Of each candidate of each query."""
        count = self.n * self.queries
        if isinstance(self.suffix, Lognormal):
            flat = tuple(self.suffix.draw(count))
        elif isinstance(self.suffix, tuple):
            flat = self.suffix
        else:
            flat = (self.suffix,) * count
        return tuple(flat[i : i + self.n] for i in range(0, count, self.n))

    @property
    def sharing_ratio(self) -> float:
        """x of the headline figure: 2 P / S with the means of both; 1 + x is the ceiling of `kv_saving`."""
        prefix = sum(self.prompts) / self.queries + self.trunk
        return 2 * prefix * self.n * self.queries / sum(map(sum, self.suffixes))

    def groups(self, n: int) -> list[Workload]:
        """Workloads of n candidates each, n at most this one's, that together use its candidates once (the last few are
        left out where n does not divide them). With a search: one, which keeps the same share."""
        if check_int("n", n, 1) > self.n:
            fail("n", f"at most the workload's {self.n}", n)
        if self.search != "best_of_n":
            return [dataclasses.replace(self, n=n, keep=share_kept(n, self))]
        if isinstance(self.suffix, int):
            return [dataclasses.replace(self, n=n)]
        starts = range(0, self.n - n + 1, n)
        return [
            dataclasses.replace(self, n=n, suffix=tuple(s for query in self.suffixes for s in query[i : i + n]))
            for i in starts
        ]

    def check_context(self, model: ModelShape) -> None:
        """Raises ValueError, naming the model and its limit, where a candidate is longer than it."""
        longest = max(p + self.trunk + max(lengths) for p, lengths in zip(self.prompts, self.suffixes))
        checked = [("model", model)]
        if self.verifier != "none":
            checked.append(("verifier_model", self.verifier_model or model))
        for role, shape in checked:
            if longest > shape.max_positions:
                fail(role, f"a context of at most {shape.max_positions} tokens, the limit of {shape.name}", longest)

    @classmethod
    def from_dict(cls, fields: Mapping) -> Workload:
        """From the JSON of a scenario: the fields by name, a lognormal as {"mean": ..., "cv": ..., "cap": ..., "seed":
        ...}."""
        if not isinstance(fields, Mapping):
            fail("workload", "an object with the fields of a Workload", type(fields).__name__, TypeError)
        known = {field.name for field in dataclasses.fields(cls)}
        for key in fields:
            if key not in known:
                fail("workload", "the fields " + ", ".join(sorted(known)), repr(key))
        for key in ("n", "prompt", "suffix"):
            if key not in fields:
                fail("workload", f"a field {key!r}", ", ".join(fields) or "nothing")
        fields = dict(fields)
        for key in ("prompt", "trunk", "suffix"):
            if isinstance(fields.get(key), Mapping):
                try:
                    fields[key] = Lognormal(**fields[key])
                except TypeError as error:
                    fail(key, "mean, cv, cap and seed of a lognormal", error, TypeError)
        return cls(**fields)


def share_kept(n: int, work: Workload) -> int:
    """Of n candidates, as many as a search keeps of its own number: the same share, or the next smaller divisor."""
    most = max(1, n * work.keep // work.n)
    return next(keep for keep in range(most, 0, -1) if n % keep == 0)
