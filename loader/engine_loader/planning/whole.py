"""The whole tensors that the ranks of an instance hold together, and which of them go into which
file. Pure.

Files are named as Hugging Face names them, so that what reads its checkpoints reads these.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from engine_loader.errors import WeightsMismatch, listed
from engine_loader.planning.boxes import Box
from engine_loader.planning.placed import boxes_of, in_one_order, strides_like
from engine_registry.schema.manifest import Manifest, TensorEntry

MAX_FILE_NBYTES = 5 * 10**9
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OURS = re.compile(r"model(-[0-9]{5,}-of-[0-9]{5,})?\.safetensors|" + re.escape(INDEX))


@dataclass(frozen=True)
class Whole:
    """`opaque`: its rank does not say that it is the whole, but there is no other rank.

    `strides` are in the order of every rank's, where all have the same.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    opaque: bool
    strides: tuple[int, ...] | None = None


def whole_tensors(instance: str, manifests: Sequence[Manifest]) -> list[Whole]:
    """Of all ranks, by rank: what they are shards of, in the order in which it lies in their
    memory.

    WeightsMismatch names the tensors of which that is not known, or of which no rank has some
    part.
    """
    held: defaultdict[str, list[tuple[int, TensorEntry]]] = defaultdict(list)
    for rank, manifest in enumerate(manifests):
        for entry in sorted(manifest.tensors, key=lambda entry: (entry.addr, entry.name)):
            held[entry.name].append((rank, entry))
    silent = [name for name, shards in held.items() if any(entry.opaque for _, entry in shards)]
    if silent and len(manifests) > 1:
        raise WeightsMismatch(
            f"{len(silent)} of {len(held)} tensors of {instance!r} do not say which part of "
            "the whole they are, and it has "
            f"{len(manifests)} ranks: {listed(silent)}",
            "publish all of its ranks with `shards`, or load one rank at a time",
            tensors=silent,
        )
    problems = [
        f"{name}: {problem}"
        for name, shards in held.items()
        if (problem := _disagreement(shards) or _gap(shards))
    ]
    if problems:
        raise WeightsMismatch(
            f"the ranks of {instance!r} do not make whole tensors, nothing was read: "
            f"{listed(problems)}",
            "register them with the right shards",
            problems=problems,
        )
    return [_whole(name, shards) for name, shards in held.items()]


def _disagreement(shards: Sequence[tuple[int, TensorEntry]]) -> str:
    first_rank, first = shards[0]
    for rank, entry in shards[1:]:
        if entry.dtype != first.dtype:
            return f"has dtype {entry.dtype} on rank {rank}, {first.dtype} on rank {first_rank}"
        if entry.global_shape != first.global_shape:
            whole, other = list(entry.global_shape), list(first.global_shape)
            return f"is part of {whole} on rank {rank}, of {other} on rank {first_rank}"
    return ""


def _gap(shards: Sequence[tuple[int, TensorEntry]]) -> str:
    """What none of them holds."""
    _, first = shards[0]
    whole = Box((0,) * len(first.global_shape), first.global_shape)
    missing = [whole] if whole.volume else []
    for box in dict.fromkeys(box for _, entry in shards for box in boxes_of(entry)):
        missing = [rest for part in missing for rest in part.minus(box)]
    if not missing:
        return ""
    return (
        f"no rank has the part at {list(missing[0].offsets)} of shape {list(missing[0].shape)}, "
        f"of {list(whole.shape)}"
    )


def _whole(name: str, shards: Sequence[tuple[int, TensorEntry]]) -> Whole:
    _, first = shards[0]
    itemsize = max(
        (entry.nbytes // prod(entry.shape) for _, entry in shards if entry.nbytes), default=0
    )
    nbytes = prod(first.global_shape) * itemsize
    alike = all(in_one_order(first, entry) for _, entry in shards)
    return Whole(
        name,
        first.dtype,
        first.global_shape,
        nbytes,
        first.opaque,
        strides_like(first, first.global_shape) if alike else None,
    )


def into_files(wholes: Sequence[Whole], max_nbytes: int = MAX_FILE_NBYTES) -> list[list[Whole]]:
    """In order, one file at least.

    Only one that holds a single tensor may be larger than `max_nbytes`.
    """
    files: list[list[Whole]] = [[]]
    room = max_nbytes
    for whole in wholes:
        if files[-1] and whole.nbytes > room:
            files.append([])
            room = max_nbytes
        files[-1].append(whole)
        room -= whole.nbytes
    return files


def file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def is_file_of_a_model(name: str) -> bool:
    """It is one of those that readers of a whole model look for: of any number of files, or their
    index.
    """
    return _OURS.fullmatch(name) is not None


def index_of(files: Sequence[Sequence[Whole]]) -> dict[str, Any]:
    """What the index of several files says: which tensor is in which."""
    places = {
        whole.name: name
        for name, file in zip(file_names(len(files)), files, strict=True)
        for whole in file
    }
    return {
        "metadata": {"total_size": sum(whole.nbytes for file in files for whole in file)},
        "weight_map": dict(sorted(places.items())),
    }
