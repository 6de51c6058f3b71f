"""The manifest: where each of a rank's tensors lies in its memory, and which box of the whole tensor it holds. Pure.

Stored as zlib-compressed JSON, in columns, cut into parts of at most 1 MiB so that none exceeds etcd's request limit of
1.5 MiB. The record carries the digest of the stored bytes, checked before anything is unpacked.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from registry.errors import RecordDamaged, SchemaUnsupported
from registry.record import ManifestRef

SCHEMA = 1
PART_NBYTES = 1 << 20
MAX_PARTS = 256
MAX_UNPACKED_NBYTES = 512 << 20  # a manifest of a million tensors takes about 100 MB


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of one rank. Lengths of `shape`, `global_shape` and `offsets` are equal.

    A tensor that says nothing of the whole that it is part of is opaque: its global shape is its own and it begins at zero,
    and `opaque` is true, so that nobody takes it for the whole.
    """

    name: str
    dtype: str  # torch's name without the prefix: float32, bfloat16, float8_e4m3fn, …
    shape: tuple[int, ...]
    addr: int
    nbytes: int
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    opaque: bool = True


@dataclass(frozen=True)
class Region:
    """A range of registered memory. One read stays inside one region."""

    addr: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.addr + self.nbytes


@dataclass(frozen=True)
class DigestTable:
    """Where in the rank's memory the digests of its tensors lie, by what algorithm: 16 bytes each, in the order of the names."""

    algorithm: str
    addr: int


@dataclass(frozen=True)
class Manifest:
    tensors: tuple[TensorEntry, ...]
    regions: tuple[Region, ...]
    digests: DigestTable | None = None
    values: Mapping[str, Any] = field(default_factory=dict)  # JSON, by name: what a state dict holds besides tensors

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors)


def encode(manifest: Manifest) -> tuple[ManifestRef, list[bytes]]:
    """What the record says of the manifest, and the parts to store."""
    tensors = manifest.tensors
    data = {
        "schema": SCHEMA,
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
    stored = zlib.compress(json.dumps(data, separators=(",", ":")).encode())
    parts = [stored[start : start + PART_NBYTES] for start in range(0, len(stored), PART_NBYTES)]
    ref = ManifestRef(hashlib.sha256(stored).hexdigest(), len(parts), len(tensors), manifest.nbytes)
    return ref, parts


def decode(owner: str, ref: ManifestRef, parts: Sequence[bytes]) -> Manifest:
    """The manifest of the rank whose record is at `owner`; RecordDamaged says what is wrong with it."""
    stored = b"".join(parts)
    if hashlib.sha256(stored).hexdigest() != ref.digest:
        raise RecordDamaged(f"the manifest of {owner} does not match the digest in its record: register the rank again", key=owner)
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(stored, MAX_UNPACKED_NBYTES)
        if not unpacker.eof:
            raise ValueError(f"it unpacks to more than {MAX_UNPACKED_NBYTES >> 20} MiB or is cut short")
        data = json.loads(raw)
        if not isinstance(data, dict) or type(data.get("schema")) is not int:
            raise ValueError("it has no schema number")
        if data["schema"] > SCHEMA:
            raise SchemaUnsupported(
                f"the manifest of {owner} has schema {data['schema']}; this version reads up to {SCHEMA}: upgrade engine-registry",
                key=owner,
            )
        manifest = _from_json(data)
        if (len(manifest.tensors), manifest.nbytes) != (ref.tensors, ref.nbytes):
            raise ValueError(f"it has {len(manifest.tensors)} tensors, its record says {ref.tensors}")
        return manifest
    except (zlib.error, ValueError, TypeError, KeyError, RecursionError) as exc:
        raise RecordDamaged(f"the manifest of {owner} is damaged: {exc}", key=owner) from exc


def _from_json(data: dict[str, Any]) -> Manifest:
    columns = [data[name] for name in ("name", "dtype", "shape", "addr", "nbytes", "box")]
    if len({len(column) for column in columns}) != 1:
        raise ValueError("its columns differ in length")
    tensors = tuple(_entry(*row) for row in zip(*columns, strict=True))
    if len({entry.name for entry in tensors}) != len(tensors):
        raise ValueError("a tensor is named twice")
    regions = tuple(Region(_natural(addr), _natural(nbytes)) for addr, nbytes in data["regions"])
    values = data.get("values", {})
    if not isinstance(values, dict):
        raise ValueError("its values are no object")
    return Manifest(tensors, regions, _digest_table(data.get("digests")), values)


def _digest_table(value: Any) -> DigestTable | None:
    if value is None:
        return None
    algorithm, addr = value
    if not isinstance(algorithm, str):
        raise ValueError("the algorithm of its digests is not a string")
    return DigestTable(algorithm, _natural(addr))


def _entry(name: Any, dtype: Any, shape: Any, addr: Any, nbytes: Any, box: Any) -> TensorEntry:
    if not isinstance(name, str) or not isinstance(dtype, str):
        raise ValueError("a tensor's name or dtype is not a string")
    own = tuple([_natural(size) for size in shape])
    whole, offsets = own, (0,) * len(own)
    if box is not None:
        whole, offsets = (tuple(map(_natural, side)) for side in box)
        if not len(own) == len(whole) == len(offsets) or any(
            offset + size > limit for offset, size, limit in zip(offsets, own, whole, strict=True)
        ):
            raise ValueError(f"tensor {name!r} has a box {offsets}+{own} that is not inside {whole}")
    if (prod(own) == 0) != (nbytes == 0):
        raise ValueError(f"tensor {name!r} of shape {own} cannot take {nbytes} bytes")
    return TensorEntry(name, dtype, own, _natural(addr), _natural(nbytes), whole, offsets, opaque=box is None)


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError(f"{value!r} is not a natural number of 64 bits")
    return value
