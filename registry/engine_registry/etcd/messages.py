"""Keys, guards and writes of ours as messages of etcd, and its keys as ours. Pure.

Used by `etcd.client` and `etcd.watch`. `namespace` stands in front of every key in etcd, and in
front of none of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine_registry.etcd.library import pb
from engine_registry.schema.keyvalue import (
    Change,
    Delete,
    Deletion,
    Found,
    Guard,
    KeyValue,
    Put,
    Range,
)

_DELETE_EVENT = 1  # mvccpb.Event.DELETE
_TARGETS = {"create_revision": pb.Compare.CREATE, "mod_revision": pb.Compare.MOD}


def key_in(namespace: str, key: str) -> bytes:
    """The key as etcd has it."""
    return (namespace + key).encode(errors="surrogateescape")


def prefix_end(prefix: bytes) -> bytes:
    """The first key after all with the prefix; etcd takes a zero byte as `to the end`."""
    end = bytearray(prefix)
    while end and end[-1] == 255:
        end.pop()
    if not end:
        return b"\0"
    end[-1] += 1
    return bytes(end)


def compares(namespace: str, guard: Guard) -> Iterator[Any]:
    """The conditions of a transaction that the guard stands for."""
    key = key_in(namespace, guard.key)
    compare = pb.Compare(
        key=key,
        target=_TARGETS[guard.target],
        result=getattr(pb.Compare, guard.result),
        **{guard.target: guard.value},
    )
    if guard.prefix:
        compare.range_end = prefix_end(key)
    yield compare
    if guard.content is not None:
        yield pb.Compare(
            key=key, target=pb.Compare.VALUE, result=pb.Compare.EQUAL, value=guard.content
        )


def request_op(namespace: str, write: Put | Delete) -> Any:
    """The write as a part of a transaction."""
    key = key_in(namespace, write.key)
    if isinstance(write, Put):
        keep = write.lease_id is None
        return pb.RequestOp(
            request_put=pb.PutRequest(
                key=key, value=write.value, lease=write.lease_id or 0, ignore_lease=keep
            )
        )
    end = prefix_end(key) if write.prefix else b""
    return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key, range_end=end))


def range_op(namespace: str, wanted: Range, revision: int) -> Any:
    """The read as a part of a transaction; at `revision`, or at 0 now."""
    end = key_in(namespace, wanted.end) if wanted.end else b""
    return pb.RequestOp(
        request_range=pb.RangeRequest(
            key=key_in(namespace, wanted.key),
            range_end=end,
            limit=wanted.limit,
            count_only=wanted.count_only,
            keys_only=wanted.keys_only,
            min_create_revision=wanted.created_after + 1 if wanted.created_after else 0,
            revision=revision,
        )
    )


def found_in(namespace: str, response: Any) -> Found:
    """What a `range_op` has brought."""
    answer = response.response_range
    return Found(tuple(key_value(namespace, kv) for kv in answer.kvs), int(answer.count))


def key_value(namespace: str, kv: Any) -> KeyValue:
    return KeyValue(
        _key_of(namespace, kv.key), kv.value, kv.create_revision, kv.mod_revision, kv.lease
    )


def change_of(namespace: str, event: Any) -> Change:
    """An event of a watch as a change."""
    if event.type == _DELETE_EVENT:
        return Deletion(_key_of(namespace, event.kv.key), event.kv.mod_revision)
    return key_value(namespace, event.kv)


def _key_of(namespace: str, key: bytes) -> str:
    """A key that is no text stays the same: it gives the same bytes when it is encoded again."""
    return key.decode(errors="surrogateescape")[len(namespace) :]
