"""What an operator asks of etcd: versions, members, alarms, users, and the route to it.

A base of `Etcd`. `etcd.admin` has the answers.
"""

from __future__ import annotations

import socket
from typing import Any

import tenacity

from engine_registry.errors import EtcdUnavailable
from engine_registry.etcd.admin import Alarm, Member, MemberStatus, Permission, User, numbers_in
from engine_registry.etcd.connection import Connection
from engine_registry.etcd.descriptors import explain
from engine_registry.etcd.library import pb

_MEMBER_LEARNER = 5  # a field of etcd's Member
_STATUS_USED, _STATUS_LEARNER, _STATUS_QUOTA = 9, 10, 12  # fields of etcd's StatusResponse
_ALARMS = {1: "NOSPACE", 2: "CORRUPT"}
_READS, _WRITES = (0, 2), (1, 2)  # authpb.Permission.Type: READ, WRITE, READWRITE


class Inspection(Connection):
    """Calls that change nothing, and that are about etcd rather than about keys of ours."""

    def status(self) -> str:
        """The server's version.

        Asks every endpoint once, so that a wrong address is an error at once.
        """
        return str(self._status().version)

    def leads(self) -> bool:
        """Whether the member that we are connected to is the leader."""
        response = self._unary("Maintenance", "Status", pb.StatusRequest())
        return bool(response.leader and response.leader == response.header.member_id)

    def member(self) -> MemberStatus:
        """The member that answers first, as it sees itself.

        Asks every endpoint once, as `status`.
        """
        response = self._status()
        # etcd3's classes are older than some of the fields
        numbers = numbers_in(response.SerializeToString())
        return MemberStatus(
            version=str(response.version),
            member_id=int(response.header.member_id),
            leader_id=int(response.leader),
            raft_index=int(response.raftIndex),
            db_nbytes=int(response.dbSize),
            used_nbytes=numbers.get(_STATUS_USED),
            quota_nbytes=numbers.get(_STATUS_QUOTA),
            learner=bool(numbers.get(_STATUS_LEARNER)),
        )

    def members(self) -> tuple[Member, ...]:
        """All members of the cluster, by name, also those that are away."""
        response = self._unary("Cluster", "MemberList", pb.MemberListRequest())
        return tuple(sorted(map(_member, response.members), key=lambda member: member.name))

    def alarms(self) -> tuple[Alarm, ...]:
        """The alarms that stand, of all members."""
        response = self._unary("Maintenance", "Alarm", pb.AlarmRequest(action=pb.AlarmRequest.GET))
        return tuple(
            Alarm(int(each.memberID), _ALARMS.get(each.alarm, f"number {each.alarm}"))
            for each in response.alarms
        )

    def user(self, name: str) -> User:
        """What that user may do. Every user may ask it of itself, root of all."""
        roles = tuple(
            map(str, self._unary("Auth", "UserGet", pb.AuthUserGetRequest(name=name)).roles)
        )
        bounded = [role for role in roles if role != "root"]  # which may do all, and need not exist
        granted = [
            p
            for role in bounded
            for p in self._unary("Auth", "RoleGet", pb.AuthRoleGetRequest(role=role)).perm
        ]
        return User(
            name,
            roles,
            tuple(
                Permission(p.key, p.range_end, p.permType in _READS, p.permType in _WRITES)
                for p in granted
            ),
        )

    def first_keys(self, limit: int) -> tuple[str, ...]:
        """The first keys of the whole store, whatever namespace they are in."""
        response = self._range(
            pb.RangeRequest(key=b"\0", range_end=b"\0", limit=limit, keys_only=True)
        )
        return tuple(kv.key.decode(errors="replace") for kv in response.kvs)

    def local_address(self) -> str:
        """Which of our addresses the way to etcd begins at.

        Nothing is sent: a datagram socket only looks up the route.
        """
        endpoint = self.config.endpoints[self._next_endpoint % len(self.config.endpoints)]
        try:
            family, kind, _, _, address = socket.getaddrinfo(
                endpoint.host, endpoint.port, type=socket.SOCK_DGRAM
            )[0]
            with socket.socket(family, kind) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
        except OSError as exc:
            why, remedy = explain(exc)
            raise EtcdUnavailable(f"there is no way to etcd at {endpoint}: {why}", remedy) from exc

    def _status(self) -> Any:
        attempts = tenacity.stop_after_attempt(len(self.config.endpoints) + 1)
        return self._unary("Maintenance", "Status", pb.StatusRequest(), attempts)


def _member(member: Any) -> Member:
    learner = bool(numbers_in(member.SerializeToString()).get(_MEMBER_LEARNER))
    return Member(int(member.ID), str(member.name), tuple(map(str, member.clientURLs)), learner)
