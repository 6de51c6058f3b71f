"""What a pull ticket says: which load reads from which registration, and how far it is.

JSON under a key of `/pulls/`. Pure.

Decoding ignores fields that it does not know, takes the tickets of older versions, which say less,
and makes nothing of all else: whatever may lie in etcd, a reader gets a good Pull or None.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeVar

from engine_registry.errors import InvalidField
from engine_registry.schema.keys import MAX_RANKS, check_instance, parse_pull_key, pull_key
from engine_registry.schema.keyvalue import KeyValue
from engine_registry.schema.record import RankRecord

MAX_TICKET_NBYTES = 4096
_MAX_TEXT = 256

T = TypeVar("T")


@dataclass(frozen=True)
class Reader:
    """The registration of the rank that reads."""

    instance: str
    rank: int
    incarnation: str

    @classmethod
    def of(cls, record: RankRecord) -> Reader:
        return cls(record.instance, record.rank, record.incarnation)


@dataclass(frozen=True)
class Pull:
    """A load reads from the rank of the instance that has this incarnation.

    `nbytes` of `total_nbytes` is how far all of the load is, from all its sources; both are
    0 until it has reported. `create_revision` is etcd's, and 0 until it has been read from there.
    """

    instance: str
    rank: int
    incarnation: str
    load_id: str
    host: str = ""
    pid: int = 0
    reader: Reader | None = None  # where the loader is a rank itself
    nbytes: int = 0
    total_nbytes: int = 0
    began_at: str = ""  # UTC, ISO 8601, by the loader's clock
    create_revision: int = 0

    @property
    def key(self) -> str:
        """Where the ticket lies in etcd, without the namespace."""
        return pull_key(self.instance, self.rank, self.load_id)

    @property
    def fraction(self) -> float | None:
        """How far the load is, from 0 to 1, if it has reported."""
        return min(1.0, self.nbytes / self.total_nbytes) if self.total_nbytes else None


def encode(pull: Pull) -> bytes:
    """As stored. The instance, the rank and the load id are in the key."""
    data: dict[str, Any] = {"host": pull.host, "pid": pull.pid, "incarnation": pull.incarnation}
    if pull.reader is not None:
        data["reader"] = {
            "instance": pull.reader.instance,
            "rank": pull.reader.rank,
            "incarnation": pull.reader.incarnation,
        }
    data.update(nbytes=pull.nbytes, total_nbytes=pull.total_nbytes, began_at=pull.began_at)
    return json.dumps(data, separators=(",", ":")).encode()


def decode(item: KeyValue) -> Pull | None:
    place = parse_pull_key(item.key)
    if place is None or len(item.value) > MAX_TICKET_NBYTES:
        return None
    instance, rank, load_id = place
    try:
        data = json.loads(item.value)
        reader = _get(data, "reader", dict, {})
        return Pull(
            instance=instance,
            rank=rank,
            incarnation=_name(data, "incarnation"),
            load_id=load_id,
            host=_text(data, "host"),
            pid=_natural(data, "pid"),
            reader=_reader(reader) if reader else None,
            nbytes=_natural(data, "nbytes"),
            total_nbytes=_natural(data, "total_nbytes"),
            began_at=_text(data, "began_at"),
            create_revision=item.create_revision,
        )
    except (ValueError, RecursionError):  # InvalidField and JSON errors are ValueErrors
        return None


def _reader(data: dict[str, Any]) -> Reader:
    rank = _natural(data, "rank", None)
    if rank >= MAX_RANKS:
        raise InvalidField(f"rank {rank} is not valid", field="rank")
    return Reader(check_instance(_text(data, "instance")), rank, _name(data, "incarnation"))


def _get(data: Any, name: str, kind: type[T], default: T | None) -> T:
    if not isinstance(data, dict):
        raise ValueError("an object was expected")
    value = data.get(name)
    if value is None:
        value = default
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name!r} is not of type {kind.__name__}")
    return value


def _text(data: Any, name: str) -> str:
    value = _get(data, name, str, "")
    if len(value) > _MAX_TEXT or not value.isprintable():
        raise ValueError(f"{name!r} is not one short line")
    return value


def _name(data: Any, name: str) -> str:
    value = _text(data, name)
    if not value:
        raise ValueError(f"{name!r} is missing")
    return value


def _natural(data: Any, name: str, default: int | None = 0) -> int:
    value = _get(data, name, int, default)
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{name!r} is out of range")
    return value
