"""What a part of the benchmark has found: tables to read, and figures that goals are about."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Cell = str | int | float
Say = Callable[[str], None]  # what is measured now


@dataclass(frozen=True)
class Table:
    """`note` says what was fitted, or how it was measured."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass
class Found:
    """`figures` by the names that goals use; those that were not measured are missing."""

    tables: list[Table] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def add(self, other: Found) -> None:
        self.tables += other.tables
        self.figures |= other.figures

    def to_json(self) -> dict[str, Any]:
        return {
            "tables": [
                {
                    "title": table.title,
                    "note": table.note,
                    "rows": [dict(zip(table.columns, row, strict=True)) for row in table.rows],
                }
                for table in self.tables
            ],
            "figures": {name: None if math.isnan(x) else x for name, x in self.figures.items()},
        }


def text_of(cell: Cell) -> str:
    """With three digits that count, or more where it is a whole number."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int) or abs(cell) >= 100:
        return f"{cell:,.0f}"
    return f"{cell:.3g}"
