"""Numbers that callers give, as Python's own, or InvalidField that names the field. Pure."""

from __future__ import annotations

import operator

from engine_registry.errors import InvalidField

MIN_TTL_S = 2.0  # etcd grants no shorter lease
# for how long a rank whose host has died may stay listed; etcd itself would grant 285 years
MAX_TTL_S = 86_400.0
# Engines hold the GIL for many seconds where they compile or capture graphs; loaders turn to other
# ranks meanwhile.
UNRESPONSIVE_AFTER_S = 30.0
MIN_UNRESPONSIVE_S = 1.0  # less would mark a machine that has too much to do
MAX_S = 1e9  # 30 years: Python's waits take no more than ten times as much


def whole(field: str, value: object, least: int = 0, most: int | None = None) -> int:
    """Of any type that stands for a whole number, as numpy's do. Truth values do not."""
    if type(value) is int and value >= least and (most is None or value <= most):
        return value  # as a rule
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except Exception as exc:
        raise _invalid(field, value, least, most) from exc
    if isinstance(value, bool) or number < least or (most is not None and number > most):
        raise _invalid(field, value, least, most)
    return number


def whole_or_none(field: str, value: object, least: int = 0) -> int | None:
    return None if value is None else whole(field, value, least)


def seconds(field: str, value: object, least: float = 0.0, most: float = MAX_S) -> float:
    """A finite time: whole numbers and fractions of any type, no texts."""
    try:
        number = float("" if isinstance(value, str | bytes | bytearray) else value)  # type: ignore[arg-type]
        good = not isinstance(value, bool) and least <= number <= most
    except Exception as exc:
        raise _no_time(field, value, least, most) from exc
    if not good:
        raise _no_time(field, value, least, most)
    return number


def _invalid(field: str, value: object, least: int, most: int | None) -> InvalidField:
    limits = f"{least} or more" if most is None else f"from {least} to {most}"
    return InvalidField(
        f"{field} {value!r} is not valid: it is a whole number, {limits}", field=field
    )


def _no_time(field: str, value: object, least: float, most: float) -> InvalidField:
    return InvalidField(
        f"{field} {value!r} is not valid: it is a number of seconds from {least:g} to {most:g}",
        field=field,
    )
