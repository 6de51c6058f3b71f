"""Which box of the whole tensor a rank's tensors are: from the options of `engines register` to one
box a tensor. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from engine_registry.errors import InvalidField

Places = Mapping[str, tuple[int, int]]  # axis -> (index, size)
_WORLD = "all ranks"  # what is cut over the ranks themselves is cut over this
_SAMPLE = '{"TENSOR": {"global_shape": [8, 16], "offsets": [4, 0]}}'


class Placement(NamedTuple):
    """The whole tensor's shape, and where the rank's part of it begins."""

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """The tensors that match are cut into equal slices along a dimension, one for each place on the
    axis.
    """

    pattern: str
    dim: int
    axis: str
    index: int
    count: int
    text: str  # as the user wrote it


def parse_place(text: str) -> tuple[str, tuple[int, int]]:
    """The axis, and (index, size) on it, of AXIS=INDEX/SIZE; InvalidField."""
    place = re.fullmatch(r"([^=]+)=([0-9]{1,9})/([0-9]{1,9})", text)
    if place is None:
        raise InvalidField(
            f"topology {text!r} is not valid: use AXIS=INDEX/SIZE, such as tp=0/2", field="topology"
        )
    index, count = int(place[2]), int(place[3])
    if index >= count:
        raise InvalidField(
            f"topology {text!r} is not valid: INDEX is from 0 to SIZE - 1", field="topology"
        )
    return place[1], (index, count)


def parse_cut(text: str, places: Places, rank: int, world_size: int) -> Cut:
    """`PATTERN:DIM` is over the axis tp where there is one, else over all ranks; `PATTERN:DIM:AXIS`
    over that axis.
    """
    parts = re.fullmatch(r"(.+):(-?[0-9]{1,9})(?::([^:]+))?", text, re.DOTALL)
    if parts is None:
        raise InvalidField(
            f"--shard {text!r} is not valid: use PATTERN:DIM or PATTERN:DIM:AXIS, such as "
            "'*.q_proj.weight:0'",
            field="shard",
        )
    axis = parts[3]
    if axis is not None and axis not in places:
        known = f"has {', '.join(places)}" if places else "is not given"
        raise InvalidField((
            f"--shard {text!r} is over the axis {axis!r}, but --topology {known}: add --topology "
            f"{axis}=INDEX/SIZE"
        ),
                           field="shard")  # fmt: skip
    axis = axis or ("tp" if "tp" in places else _WORLD)
    index, count = places.get(axis, (rank, world_size))
    return Cut(parts[1], int(parts[2]), axis, index, count, text)


def read_boxes(path: Path) -> dict[str, Placement]:
    """What a file of `--shards` says."""
    try:
        data = json.loads(path.read_bytes(), object_pairs_hook=_each_once)
        if not isinstance(data, dict):
            raise ValueError("it is no object")
        return {name: _box(name, value) for name, value in data.items()}
    except OSError as exc:
        raise InvalidField(
            f"--shards {path} cannot be read: {exc.strerror}", field="shards"
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise InvalidField(f"--shards {path} is not as {_SAMPLE}: {exc}", field="shards") from exc


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"{next(name for name in names if names.count(name) > 1)!r} is there twice"
        )
    return found


def _box(name: str, value: Any) -> Placement:
    if not isinstance(value, dict) or value.keys() != {"global_shape", "offsets"}:
        raise ValueError(
            f"{name!r} does not have the fields global_shape and offsets, and no others"
        )
    for field, numbers in value.items():
        if not isinstance(numbers, list) or not all(
            type(number) is int and number >= 0 for number in numbers
        ):
            raise ValueError(f"{field} of {name!r} is no list of natural numbers")
    return Placement(tuple(value["global_shape"]), tuple(value["offsets"]))


def boxes_of(
    shapes: Mapping[str, tuple[int, ...]],
    cuts: Sequence[Cut],
    listed: Mapping[str, Placement],
    *,
    whole: bool,
) -> dict[str, Placement]:
    """The box of each tensor that has one. The tensors that nothing is said of are whole, if
    `whole` or if anything is said of any.

    InvalidField says which option does not fit the tensors.
    """
    boxes = {name: _checked(name, box, shapes) for name, box in listed.items()}
    by_name: dict[str, list[Cut]] = {}
    for cut in dict.fromkeys(cuts):
        names = [name for name in shapes if fnmatchcase(name, cut.pattern)]
        if not names:
            raise InvalidField(
                f"--shard {cut.text!r} matches none of the {len(shapes)} "
                f"tensors{_for_example(shapes)}: correct PATTERN",
                field="shard",
            )
        for name in names:
            by_name.setdefault(name, []).append(cut)
    for name, some in by_name.items():
        if name in listed:
            raise InvalidField(
                f"tensor {name!r} is in --shards and matches --shard {some[0].text!r}: say it once",
                field="shards",
            )
        boxes[name] = _sliced(name, shapes[name], some)
    if whole or cuts or listed:
        boxes = {
            name: Placement(shape, (0,) * len(shape)) for name, shape in shapes.items()
        } | boxes
    return boxes


def _for_example(shapes: Mapping[str, object]) -> str:
    first = next(iter(shapes), None)
    return f" (the first is {first!r})" if first is not None else ""


def _sliced(name: str, shape: tuple[int, ...], cuts: Sequence[Cut]) -> Placement:
    whole, offsets = list(shape), [0] * len(shape)
    seen: dict[int | str, Cut] = {}
    for cut in cuts:
        if not -len(shape) <= cut.dim < len(shape):
            has = (
                f"DIM is from {-len(shape)} to {len(shape) - 1}"
                if shape
                else "it has no dimensions"
            )
            raise InvalidField(
                f"--shard {cut.text!r} does not fit tensor {name!r} of shape {list(shape)}: {has}",
                field="shard",
            )
        dim = cut.dim % len(shape)
        for key in (dim, cut.axis):
            other = seen.setdefault(key, cut)
            if other is not cut:
                what = f"along dimension {dim}" if key == dim else f"over {cut.axis}"
                raise InvalidField(
                    f"tensor {name!r} is cut twice {what}, by --shard {other.text!r} and "
                    f"--shard {cut.text!r}: leave one out",
                    field="shard",
                )
        whole[dim], offsets[dim] = shape[dim] * cut.count, shape[dim] * cut.index
    return Placement(tuple(whole), tuple(offsets))


def _checked(name: str, box: Placement, shapes: Mapping[str, tuple[int, ...]]) -> Placement:
    if name not in shapes:
        raise InvalidField(
            f"--shards has the tensor {name!r}, which --weights lacks: correct the name",
            field="shards",
        )
    shape = shapes[name]
    fits = len(shape) == len(box.global_shape) == len(box.offsets) and all(
        offset + size <= limit
        for offset, size, limit in zip(box.offsets, shape, box.global_shape, strict=True)
    )
    if not fits:
        raise InvalidField(
            f"--shards has tensor {name!r} at {list(box.offsets)} of "
            f"{list(box.global_shape)}: its shape {list(shape)} does not "
            "fit in there",
            field="shards",
        )
    return box
