"""Good values that tests vary: each builder gives a valid one, and takes the fields that the test
is about.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine_registry import (
    Manifest,
    ModelIdentity,
    Pull,
    RankRecord,
    Region,
    Release,
    TensorEntry,
)
from engine_registry.schema import pull_ticket
from engine_registry.schema.holder import model_digest
from engine_registry.schema.keys import record_key, release_key
from engine_registry.schema.keyvalue import Deletion, KeyValue, Snapshot
from engine_registry.schema.record import ManifestRef
from engine_registry.schema.record_format import encode
from engine_registry.schema.release import digest_of

# Which process and which launch: tests that need another one name it.
INCARNATION = "0123456789abcdef0123456789abcdef"
OTHER_INCARNATION = "fedcba9876543210fedcba9876543210"
# What a rank holds, and something else.
CONTENT = "c0" * 16
OTHER_CONTENT = "0c" * 16

_GOOD = RankRecord(
    incarnation=INCARNATION,
    instance="qwen",
    rank=0,
    world_size=2,
    model=ModelIdentity("qwen", "r1", "bfloat16", "none", {"layers": "28"}),
    session_id="10.0.0.1:15000",
    protocol="tcp",
    manifest=ManifestRef(digest="ab" * 32, parts=1, tensors=1, nbytes=16),
    header_addr=0x7F00_0000_0000,
    registered_at="2026-01-02T03:04:05.678+00:00",
    generation="launch-1",
    topology={"tp": (0, 2), "pp": (0, 1)},
    version=3,
    content=CONTENT,
    fabric="rack-1",
    host="node-1",
    pid=4711,
    device="cpu",
    writer="0.1.0",
)


def a_record(**changes: Any) -> RankRecord:
    return replace(_GOOD, **changes)


def a_release(**changes: Any) -> Release:
    """Of the version that `a_record` gives, which both of its ranks hold."""
    contents = changes.get("contents", (CONTENT, CONTENT))
    made = Release(
        "qwen",
        3,
        digest_of(contents),
        model_digest(_GOOD.model),
        "2026-01-02T03:05:00.000Z",
        "alice@node-9",
        contents,
    )
    return replace(made, **changes)


def released(release: Release, mod_revision: int = 1) -> KeyValue:
    """The release as etcd returns it."""
    key = release_key(release.instance)
    return KeyValue(key, release.encode(), mod_revision, mod_revision, 1)


def an_entry(name: str = "w", addr: int = 4096, nbytes: int = 16, **changes: Any) -> TensorEntry:
    """An opaque uint8 tensor of one dimension, unless `changes` say otherwise."""
    shape = changes.get("shape", (nbytes,))
    entry = TensorEntry(name, "uint8", shape, addr, nbytes, shape, (0,) * len(shape))
    return replace(entry, **changes)


def a_manifest(*entries: TensorEntry, regions: tuple[Region, ...] | None = None) -> Manifest:
    """By default each tensor lies in a separate region."""
    tensors = entries or (an_entry(),)
    own = tuple(Region(entry.addr, entry.nbytes) for entry in tensors if entry.nbytes)
    return Manifest(tensors, own if regions is None else regions)


def stored(record: RankRecord, mod_revision: int = 1) -> KeyValue:
    """The record as etcd returns it."""
    return KeyValue(record.key, encode(record), mod_revision, mod_revision, 1)


def a_pull(**changes: Any) -> Pull:
    """From the record that `a_record` gives."""
    return replace(
        Pull(
            "qwen", 0, INCARNATION, "load-1", "node-2", 12, began_at="2026-01-02T03:04:06.000+00:00"
        ),
        **changes,
    )


def ticket(pull: Pull, mod_revision: int = 1) -> KeyValue:
    """The pull as etcd returns it."""
    return KeyValue(pull.key, pull_ticket.encode(pull), pull.create_revision, mod_revision, 1)


def garbage(instance: str = "qwen", rank: int = 0, value: bytes = b"{") -> KeyValue:
    """A record's key that holds none."""
    return KeyValue(record_key(instance, rank), value, 1, 1, 1)


def deleted(record: RankRecord, mod_revision: int = 2) -> Deletion:
    return Deletion(record.key, mod_revision)


def snapshot(*items: KeyValue, revision: int = 1) -> Snapshot:
    return Snapshot(revision, items)
