"""The manifest of a rank as it lies in etcd. Pure.

Stored as zlib-compressed JSON, in columns, cut into parts of at most 1 MiB so that none exceeds
etcd's request limit of 1.5 MiB. The record carries the digest of the stored bytes, checked before
anything is unpacked.

It is read by `json`, not into a Struct of msgspec as the other formats are. `values` may hold NaN
and infinities, which msgspec neither reads nor writes. And of the time that a manifest of 60,000
tensors takes to decode, `json` takes a seventh: the rest makes and checks the tensors.
"""

from __future__ import annotations

import base64
import bisect
import hashlib
import itertools
import json
import zlib
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from engine_registry.collector import collector_paused
from engine_registry.errors import InvalidField, RecordDamaged, SchemaUnsupported
from engine_registry.schema.manifest import (
    DigestTable,
    Export,
    Manifest,
    Region,
    TensorEntry,
)
from engine_registry.schema.printable import is_unicode, short
from engine_registry.schema.record import ManifestRef
from engine_registry.schema.tensor_format import END_OF_MEMORY, entry_of, natural

# 3 where a tensor is several boxes of the whole, else 2 where one has strides, else 1. Readers of
# 1 would take every tensor for contiguous, and those of 2 for one box.
SCHEMA = 3
PART_NBYTES = 1 << 20
MAX_PARTS = 256
MAX_UNPACKED_NBYTES = 256 << 20  # a manifest of a million tensors takes about 100 MB
# Commas and brackets, each of which may become an object of some 60 bytes (of four times that for a
# brace). A million tensors that say which box they are have 14 million.
MAX_UNPACKED_ITEMS = 20 << 20
DIGEST_NBYTES = 16
MAX_BOXES = 1024  # of one tensor: 256 experts, each fused of two, have 512
MAX_FUSED_BOXES = 1 << 20  # of all tensors that are several boxes: a reader compares each of them
MAX_HANDLE_NBYTES = 256  # of an export; CUDA's have 64
MAX_DELTAS = 64
MAX_EXPORTS = 1 << 17  # that a reader opens; of torch's segments of 2 MiB that is 256 GiB
# Marks, and digests of blocks, that a reader makes room for; of blocks of 1 MiB that is 4 TiB.
MAX_MARKS = MAX_BLOCK_DIGESTS = 4 << 20


def encode(manifest: Manifest) -> tuple[ManifestRef, list[bytes]]:
    """What the record says of the manifest, and the parts to store; InvalidField where no reader
    would take it.
    """
    try:
        _check_places(manifest)
    except ValueError as exc:
        raise InvalidField(f"the manifest is not valid: {exc}", field="manifest") from exc
    tensors = manifest.tensors
    data = {
        "schema": 1,
        "name": [entry.name for entry in tensors],
        "dtype": [entry.dtype for entry in tensors],
        "shape": [entry.shape for entry in tensors],
        "addr": [entry.addr for entry in tensors],
        "nbytes": [entry.nbytes for entry in tensors],
        "box": [None if entry.opaque else [entry.global_shape, entry.offsets] for entry in tensors],
        "regions": [[region.addr, region.nbytes] for region in manifest.regions],
        "digests": manifest.digests and [manifest.digests.algorithm, manifest.digests.addr],
        "values": manifest.values,
    }
    if any(entry.strides for entry in tensors):
        data |= {"schema": 2, "strides": [entry.strides for entry in tensors]}
    if any(entry.slices is not None for entry in tensors):
        data |= {"schema": 3, "slices": [entry.slices for entry in tensors]}
    if manifest.digests and manifest.digests.block_nbytes:
        # beside the pair, which older readers take apart
        data["digest_block_nbytes"] = manifest.digests.block_nbytes
    if manifest.block_nbytes:
        data["block_nbytes"] = manifest.block_nbytes
    if manifest.exports:
        data["exports"] = [
            [export.addr, export.nbytes, base64.b64encode(export.handle).decode()]
            for export in manifest.exports
        ]
    if manifest.deltas:
        data["deltas"] = [[region.addr, region.nbytes] for region in manifest.deltas]
    raw = json.dumps(data, separators=(",", ":")).encode()
    if problem := _too_much(raw):
        raise InvalidField(
            f"a manifest of {len(tensors)} tensors cannot be published: {problem}", field="manifest"
        )
    stored = zlib.compress(raw)
    parts = [stored[start : start + PART_NBYTES] for start in range(0, len(stored), PART_NBYTES)]
    ref = ManifestRef(hashlib.sha256(stored).hexdigest(), len(parts), len(tensors), manifest.nbytes)
    return ref, parts


