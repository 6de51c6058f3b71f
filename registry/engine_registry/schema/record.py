"""What a rank says of itself in the registry, with the type and range of every field. Pure.

`schema.record_format` writes and reads it as the JSON that lies in etcd.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from operator import attrgetter
from typing import Any

from engine_registry.errors import InvalidField
from engine_registry.schema.eviction import Eviction
from engine_registry.schema.keys import check_instance, check_rank, record_key
from engine_registry.schema.labels import check_labels
from engine_registry.schema.location import UNKNOWN, Location
from engine_registry.schema.numbers import whole
from engine_registry.schema.texts import are_printable, check_kind, check_names, check_texts
from engine_registry.schema.topology import check_topology

MAX_VERSION = 1 << 62  # the header holds twice the version in 64 bits
MAX_REVISION = (1 << 63) - 1  # of etcd
_MAX_SHIFT = (1 << 63) - 1
PROTOCOLS = ("tcp", "socket", "rdma", "nvlink_intra", "cuda_ipc")  # that transfer engines can use
WITHIN_HOST = ("nvlink_intra", "cuda_ipc")  # those of them that do not leave a host
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
    "unresponsive_since",
    "ended",
    "held_until",
)
_texts_of = attrgetter(*_TEXTS)
_CONTENT = re.compile(r"[0-9a-f]{32}")
GATEWAY = "gateway"  # in `kept_by`


def new_incarnation() -> str:
    """32 hexadecimal digits, never the same twice."""
    return uuid.uuid4().hex


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


def check_version(version: object) -> int:
    """As Python's integer, or InvalidField."""
    return whole("version", version, 0, MAX_VERSION - 1)


def check_shift(shift: object) -> int:
    """As Python's integer, or InvalidField."""
    return whole("shift", shift, -_MAX_SHIFT, _MAX_SHIFT)


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
        check_texts({f"model.{name}": text for name, text in texts.items()})
        check_names("model.extra", self.extra)

    def __hash__(self) -> int:
        return hash((self.name, self.revision))  # `extra` is a mapping, which has none

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


@dataclass(frozen=True)
class ManifestRef:
    """What the record says of the manifest, so that a reader can check what it fetches."""

    digest: str  # sha256 of the stored bytes, hexadecimal
    parts: int
    tensors: int
    nbytes: int  # of the weights, not of the manifest


@dataclass(frozen=True)
class Retained:
    """A version before the present one that can still be read.

    `header_addr` and `shift` are as in the record.
    """

    version: int
    content: str
    header_addr: int
    shift: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", check_version(self.version))
        check_content(self.content)
        check_kind("header_addr", self.header_addr, int)
        object.__setattr__(self, "shift", check_shift(self.shift))


_KINDS = {
    "model": ModelIdentity,
    "manifest": ManifestRef,
    "header_addr": int,
    "state": RankState,
    "pid": int,
    "location": Location,
}


@dataclass(frozen=True)
class RankRecord:
    """One rank of one instance.

    `content` says which bytes the rank holds: two memories with equal contents hold the same.
    `version` is a number that people give, and two launches may give the same one to different
    weights.

    The weights lie `shift` bytes behind the addresses of the manifest. A rank that publishes
    snapshots has several such places, and puts each new version into another one. `retained` are
    versions that can still be read in the places where they are; see `as_of`.

    Both revisions are etcd's, and 0 until the record has been read from there. `order` is the
    revision of etcd just before the rank was first registered. It stays the same as long as the
    incarnation does, so it orders ranks by when they began. It is 0 for a rank that is not in the
    index of holders: of an older release, or without permission to write there.
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
    registered_at: str  # RFC 3339, UTC
    generation: str = ""
    topology: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # axis -> (index, size)
    version: int = 0
    content: str = ""  # empty: the one that `implied_content` gives
    state: RankState = RankState.READY
    shift: int = 0
    retained: tuple[Retained, ...] = ()
    fabric: str = ""
    rails: Mapping[str, str] = field(default_factory=dict)  # RDMA device -> subnet, or empty
    location: Location = UNKNOWN
    host: str = ""
    pid: int = 0
    device: str = ""
    writer: str = ""
    # which process renews its lease: empty, its own keeper; GATEWAY, every gateway
    kept_by: str = ""
    # UTC, ISO 8601: since when the rank's process has not answered its keeper; empty while it does
    unresponsive_since: str = ""
    ended: str = ""  # why the registration is over; the key follows at once, unless it is held
    # UTC, ISO 8601: until when the keeper of a rank whose process has ended keeps its memory
    held_until: str = ""
    eviction: Eviction | None = None  # who has ended it, if it was evicted
    labels: Mapping[str, str] = field(default_factory=dict)
    order: int = field(default=0, compare=False)
    mod_revision: int = field(default=0, compare=False)
    create_revision: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        check_instance(self.instance)
        rank, world_size = check_rank(self.rank, self.world_size)
        checked = {
            "rank": rank,
            "world_size": world_size,
            "version": check_version(self.version),
            "topology": check_topology(self.topology),
            "labels": check_labels(self.labels),
            "order": whole("order", self.order, 0, MAX_REVISION),
            "shift": check_shift(self.shift),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # the record is frozen for everybody else
        if self.content != "":
            check_content(self.content)
        if self.eviction is not None:
            check_kind("eviction", self.eviction, Eviction)
        texts = _texts_of(self)
        if not are_printable(texts):
            check_texts(dict(zip(_TEXTS, texts, strict=True)))
        check_names("rails", self.rails)
        for one in self.retained:
            check_kind("retained", one, Retained)
        for name, kind in _KINDS.items():
            check_kind(name, getattr(self, name), kind)

    @property
    def held(self) -> bool:
        """Whether its process has ended, and its keeper keeps the memory for another one."""
        return bool(self.ended and self.held_until)

    @property
    def key(self) -> str:
        """Where the record lies in etcd, without the namespace."""
        return record_key(self.instance, self.rank)

    def as_of(self, version: int | None = None, content: str | None = None) -> RankRecord | None:
        """The record as it describes the version that is asked for, or the content, or both: the
        present one or one that is retained, with the others in its place. None where it has no
        such one.
        """
        if version in (None, self.version) and content in (None, self.content):
            return self
        for number, one in enumerate(self.retained):
            if version in (None, one.version) and content in (None, one.content):
                present = Retained(self.version, self.content, self.header_addr, self.shift)
                others = self.retained[:number] + self.retained[number + 1 :]
                return replace(
                    self,
                    version=one.version,
                    content=one.content,
                    header_addr=one.header_addr,
                    shift=one.shift,
                    retained=(present, *others),
                )
        return None

    @property
    def began(self) -> tuple[int, tuple[int, ...]]:
        """Less than that of any rank which registered after this one had: no two are equal.

        Ranks that registered at once may have one order. Then it is as in the index of holders:
        the one whose incarnation comes first has begun last.
        """
        order = self.order or self.create_revision - 1
        return order, (*[-ord(each) for each in self.incarnation], 1)

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

    @property
    def alike(self) -> Hashable:
        """Equal for records of which `agreed` is equal, and quicker to compare."""
        return (
            self.world_size,
            self.generation,
            self.model,
            frozenset((axis, size) for axis, (_, size) in self.topology.items()),
            frozenset(self.labels.items()),
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
            "labels": dict(self.labels),
        }
