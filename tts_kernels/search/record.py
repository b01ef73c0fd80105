"""What a search returns: every candidate with its scores, the choice, and what each part of it cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, overload


@dataclass(frozen=True)
class Candidate:
    """One answer of the policy.

    text         all of it, special tokens left out
    steps        the pieces that the verifier scored; () without a verifier
    step_scores  a probability for each of them
    score        the aggregate of step_scores that the search went by; nan without steps
    answer       what `answer` took out of the text, or None
    reason       why it is no longer: "eos", the policy ended it; "length", it ran out of tokens; "stop", it ended a
                 step and the search took it no further
    tokens       that the policy sampled for it, from the prompt on, an end token included
    """

    text: str
    steps: tuple[str, ...]
    step_scores: tuple[float, ...]
    score: float
    answer: str | None
    reason: str
    tokens: int

    @property
    def ended(self) -> bool:
        """Whether the policy ended it itself."""
        return self.reason == "eos"


@dataclass(frozen=True)
class Cost:
    """Tokens and seconds of each part of a call; on a GPU it is waited for before a part's time is taken.

    Of one question among several only `new_tokens` is told, the rest is None: what a forward for all of them takes has
    no part that is one question's. `SearchBatch.cost` has the whole.

    prompt_tokens     of the policy's prompt, computed once
    new_tokens        that the policy sampled, for candidates that were dropped on the way too
    policy_tokens     that went through the policy model, the prompt's included
    verifier_tokens   that went through the verifier model, the question's included
    prefill_seconds   the prompt through the policy
    decode_seconds    sampling
    verify_seconds    scoring: the session's start, encoding and heads
    select_seconds    choosing: between steps, the answers, the final choice
    seconds           all of it
    """

    prompt_tokens: int | None = None
    new_tokens: int = 0
    policy_tokens: int | None = None
    verifier_tokens: int | None = None
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    verify_seconds: float | None = None
    select_seconds: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class SearchResult:
    """The record of a search.

    candidates  best first where the search ranks them, else in the order of sampling
    choice      index of the chosen candidate; -1 where there is none: no score but nan, or nobody voted
    parameters  of the call, those left to their defaults included
    """

    question: str
    method: str
    candidates: tuple[Candidate, ...]
    choice: int
    seed: int
    parameters: Mapping[str, Any]
    cost: Cost

    @property
    def chosen(self) -> Candidate | None:
        return self.candidates[self.choice] if self.choice >= 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; nan, which JSON has not, is None."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        own["candidates"] = [{**asdict(candidate), "ended": candidate.ended} for candidate in self.candidates]
        own["cost"] = asdict(self.cost)
        return _plain(own)

    def to_json(self, **options) -> str:
        """`to_dict` as JSON; `options` go to json.dumps."""
        return json.dumps(self.to_dict(), allow_nan=False, **options)


@dataclass(frozen=True)
class SearchBatch(Sequence[SearchResult]):
    """The records of several questions that were searched in one call, in their order, and what the call cost.

    A sequence of SearchResult, whose slices are tuples of them. Each has the candidates and the choice that its
    question has alone, from the same seed, but for what sums of other sizes round otherwise.
    """

    results: tuple[SearchResult, ...]
    cost: Cost

    def __len__(self) -> int:
        return len(self.results)

    @overload
    def __getitem__(self, index: int) -> SearchResult: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[SearchResult, ...]: ...
    def __getitem__(self, index: int | slice) -> SearchResult | tuple[SearchResult, ...]:
        return self.results[index]

    def to_dict(self) -> dict[str, Any]:
        """As `SearchResult.to_dict`."""
        return {"results": [result.to_dict() for result in self.results], "cost": asdict(self.cost)}

    def to_json(self, **options) -> str:
        """`to_dict` as JSON; `options` go to json.dumps."""
        return json.dumps(self.to_dict(), allow_nan=False, **options)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