@collector_paused
def decode(owner: str, ref: ManifestRef, parts: Sequence[bytes]) -> Manifest:
    """The manifest of the rank whose record is at `owner`; RecordDamaged says what is wrong with
    it.
    """
    stored = b"".join(parts)
    if hashlib.sha256(stored).hexdigest() != ref.digest:
        raise RecordDamaged(
            f"the manifest of {owner} does not match the digest in its record",
            "register the rank again",
            key=owner,
        )
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(stored, MAX_UNPACKED_NBYTES)
        if not unpacker.eof:
            raise ValueError(
                f"it unpacks to more than {MAX_UNPACKED_NBYTES >> 20} MiB or is cut short"
            )
        if problem := _too_much(raw):
            raise ValueError(problem)
        data = json.loads(raw)
        if not isinstance(data, dict) or type(data.get("schema")) is not int:
            raise ValueError("it has no schema number")
        if data["schema"] > SCHEMA:
            raise SchemaUnsupported(
                f"the manifest of {owner} has schema {short(data['schema'])}; this version "
                f"reads up to {SCHEMA}",
                "upgrade engine-registry",
                key=owner,
            )
        manifest = _from_json(data)
        if (len(manifest.tensors), manifest.nbytes) != (ref.tensors, ref.nbytes):
            raise ValueError(
                f"it has {len(manifest.tensors)} tensors of {manifest.nbytes} bytes, its "
                f"record says {ref.tensors} of {ref.nbytes}"
            )
        _check_places(manifest)
        return manifest
    except (zlib.error, ValueError, TypeError, KeyError, RecursionError, MemoryError) as exc:
        raise RecordDamaged(
            f"the manifest of {owner} is damaged: {short(exc) or type(exc).__name__}", key=owner
        ) from exc


def _too_much(raw: bytes) -> str:
    """Looked at before it is parsed: Python's objects take twenty times the room of their JSON."""
    if len(raw) > MAX_UNPACKED_NBYTES:
        return f"it unpacks to {len(raw) >> 20} MiB, {MAX_UNPACKED_NBYTES >> 20} are the limit"
    items = raw.count(b",") + raw.count(b"[") + 4 * raw.count(b"{")
    return (
        f"it holds {items} items, {MAX_UNPACKED_ITEMS} are the limit"
        if items > MAX_UNPACKED_ITEMS
        else ""
    )


def _check_places(manifest: Manifest) -> None:
    """ValueError unless the regions lie apart, in memory, and each tensor in one of them; and
    unless memory could hold its whole. Tensors may share memory: tied weights and views do. And
    where there are too many boxes.
    """
    regions = sorted(manifest.regions, key=lambda region: region.addr)
    if any(not region.nbytes or region.end > END_OF_MEMORY for region in regions):
        raise ValueError("a region is empty or reaches beyond what memory there is")
    if any(one.end > next_one.addr for one, next_one in itertools.pairwise(regions)):
        raise ValueError("two of its regions overlap")
    starts = [region.addr for region in regions]
    for entry in manifest.tensors:
        if max(prod(entry.global_shape), *entry.global_shape, 0) >= END_OF_MEMORY:
            raise ValueError(f"tensor {short(entry.name)!r} is part of a whole of 2^63 or more")
        place = bisect.bisect_right(starts, entry.addr) - 1
        if entry.nbytes and (place < 0 or entry.addr + entry.nbytes > regions[place].end):
            raise ValueError(
                f"tensor {short(entry.name)!r} lies outside its regions: {entry.nbytes} "
                f"bytes at {entry.addr:#x}"
            )
    _check_count_of_boxes(manifest)
    _check_exports(manifest.exports)
    if manifest.marks > MAX_MARKS:
        raise ValueError(
            f"its blocks of {manifest.block_nbytes} bytes have {manifest.marks} marks, "
            f"{MAX_MARKS} are the limit"
        )
    if manifest.digests is not None:
        _check_digests(manifest.digests, manifest.tensors)
    if len(manifest.deltas) > MAX_DELTAS or any(
        not region.nbytes or region.end > END_OF_MEMORY for region in manifest.deltas
    ):
        raise ValueError("a buffer of its deltas is empty or reaches beyond what memory there is")


