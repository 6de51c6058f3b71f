"""Pull tickets: issued while the record stands, also where etcd's first answer was lost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry import RankRecord
from registry.kv import Put
from registry.pulls import count_pulls, take_ticket
from registry.record import decode, encode
from tests.builders import a_record
from tests.fake_etcd import FakeEtcd

OURS = a_record()


@pytest.fixture
def etcd() -> FakeEtcd:
    return FakeEtcd()


@pytest.fixture
def read(etcd: FakeEtcd) -> RankRecord:
    """The record as it stands."""
    etcd.commit([], [Put(OURS.key, encode(OURS), etcd.grant(10))])
    item = etcd.get(OURS.key)
    assert item is not None
    return decode(item.key, item.value, item.mod_revision)


@pytest.mark.parametrize("answer_lost", [False, True])
def test_a_ticket_counts_until_it_is_given_back(etcd: FakeEtcd, read: RankRecord, answer_lost: bool) -> None:
    etcd.retry_next_commit = answer_lost
    ticket = take_ticket(etcd, read)
    assert ticket is not None
    with ticket:
        assert count_pulls(etcd, "qwen", 0) == 1
    assert count_pulls(etcd, "qwen", 0) == 0


def test_a_record_that_has_changed_gives_no_ticket(etcd: FakeEtcd, read: RankRecord) -> None:
    etcd.put(OURS.key, encode(replace(OURS, version=4)))
    leases = etcd.leases
    assert take_ticket(etcd, read) is None
    assert etcd.leases == leases
