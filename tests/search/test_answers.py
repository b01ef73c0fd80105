from __future__ import annotations

import pytest

from tts_kernels.search.answers import boxed, canonical, vote_groups


@pytest.mark.parametrize(
    "text, answer",
    [
        ("no box", None),
        (r"\boxed{98}", "98"),
        (r"first \boxed{1}, then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}} and {more}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x \right.}", r"\left\{x \right."),  # an escaped brace closes nothing
        (r"\boxed{}", ""),
        (r"\boxed{1} or \boxed{2", None),  # cut off
        ("\\boxed{1\\", None),
        (r"\boxed {3}", None),
    ],
)
def test_boxed(text, answer):
    assert boxed(text) == answer


@pytest.mark.parametrize(
    "same",
    [
        ("2", " 2 ", "2.0", "+2", "$2$", "2.", "02"),
        ("-0.5", "-.50", r"-0.5\!"),
        ("0", "-0", "0.00"),
        ("1200", "1200.0"),  # not 1.2E+3
        ("1" * 40, "+" + "1" * 40 + ".0", "0" + "1" * 40),
        (r"\frac{1}{2}", r"\dfrac{1}{2}", r"\tfrac{1} {2}"),
        ("(1,2)", r"\left( 1, 2 \right)", "( 1,2 )"),
    ],
)
def test_canonical_equal(same):
    assert len({canonical(answer) for answer in same}) == 1


def test_canonical_different():
    different = ["1" * 30, "1" * 29 + "2", "1/2", "0.5", r"\frac{1}{2}", "-1", "1", "x", "X", r"\leftarrow", "arrow"]
    assert len({canonical(answer) for answer in different}) == len(different)


def test_vote_groups():
    assert vote_groups(["2", None, "1", "2.0", ""]) == [0, -1, 1, 0, 2]
    assert vote_groups(["a", "A"], str.lower) == [0, 0]
    assert vote_groups([]) == []
