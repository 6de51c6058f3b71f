"""Whether tensors are like those that a rank has published, byte for byte and tie for tie. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from engine_loader.planning.tied import stand_ins
from engine_registry.schema.manifest import TensorEntry, shape_text

Pair = tuple[TensorEntry, TensorEntry]  # held, and wanted


def match(
    held: Sequence[TensorEntry], wanted: Sequence[TensorEntry]
) -> tuple[dict[str, TensorEntry], list[str]]:
    """By the name of each wanted tensor, the one that is held for it; and one line for each
    difference.

    Of tensors that are the same memory one name on both sides is enough. A wanted tensor that does
    not say what it is part of is taken for the same part. Addresses of wanted ones say which share
    memory.
    """
    there = {entry.name: entry for entry in held}
    here = {entry.name: entry for entry in wanted}
    twins, spare = stand_ins(wanted, there), stand_ins(held, here)
    found: dict[str, TensorEntry] = {}
    problems = [
        f"{name}: held, but not here" for name in there if name not in here and name not in spare
    ]
    for name, entry in here.items():
        other = there.get(twins.get(name, name))
        if other is None:
            problems.append(f"{name}: here, but not held")
        elif problem := _difference(other, entry):
            problems.append(f"{name}: {problem}")
        else:
            found[name] = other
    return found, problems + _untied([(found[name], here[name]) for name in found])


def _difference(held: TensorEntry, entry: TensorEntry) -> str:
    if held.dtype != entry.dtype:
        return f"dtype {held.dtype} held, {entry.dtype} here"
    if held.shape != entry.shape:
        return f"shape {shape_text(held.shape)} held, {shape_text(entry.shape)} here"
    if held.strides != entry.strides:
        return f"{_order_of(held)} held, {_order_of(entry)} here"
    if not entry.opaque and _box_of(held) != _box_of(entry):
        return "another part of the whole is held"
    return ""


def _order_of(entry: TensorEntry) -> str:
    return "contiguous" if entry.strides is None else f"strides {list(entry.strides)}"


def _box_of(entry: TensorEntry) -> tuple[object, ...]:
    return entry.opaque, entry.global_shape, entry.offsets, entry.slices


def _untied(pairs: Sequence[Pair]) -> list[str]:
    """One line for each tensor that shares memory on one side alone, or shares it otherwise."""
    problems: dict[str, str] = {}
    for side, (here, there) in enumerate((("held", "here"), ("here", "held"))):
        for first, *others in _overlapping(pairs, side):
            for one in others:
                if one[1].addr - one[0].addr != first[1].addr - first[0].addr:
                    name = one[1].name
                    problems.setdefault(
                        name,
                        f"{name}: shares memory with {first[1].name} where it is {here}, but not "
                        f"in the same way {there}",
                    )
    return list(problems.values())


def _overlapping(pairs: Iterable[Pair], side: int) -> Iterator[list[Pair]]:
    """In groups that share memory on that side."""
    group: list[Pair] = []
    end = 0
    for pair in sorted(pairs, key=lambda pair: (pair[side].addr, -pair[side].nbytes)):
        entry = pair[side]
        if not entry.nbytes:
            continue
        if group and entry.addr >= end:
            yield group
            group = []
        group.append(pair)
        end = max(end, entry.addr + entry.nbytes) if len(group) > 1 else entry.addr + entry.nbytes
    if group:
        yield group


def blocks_of(found: Mapping[str, TensorEntry]) -> list[dict[str, TensorEntry]]:
    """The held tensors by the names of those that are wanted, in groups that share memory."""
    pairs = [(entry, entry) for entry in found.values()]
    names: dict[TensorEntry, list[str]] = {}
    for name, entry in found.items():
        names.setdefault(entry, []).append(name)
    blocks = []
    for group in _overlapping(dict.fromkeys(pairs), 0):
        blocks.append({name: entry for entry, _ in group for name in names[entry]})
    return blocks
