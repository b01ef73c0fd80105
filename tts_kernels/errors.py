"""How a wrong argument is refused. Plain Python: the cost formulas need no torch."""

from __future__ import annotations

import operator
from typing import NoReturn


def fail(argument: str, expected: object, got: object, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{argument}: expected {expected}, got {got}")


def check_int(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        fail(name, "an int", repr(value), TypeError)
    value = operator.index(value)
    if value < least:
        fail(name, f"at least {least}", value)
    return value
