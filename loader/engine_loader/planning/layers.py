"""Whole tensors in groups by layer, in an order that follows from their names alone. Pure.

So processes that read one model from different sources go through it in step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from engine_loader.planning.whole import Whole, into_files


def layer_of(name: str) -> str:
    """The name up to its first number: `model.layers.3` of `model.layers.3.mlp.up.weight`.

    Empty where no part of the name is a number.
    """
    parts = name.split(".")
    numbered = (at for at, part in enumerate(parts) if _is_number(part))
    at = next(numbered, None)
    return "" if at is None else ".".join(parts[: at + 1])


def in_order(names: Iterable[str]) -> list[str]:
    """Sorted, with numbers in the names by their value: `layers.2` before `layers.10`."""
    return sorted(names, key=_order)


def by_layer(wholes: Sequence[Whole], max_nbytes: int) -> list[list[Whole]]:
    """A group for each layer, and first one for the tensors of no layer; in order, as `in_order`.

    A group of more than `max_nbytes` is cut. Only a group of one tensor may be larger.
    """
    by_name = {whole.name: whole for whole in wholes}
    layers: defaultdict[str, list[Whole]] = defaultdict(list)
    for name in in_order(by_name):
        layers[layer_of(name)].append(by_name[name])
    return [group for layer in in_order(layers) for group in into_files(layers[layer], max_nbytes)]


def _order(name: str) -> tuple[tuple[tuple[int, str], ...], str]:
    """A number's length, then its digits: so that no number is too long."""
    parts = [part.lstrip("0") if _is_number(part) else part for part in name.split(".")]
    numbers = map(_is_number, name.split("."))
    return (
        tuple(
            (len(part) if number else _AFTER_NUMBERS, part)
            for part, number in zip(parts, numbers, strict=True)
        ),
        name,
    )


_AFTER_NUMBERS = 1 << 30


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdecimal()
