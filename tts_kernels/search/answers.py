"""How a vote takes the answer out of a candidate's text, and when it counts two answers as equal.

Both are arguments of the searches: `answer`, from a text to a string or None, and `canonical`, from an answer to the
form in which answers are compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Context, Decimal

BOX = "\\boxed{"
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")
SPACING = re.compile(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\[!,;: ]|[\s~]")


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} of `text` holds; None where there is none, or where its brace is never closed.

    Braces are matched; \{ and \} are no braces.
    """
    begin = text.rfind(BOX)
    if begin < 0:
        return None
    begin += len(BOX)
    open_braces, i = 1, begin
    while i < len(text):
        if text[i] == "\\":
            i += 1  # what it escapes is no brace
        elif text[i] == "{":
            open_braces += 1
        elif text[i] == "}":
            open_braces -= 1
            if not open_braces:
                return text[begin:i]
        i += 1
    return None


def canonical(answer: str) -> str:
    r"""`answer` without what does not change it: dollar signs around it, spaces, a full stop at the end, \left and
    \right, the d or t of \dfrac and \tfrac, zeros that lead or trail a decimal number, its plus sign.

    No algebra: 1/2, 0.5 and \frac{1}{2} are three answers. A function that knows more can take its place.
    """
    answer = SPACING.sub("", answer).strip("$").rstrip(".").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    if NUMBER.fullmatch(answer):
        number = Decimal(answer)
        return f"{number.normalize(Context(prec=len(answer))):f}" if number else "0"
    return answer


def vote_groups(answers: Sequence[str | None], canonical: Callable[[str], str] = canonical) -> list[int]:
    """Equal numbers for answers of equal canonical form, in the order of their first voters; -1 for None. What `select`
    takes as `answers`."""
    numbers: dict[str, int] = {}
    return [-1 if a is None else numbers.setdefault(canonical(a), len(numbers)) for a in answers]
