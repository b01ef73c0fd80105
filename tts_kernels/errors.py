"""How a wrong argument is refused. Plain Python: the cost formulas need no torch."""

from __future__ import annotations

import operator
from typing import NoReturn


def fail(argument: str, expected: object, got: object, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{argument}: expected {expected}, got {got}")


def check_int(name: str, value: object, least: int | None = None) -> int:
    """`value` as a Python int: ints, numpy's integers and whatever else `operator.index` takes, but no bool."""
    try:
        index = None if isinstance(value, bool) else operator.index(value)
    except TypeError:  # a float, say, or a tensor that is not one integer
        index = None
    if index is None:
        fail(name, "an int", repr(value), TypeError)
    if least is not None and index < least:
        fail(name, f"at least {least}", index)
    return index
