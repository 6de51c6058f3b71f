"""A registry over an etcd in memory, in which ranks stand as a test wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine_registry import RankRecord, Registry
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.schema.holder import holder_keys
from engine_registry.schema.keyvalue import Found, Put, Range
from engine_registry.schema.record_format import decode_item, encode
from tests.support.fake_etcd import FakeEtcd


class CountingEtcd(FakeEtcd):
    """Counts requests, and the keys and values that they bring."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = 0
        self.nbytes = 0

    def read(self, ranges: Sequence[Range]) -> tuple[int, list[Found]]:
        revision, found = super().read(ranges)
        self.requests += -(-len(ranges) // 128)
        self.nbytes += sum(len(item.key) + len(item.value) for each in found for item in each.items)
        return revision, found


class OverFake(Registry):
    """Asks the etcd in memory."""

    def __init__(self, etcd: FakeEtcd) -> None:
        super().__init__(EtcdConfig(parse_endpoints("fake:1")))
        self._etcd.close()
        self._etcd = etcd
        self._mark_closed()  # there is nothing to close


def shelve(etcd: FakeEtcd, record: RankRecord, *, indexed: bool = True) -> RankRecord:
    """Puts the record, with its entries in the index, and reads it again. Its order is that of the
    record, or else the revision before.
    """
    now = etcd.snapshot(record.key, exact=True).revision
    record = replace(record, order=(record.order or now) if indexed else 0)
    puts = [Put(record.key, encode(record), 0)]
    puts += [Put(key, record.key.encode(), 0) for key in holder_keys(record)]
    etcd.commit([], puts)
    found = etcd.get(record.key)
    assert found is not None
    return decode_item(found)
