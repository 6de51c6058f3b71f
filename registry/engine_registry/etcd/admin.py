"""What an operator asks of etcd: its members, alarms, sizes, and what a user may do.

Read by `engines doctor`. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class MemberStatus:
    """One member as it sees itself.

    A fact that a release does not report is None: sizes before 3.4, the quota before 3.6.
    """

    version: str
    member_id: int
    leader_id: int  # 0: it knows of none
    raft_index: int
    db_nbytes: int
    used_nbytes: int | None = None  # of them: what compacting has freed stays in the file
    quota_nbytes: int | None = None
    learner: bool = False

    @property
    def leads(self) -> bool:
        return self.leader_id != 0 and self.leader_id == self.member_id


@dataclass(frozen=True)
class Member:
    member_id: int
    name: str  # empty: it was added and has never started
    client_urls: tuple[str, ...]
    learner: bool = False  # it has no vote, and answers its clients nothing but its status


@dataclass(frozen=True)
class Alarm:
    member_id: int
    kind: str  # NOSPACE, CORRUPT


class Reach(str, Enum):
    """How much of a range of keys permissions cover."""

    ALL = "all"
    PART = "part"
    NONE = "none"


@dataclass(frozen=True)
class Permission:
    """Keys from `start` up to, and without, `end`.

    `end` empty: that one key; a zero byte: to the end of all keys.
    """

    start: bytes
    end: bytes
    read: bool
    write: bool


@dataclass(frozen=True)
class User:
    name: str
    roles: tuple[str, ...]
    permissions: tuple[Permission, ...] = ()

    def reach(self, start: bytes, end: bytes, *, write: bool) -> Reach:
        """Of the keys from `start` up to `end`, which it may write, or else read."""
        if "root" in self.roles:
            return Reach.ALL
        spans = sorted(
            (p.start, _end(p)) for p in self.permissions if (p.write if write else p.read)
        )
        touched, covered = False, start
        for low, high in spans:
            touched = touched or (_below(low, end) and _below(start, high))
            if low <= covered and _below(covered, high):
                if high == b"\0" or not _below(high, end):
                    return Reach.ALL
                covered = high
        return Reach.PART if touched else Reach.NONE


def _end(permission: Permission) -> bytes:
    return permission.end or permission.start + b"\0"


def _below(key: bytes, end: bytes) -> bool:
    """Whether the key lies before the end of a range."""
    return end == b"\0" or key < end


def numbers_in(message: bytes) -> dict[int, int]:
    """The whole numbers of an encoded protobuf message by their field: also those that its class
    here is too old to know.
    """
    found: dict[int, int] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            found[tag >> 3], at = _varint(message, at)
        elif kind == 2:  # bytes, text, another message
            nbytes, at = _varint(message, at)
            at += nbytes
        else:
            at += {1: 8, 5: 4}.get(kind, 0)
    return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number there, and where it ends."""
    value, shift = 0, 0
    while at < len(message):
        byte, at = message[at], at + 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    return value, at


def version_of(text: str) -> tuple[int, ...]:
    """`3.5.1` and `3.6.0-rc.2` as numbers, for comparisons; empty where it is none."""
    numbers: list[int] = []
    for part in text.partition("-")[0].split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


def behind(statuses: Sequence[MemberStatus]) -> int:
    """By how many entries of the log the last member is behind the first."""
    return max((status.raft_index for status in statuses), default=0) - min(
        (s.raft_index for s in statuses), default=0
    )
