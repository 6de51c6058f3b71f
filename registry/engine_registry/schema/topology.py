"""The place of a rank along each parallel axis. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from engine_registry.errors import InvalidField
from engine_registry.schema.numbers import whole
from engine_registry.schema.texts import check_kind

_ORDERED = (tuple, list)  # as a rule


def check_topology(topology: object) -> dict[str, tuple[int, int]]:
    """With Python's integers, or InvalidField."""
    check_kind("topology", topology, Mapping)
    return {axis: _checked_place(axis, place) for axis, place in topology.items()}  # type: ignore[attr-defined]


def _checked_place(axis: Any, place: Any) -> tuple[int, int]:
    try:
        if not isinstance(axis, str) or not axis.isprintable():
            raise ValueError("the axis is not one line of printable text")
        if not isinstance(place, _ORDERED) and isinstance(place, Set | Mapping):
            raise ValueError("it has no order")
        index, size = place
        size = whole("topology", size, 1)
        return whole("topology", index, 0, size - 1), size
    except (TypeError, ValueError) as exc:
        raise InvalidField(
            f"topology {axis!r}: {place!r} is not valid: an axis has (index, size), and the "
            "index is from 0 to size - 1",
            field="topology",
        ) from exc
