"""What differs between instances, as lines, as a table and as the summary of both, for people."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from engine_cli.render.texts import some_of
from engine_registry.schema.printable import count

if TYPE_CHECKING:
    from engine_loader import Comparison, Difference

_BY_FILES = "compare each with files: engines verify INSTANCE --against FOLDER"
# by the value of an Obstacle: why, and what to do
_OBSTACLES = {
    "no digests": (
        "ranks publish no digests",
        "publish with digests, as `engines register` does",
    ),
    "algorithm": ("hosts and GPUs have other digests", _BY_FILES),
    "layout": ("the ranks hold other parts", _BY_FILES),
    "order": ("they lie in memory in other orders", _BY_FILES),
}


def difference_line(difference: Difference) -> str:
    """The tensor, in what it differs, and what each side has."""
    if difference.aspect.value == "name":
        present = some_of([side for side, form in difference.values.items() if form])
        absent = some_of([side for side, form in difference.values.items() if not form])
        return f"{difference.tensor}: in {present}, not in {absent}"
    holders: defaultdict[str, list[str]] = defaultdict(list)
    for holder, value in difference.values.items():
        holders[value].append(holder)
    values = "; ".join(f"{value} in {some_of(some)}" for value, some in holders.items())
    return f"{difference.tensor}: {difference.aspect.value} {values}"


def difference_row(difference: Difference, sides: Sequence[str]) -> list[str]:
    """Of a table with a column for each side."""
    return [
        difference.aspect.value,
        difference.tensor,
        *(_cell(difference.values, side) for side in sides),
    ]


def _cell(values: Mapping[str, str], side: str) -> str:
    """Digests are by rank, everything else by side."""
    if side in values:
        return values[side] or "-"
    ranks = {
        holder.rpartition("/")[2]: value
        for holder, value in values.items()
        if holder.rpartition("/")[0] == side
    }
    if len(set(ranks.values())) == 1:
        return next(iter(ranks.values()))
    return some_of([f"{value} (rank {rank})" for rank, value in ranks.items()])


def summary(comparison: Comparison) -> Iterator[str]:
    """What came of it, in lines."""
    for obstacle, number in Counter(comparison.unproven.values()).items():
        why, mend = _OBSTACLES[obstacle.value]
        yield f"not compared: the bytes of {count(number, 'tensor')}, as {why}"
        if obstacle.value == "no digests":
            yield f"no digests: {some_of(comparison.without_digests)}"
        yield f"to mend it, {mend}"
    all_of_them = f"{count(comparison.tensors, 'tensor')} in {_listed(comparison.sides)}"
    if comparison.differences:
        yield f"different: {len(comparison.differences):,} of {all_of_them}"
    elif comparison.unproven:
        yield f"not proven to be the same: {len(comparison.unproven):,} of {all_of_them}"
    elif len(comparison.sides) > 1:
        yield f"the same: {all_of_them}"
    else:
        yield f"the same on each rank that has them: {comparison.compared:,} of {all_of_them}"


def _listed(sides: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(sides[:-1]), sides[-1]]))
