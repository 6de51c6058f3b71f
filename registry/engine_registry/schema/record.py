"""The record that a rank writes under `/engines/<instance>/<rank>`: schema 1, JSON, under 4 KB.
Pure.

Decoding ignores fields that it does not know, refuses a newer schema by name, and checks the type
and range of every field: whatever may lie in etcd, a reader gets a good record or `RecordDamaged`.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

from engine_registry.errors import InvalidField, RecordDamaged, SchemaUnsupported
from engine_registry.schema.keys import check_instance, check_rank, record_key
from engine_registry.schema.keyvalue import KeyValue
from engine_registry.schema.numbers import whole
from engine_registry.schema.printable import short

SCHEMA = 1
MAX_RECORD_NBYTES = 4096

MAX_VERSION = 1 << 62  # the header holds twice the version in 64 bits
PROTOCOLS = ("tcp", "rdma", "nvlink_intra")  # that the transfer engine can be told to use
_TEXTS = (
    "incarnation",
    "session_id",
    "protocol",
    "registered_at",
    "generation",
    "fabric",
    "host",
    "device",
    "writer",
    "kept_by",
    "ended",
)
_CONTENT = re.compile(r"[0-9a-f]{32}")
GATEWAY = "gateway"  # in `kept_by`

T = TypeVar("T")


def new_content() -> str:
    """A content that no memory has had before: 128 random bits as 32 hexadecimal digits."""
    return uuid.uuid4().hex


def implied_content(incarnation: str, version: int) -> str:
    """The content of a rank that states none, as ranks of older releases: each of its versions is
    like no other.
    """
    return hashlib.blake2b(f"{incarnation} {version}".encode(), digest_size=16).hexdigest()


def check_content(content: str) -> str:
    """`content` itself, or InvalidField."""
    if not isinstance(content, str) or not _CONTENT.fullmatch(content):
        raise InvalidField(
            f"content {content!r} is not valid: it is 32 hexadecimal digits", field="content"
        )
    return content


def _check_texts(texts: Mapping[str, object]) -> None:
    for field_name, text in texts.items():
        if not isinstance(text, str) or not text.isprintable():  # lists print it, on terminals too
            raise InvalidField(
                f"{field_name} {text!r} is not valid: it is one line of printable text",
                field=field_name,
            )


def _check_kind(field_name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InvalidField(
            f"{field_name} {value!r} is not valid: it is of type {kind.__name__}", field=field_name
        )


def check_topology(topology: object) -> dict[str, tuple[int, int]]:
    """With Python's integers, or InvalidField."""
    _check_kind("topology", topology, Mapping)
    return {axis: _checked_place(axis, place) for axis, place in topology.items()}  # type: ignore[attr-defined]


def _checked_place(axis: Any, place: Any) -> tuple[int, int]:
    try:
        if not isinstance(axis, str) or not axis.isprintable():
            raise ValueError("the axis is not one line of printable text")
        if isinstance(place, Set | Mapping):
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


def check_version(version: object) -> int:
    """As Python's integer, or InvalidField."""
    return whole("version", version, 0, MAX_VERSION - 1)


class RankState(str, Enum):
    """What a reader may do with the rank's weights."""

    LOADING = "loading"  # wait: the weights are not complete yet
    READY = "ready"  # read
    UPDATING = "updating"  # wait: the weights are being changed in place
    DRAINING = "draining"  # do not begin a new read: the rank is about to leave


@dataclass(frozen=True)
class ModelIdentity:
    """Which weights these are.

    Two instances with equal identities can serve each other's loaders.
    """

    name: str
    revision: str = ""
    dtype: str = ""
    quantization: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InvalidField(
                f"model name {self.name!r} is not valid: it is a non-empty string",
                field="model.name",
            )
        texts = {
            "name": self.name,
            "revision": self.revision,
            "dtype": self.dtype,
            "quantization": self.quantization,
        }
        _check_texts({f"model.{name}": text for name, text in texts.items()})
        _check_kind("model.extra", self.extra, Mapping)
        for name, text in self.extra.items():
            _check_texts({"model.extra": name})
            _check_texts({"model.extra": text})

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


@dataclass(frozen=True)
class ManifestRef:
    """What the record says of the manifest, so that a reader can check what it fetches."""

    digest: str  # sha256 of the stored bytes, hexadecimal
    parts: int
    tensors: int
    nbytes: int  # of the weights, not of the manifest


