"""The rank's line to its keeper, without a keeper: how changes of the record meet."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from engine_registry import RankState
from engine_registry.errors import InvalidField
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.registration.keeper.link import KeeperLink
from tests.support.builders import a_record

CHANGES = 5_000


@pytest.fixture
def link() -> KeeperLink:
    """Its keeper is not there yet, so a change waits for nothing."""
    return KeeperLink(
        EtcdConfig(parse_endpoints("nowhere:1")), a_record(), [b"part"], 10.0, 30.0, lambda: None
    )


@pytest.fixture
def _threads_alternate() -> Iterator[None]:
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval_s)


@pytest.mark.usefixtures("_threads_alternate")
def test_changes_of_different_fields_by_two_threads_do_not_undo_each_other(
    link: KeeperLink,
) -> None:
    def change_versions() -> list[int]:
        seen = []
        for version in range(CHANGES):
            link.update(lambda record, version=version: replace(record, version=version))  # type: ignore[misc]
            seen.append(link.record.version)
        return seen

    def change_states() -> list[RankState]:
        seen = []
        for state in [RankState.UPDATING, RankState.READY] * (CHANGES // 2):
            link.update(lambda record, state=state: replace(record, state=state))  # type: ignore[misc]
            seen.append(link.record.state)
        return seen

    with ThreadPoolExecutor(2) as pool:
        versions, states = pool.submit(change_versions), pool.submit(change_states)
        assert versions.result(60) == list(range(CHANGES))
        assert states.result(60) == [RankState.UPDATING, RankState.READY] * (CHANGES // 2)


def test_a_change_that_makes_no_valid_record_leaves_it_as_it_was(link: KeeperLink) -> None:
    before = link.record
    with pytest.raises(InvalidField):
        link.update(lambda record: replace(record, version=-1))
    with pytest.raises(InvalidField, match="more than 4096"):
        link.update(lambda record: replace(record, device="x" * 5_000))
    assert link.record == before
