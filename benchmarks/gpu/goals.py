"""What the figures shall be, and whether they are.

Most goals are ratios of rates, so that sets of other sizes can be beside each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu import kills, layouts, updates
from benchmarks.gpu.rows import (
    AGAIN,
    AGAIN_DIGESTS,
    COLD,
    EACH_NCCL,
    FLAT_COPY,
    TURN,
    TURN_DIGESTS,
    WARM,
    Row,
    reads_of,
)


@dataclass(frozen=True)
class Goal:
    what: str
    limit: float
    at_least: bool
    value: float | None  # None: what it is made of was not run

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not run"
        return (
            "met"
            if (self.value >= self.limit if self.at_least else self.value <= self.limit)
            else "missed"
        )

    def as_json(self) -> dict[str, Any]:
        value = None if self.value is None else round(self.value, 3)
        return {
            "what": self.what,
            "limit": self.limit,
            "at_least": self.at_least,
            "value": value,
            "verdict": self.verdict,
        }

    def cells(self) -> list[str]:
        value = "" if self.value is None else f"{self.value:.3f}"
        return [self.what, f"{'>=' if self.at_least else '<='} {self.limit:g}", value, self.verdict]


def goals(
    rows: Sequence[Row], counts: Mapping[str, Mapping[str, int]], protocol: str
) -> list[Goal]:
    """Of one protocol, beside what needs none."""
    found = {
        (row.group, row.what): row.gb_per_s
        for row in rows
        if row.samples_s and row.nbytes and row.protocol in ("", protocol)
    }

    def faster(group: str, one: str, other: str) -> float | None:
        """How many times the rate of the other."""
        rates = found.get((group, one)), found.get((group, other))
        return None if rates[0] is None or rates[1] is None else rates[0] / rates[1]

    def at_least(limit: float, group: str, one: str, other: str) -> Goal:
        return Goal(f"{group}: rate of {one}, to {other}", limit, True, faster(group, one, other))

    def at_most(limit: float, group: str, one: str, other: str) -> Goal:
        """Of times, for the same bytes."""
        return Goal(f"{group}: time of {one}, to {other}", limit, False, faster(group, other, one))

    def none_of(part: str, what: str) -> Goal:
        count = counts[part].get(what, 0) if part in counts else None
        return Goal(f"{part}: {what}", 0, False, count)

    large = ("mixed", "large")
    return [
        *(at_least(0.95, group, reads_of(TURN), FLAT_COPY) for group in large),
        *(at_most(1.25, group, warm, FLAT_COPY) for group in large for warm in (WARM, AGAIN)),
        *(at_most(2, group, COLD, WARM) for group in large),
        *(
            at_most(1.03, group, *pair)
            for group in large
            for pair in (
                (reads_of(TURN_DIGESTS), reads_of(TURN)),
                (TURN_DIGESTS, TURN),
                (AGAIN_DIGESTS, AGAIN),
            )
        ),
        *(
            at_least(0.9, layouts.GROUP, reads_of(one), reads_of(contiguous))
            for one, contiguous in layouts.BESIDE
        ),
        *(at_least(10, "small", load, EACH_NCCL) for load in (reads_of(TURN), AGAIN, WARM)),
        none_of(updates.GROUP, updates.WRONG),
        none_of(kills.GROUP, kills.WRONG),
        none_of(kills.GROUP, kills.UNTYPED),
        none_of(kills.GROUP, kills.DEAD),
        none_of(kills.GROUP, kills.HELD),
    ]
