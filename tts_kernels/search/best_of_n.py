"""Best-of-N and votes: whole answers sampled in parallel, then one of them chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from tts_kernels.tree.checks import check_int

from .checks import check_verifier
from .drive import Call
from .record import SearchBatch, SearchResult
from .run import Grow, Judge, Run, Search

if TYPE_CHECKING:
    from tts_kernels.verifier import Verifier

    from .policy import Policy


@overload
def best_of_n(policy: Policy, verifier: Verifier, question: str, *, n: int, **options: Any) -> SearchResult: ...
@overload
def best_of_n(
    policy: Policy, verifier: Verifier, question: list[str] | tuple[str, ...], *, n: int, **options: Any
) -> SearchBatch: ...
def best_of_n(
    policy: Policy, verifier: Verifier, question: str | Sequence[str], *, n: int, **options: Any
) -> SearchResult | SearchBatch:
    """`n` answers, of which the one with the highest score is chosen: the higher score first, then the lower index.

    As in search-and-learn (src/sal/search/best_of_n.py), whose argmax breaks ties in the same way. The prompt is
    computed once, all answers are decoded together, and the verifier encodes them in one go as a tree, so that any
    recipe serves, one that scores whole answers too. A candidate without a single step has no score and is not chosen.

    question: one, or several, which go through the models together. options: see `Options`. Raises TypeError and
    ValueError for wrong arguments and OutOfPages where a tree is full.
    """
    return _sample(policy, verifier, question, n, "best_of_n", "best", options)


@overload
def weighted_vote(policy: Policy, verifier: Verifier, question: str, *, n: int, **options: Any) -> SearchResult: ...
@overload
def weighted_vote(
    policy: Policy, verifier: Verifier, question: list[str] | tuple[str, ...], *, n: int, **options: Any
) -> SearchBatch: ...
def weighted_vote(
    policy: Policy, verifier: Verifier, question: str | Sequence[str], *, n: int, **options: Any
) -> SearchResult | SearchBatch:
    """`n` answers as in `best_of_n`; the answer whose candidates' scores have the greatest sum wins.

    Chosen is its best-scored candidate. As in search-and-learn (src/sal/utils/math.py: answers in canonical form, the
    first of those that tie), but a candidate without an answer votes for nothing where it votes for "" there, the
    canonical form is plain text where sympy simplifies there, and the aggregate is that of `reduce` where it is
    always "last" there. `answer` and `canonical` take other functions. Where `answer` finds none in any candidate
    nothing is chosen, and a warning says so.
    """
    return _sample(policy, verifier, question, n, "weighted_vote", "weighted_vote", options)


@overload
def majority(
    policy: Policy, question: str, *, n: int, verifier: Verifier | None = None, **options: Any
) -> SearchResult: ...
@overload
def majority(
    policy: Policy, question: list[str] | tuple[str, ...], *, n: int, verifier: Verifier | None = None, **options: Any
) -> SearchBatch: ...
def majority(
    policy: Policy, question: str | Sequence[str], *, n: int, verifier: Verifier | None = None, **options: Any
) -> SearchResult | SearchBatch:
    """`n` answers as in `best_of_n`; the answer that most candidates gave wins, of those that tie the one whose first
    voter has the lower index.

    Needs no verifier: then the first candidate that gave the answer is chosen. With one, a candidate without a score
    does not vote, and the best-scored candidate of the answer is chosen. Else as `weighted_vote`.
    """
    return _sample(policy, verifier, question, n, "majority", "majority", options)


def _sample(
    policy: Policy, verifier: Verifier | None, question: str | Sequence[str], n: int, name: str, choose: str,
    options: Mapping[str, Any],
) -> SearchResult | SearchBatch:  # fmt: skip
    check_int("n", n, 1)
    if choose != "majority":
        check_verifier(verifier)

    def search(run: Run) -> Search:
        candidates = yield Grow([run.root] * n, None)
        run.keep([])
        if verifier is not None:
            yield Judge(candidates, whole=True)
        return candidates

    with Call(
        name, policy, verifier, question, options, search, {"n": n}, total=n, unit="candidate", choose=choose
    ) as call:
        return call.results()
