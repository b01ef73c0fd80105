"""Beam search over steps and diverse verifier tree search: step by step, the verifier says what is taken further.

What search-and-learn (https://github.com/huggingface/search-and-learn, src/sal/search) calls n, beam_width and
num_iterations is here

    n = width * expand     candidates in every iteration
    beam_width = expand    steps sampled under each beam that is kept
    num_iterations = depth

with its lookahead of 0. The last iteration samples to the end instead of to the end of a step, and what comes is scored
step by step like the rest.

Where both searches deviate:
- ties and nan: the higher score first, then the lower index, and nan never, where argsort's order is unspecified;
- the verifier scores what its recipe's `split` makes of each step as it comes. search-and-learn splits the whole text
  anew, and for RLHFlow's models what stands behind the last stop string, nothing, is a step whose score is read;
- a beam is continued from its tokens, not from its text tokenized again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

from tts_kernels.tree.checks import check_int, fail

from .checks import check_stop, check_verifier
from .drive import Call
from .record import SearchBatch, SearchResult
from .run import Beam, Grow, Judge, Run, Search

if TYPE_CHECKING:
    from tts_kernels.verifier import Verifier

    from .policy import Policy


@overload
def beam_search(policy: Policy, verifier: Verifier, question: str, **options: Any) -> SearchResult: ...
@overload
def beam_search(
    policy: Policy, verifier: Verifier, question: list[str] | tuple[str, ...], **options: Any
) -> SearchBatch: ...
def beam_search(
    policy: Policy,
    verifier: Verifier,
    question: str | Sequence[str],
    *,
    width: int,
    expand: int,
    depth: int = 40,
    stop: str | Sequence[str] = "\n\n",
    filter_duplicates: bool = True,
    **options: Any,
) -> SearchResult | SearchBatch:
    """Step-level beam search: of width * expand candidates the `width` best are kept and continued, `depth` times.

    An iteration:

    1. The beams kept, which are one empty beam at first, are repeated in turn (0, 1, 2, 0, 1, ...) up to
       width * expand, and each copy samples a step. All are scored.
    2. Those that ended, by an end token or out of tokens, are put aside. If none is left the search ends.
    3. With `filter_duplicates`, of beams with equal text the first stays.
    4. The `width` best by their aggregate are kept, in their order; the others are dropped.

    Since ended beams take no place among those kept, the later iterations have as many candidates as the first.

    The candidates of the result are those that ended, best first, of equal scores the one that ended first, at most
    width * expand (search-and-learn's sort_completed=True; without it, its default, it takes the first that ended);
    the first is the choice. They are not repeated up to width * expand where they are fewer, as they are there: votes
    over them would count one answer twice. filter_duplicates=False is the default there, and True what its recipe for
    beam search says.

    question: one, or several, which go through the models together. stop: see `Policy.sample_steps`. options: see
    `Options`. Raises TypeError and ValueError for wrong arguments, OutOfPages where a tree is full.
    """
    stops = _check(verifier, width, expand, depth, stop)
    if not isinstance(filter_duplicates, bool):
        fail("filter_duplicates", "a bool", repr(filter_duplicates), TypeError)
    parameters = {"width": width, "expand": expand, "depth": depth, "stop": list(stops),
                  "filter_duplicates": filter_duplicates}  # fmt: skip
    size = width * expand

    def search(run: Run) -> Search:
        active, ended = [run.root], []
        for iteration in range(1, depth + 1):
            parents = [active[i % len(active)] for i in range(size)]
            beams = yield Grow(parents, stops if iteration < depth else None)
            yield Judge(beams)
            ended += [beam for beam in beams if beam.reason != "stop"]
            active = [beam for beam in beams if beam.reason == "stop"]
            if filter_duplicates:
                active = _first_of_equal_text(active)
            active = [active[i] for i in sorted(run.best(active, width))]
            run.keep(active)
            run.step_done()
            if not active:
                break
        order = run.best(ended, len(ended))
        unscored = [i for i in range(len(ended)) if i not in set(order)]
        return [ended[i] for i in [*order, *unscored][:size]]

    with Call(
        "beam_search", policy, verifier, question, options, search, parameters, total=depth, unit="step"
    ) as call:  # fmt: skip
        return call.results()


@overload
def dvts(policy: Policy, verifier: Verifier, question: str, **options: Any) -> SearchResult: ...
@overload
def dvts(policy: Policy, verifier: Verifier, question: list[str] | tuple[str, ...], **options: Any) -> SearchBatch: ...
def dvts(
    policy: Policy,
    verifier: Verifier,
    question: str | Sequence[str],
    *,
    width: int,
    expand: int,
    depth: int = 40,
    stop: str | Sequence[str] = "\n\n",
    until: str | None = "boxed{",
    **options: Any,
) -> SearchResult | SearchBatch:
    """Diverse verifier tree search: `width` independent trees below the question, in each of which the best of
    `expand` steps is continued, `depth` times.

    An iteration samples `expand` steps below the tip of every tree that is not finished and scores them; the best of
    a tree's becomes its tip. A tree is finished when its tip ended, by an end token or out of tokens, or when its
    text contains `until` (None: then only so). A tree all of whose new steps are without a score is finished too.

    The candidates of the result are the `expand` steps of each tree's last iteration with what lies above them, tree
    after tree, width * expand in all; of a tree that finished early some may not have ended. The choice is the best of
    them, which is the best tip.

    `width` is n / beam_width of search-and-learn, as in `beam_search`. question: one, or several, which go through the
    models together. stop: see `Policy.sample_steps`. options: see `Options`. Raises TypeError and ValueError for wrong
    arguments, OutOfPages where a tree is full.
    """
    stops = _check(verifier, width, expand, depth, stop)
    if until is not None and not (isinstance(until, str) and until):
        fail("until", "a string that is not empty, or None", repr(until), ValueError if until == "" else TypeError)
    parameters = {"width": width, "expand": expand, "depth": depth, "stop": list(stops), "until": until}

    def search(run: Run) -> Search:
        last: list[list[Beam]] = [[] for _ in range(width)]  # of each tree, what was sampled below its tip
        tips = dict.fromkeys(range(width), run.root)  # of the trees that go on
        for iteration in range(1, depth + 1):
            parents = [tip for tip in tips.values() for _ in range(expand)]
            beams = yield Grow(parents, stops if iteration < depth else None)
            yield Judge(beams)
            going = {}
            for place, (tree, best) in enumerate(zip(tips, run.best_of_each(beams, expand))):
                last[tree] = beams[place * expand : (place + 1) * expand]
                if best >= 0 and beams[best].reason == "stop" and not (until and until in beams[best].text):
                    going[tree] = beams[best]
            tips = going
            run.keep(list(tips.values()))
            run.step_done()
            if not tips:
                break
        return [beam for tree in last for beam in tree]

    with Call("dvts", policy, verifier, question, options, search, parameters, total=depth, unit="step") as call:
        return call.results()


def _first_of_equal_text(beams: list[Beam]) -> list[Beam]:
    first: dict[str, Beam] = {}
    for beam in beams:
        first.setdefault(beam.text, beam)
    return list(first.values())


def _check(verifier: Verifier, width: int, expand: int, depth: int, stop: str | Sequence[str]) -> tuple[str, ...]:
    for name, value in (("width", width), ("expand", expand), ("depth", depth)):
        check_int(name, value, 1)
    if stop is None:
        fail("stop", "a string or a list of strings: they end a step", "None", TypeError)
    check_verifier(verifier)
    if not verifier.recipe.stepwise:
        fail("verifier", "one whose recipe scores step after step", f"recipe {verifier.recipe.name}: use best_of_n")
    return check_stop(stop)
