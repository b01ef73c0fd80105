"""What the searches and the policy accept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

from tts_kernels.tree.checks import check_int, fail


def check_questions(name: str, question: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(question, str):
        return (question,)
    if not isinstance(question, Sequence):
        fail(name, "a string, or a list of strings", repr(question), TypeError)
    for i, text in enumerate(question):
        if not isinstance(text, str):
            fail(f"{name}[{i}]", "a string", repr(text), TypeError)
    return tuple(question)


def check_verifier(verifier: object) -> None:
    if verifier is None:
        fail("verifier", "a Verifier: only majority needs none", "None", TypeError)


def check_sampling(max_new_tokens: int, temperature: float, top_p: float, top_k: int) -> None:
    check_int("max_new_tokens", max_new_tokens, 1)
    check_int("top_k", top_k, 0)
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if isinstance(value, bool) or not isinstance(value, Real):
            fail(name, "a number", repr(value), TypeError)
    if not 0 <= temperature < math.inf:
        fail("temperature", "at least 0 and finite", temperature)
    if not 0 < top_p <= 1:
        fail("top_p", "0 < top_p <= 1", top_p)


def check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The stop strings; none for None."""
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(string, str) for string in strings):
        fail("stop", "a string, a list of strings or None", repr(stop), TypeError)
    if not strings or not all(strings):
        fail("stop", "strings that are not empty, or None", repr(stop))
    return tuple(strings)
