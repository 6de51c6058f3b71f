"""A leader that is not one any more notices: without etcd."""

from __future__ import annotations

import threading
import time

import pytest

from registry.election import Election
from registry.keys import election_key
from registry.kv import Put
from tests.fake_etcd import FakeEtcd


@pytest.mark.parametrize("by_another", [False, True])
def test_a_leader_whose_key_somebody_took_away_stops_leading(monkeypatch: pytest.MonkeyPatch, by_another: bool) -> None:
    monkeypatch.setattr("registry.election._TTL_S", 0.03)
    etcd, key = FakeEtcd(), election_key("x")
    lease_id = etcd.grant(60)
    etcd.commit([], [Put(key, b"us", lease_id)])
    election = Election(etcd, "x")
    leading = threading.Thread(target=election._lead, args=(lease_id, time.monotonic()), daemon=True)
    leading.start()
    try:
        etcd.delete(key)
        if by_another:
            etcd.commit([], [Put(key, b"them", etcd.grant(60))])
        leading.join(20)
        assert not leading.is_alive()
    finally:
        election.close()