def _check_digests(table: DigestTable, tensors: Sequence[TensorEntry]) -> None:
    blocks = sum([table.blocks_of(entry.nbytes) for entry in tensors])
    if blocks > MAX_BLOCK_DIGESTS:
        raise ValueError(
            f"its blocks of {table.block_nbytes} bytes have {blocks} digests, "
            f"{MAX_BLOCK_DIGESTS} are the limit"
        )
    if table.addr + DIGEST_NBYTES * (len(tensors) + blocks) > END_OF_MEMORY:
        raise ValueError("the table of its digests reaches beyond what memory there is")


def _check_exports(exports: Sequence[Export]) -> None:
    if len(exports) > MAX_EXPORTS:
        raise ValueError(f"it has {len(exports)} exports, {MAX_EXPORTS} are the limit")
    some = sorted(exports, key=lambda export: export.addr)
    if any(
        not export.nbytes
        or export.end > END_OF_MEMORY
        or not 0 < len(export.handle) <= MAX_HANDLE_NBYTES
        for export in some
    ):
        raise ValueError("one of its exports is no allocation with a handle")
    if any(one.end > next_one.addr for one, next_one in itertools.pairwise(some)):
        raise ValueError("two of its exports overlap")


def _check_count_of_boxes(manifest: Manifest) -> None:
    fused = [entry for entry in manifest.tensors if entry.slices is not None]
    for entry in fused:
        if entry.boxes > MAX_BOXES:
            raise ValueError(
                f"tensor {short(entry.name)!r} is {entry.boxes} boxes of its whole, {MAX_BOXES} "
                "are the limit"
            )
    if (count := sum([entry.boxes for entry in fused])) > MAX_FUSED_BOXES:
        raise ValueError(
            f"its tensors of several boxes have {count} of them, {MAX_FUSED_BOXES} are the limit"
        )


def _from_json(data: dict[str, Any]) -> Manifest:
    columns = [data[name] for name in ("name", "dtype", "shape", "addr", "nbytes", "box")]
    columns += [_strides_column(data, len(columns[0])), _slices_column(data, len(columns[0]))]
    if len({len(column) for column in columns}) != 1:
        raise ValueError("its columns differ in length")
    tensors = tuple(entry_of(*row) for row in zip(*columns, strict=True))
    if len({entry.name for entry in tensors}) != len(tensors):
        raise ValueError("a tensor is named twice")
    regions = tuple(Region(natural(addr), natural(nbytes)) for addr, nbytes in data["regions"])
    values = data.get("values", {})
    if not isinstance(values, dict) or not all(map(is_unicode, values)):
        raise ValueError("its values are no object with names that are text")
    return Manifest(
        tensors,
        regions,
        _digest_table(data.get("digests"), data.get("digest_block_nbytes", 0)),
        values,
        natural(data.get("block_nbytes", 0)),
        _exports(data.get("exports", [])),
        tuple([Region(natural(addr), natural(nbytes)) for addr, nbytes in data.get("deltas", [])]),
    )


def _exports(rows: Any) -> tuple[Export, ...]:
    return tuple(
        [
            Export(natural(addr), natural(nbytes), base64.b64decode(handle, validate=True))
            for addr, nbytes, handle in rows
        ]
    )


def _strides_column(data: Mapping[str, Any], count: int) -> Any:
    if data["schema"] < 3 and (data["schema"] == 2) != ("strides" in data):
        raise ValueError(
            f"it has schema {data['schema']}, and strides or not: schema 2 has them, 1 has not"
        )
    return data.get("strides", [None] * count)


def _slices_column(data: Mapping[str, Any], count: int) -> Any:
    if (data["schema"] == 3) != ("slices" in data):
        raise ValueError(
            f"it has schema {data['schema']}, and slices or not: only schema 3 has them"
        )
    return data.get("slices", [None] * count)


def _digest_table(value: Any, block_nbytes: Any) -> DigestTable | None:
    if value is None:
        return None
    algorithm, addr = value
    if not isinstance(algorithm, str) or not algorithm.isprintable():
        raise ValueError("the algorithm of its digests is not a line of text")
    return DigestTable(algorithm, natural(addr), natural(block_nbytes))
