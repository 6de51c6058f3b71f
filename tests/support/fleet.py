"""Records and tickets in etcd that no process stands behind: fleets for the dashboard, of any size
and with any text in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from engine_registry import ModelIdentity, Pull, RankRecord, RankState
from engine_registry.etcd.client import Etcd
from engine_registry.schema import pull_ticket
from engine_registry.schema.keyvalue import Delete, Put
from engine_registry.schema.pull_ticket import Reader
from engine_registry.schema.record import ManifestRef
from engine_registry.schema.record_format import encode

_AT_ONCE = 100


class Fleet:
    """Everything is under one lease, which ends with the etcd."""

    def __init__(self, etcd: Etcd) -> None:
        self._etcd = etcd
        self._lease_id = etcd.grant(3600)

    def put(self, records: Iterable[RankRecord]) -> None:
        puts = [Put(each.key, encode(each), self._lease_id) for each in records]
        for start in range(0, len(puts), _AT_ONCE):
            self._etcd.commit([], puts[start : start + _AT_ONCE])

    def end(self, record: RankRecord, reason: str) -> None:
        """As the keeper of a rank that has died does."""
        self.put([replace(record, ended=reason)])
        self._etcd.commit([], [Delete(record.key)])

    def pull(self, source: RankRecord, reader: RankRecord, done: int, total: int) -> None:
        self.tickets([a_ticket(source, reader, done, total)])

    def tickets(self, pulls: Iterable[Pull]) -> None:
        for pull in pulls:
            self._etcd.commit([], [Put(pull.key, pull_ticket.encode(pull), self._lease_id)])


def ranks(instance: str, world_size: int, **changes: Any) -> list[RankRecord]:
    """All ranks of an instance, 2 GB each."""
    return [a_rank(instance, rank, world_size, **changes) for rank in range(world_size)]


def a_rank(instance: str, rank: int = 0, world_size: int = 1, **changes: Any) -> RankRecord:
    record = RankRecord(
        incarnation=f"{instance}{rank}".encode().hex().rjust(32, "0")[-32:],
        instance=instance,
        rank=rank,
        world_size=world_size,
        model=ModelIdentity("qwen3-8b", "main", "bfloat16"),
        session_id=f"10.0.{rank // 250}.{rank % 250 + 1}:15{rank % 1000:03d}",
        protocol="rdma",
        manifest=ManifestRef(digest="ab" * 32, parts=1, tensors=399, nbytes=2_047_868_928),
        header_addr=0x7F00_0000_0000,
        registered_at="2026-01-02T03:04:05.678+00:00",
        version=3,
        content=f"{rank + 0xC0FFEE42:08x}" * 4,
        state=RankState.READY,
        host=f"node-{rank // 8 + 1}",
        pid=4000 + rank,
        device=f"cuda:{rank % 8}",
        writer="0.1.0",
    )
    return replace(record, **changes)


def a_ticket(source: RankRecord, reader: RankRecord | str, done: int, total: int) -> Pull:
    """`reader` is a rank, or the host of a process that is none."""
    rank = reader if isinstance(reader, RankRecord) else None
    name = rank.key if rank else str(reader)
    return Pull(
        source.instance,
        source.rank,
        source.incarnation,
        hashlib.blake2b(name.encode(), digest_size=16).hexdigest(),
        host=rank.host if rank else str(reader),
        pid=77,
        reader=Reader.of(rank) if rank else None,
        nbytes=done,
        total_nbytes=total,
        began_at="2026-01-02T03:04:06.000+00:00",
    )
