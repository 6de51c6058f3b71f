"""A leader that is not one any more notices; one that is registered hands its lead to its keeper:
without etcd.
"""

from __future__ import annotations

import math
import threading
import time

import pytest

from engine_registry import RankRecord
from engine_registry.errors import EtcdRefused, EtcdUnavailable
from engine_registry.schema.keys import election_key
from engine_registry.schema.keyvalue import Put
from engine_registry.schema.record_format import encode
from engine_registry.watching.campaign import Campaign
from tests.support.builders import a_record
from tests.support.fake_etcd import FakeEtcd


@pytest.mark.parametrize("by_another", [False, True])
def test_a_leader_whose_key_somebody_took_away_stops_leading(
    monkeypatch: pytest.MonkeyPatch, by_another: bool
) -> None:
    monkeypatch.setattr("engine_registry.watching.campaign._TTL_S", 0.03)
    etcd, key = FakeEtcd(), election_key("x")
    lease_id = etcd.grant(60)
    etcd.commit([], [Put(key, b"us", lease_id)])
    campaign = Campaign(etcd, "x")
    leading = threading.Thread(
        target=campaign._lead, args=(lease_id, time.monotonic()), daemon=True
    )
    leading.start()
    try:
        etcd.delete(key)
        if by_another:
            etcd.commit([], [Put(key, b"them", etcd.grant(60))])
        leading.join(60)
        assert not leading.is_alive()
    finally:
        campaign.close()


def test_a_lead_whose_handing_over_was_not_answered_is_kept_by_the_registration() -> None:
    etcd, key = FakeEtcd(), election_key("x")
    record = a_record()
    own, kept_by = etcd.grant(60), etcd.grant(60)
    etcd.commit([], [Put(record.key, encode(record), kept_by)])
    campaign = Campaign(etcd, "x")
    etcd.commit([], [Put(key, b"us", own)])
    campaign._ours = etcd.get(key)
    campaign._leads_until = time.monotonic() + 60
    etcd.retry_next_commit = True
    assert campaign.keep_with(record)
    assert etcd.lease_of(key) == kept_by
    campaign.close()
    assert etcd.keys == [record.key]
    assert kept_by in etcd.leases


def kept(etcd: FakeEtcd) -> tuple[Campaign, RankRecord]:
    """A lead that is kept by a registration."""
    key, record = election_key("x"), a_record()
    etcd.commit([], [Put(record.key, encode(record), etcd.grant(60))])
    etcd.commit([], [Put(key, b"us", etcd.grant(60))])
    campaign = Campaign(etcd, "x")
    campaign._ours = etcd.get(key)
    campaign._leads_until = time.monotonic() + 60
    assert campaign.keep_with(record)
    campaign._leads_until = 0.0
    return campaign, record


@pytest.mark.parametrize("is_answered", [True, False])
def test_a_lead_outlives_the_registration_that_kept_it_for_a_while(is_answered: bool) -> None:
    etcd = FakeEtcd()
    campaign, record = kept(etcd)
    etcd.retry_next_commit = not is_answered
    assert campaign.keep_for(60)
    etcd.expire(etcd.lease_of(record.key))
    assert campaign.leading
    assert etcd.keys == [election_key("x")]
    campaign.close()
    assert etcd.keys == []
    assert not campaign.leading


def test_a_lead_that_is_kept_for_a_while_ends_with_it() -> None:
    campaign, _ = kept(FakeEtcd())
    assert campaign.keep_for(0.0)
    assert not campaign.leading
    campaign.close()


def test_a_lead_that_another_has_or_no_registration_keeps_is_not_kept_for_a_while() -> None:
    etcd = FakeEtcd()
    assert not Campaign(etcd, "y").keep_for(60)
    campaign, _ = kept(etcd)
    etcd.put(election_key("x"), b"them")
    assert not campaign.keep_for(60)
    campaign.close()
    assert etcd.value(election_key("x")) == b"them"


def test_a_lead_is_not_handed_over_once_another_has_it() -> None:
    etcd, key = FakeEtcd(), election_key("x")
    record = a_record()
    etcd.commit([], [Put(record.key, encode(record), etcd.grant(60))])
    campaign = Campaign(etcd, "x")
    etcd.commit([], [Put(key, b"us", etcd.grant(60))])
    campaign._ours = etcd.get(key)
    campaign._leads_until = time.monotonic() + 60
    etcd.put(key, b"them")
    assert not campaign.keep_with(record)
    campaign.close()
    assert etcd.value(key) == b"them"


def test_a_lead_is_not_given_up_for_another_that_has_it_at_the_same_revision_of_a_wiped_store() -> (
    None
):
    etcd, key = FakeEtcd(), election_key("x")
    etcd.put(key, b"us")
    campaign = Campaign(etcd, "x")
    campaign._ours, campaign._kept_until = etcd.get(key), math.inf
    etcd.restore([Put(key, b"them", 0)], back_to_revision=1)
    campaign.close()
    assert etcd.value(key) == b"them"


def test_until_etcd_has_answered_it_is_away_since_the_campaign_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    campaign = Campaign(FakeEtcd(), "x")
    monkeypatch.setattr(campaign, "_thread", threading.Thread(target=lambda: None))
    campaign.start()
    began = campaign.unreachable_since
    campaign._note(EtcdUnavailable("away"))
    assert began is not None
    assert campaign.unreachable_since == began
    campaign.close()


def test_a_refusal_and_an_outage_are_distinguished() -> None:
    campaign = Campaign(FakeEtcd(), "x")
    assert (campaign.refusal, campaign.unreachable_since) == (None, None)
    campaign._note(EtcdUnavailable("away"))
    since = campaign.unreachable_since
    assert (since is None, campaign.refusal) == (False, None)
    campaign._note(EtcdRefused("no"))
    assert isinstance(campaign.refusal, EtcdRefused)
    assert campaign.unreachable_since == since
    campaign.close()
