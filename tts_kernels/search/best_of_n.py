"""Best-of-N and votes: whole answers sampled in parallel, then one of them chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tts_kernels.tree.checks import check_int

from .record import SearchResult
from .run import Run

if TYPE_CHECKING:
    from tts_kernels.verifier import Verifier

    from .policy import Policy


def best_of_n(policy: Policy, verifier: Verifier, question: str, *, n: int, **options) -> SearchResult:
    """`n` answers, of which the one with the highest score is chosen: the higher score first, then the lower index.

    As in search-and-learn (src/sal/search/best_of_n.py), whose argmax breaks ties in the same way. The prompt is
    computed once, all answers are decoded together, and the verifier encodes them in one go as a tree, so that any
    recipe serves, one that scores whole answers too. A candidate without a single step has no score and is not chosen.

    options: see `Options`. Raises TypeError and ValueError for wrong arguments and OutOfPages where a tree is full.
    """
    return _sample(policy, verifier, question, n, "best_of_n", "best", options)


def weighted_vote(policy: Policy, verifier: Verifier, question: str, *, n: int, **options) -> SearchResult:
    """`n` answers as in `best_of_n`; the answer whose candidates' scores have the greatest sum wins.

    Chosen is its best-scored candidate. As in search-and-learn (src/sal/utils/math.py: answers in canonical form, the
    first of those that tie), but a candidate without an answer votes for nothing where it votes for "" there, the
    canonical form is plain text where sympy simplifies there, and the aggregate is that of `reduce` where it is
    always "last" there. `answer` and `canonical` take other functions. Where `answer` finds none in any candidate
    nothing is chosen, and a warning says so.
    """
    return _sample(policy, verifier, question, n, "weighted_vote", "weighted_vote", options)


def majority(policy: Policy, question: str, *, n: int, verifier: Verifier | None = None, **options) -> SearchResult:
    """`n` answers as in `best_of_n`; the answer that most candidates gave wins, of those that tie the one whose first
    voter has the lower index.

    Needs no verifier: then the first candidate that gave the answer is chosen. With one, a candidate without a score
    does not vote, and the best-scored candidate of the answer is chosen. Else as `weighted_vote`.
    """
    return _sample(policy, verifier, question, n, "majority", "majority", options)


def _sample(policy, verifier, question, n, name, choose, options) -> SearchResult:
    check_int("n", n, 1)
    with Run(name, policy, verifier, question, options, total=n, unit="candidate") as run:
        candidates = run.grow([run.root] * n, stop=None)
        run.keep([])
        if verifier is not None:
            run.judge_whole(candidates)
        return run.result(candidates, {"n": n}, choose=choose)
