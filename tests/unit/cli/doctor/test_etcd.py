"""What `engines doctor` makes of what etcd shows: facts in, findings out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from engine_cli.doctor.access import JOBS, judge_login, judge_permissions
from engine_cli.doctor.dial import Dialled, Trouble
from engine_cli.doctor.endpoints import EndpointFacts, judge_endpoints, judge_quorum, judge_version
from engine_cli.doctor.etcd import Login
from engine_cli.doctor.finding import Status
from engine_cli.doctor.store import (
    RoundTrip,
    judge_alarms,
    judge_database,
    judge_latency,
    judge_lease,
    judge_namespace,
    round_trip,
)
from engine_cli.doctor.tls import Certificate, judge_certificates, judge_plaintext
from engine_registry.errors import EtcdError, EtcdFull, EtcdRefused, EtcdUnavailable
from engine_registry.etcd.admin import Alarm, Member, MemberStatus, Permission, User
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.schema.keyvalue import Delete, Guard, Put
from tests.support.assessment import assess
from tests.support.builders import a_record
from tests.support.fake_etcd import FakeEtcd

LEADER = MemberStatus("3.6.6", 1, 1, 100, 1000)
FOLLOWER = MemberStatus("3.6.6", 2, 1, 100, 1000)
THIRD = MemberStatus("3.6.6", 3, 1, 100, 1000)
LEARNER = MemberStatus("3.6.6", 4, 1, 100, 1000, learner=True)
MEMBERS = [Member(number, f"m{number}", (f"http://h{number}:2379",)) for number in (1, 2, 3)]
NO_ERROR = ("", "")


def seen(endpoint: str = "h:2379", trouble: Trouble | None = None, **fields: Any) -> EndpointFacts:
    return EndpointFacts(
        endpoint, Dialled(0.001, trouble, "detail"), **{"answer_s": 0.002, **fields}
    )


# -- endpoints and members
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "what", "mend"),
    [
        (seen(trouble=Trouble.NAME), "the name h leads to no address (detail)", "DNS"),
        (seen(trouble=Trouble.REFUSED), "h:2379 refuses connections", "start etcd there"),
        (seen(trouble=Trouble.SILENT), "no answer to a connection", "nc -vz h 2379"),
        (seen(trouble=Trouble.NO_WAY), "h:2379: detail", "ip route"),
        (
            seen(error=EtcdUnavailable("etcd does not answer in time", reason="deadline")),
            "takes connections but does not answer within 2.0 ms",
            "iostat",
        ),
        (
            seen(error=EtcdUnavailable("what answers there is not etcd 3", "check the port")),
            "is not etcd 3",
            "check the port",
        ),
        (seen(error=EtcdError("something new")), "something new", "etcd's log"),
    ],
)
def test_an_endpoint_that_does_not_answer_fails_or_warns_if_another_does(
    facts: EndpointFacts, what: str, mend: str
) -> None:
    (alone,) = judge_endpoints([facts])
    assert alone.status is Status.FAIL
    assert what in alone.what
    assert mend in alone.mend
    good, warned = judge_endpoints([seen("g:2379", status=LEADER), facts])
    assert (good.status, warned.status) == (Status.OK, Status.WARN)
    assert warned.what == f"{alone.what}; other endpoints answer"


@pytest.mark.parametrize(
    ("status", "role"),
    [(LEADER, "leader"), (FOLLOWER, "member"), (replace(FOLLOWER, learner=True), "learner")],
)
def test_an_endpoint_that_answers_is_reported_with_version_time_and_role(
    status: MemberStatus, role: str
) -> None:
    (finding,) = judge_endpoints([seen(status=status)])
    assert finding.what == f"h:2379 answers in 2.0 ms: etcd 3.6.6, {role}"


@pytest.mark.parametrize(
    ("versions", "status"),
    [
        (["3.3.27"], Status.FAIL),
        (["2.3.8"], Status.FAIL),
        (["3.6.6", "3.3.27"], Status.FAIL),
        (["3.4.0"], Status.OK),
        (["3.4.23"], Status.OK),
        (["3.5.0"], Status.WARN),
        (["3.5.2"], Status.WARN),
        (["3.5.3"], Status.OK),
        (["3.5.21"], Status.OK),
        (["3.6.6", "3.5.1"], Status.WARN),
        (["3.5.21", "3.6.0"], Status.WARN),
        (["3.6.0", "3.6.6"], Status.OK),
        (["3.10.0"], Status.OK),
    ],
)
def test_versions_that_corrupt_data_warn_and_those_that_are_too_old_fail(
    versions: list[str], status: Status
) -> None:
    finding = judge_version([replace(LEADER, version=version) for version in versions])
    assert finding.status is status
    assert all(version in finding.what for version in versions)


@pytest.mark.parametrize(
    ("members", "statuses", "error", "status", "what"),
    [
        (
            MEMBERS,
            [LEADER, FOLLOWER, THIRD],
            NO_ERROR,
            Status.OK,
            "3 of 3 members answer; one leader",
        ),
        (MEMBERS[:1], [LEADER], NO_ERROR, Status.OK, "the only member answers; one leader"),
        (MEMBERS[:2], [LEADER, FOLLOWER], NO_ERROR, Status.OK, "an even number"),
        (
            [*MEMBERS, replace(MEMBERS[0], member_id=4, name="l", learner=True)],
            [LEADER, FOLLOWER, THIRD, LEARNER],
            NO_ERROR,
            Status.OK,
            "3 of 3 members answer; besides a learner without a vote; one leader",
        ),
        (
            [*MEMBERS[:1], replace(MEMBERS[0], member_id=4, name="l", learner=True)],
            [LEADER],
            NO_ERROR,
            Status.OK,
            "the only member answers; besides a learner without a vote; one leader",
        ),
        (
            MEMBERS,
            [LEADER, LEARNER],
            ("no", ""),
            Status.FAIL,
            "1 of 3 members answer, not m2, m3; besides a learner without a vote; there is "
            "no quorum",
        ),
        (None, [LEARNER], ("it is a learner", ""), Status.FAIL, "only a learner answers"),
        (None, [LEADER], NO_ERROR, Status.OK, "the only member"),
        (
            MEMBERS,
            [LEADER, FOLLOWER],
            NO_ERROR,
            Status.WARN,
            "2 of 3 members answer, not m3; the loss of one more stops etcd",
        ),
        (
            [*MEMBERS, Member(4, "", ())],
            [LEADER, FOLLOWER, THIRD],
            NO_ERROR,
            Status.WARN,
            "not 4 (never started)",
        ),
        (MEMBERS, [replace(LEADER, leader_id=0)], ("no", ""), Status.FAIL, "there is no quorum"),
        (MEMBERS, [LEADER], ("no", ""), Status.FAIL, "there is no quorum"),
        (
            MEMBERS,
            [LEADER, FOLLOWER, THIRD],
            ("slow disk", "look"),
            Status.FAIL,
            "a read fails: slow disk",
        ),
        (
            MEMBERS,
            [LEADER, replace(FOLLOWER, leader_id=2), THIRD],
            NO_ERROR,
            Status.WARN,
            "different leaders",
        ),
        (
            MEMBERS[:1],
            [replace(LEADER, leader_id=0)],
            NO_ERROR,
            Status.WARN,
            "none knows of a leader",
        ),
        (
            MEMBERS,
            [LEADER, FOLLOWER, replace(THIRD, raft_index=100_000)],
            NO_ERROR,
            Status.WARN,
            "99,900 entries behind",
        ),
    ],
)
def test_a_cluster_is_judged_by_its_members_their_leader_and_a_read(
    members: list[Member] | None,
    statuses: list[MemberStatus],
    error: tuple[str, str],
    status: Status,
    what: str,
) -> None:
    finding = judge_quorum(members, statuses, error)
    assert finding.status is status, finding
    assert what in finding.what
    assert bool(finding.mend) == (status is not Status.OK)


def test_a_cluster_of_five_says_how_many_more_it_can_lose() -> None:
    members = [Member(number, f"m{number}", ()) for number in range(1, 6)]
    assert (
        "1 more may be lost"
        in judge_quorum(
            members, [replace(LEADER, member_id=number) for number in (1, 2, 3, 4)], NO_ERROR
        ).what
    )


# -- store
# --------------------------------------------------------------------------------------------------


GOOD = RoundTrip("/doctor/", kept=True, gone=True, put_s=[0.001], get_s=[0.001], watch_s=[0.002])


@pytest.mark.parametrize(
    ("trip", "status", "what"),
    [
        (GOOD, Status.OK, "nothing is left"),
        (RoundTrip(gone=True), Status.OK, "no key was put"),
        (replace(GOOD, kept=False), Status.FAIL, "not read back"),
        (replace(GOOD, gone=False), Status.FAIL, "has not deleted"),
    ],
)
def test_a_lease_is_good_if_its_key_was_there_and_is_gone(
    trip: RoundTrip, status: Status, what: str
) -> None:
    finding = judge_lease(trip)
    assert finding.status is status
    assert what in finding.what


@pytest.mark.parametrize(
    ("trip", "status"),
    [
        (GOOD, Status.OK),
        (replace(GOOD, put_s=[0.5]), Status.WARN),
        (replace(GOOD, watch_s=[0.5]), Status.WARN),
        (replace(GOOD, put_s=[1.5]), Status.FAIL),
        (replace(GOOD, put_s=[0.001, 0.001, 9.0]), Status.OK),  # one of several
        (RoundTrip(get_s=[0.001]), Status.OK),
        (RoundTrip(), Status.SKIPPED),
    ],
)
def test_latency_is_judged_by_its_medians(trip: RoundTrip, status: Status) -> None:
    assert judge_latency(trip).status is status


def test_slow_reads_are_put_down_to_the_distance_and_slow_writes_to_the_disk() -> None:
    assert "far away" in judge_latency(replace(GOOD, get_s=[0.2], put_s=[0.2])).mend
    assert "disk" in judge_latency(replace(GOOD, put_s=[0.2])).mend


class Guarded(FakeEtcd):
    """Lets its user write under one prefix only, and has no watches."""

    def __init__(self, writable: str) -> None:
        super().__init__()
        self._writable = writable
        self.tried: list[str] = []

    def commit(self, guards: Any, writes: Any) -> int:
        self.tried += [write.key for write in writes]
        if not all(write.key.startswith(self._writable) for write in writes):
            raise EtcdRefused("denied", reason="denied")
        return super().commit(guards, writes)

    def watch(
        self,
        prefix: str,
        start_revision: int,
        timeout_s: float | None = None,
        exact: bool = False,
        others: Sequence[tuple[str, int, bool]] = (),
    ) -> Any:
        raise EtcdUnavailable("no watch")


@pytest.mark.parametrize("place", ["/doctor/", "/pulls/", "/manifests/"])
def test_the_key_goes_where_this_user_may_write_and_is_gone_even_if_a_step_fails(
    place: str,
) -> None:
    etcd = Guarded(place)
    with pytest.raises(EtcdUnavailable):
        round_trip(etcd)
    assert any(key.startswith(place) for key in etcd.tried)
    assert (etcd.keys, etcd.leases) == ([], {})


def test_a_user_that_may_write_nowhere_leaves_no_lease() -> None:
    etcd = Guarded("/nowhere/")
    assert not round_trip(etcd).place
    assert etcd.leases == {}


def test_an_etcd_without_space_leaves_no_lease() -> None:
    class Full(FakeEtcd):
        def commit(self, guards: list[Guard], writes: list[Put | Delete]) -> int:  # type: ignore[override]
            raise EtcdFull("no space")

    etcd = Full()
    with pytest.raises(EtcdFull):
        round_trip(etcd)
    assert etcd.leases == {}


@pytest.mark.parametrize(
    ("size", "quota", "status", "what"),
    [
        (1 << 20, 2 << 30, Status.OK, "1.0 MB of 2.1 GB, 0%"),
        (85, 100, Status.WARN, "85 B of 100 B, 85%"),
        (96, 100, Status.FAIL, "96%"),
        (150, 100, Status.FAIL, "150%"),
        (1 << 20, None, Status.OK, "if etcd has its default quota"),
    ],
)
def test_a_database_is_judged_by_its_share_of_the_quota(
    size: int, quota: int | None, status: Status, what: str
) -> None:
    finding = judge_database(
        [replace(LEADER, db_nbytes=1), replace(FOLLOWER, db_nbytes=size, used_nbytes=1)], quota
    )
    assert finding.status is status
    assert what in finding.what
    assert finding.what.endswith("1 B in use")


def test_each_kind_of_alarm_says_what_it_takes_to_end_it() -> None:
    assert [finding.status for finding in judge_alarms([])] == [Status.OK]
    corrupt, full, new = judge_alarms(
        [Alarm(255, "NOSPACE"), Alarm(10, "CORRUPT"), Alarm(11, "NOSPACE"), Alarm(1, "number 7")]
    )
    assert {finding.status for finding in (corrupt, full, new)} == {Status.FAIL}
    assert full.what.startswith("NOSPACE at member ff, b")
    assert "alarm disarm" in full.mend
    assert "member remove" in corrupt.mend
    assert new.what == "number 7 at member 1"


@pytest.mark.parametrize(
    ("namespace", "keys", "status", "words"),
    [
        ("", [], Status.OK, "no instance under /engines/"),
        ("", ["/prod/engines/a/0", "/prod/manifests/a/0"], Status.WARN, "give --namespace '/prod'"),
        ("/prod", ["/engines/a/0"], Status.WARN, "leave out --namespace"),
        ("/prod", ["/prod/pulls/a/0/x", "other"], Status.OK, "no instance under /prod/engines/"),
    ],
)
def test_an_empty_namespace_warns_if_another_is_in_use(
    namespace: str, keys: list[str], status: Status, words: str
) -> None:
    finding = judge_namespace(namespace, [], keys)
    assert finding.status is status
    assert words in finding.what + finding.mend


def test_a_namespace_in_use_is_reported_with_its_instances() -> None:
    statuses = [
        assess("a", [a_record(instance="a", rank=0, world_size=2)]),
        assess("b", [a_record(instance="b", rank=0, world_size=1)]),
    ]
    assert judge_namespace("/p", statuses, []).what == "2 instances under /p/engines/, 1 ready"


# -- who we are
# --------------------------------------------------------------------------------------------------


def refused(reason: str) -> EtcdError:
    return EtcdRefused("no", reason=reason)


@pytest.mark.parametrize(
    ("user", "error", "loopback", "certificate", "status", "what"),
    [
        (None, None, True, False, Status.OK, "off, and etcd is on this machine"),
        (None, None, False, False, Status.WARN, "off: any client that reaches etcd"),
        (None, None, False, True, Status.OK, "from the client certificate"),
        (None, refused("denied"), False, False, Status.OK, "from the client certificate"),
        (None, refused("credentials"), True, False, Status.FAIL, "no user was given"),
        (
            "bob",
            refused("credentials"),
            True,
            False,
            Status.FAIL,
            "refuses the user 'bob' or the password",
        ),
        ("bob", refused("auth_off"), True, False, Status.FAIL, "has authentication off"),
        ("bob", refused("denied"), True, False, Status.OK, "logged in as 'bob'"),
        ("bob", None, False, False, Status.OK, "logged in as 'bob'"),
    ],
)
def test_a_login_is_judged_by_what_a_first_read_ends_with(
    user: str | None,
    error: EtcdError | None,
    loopback: bool,
    certificate: bool,
    status: Status,
    what: str,
) -> None:
    finding = judge_login(user, error, loopback, certificate)
    assert finding.status is status
    assert what in finding.what


def on(prefix: str, mode: str, namespace: str = "/ns") -> Permission:
    start = f"{namespace}{prefix}".encode()
    return Permission(start, start[:-1] + b"0", read="r" in mode, write="w" in mode)


def all_of(job: str) -> tuple[Permission, ...]:
    reads, writes = JOBS[job]
    both = on("/holders/", "rw")
    return (*(on(prefix, "r") for prefix in reads), *(on(prefix, "w") for prefix in writes), both)


@pytest.mark.parametrize("job", JOBS)
def test_a_user_with_the_permissions_of_the_table_may_do_the_job(job: str) -> None:
    finding = judge_permissions(User("u", ("r",), all_of(job)), "/ns")
    assert finding.status is Status.OK
    assert job in finding.what.partition(":")[2]
    assert f"{job} (some" not in finding.what
    assert judge_permissions(User("u", ("r",), all_of(job)), "/other").status is Status.FAIL


def test_a_user_that_may_write_one_instance_serves_that_one() -> None:
    own = (
        on("/engines/", "r"),
        on("/engines/a/", "rw"),
        on("/manifests/a/", "rw"),
        on("/pulls/a/", "r"),
        on("/evicted/a/", "r"),
    )
    finding = judge_permissions(User("u", ("r",), (*own, on("/holders/", "w"))), "/ns")
    assert finding.status is Status.OK
    assert (
        "may list and watch, serve a rank (some instances): reads /engines/, parts of /evicted/"
        in finding.what
    )
    without = judge_permissions(User("u", ("r",), own), "/ns")
    assert without.status is Status.WARN
    assert without.what.endswith("may not write /ns/holders/, so loads by model read all records")
    assert without.mend == "etcdctl role grant-permission ROLE write --prefix=true /ns/holders/"


def test_a_user_that_loads_without_the_index_reads_all_records() -> None:
    some = (on("/engines/", "r"), on("/manifests/", "r"), on("/pulls/", "rw"))
    without = judge_permissions(User("u", ("r",), some), "/ns")
    assert without.mend == "etcdctl role grant-permission ROLE read --prefix=true /ns/holders/"
    finding = judge_permissions(User("u", ("r",), (*some, on("/holders/", "r"))), "/ns")
    assert finding.status is Status.OK


def test_a_user_that_may_read_nothing_learns_what_to_grant_and_root_that_it_is_too_much() -> None:
    nobody = judge_permissions(User("u", ()), "/ns")
    assert (nobody.status, nobody.mend) == (
        Status.FAIL,
        "etcdctl role grant-permission ROLE read --prefix=true /ns/engines/",
    )
    assert judge_permissions(User("root", ("root",)), "").status is Status.WARN


DAY = 86_400


@pytest.mark.parametrize(
    ("certificate", "status", "what"),
    [
        (
            Certificate("etcd's at h:1", "etcd", 100 * DAY),
            Status.OK,
            "(etcd) is good for 100 more days",
        ),
        (
            Certificate("etcd's at h:1", "", 1.5 * DAY),
            Status.WARN,
            "(without a name) is good for 1 more day",
        ),
        (Certificate("ours in f", "bob", -1), Status.FAIL, "has expired"),
        (
            Certificate("etcd's at h:1", error="certificate has expired"),
            Status.FAIL,
            "the certificate etcd's at h:1 has expired",
        ),
        (
            Certificate("etcd's at h:1", error="self-signed certificate"),
            Status.FAIL,
            "is not accepted: self-signed certificate",
        ),
    ],
)
def test_certificates_warn_before_they_expire_and_fail_after(
    certificate: Certificate, status: Status, what: str
) -> None:
    (finding,) = judge_certificates([certificate], now=0)
    assert finding.status is status
    assert what in finding.what


def test_plaintext_warns_unless_etcd_is_here_and_says_that_a_password_is_read() -> None:
    assert judge_plaintext(EtcdConfig(parse_endpoints("127.0.0.1:1,[::1]:2"))).status is Status.OK
    far = EtcdConfig(parse_endpoints("127.0.0.1:1,10.0.0.1:2"))
    assert judge_plaintext(far).status is Status.WARN
    secret = judge_plaintext(replace(far, user="bob", password="hush"))
    assert "reads the password" in secret.what
    assert "hush" not in secret.what + secret.mend


@pytest.mark.parametrize("reason", ["deadline", None])
def test_an_etcd_that_gives_no_answer_refuses_nobody(reason: str | None) -> None:
    login = Login(EtcdUnavailable("etcd does not answer in time", reason=reason))
    assert (login.unread, login.refused, login.denied) == (login.error, False, False)


@pytest.mark.parametrize("reason", ["credentials", "auth_off", "denied"])
def test_an_etcd_that_refuses_the_user_has_answered(reason: str) -> None:
    login = Login(EtcdRefused("no", reason=reason))
    assert (login.unread, login.refused, login.denied) == (None, True, reason == "denied")


def test_a_login_that_went_well_is_neither() -> None:
    assert (Login().unread, Login().refused, Login().denied) == (None, False, False)
