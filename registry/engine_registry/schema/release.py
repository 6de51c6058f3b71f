"""Which version of an instance is released: that every rank holds, as somebody has said. Pure.

`/releases/<instance>`, JSON. It says which bytes each rank holds in that version, since two
launches may give one number to different weights: by a digest, and of an instance with few ranks by
the contents themselves. Of many these would be megabytes, for each watch again at each release.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from msgspec import UNSET, UnsetType

from engine_registry.errors import InvalidField, RecordDamaged, SchemaUnsupported
from engine_registry.schema import structs
from engine_registry.schema.keys import parse_release_key
from engine_registry.schema.keyvalue import KeyValue
from engine_registry.schema.printable import short
from engine_registry.schema.record import check_content, check_version
from engine_registry.schema.structs import Malformed, Natural
from engine_registry.schema.texts import check_texts

SCHEMA = 1
MAX_CONTENTS = 256  # that are written out: 9 KB


class _Release(msgspec.Struct, frozen=True):
    """In the order in which they are written."""

    schema: int
    version: Natural
    digest: str
    model: str
    released_at: str
    by: str
    contents: list[str] | UnsetType = UNSET


_DECODER = msgspec.json.Decoder(_Release)


def digest_of(contents: Sequence[str]) -> str:
    """128 bits as 32 hexadecimal digits, by BLAKE2b, of the contents by rank, one after another."""
    return hashlib.blake2b("".join(contents).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Release:
    """The released version of an instance.

    Attributes:
        instance: The instance.
        version: The version.
        digest: Of the contents of all ranks, by rank.
        model: The digest of the model's identity, as in the index of holders.
        released_at: When, in UTC by the clock of whoever released it.
        by: The user and the host that released it, as `alice@node-9`.
        contents: What each rank holds in this version, by rank. Empty where that is not known: of
            an instance of more than 256 ranks, until they are looked at.
    """

    instance: str
    version: int
    digest: str
    model: str
    released_at: str
    by: str
    contents: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises InvalidField."""
        object.__setattr__(self, "version", check_version(self.version))
        for content in (self.digest, self.model, *self.contents):
            check_content(content)
        check_texts({"released_at": self.released_at, "by": self.by})

    def is_of(self, version: int, contents: Sequence[str]) -> bool:
        """Whether it is the release of this version with these contents, by rank."""
        return (self.version, self.digest) == (version, digest_of(contents))

    def encode(self) -> bytes:
        """As stored."""
        few = 0 < len(self.contents) <= MAX_CONTENTS
        return structs.write(
            _Release(
                SCHEMA,
                self.version,
                self.digest,
                self.model,
                self.released_at,
                self.by,
                list(self.contents) if few else UNSET,
            )
        )


def decode_release(item: KeyValue) -> Release:
    """RecordDamaged or SchemaUnsupported say which key and why."""
    instance = parse_release_key(item.key)
    try:
        if instance is None:
            raise Malformed("its key is not /releases/<instance>")
        stored = structs.read(_DECODER, item.value)
        _check_schema(item.key, stored.schema)
        contents = tuple(stored.contents or ())
        if contents and digest_of(contents) != stored.digest:
            raise Malformed("its digest is not that of its contents")
        return Release(
            instance,
            stored.version,
            stored.digest,
            stored.model,
            stored.released_at,
            stored.by,
            contents,
        )
    except Malformed as exc:
        _check_schema(item.key, structs.schema_of(item.value))
        raise _damaged(item.key, exc) from exc
    except InvalidField as exc:
        raise _damaged(item.key, exc) from exc


def _damaged(key: str, why: Exception) -> RecordDamaged:
    return RecordDamaged(f"the release at {key} is damaged: {short(why)}", key=key)


def _check_schema(key: str, schema: int) -> None:
    if schema > SCHEMA:
        raise SchemaUnsupported(
            f"the release at {key} has schema {short(schema)}; this version reads up to {SCHEMA}",
            "upgrade engine-registry",
            key=key,
            schema=schema,
        )
