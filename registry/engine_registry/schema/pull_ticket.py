"""What a pull ticket says: which load reads from which registration, and how far it is.

JSON under a key of `/pulls/`. Pure.

Decoding ignores fields that it does not know, takes the tickets of older versions, which say less,
and makes nothing of all else: whatever may lie in etcd, a reader gets a good Pull or None.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType

from engine_registry.schema import structs
from engine_registry.schema.keys import MAX_RANKS, check_instance, parse_pull_key, pull_key
from engine_registry.schema.keyvalue import KeyValue
from engine_registry.schema.record import RankRecord
from engine_registry.schema.structs import Natural, check_64_bits

MAX_TICKET_NBYTES = 4096
_Text = Annotated[str, msgspec.Meta(max_length=256)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


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
    """A load reads from the rank of the instance that has this incarnation, and the weights with
    this content, if it says so.

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
    content: str = ""
    create_revision: int = 0

    @property
    def key(self) -> str:
        """Where the ticket lies in etcd, without the namespace."""
        return pull_key(self.instance, self.rank, self.load_id)

    @property
    def fraction(self) -> float | None:
        """How far the load is, from 0 to 1, if it has reported."""
        return min(1.0, self.nbytes / self.total_nbytes) if self.total_nbytes else None


class _Reader(msgspec.Struct, frozen=True):
    instance: _Text
    rank: Annotated[int, msgspec.Meta(ge=0, lt=MAX_RANKS)]
    incarnation: _Name


class _Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """In the order in which they are written. Older versions left out fields, or wrote null."""

    host: _Text | None = ""
    pid: Natural | None = 0
    incarnation: _Name
    reader: dict[str, Any] | UnsetType | None = UNSET
    nbytes: Natural | None = 0
    total_nbytes: Natural | None = 0
    began_at: _Text | None = ""
    content: _Text | UnsetType | None = UNSET

    def __post_init__(self) -> None:
        check_64_bits(self, "pid", "nbytes", "total_nbytes")


_DECODER = msgspec.json.Decoder(_Ticket)


def encode(pull: Pull) -> bytes:
    """As stored. The instance, the rank and the load id are in the key."""
    reader = pull.reader
    return structs.write(
        _Ticket(
            host=pull.host,
            pid=pull.pid,
            incarnation=pull.incarnation,
            reader=UNSET if reader is None else dataclasses.asdict(reader),
            nbytes=pull.nbytes,
            total_nbytes=pull.total_nbytes,
            began_at=pull.began_at,
            content=pull.content or UNSET,
        )
    )


def decode(item: KeyValue) -> Pull | None:
    place = parse_pull_key(item.key)
    if place is None or len(item.value) > MAX_TICKET_NBYTES:
        return None
    instance, rank, load_id = place
    try:
        stored = structs.read(_DECODER, item.value)
        return Pull(
            instance=instance,
            rank=rank,
            incarnation=_line(stored.incarnation),
            load_id=load_id,
            host=_line(stored.host or ""),
            pid=stored.pid or 0,
            reader=_reader(stored.reader) if stored.reader else None,
            nbytes=stored.nbytes or 0,
            total_nbytes=stored.total_nbytes or 0,
            began_at=_line(stored.began_at or ""),
            content=_line(stored.content or ""),
            create_revision=item.create_revision,
        )
    except ValueError:  # as Malformed and InvalidField are
        return None


def _reader(data: dict[str, Any]) -> Reader:
    stored = structs.convert(data, _Reader)
    return Reader(check_instance(stored.instance), stored.rank, _line(stored.incarnation))


def _line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it is not one line of printable text")
    return text
