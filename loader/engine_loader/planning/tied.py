"""Several names of one memory, as tied weights have. Pure.

A module's `state_dict()` has all of them, its `named_parameters()` one. So the two sides of a load
may differ in these names, and all memory of each still has its counterpart on the other.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace

from engine_registry.schema.manifest import TensorEntry


def stand_ins(entries: Iterable[TensorEntry], names: Container[str]) -> dict[str, str]:
    """Of one side's entries, those that the other side's `names` lack and can do without, each with
    the name among these that exactly the same memory has as well.

    The same in address, bytes, dtype, shape and box: a view of a part of it is another tensor.
    """
    entries = [entry for entry in entries if entry.nbytes]
    lacking = [entry for entry in entries if entry.name not in names]
    if not lacking:
        return {}
    known = {_memory(entry): entry.name for entry in entries if entry.name in names}
    found = {entry.name: known.get(_memory(entry)) for entry in lacking}
    return {name: other for name, other in found.items() if other is not None}


def tied_names(entries: Sequence[TensorEntry]) -> list[list[str]]:
    """The names of each memory that has several."""
    at = Counter(entry.addr for entry in entries if entry.nbytes)
    names: defaultdict[TensorEntry, list[str]] = defaultdict(list)
    for entry in entries:
        if entry.nbytes and at[entry.addr] > 1:
            names[_memory(entry)].append(entry.name)
    return [some for some in names.values() if len(some) > 1]


def _memory(entry: TensorEntry) -> TensorEntry:
    """Equal for all names of it."""
    return replace(entry, name="")
