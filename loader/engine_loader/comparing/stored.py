"""Files in the place of an instance: the digests that its ranks would publish if they held what the
files hold.

Used by `comparing.compare`. Reads the files group by group, so memory is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from engine_loader.comparing.holding import HeldRank, Holding
from engine_loader.digests.table import ALGORITHMS, digests_of
from engine_loader.errors import DigestsMissing
from engine_loader.files.disk import DiskRead
from engine_loader.files.folder import Paths, files_of
from engine_loader.files.memory import allocate
from engine_loader.files.stored import Files
from engine_loader.planning.placed import steps_of
from engine_loader.tensors.dtypes import dtype_named
from engine_loader.tensors.regions import describe
from engine_loader.tensors.shards import shard_of
from engine_registry import TensorEntry

_GROUP_NBYTES = 1 << 30
_Form = tuple[str, tuple[int, ...]]  # dtype and shape


def stored_like(paths: Paths, like: Holding) -> Holding:
    """What the files hold, cut as the ranks of `like` are. A folder means the same as for
    `load_or_seed`.

    WeightsFileInvalid says which file is at fault.
    """
    files = [Files(files_of(paths, rank.place.rank)) for rank in like.ranks]
    name = str(paths) if isinstance(paths, str | Path) else files[0].name
    ranks = [
        _stored_rank(
            name if len(files) == 1 else f"{name} as rank {rank.place.rank}",
            some,
            rank,
            like.names,
        )
        for some, rank in zip(files, like.ranks, strict=True)
    ]
    return Holding(name, ranks)


def _stored_rank(name: str, files: Files, rank: HeldRank, wanted: set[str]) -> HeldRank:
    """Without the digests of what could not be compared anyway."""
    if rank.digests is not None and rank.algorithm not in ALGORITHMS:
        raise DigestsMissing(
            f"{rank.name} has digests by {rank.algorithm!r}, which this version cannot compute",
            "upgrade engine-registry",
        )
    forms = {tensor: form for layout in files.layouts() for tensor, form in layout.items()}
    entries = []
    fitting = []
    for entry in rank.manifest.tensors:
        if (form := forms.get(entry.name)) is None:
            continue
        if form[0] == entry.dtype and form[1] in (entry.shape, entry.global_shape):
            fitting.append(entry)
            entries.append(entry)
        else:
            entries.append(_as_stored(entry.name, form))
    entries += [_as_stored(tensor, form) for tensor, form in forms.items() if tensor not in wanted]
    digests: dict[str, bytes] = {}
    for group in _groups(fitting) if rank.digests is not None else ():
        digests |= digests_of(_read(files, group), rank.algorithm)
    manifest = replace(rank.manifest, tensors=tuple(entries))
    return HeldRank(name, rank.place, manifest, digests, rank.algorithm)


def _as_stored(name: str, form: _Form) -> TensorEntry:
    """The whole tensor. Its bytes are not compared, so their number does not matter."""
    dtype, shape = form
    return TensorEntry(name, dtype, shape, 0, 0, shape, (0,) * len(shape), opaque=False)


def _groups(entries: Sequence[TensorEntry]) -> Iterator[list[TensorEntry]]:
    group: list[TensorEntry] = []
    room = _GROUP_NBYTES
    for entry in entries:
        if group and entry.nbytes > room:
            yield group
            group, room = [], _GROUP_NBYTES
        group.append(entry)
        room -= entry.nbytes
    if group:
        yield group


def _read(files: Files, entries: Sequence[TensorEntry]) -> Mapping[str, torch.Tensor]:
    """The parts that the rank holds, with their bytes in the order in which its memory has them."""
    tensors = allocate({one.name: (dtype_named(one.dtype), one.shape) for one in entries})
    shards = {one.name: shard_of(one) for one in entries if not one.opaque}
    DiskRead(files, tensors, describe(tensors, shards)).read()
    return {
        one.name: tensors[one.name]
        if one.strides is None
        else tensors[one.name].permute(_by_distance(one)).contiguous()
        for one in entries
    }


def _by_distance(entry: TensorEntry) -> list[int]:
    """The dimensions, from the one whose neighbours lie farthest apart in memory."""
    steps = steps_of(entry)
    return sorted(range(len(steps)), key=lambda axis: -steps[axis])