_KINDS = {
    "model": ModelIdentity,
    "manifest": ManifestRef,
    "header_addr": int,
    "state": RankState,
    "pid": int,
}


@dataclass(frozen=True)
class RankRecord:
    """One rank of one instance.

    `content` says which bytes the rank holds: two memories with equal contents hold the same.
    `version` is a number that people give, and two launches may give the same one to different
    weights.

    Both revisions are etcd's, and 0 until the record has been read from there. `create_revision`
    orders registrations by when they began. It grows only where a record had to be put again
    because its lease was lost.
    """

    incarnation: str
    instance: str
    rank: int
    world_size: int
    model: ModelIdentity
    session_id: str  # of the transfer engine, host:port
    protocol: str
    manifest: ManifestRef
    header_addr: int
    registered_at: str  # UTC, ISO 8601
    generation: str = ""
    topology: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # axis -> (index, size)
    version: int = 0
    content: str = ""  # empty: the one that `implied_content` gives
    state: RankState = RankState.READY
    fabric: str = ""
    host: str = ""
    pid: int = 0
    device: str = ""
    writer: str = ""
    # who renews its lease: empty, its own keeper; GATEWAY, every gateway, while its session answers
    kept_by: str = ""
    ended: str = ""  # why the registration is over; the key follows at once
    mod_revision: int = field(default=0, compare=False)
    create_revision: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        check_instance(self.instance)
        rank, world_size = check_rank(self.rank, self.world_size)
        numbers = {
            "rank": rank,
            "world_size": world_size,
            "version": check_version(self.version),
            "topology": check_topology(self.topology),
        }
        for name, number in numbers.items():
            object.__setattr__(self, name, number)  # the record is frozen for everybody else
        if self.content != "":
            check_content(self.content)
        _check_texts({name: getattr(self, name) for name in _TEXTS})
        for name, kind in _KINDS.items():
            _check_kind(name, getattr(self, name), kind)

    @property
    def key(self) -> str:
        """Where the record lies in etcd, without the namespace."""
        return record_key(self.instance, self.rank)

    @property
    def holder(self) -> str:
        """The process that registered, and since when, for a message."""
        return f"{self.process}, since {self.registered_at}"

    @property
    def process(self) -> str:
        """Where it runs; of a seed that registered through a gateway the pid is not known."""
        return (
            f"host {self.host or '?'}, pid {self.pid}" if self.pid else f"host {self.host or '?'}"
        )

    def agreed(self) -> dict[str, Any]:
        """The fields on which all ranks of one instance must agree."""
        return {
            "world_size": self.world_size,
            "generation": self.generation,
            "model.name": self.model.name,
            "model.revision": self.model.revision,
            "model.dtype": self.model.dtype,
            "model.quantization": self.model.quantization,
            "model.extra": dict(self.model.extra),
            "topology sizes": {axis: size for axis, (_, size) in sorted(self.topology.items())},
        }


def encode(record: RankRecord) -> bytes:
    """The record as stored; InvalidField where it would exceed 4 KB."""
    model = record.model
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "incarnation": record.incarnation,
        "generation": record.generation,
        "instance": record.instance,
        "rank": record.rank,
        "world_size": record.world_size,
        "topology": {axis: list(place) for axis, place in record.topology.items()},
        "model": {
            "name": model.name,
            "revision": model.revision,
            "dtype": model.dtype,
            "quantization": model.quantization,
            "extra": dict(model.extra),
        },
        "version": record.version,
        "content": record.content,
        "state": record.state.value,
        "session_id": record.session_id,
        "protocol": record.protocol,
        "fabric": record.fabric,
        "host": record.host,
        "pid": record.pid,
        "device": record.device,
        "header": {"addr": record.header_addr},
        "manifest": {
            "digest": record.manifest.digest,
            "parts": record.manifest.parts,
            "tensors": record.manifest.tensors,
            "nbytes": record.manifest.nbytes,
        },
        "registered_at": record.registered_at,
        "writer": record.writer,
    }
    if not record.content:
        del data["content"]
    if record.kept_by:
        data["kept_by"] = record.kept_by
    if record.ended:
        data["ended"] = record.ended
    value = json.dumps(data, separators=(",", ":")).encode()
    if len(value) > MAX_RECORD_NBYTES and not record.ended:
        largest = max(data, key=lambda name: len(json.dumps(data[name])))
        raise InvalidField(
            f"the record of {record.key} takes {len(value)} bytes, more than {MAX_RECORD_NBYTES}",
            f"shorten {largest!r}",
            field=largest,
        )
    return value


