"""docker-compose.yml run for real: eight containers, some stopped, killed and cut off."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from tests.compose.daemon import CommandFailed
from tests.compose.project import ETCD, LEASE_S, Project
from tests.support.waiting import wait_until

# The first test of each kind of compose builds the images.
pytestmark = pytest.mark.timeout(1800)

# A lease that expired is gone half a second later, and in doubt for a second. The rest is for a
# busy machine.
SEEN_S = LEASE_S + 0.5 + 1.0
BUSY_S = 10.0


def test_three_members_form_one_healthy_cluster(project: Project) -> None:
    health = json.loads(
        project.etcdctl("etcd-0", "endpoint", "health", "--cluster", "--write-out", "json")
    )
    assert [each["health"] for each in health] == [True, True, True]
    members = json.loads(project.etcdctl("etcd-2", "member", "list", "--write-out", "json"))[
        "members"
    ]
    assert sorted(each["name"] for each in members) == list(ETCD)


def test_two_containers_serve_one_rank_each_at_their_own_address(project: Project) -> None:
    ranks = project.ranks()
    assert {rank: each["host"] for rank, each in ranks.items()} == {0: "seed-0", 1: "seed-1"}
    addresses = {rank: each["session_id"].partition(":")[0] for rank, each in ranks.items()}
    assert addresses == {0: project.address_of("seed-0"), 1: project.address_of("seed-1")}
    assert len(set(addresses.values())) == 2


def test_the_loader_ends_with_0_once_it_has_compared_every_byte(project: Project) -> None:
    project.again("loader")
    assert project.exit_code_of("loader") == 0
    held = {rank: each["nbytes"] for rank, each in project.ranks().items()}
    for rank, nbytes in held.items():
        assert f"rank-{rank}.safetensors: 65 tensors, {nbytes:,} bytes, verified" in project.log_of(
            "loader"
        )


def test_a_stopped_seed_drains_withdraws_and_ends_with_0(project: Project) -> None:
    with project.watching() as watcher:
        project.stop("seed-1")
        watcher.says("testbed/1 updated: draining")
        watcher.says("testbed/1 lost: withdrawn (host seed-1")
        assert project.exit_code_of("seed-1") == 0
        project.start("seed-1")
        watcher.says("testbed ready: 2 ranks")


def test_a_killed_seed_is_lost_when_its_lease_expires(
    project: Project, say: Callable[[str], None]
) -> None:
    with project.watching() as watcher:
        killed = time.time()
        project.kill("seed-1")
        lost = watcher.says("testbed/1 lost: lease expired", within_s=SEEN_S + BUSY_S)
        watcher.says("testbed degraded: missing rank 1 of 2")
        say(
            f"the watcher reported the killed seed's loss after {lost.at - killed:.1f} s, TTL "
            f"{LEASE_S:.0f} s"
        )


def test_a_seed_that_comes_back_before_its_lease_has_expired_is_refused_until_then(
    project: Project,
) -> None:
    former = project.ranks()[1]["incarnation"]
    with project.watching() as watcher:
        project.kill("seed-1")
        project.start("seed-1")
        watcher.says("testbed/1 joined", within_s=SEEN_S + BUSY_S)
    assert "rank 1 of 'testbed' is already registered" in project.log_of("seed-1")
    assert project.ranks()[1]["incarnation"] != former


def test_an_evicted_seed_comes_back_as_a_new_registration(project: Project) -> None:
    former = project.ranks()
    with project.watching() as watcher:
        project.engines("evict", "testbed", "--rank", "1")
        watcher.says("testbed/1 lost: evicted")
        watcher.says("testbed ready: 2 ranks")
    assert project.ranks()[1]["incarnation"] != former[1]["incarnation"]
    assert project.ranks()[0] == former[0]


def test_without_its_leader_etcd_loses_nothing_and_takes_new_registrations(
    project: Project,
) -> None:
    former = project.ranks()
    leader = project.leader()
    with project.watching() as watcher:
        project.kill(leader)
        assert project.ranks() == former
        project.stop("seed-0")
        watcher.says("testbed/0 lost: withdrawn")
        project.start("seed-0")
        watcher.says("testbed/0 joined")
        watcher.says("testbed ready: 2 ranks")
        assert project.ranks()[1] == former[1]
        project.again("loader")
        assert project.exit_code_of("loader") == 0
        project.start(leader)
    wait_until(lambda: _all_healthy(project), timeout_s=60)
    assert project.ranks()[1] == former[1]


def _all_healthy(project: Project) -> bool:
    try:
        health = json.loads(
            project.etcdctl("etcd-0", "endpoint", "health", "--cluster", "--write-out", "json")
        )
    except CommandFailed:  # that is how it says that one is not
        return False
    return [each["health"] for each in health] == [True, True, True]


def test_a_seed_that_was_cut_off_for_longer_than_its_lease_comes_back_as_the_same_registration(
    project: Project,
) -> None:
    former = project.ranks()[1]
    with project.watching() as watcher:
        project.cut_off("seed-1")
        watcher.says("testbed/1 lost: lease expired", within_s=SEEN_S + BUSY_S)
        project.connect("seed-1")
        watcher.says("testbed/1 joined")
        watcher.says("testbed ready: 2 ranks")
    assert project.ranks()[1] == former
    project.again("loader")
    assert project.exit_code_of("loader") == 0


def test_a_watcher_that_was_cut_off_reports_what_happened_meanwhile(project: Project) -> None:
    with project.watching() as watcher:
        project.cut_off("watcher")
        project.stop("seed-0")
        project.connect("watcher")
        watcher.says("testbed/0 lost: withdrawn")
        project.start("seed-0")
        watcher.says("testbed ready: 2 ranks")
