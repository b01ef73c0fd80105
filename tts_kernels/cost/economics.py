"""Internal against external: training once against sampling and verifying for every query, at equal accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tts_kernels.errors import fail

from . import figures
from .checks import check_number
from .formulas import break_even
from .table import markdown, volume_text

SCALES = {
    "as given": {},
    "training x 0.5": {"train": 0.5},
    "training x 2": {"train": 2.0},
    "external x 0.5": {"external": 0.5},
    "external x 2": {"external": 2.0},
    "internal x 0.5": {"internal": 0.5},
    "internal x 2": {"internal": 2.0},
}


@dataclass(frozen=True)
class Comparison:
    """Made by `compare`. All costs in `currency`; `external` by sharing."""

    train_cost: float
    internal: float
    external: Mapping[str, float]
    internal_accuracy: float
    external_accuracy: float
    currency: str

    def volume(self, sharing: str, *, train: float = 1.0, external: float = 1.0, internal: float = 1.0) -> float:
        """Queries from which on training was cheaper; costs scaled by the factors given."""
        return break_even(self.train_cost * train, self.external[sharing] * external, self.internal * internal)

    def total(self, side: str, queries: float) -> float:
        """Of so many queries: "internal", training included, or external under a policy of sharing."""
        if side == "internal":
            return self.train_cost + queries * self.internal
        return queries * self.external[side]

    def sensitivity_rows(self) -> list[list[str]]:
        """Break-even volumes by sharing, with each cost halved and doubled."""
        return [
            [label, *(volume_text(self.volume(sharing, **scale)) for sharing in self.external)]
            for label, scale in SCALES.items()
        ]

    def sensitivity(self) -> str:
        return markdown(("break-even, queries", *self.external), self.sensitivity_rows())

    def plot(self, path: str | Path, caption: str) -> None:
        """Total cost against queries, as SVG or PNG by the name. Needs matplotlib."""
        path = Path(path)
        path.write_bytes(figures.image(figures.draw(figures.break_even, self, caption), path.suffix[1:].lower()))


def compare(
    train_cost: float,
    internal: float,
    external: Mapping[str, float],
    *,
    internal_accuracy: float | None,
    external_accuracy: float | None,
    currency: str,
) -> Comparison:
    """Training (`train_cost` once, `internal` a query) beside sampling (`external` a query, by sharing), where both
    reach the same accuracy. Raises ValueError where the external side does not reach it, since then it is no way to the
    same thing at any price (the "reasoning floor"), and where an accuracy is not given."""
    for name, value in (("internal_accuracy", internal_accuracy), ("external_accuracy", external_accuracy)):
        if value is None:
            fail(name, "an accuracy in [0, 1]: a break-even is stated at equal accuracy only", "none")
        check_number(name, value, least=0, most=1)
    if external_accuracy < internal_accuracy:
        fail(
            "external_accuracy",
            f"at least the internal side's {internal_accuracy:g}: a break-even is stated at equal accuracy only",
            f"{external_accuracy:g}, so the external side cannot stand in for training at any price",
        )
    check_number("train_cost", train_cost, least=0)
    check_number("internal", internal, least=0)
    for sharing, cost in external.items():
        check_number(f"external[{sharing!r}]", cost, least=0)
    return Comparison(train_cost, internal, dict(external), internal_accuracy, external_accuracy, currency)


def cheapest(comparison: Comparison, queries: float, sides: Sequence[str]) -> str:
    """Of the sides, the one whose total over so many queries is the least."""
    return min(sides, key=lambda side: comparison.total(side, queries))