def decode(key: str, value: bytes, mod_revision: int = 0, create_revision: int = 0) -> RankRecord:
    """The record stored under `key`; RecordDamaged or SchemaUnsupported say which key and why."""
    if len(value) > 4 * MAX_RECORD_NBYTES:
        raise RecordDamaged(
            f"the record at {key} is damaged: {len(value)} bytes is no record's size", key=key
        )
    try:
        data = json.loads(value)
        schema = _get(data, "schema", int)
        if schema > SCHEMA:
            raise SchemaUnsupported(
                f"the record at {key} has schema {short(schema)}; this version reads up to "
                f"{SCHEMA}",
                "upgrade engine-registry",
                key=key,
                schema=schema,
            )
        record = _from_json(data, mod_revision, create_revision)
    except (ValueError, RecursionError) as exc:  # InvalidField and JSON errors are ValueErrors
        raise RecordDamaged(f"the record at {key} is damaged: {short(exc)}", key=key) from exc
    if record.key != key:
        raise RecordDamaged(
            f"the record at {key} is damaged: it says that it belongs at {record.key}", key=key
        )
    return record


def decode_item(item: KeyValue) -> RankRecord:
    """`decode` of a key as etcd holds it, with both of its revisions."""
    return decode(item.key, item.value, item.mod_revision, item.create_revision)


def _from_json(data: dict[str, Any], mod_revision: int, create_revision: int) -> RankRecord:
    model = _get(data, "model", dict)
    manifest = _get(data, "manifest", dict)
    incarnation, version = _get(data, "incarnation", str), _natural(data, "version")
    return RankRecord(
        incarnation=incarnation,
        instance=_get(data, "instance", str),
        rank=_get(data, "rank", int),
        world_size=_get(data, "world_size", int),
        model=ModelIdentity(
            name=_get(model, "name", str),
            revision=_get(model, "revision", str, ""),
            dtype=_get(model, "dtype", str, ""),
            quantization=_get(model, "quantization", str, ""),
            extra={name: str(value) for name, value in _get(model, "extra", dict, {}).items()},
        ),
        session_id=_get(data, "session_id", str),
        protocol=_get(data, "protocol", str),
        manifest=ManifestRef(
            digest=_get(manifest, "digest", str),
            parts=_natural(manifest, "parts"),
            tensors=_natural(manifest, "tensors"),
            nbytes=_natural(manifest, "nbytes"),
        ),
        header_addr=_natural(_get(data, "header", dict), "addr"),
        registered_at=_get(data, "registered_at", str),
        generation=_get(data, "generation", str, ""),
        topology={
            axis: _place(axis, place) for axis, place in _get(data, "topology", dict, {}).items()
        },
        version=version,
        content=_get(data, "content", str, "") or implied_content(incarnation, version),
        state=RankState(_get(data, "state", str)),
        fabric=_get(data, "fabric", str, ""),
        host=_get(data, "host", str, ""),
        pid=_natural(data, "pid", 0),
        device=_get(data, "device", str, ""),
        writer=_get(data, "writer", str, ""),
        kept_by=_get(data, "kept_by", str, ""),
        ended=_get(data, "ended", str, ""),
        mod_revision=mod_revision,
        create_revision=create_revision,
    )


def _get(data: Any, name: str, kind: type[T], default: T | None = None) -> T:
    if not isinstance(data, dict):
        raise ValueError(f"an object was expected where {name!r} should be")
    value = data.get(name, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(
            f"{name!r} is missing" if value is None else f"{name!r} is not of type {kind.__name__}"
        )
    return value


def _natural(data: Any, name: str, default: int | None = None) -> int:
    value = _get(data, name, int, default)
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{name!r} is out of range: {value}")
    return value


def _place(axis: str, place: Any) -> tuple[int, int]:
    if (
        not isinstance(place, list)
        or len(place) != 2
        or not all(type(number) is int for number in place)
    ):
        raise ValueError(f"topology axis {axis!r} is not [index, size]")
    return place[0], place[1]
