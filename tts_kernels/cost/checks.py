"""What the cost functions accept. Plain Python, like the formulas: nothing here needs torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Real
from typing import NoReturn

from tts_kernels.errors import fail


def check_number(name: str, value: object, *, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        fail(name, "a number", repr(value), TypeError)
    value = float(value)
    if not math.isfinite(value):
        fail(name, "a finite number", value)
    if value < least:
        fail(name, f"at least {least:g}", f"{value:g}")
    if value > most:
        fail(name, f"at most {most:g}", f"{value:g}")
    return value


def check_choice(name: str, value: object, options: Iterable[str]) -> str:
    options = list(options)
    if not isinstance(value, str):
        fail(name, "one of " + ", ".join(options), repr(value), TypeError)
    if value not in options:
        fail(name, "one of " + ", ".join(options), repr(value))
    return value


def fail_unknown(name: str, value: str, known: Iterable[str]) -> NoReturn:
    """The error for a name that no table has: with the nearest ones, or with all where none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(value.lower(), known, 3, 0.5)
    fail(name, "one of " + ", ".join(known) + (f"; nearest: {', '.join(near)}" if near else ""), repr(value))
