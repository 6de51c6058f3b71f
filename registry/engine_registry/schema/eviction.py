"""Who has evicted a rank, from where, when and why: in the rank's last record, for watchers, and in
the mark under `/evicted/`, for the rank itself. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from engine_registry.errors import Evicted, InvalidField
from engine_registry.schema import structs
from engine_registry.schema.printable import short
from engine_registry.schema.structs import Malformed

SCHEMA = 1
MAX_LENGTH = 200  # of each text


class _Mark(msgspec.Struct, frozen=True):
    """In the order in which they are written."""

    schema: int
    by: str
    at: str
    reason: str = ""


_DECODER = msgspec.json.Decoder(_Mark)


@dataclass(frozen=True)
class Eviction:
    """An eviction as the process that made it describes it.

    Attributes:
        by: The user and the host of that process, as `user@host`.
        at: UTC by its clock, ISO 8601.
        reason: What the operator has said; empty if nothing.

    Raises:
        InvalidField: A text is not one line of printable text of at most 200 characters.
    """

    by: str
    at: str
    reason: str = ""

    def __post_init__(self) -> None:
        """Raises InvalidField."""
        for name, text in (("by", self.by), ("at", self.at), ("reason", self.reason)):
            is_text = isinstance(text, str) and text.isprintable()
            if not is_text or len(text) > MAX_LENGTH:
                raise InvalidField(
                    f"{name} of the eviction {short(repr(text), 60)} is not valid: it is one line "
                    f"of printable text of at most {MAX_LENGTH} characters",
                    field=name,
                )

    def __str__(self) -> str:
        return f"by {self.by} at {self.at}{f': {self.reason}' if self.reason else ''}"

    def encode(self) -> bytes:
        """As the value of a mark."""
        return structs.write(_Mark(SCHEMA, self.by, self.at, self.reason))

    @classmethod
    def decode(cls, value: bytes) -> Eviction | None:
        """None where the mark does not say, or says what cannot be read: it holds all the same."""
        try:
            mark = structs.read(_DECODER, value)
            return cls(mark.by, mark.at, mark.reason)
        except (Malformed, InvalidField):
            return None


def was_evicted(key: str, eviction: Eviction | None, remedy: str = "") -> Evicted:
    """With who has done it, and why, if that is known."""
    how = f"{key} was evicted{f' {eviction}' if eviction else ''}"
    facts = {"by": eviction.by, "at": eviction.at, "reason": eviction.reason} if eviction else {}
    return Evicted(how, remedy, key=key, **facts)
