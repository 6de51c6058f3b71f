"""Every endpoint of etcd by itself: does something listen, does it answer, which version is it; and
all of them as a cluster.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine_cli.doctor.dial import Dialled, Trouble, dial
from engine_cli.doctor.finding import Finding, Status, described, duration, fail, ok, warn
from engine_registry.errors import EtcdError, EtcdRefused
from engine_registry.schema.address import is_loopback

if TYPE_CHECKING:
    from engine_registry.etcd.admin import Member, MemberStatus
    from engine_registry.etcd.config import EtcdConfig

# entries of the log; etcd itself refuses requests of a leader 5,000 ahead of what is applied
_FAR_BEHIND = 5_000


@dataclass(frozen=True)
class EndpointFacts:
    endpoint: str
    dialled: Dialled
    answer_s: float = 0.0
    status: MemberStatus | None = None
    error: EtcdError | None = None  # what it answered instead


def look(config: EtcdConfig, limit_s: float) -> EndpointFacts:
    """At the one endpoint of `config`.

    First without credentials, so that a wrong password does not hide a good server.
    """
    from engine_registry.etcd.client import Etcd

    endpoint = config.endpoints[0]
    dialled = dial(endpoint.host, endpoint.port, limit_s)
    if dialled.trouble is not None:
        return EndpointFacts(str(endpoint), dialled)
    timed = replace(config, timeout_s=max(0.2, limit_s - dialled.seconds))
    began = time.monotonic()
    try:
        try:
            with closing(Etcd(replace(timed, user=None, password=None))) as etcd:
                etcd.member()  # connects
                began = time.monotonic()
                status = etcd.member()
        except EtcdRefused:
            if config.user is None:
                raise
            with closing(Etcd(timed)) as etcd:
                status = etcd.member()
    except EtcdError as exc:
        return EndpointFacts(str(endpoint), dialled, time.monotonic() - began, error=exc)
    return EndpointFacts(str(endpoint), dialled, time.monotonic() - began, status)


def judge_endpoints(facts: Sequence[EndpointFacts]) -> list[Finding]:
    """An endpoint that is away is a failure only if no other answers."""
    some = any(each.status is not None for each in facts)
    return [_judge_endpoint(each, Status.WARN if some else Status.FAIL) for each in facts]


def _judge_endpoint(facts: EndpointFacts, bad: Status) -> Finding:
    name = "etcd.endpoint"
    if facts.status is not None:
        role = "leader" if facts.status.leads else "learner" if facts.status.learner else "member"
        return ok(
            name,
            f"{facts.endpoint} answers in {duration(facts.answer_s)}: etcd "
            f"{facts.status.version}, {role}",
        )
    what, mend = _why_not(facts)
    return Finding(
        name, bad, what + ("; other endpoints answer" if bad is Status.WARN else ""), mend
    )


def _why_not(facts: EndpointFacts) -> tuple[str, str]:
    endpoint, dialled = facts.endpoint, facts.dialled
    host, _, port = endpoint.rpartition(":")
    if dialled.trouble is Trouble.NAME:
        return (
            f"{endpoint}: the name {host} leads to no address ({dialled.detail})",
            "correct --etcd (or ENGINES_ETCD), or the name in DNS or /etc/hosts",
        )
    if dialled.trouble is Trouble.REFUSED:
        return (
            f"{endpoint} refuses connections: nothing listens there",
            "start etcd there, or give the right address with --etcd (or ENGINES_ETCD)",
        )
    if dialled.trouble is Trouble.SILENT:
        return (
            f"{endpoint}: no answer to a connection within {duration(dialled.seconds)}",
            f"is that machine up, and does a firewall drop packets to port {port}? From "
            f"here: nc -vz {host} {port}",
        )
    if dialled.trouble is Trouble.NO_WAY:
        return (
            f"{endpoint}: {dialled.detail}",
            "look at the routes (ip route get), and at the address in --etcd",
        )
    if facts.error is None:
        return f"{endpoint} gives no answer", "look at etcd's log"
    if facts.error.details.get("reason") == "deadline":
        return (
            f"{endpoint} takes connections but does not answer within {duration(facts.answer_s)}",
            "etcd hangs or its disk does: look at its log, at `systemctl status etcd` and "
            "`iostat -x 1` on that machine",
        )
    what, mend = described(facts.error)
    return what, mend or "look at etcd's log"


def judge_version(statuses: Sequence[MemberStatus]) -> Finding:
    """Of all members that answer."""
    from engine_registry.etcd.admin import version_of

    name, versions = "etcd.version", sorted({status.version for status in statuses}, key=version_of)
    said = f"etcd {' and '.join(versions)}"
    if any(version_of(version) < (3, 4) for version in versions):
        return fail(
            name,
            f"{said}: older than 3.4, which is not supported",
            "upgrade etcd to 3.6, one minor release at a time",
        )
    if any((3, 5, 0) <= version_of(version) <= (3, 5, 2) for version in versions):
        return warn(
            name,
            f"{said}: 3.5.0 to 3.5.2 can corrupt data under load",
            "upgrade to the newest 3.5 or 3.6 for production; for trying things out it will do",
        )
    if len({version_of(version)[:2] for version in versions}) > 1:
        return warn(name, f"{said}: members of different releases", "finish the upgrade")
    return ok(name, said)


def judge_quorum(
    members: Sequence[Member] | None, statuses: Sequence[MemberStatus], read_error: tuple[str, str]
) -> Finding:
    """`members` None: this user may not ask.

    `read_error` is what a read that needs a quorum ended with, or empty.
    """
    name = "etcd.quorum"
    voting = [status for status in statuses if not status.learner]
    if statuses and not voting:
        return fail(
            name,
            "only a learner answers, which neither reads nor writes for clients",
            "name a voting member in --etcd, or promote the learner: etcdctl member promote",
        )
    alive = {status.member_id for status in voting}
    known = {member.member_id: member for member in members or () if not member.learner}
    total = max(len(known), len(alive))
    away = [
        member.name or f"{member.member_id:x} (never started)"
        for number, member in known.items()
        if number not in alive
    ]
    count = (
        "the only member answers"
        if total == len(alive) == 1
        else f"{len(alive)} of {total} members answer"
    )
    if away:
        count += f", not {', '.join(away)}"
    if learners := _learners(members, statuses):
        count += f"; besides {learners} without a vote"
    leaders = {status.leader_id for status in voting} - {0}
    if read_error[0] and (not leaders or len(alive) <= total // 2):
        return fail(
            name,
            f"{count}; there is no quorum, so etcd neither reads nor writes",
            "start the members that are away: more than half must run",
        )
    if read_error[0]:
        return fail(
            name, f"{count}; a read fails: {read_error[0]}", read_error[1] or "look at etcd's log"
        )
    if len(leaders) > 1:
        return warn(
            name,
            f"{count}; they name different leaders",
            "run this again: an election may be under way; else look at the network between "
            "members",
        )
    if away:
        spare = len(alive) - (total // 2 + 1)
        loss = "the loss of one more stops etcd" if spare <= 0 else f"{spare} more may be lost"
        return warn(
            name,
            f"{count}; {loss}",
            "start the members that are away (or they are not reachable from here: etcdctl "
            "endpoint health --cluster)",
        )
    return _judge_health(name, count, voting, leaders)


def _learners(members: Sequence[Member] | None, statuses: Sequence[MemberStatus]) -> str:
    """How many members are learners, in words; empty where none is."""
    known = {member.member_id for member in members or () if member.learner}
    known |= {status.member_id for status in statuses if status.learner}
    return "" if not known else "a learner" if len(known) == 1 else f"{len(known)} learners"


def _judge_health(
    name: str, count: str, statuses: Sequence[MemberStatus], leaders: set[int]
) -> Finding:
    from engine_registry.etcd.admin import behind

    if not leaders:
        return warn(
            name,
            f"{count}; none knows of a leader at the moment",
            "run this again: an election may be under way",
        )
    lag = behind(statuses)
    if lag > _FAR_BEHIND:
        return warn(
            name,
            f"{count}; one is {lag:,} entries behind",
            "look at the disk and network of the slow member",
        )
    even = len(statuses) > 1 and len(statuses) % 2 == 0
    return ok(
        name,
        f"{count}; one leader"
        + ("; an even number of members withstands no more than one less" if even else ""),
    )


def all_loopback(config: EtcdConfig) -> bool:
    return all(is_loopback(endpoint.host) for endpoint in config.endpoints)
