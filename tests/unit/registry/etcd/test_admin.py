"""What an operator learns from etcd: which keys permissions cover, and numbers in answers that the
client's classes do not know.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_registry.etcd.admin import (
    MemberStatus,
    Permission,
    Reach,
    User,
    behind,
    numbers_in,
    version_of,
)
from engine_registry.etcd.library import pb


def user(*permissions: Permission, roles: tuple[str, ...] = ("r",)) -> User:
    return User("u", roles, permissions)


def reads(start: bytes, end: bytes) -> Permission:
    return Permission(start, end, read=True, write=False)


PREFIX = (b"/engines/", b"/engines0")


@pytest.mark.parametrize(
    ("permissions", "reach"),
    [
        ([], Reach.NONE),
        ([reads(*PREFIX)], Reach.ALL),
        ([reads(b"/", b"0")], Reach.ALL),
        ([reads(b"\0", b"\0")], Reach.ALL),
        ([reads(b"/engines/", b"/engines/m"), reads(b"/engines/m", b"/engines0")], Reach.ALL),
        ([reads(b"/engines/m", b"/engines0"), reads(b"/a", b"/engines/z")], Reach.ALL),
        ([reads(b"/engines/", b"/engines/m"), reads(b"/engines/n", b"/engines0")], Reach.PART),
        ([reads(b"/engines/a/", b"/engines/a0")], Reach.PART),
        ([reads(b"/engines/a", b"")], Reach.PART),
        ([reads(b"/engines/a", b"\0")], Reach.PART),
        ([reads(b"/engines0", b"/f")], Reach.NONE),
        ([reads(b"/a", b"/engines/")], Reach.NONE),
        ([Permission(*PREFIX, read=False, write=True)], Reach.NONE),
    ],
)
def test_permissions_cover_a_range_wholly_partly_or_not(
    permissions: list[Permission], reach: Reach
) -> None:
    assert user(*permissions).reach(*PREFIX, write=False) is reach


def test_permission_to_read_is_none_to_write() -> None:
    assert user(reads(*PREFIX)).reach(*PREFIX, write=True) is Reach.NONE


def test_root_may_do_everything_whatever_its_roles_say() -> None:
    assert user(roles=("root",)).reach(b"\0", b"\0", write=True) is Reach.ALL


@given(st.integers(0, 2**63 - 1), st.text(max_size=300), st.integers(0, 2**64 - 1))
def test_numbers_of_an_encoded_message_are_found_by_their_field(
    size: int, version: str, leader: int
) -> None:
    message = pb.StatusResponse(
        header=pb.ResponseHeader(revision=5), version=version, dbSize=size, leader=leader
    )
    expected = {3: size, 4: leader}
    assert numbers_in(message.SerializeToString()) == {
        field: number for field, number in expected.items() if number
    }


def test_fields_that_the_message_class_does_not_know_are_found() -> None:
    newer = pb.StatusResponse.FromString(
        b"\x48\x96\x01\x50\x01\x5a\x053.6.0\x60\xff\xff\x03\x6d\x01\x02\x03\x04\x61\x01\x02\x03\x04\x05\x06\x07\x08"
    )
    assert numbers_in(newer.SerializeToString()) == {9: 150, 10: 1, 12: 65535}


@given(st.binary(max_size=100))
def test_bytes_that_are_no_message_are_read_to_their_end(junk: bytes) -> None:
    numbers_in(junk)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("3.5.1", (3, 5, 1)),
        ("3.6.0-rc.2", (3, 6, 0)),
        ("3.4", (3, 4)),
        ("", ()),
        ("next", ()),
        ("3.x", (3,)),
    ],
)
def test_versions_are_compared_as_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert version_of(text) == numbers


def test_a_member_leads_if_it_says_so_of_itself() -> None:
    assert MemberStatus("3.5.1", 7, 7, 1, 1).leads
    assert not MemberStatus("3.5.1", 7, 8, 1, 1).leads
    assert not MemberStatus("3.5.1", 0, 0, 1, 1).leads


def test_how_far_the_last_is_behind_the_first() -> None:
    assert behind([MemberStatus("", 1, 1, index, 0) for index in (10, 4, 7)]) == 6
    assert behind([]) == 0
