"""What a ticket says: there and back, older tickets, and what is none."""

from __future__ import annotations

import json

import pytest

from engine_registry.schema.keyvalue import KeyValue
from engine_registry.schema.pull_ticket import Pull, Reader, decode, encode
from tests.support.builders import OTHER_INCARNATION, a_pull, a_record, ticket

FULL = a_pull(
    reader=Reader.of(a_record(instance="b", incarnation=OTHER_INCARNATION)),
    nbytes=5,
    total_nbytes=8,
    create_revision=7,
)


def read(value: bytes, key: str = FULL.key) -> Pull | None:
    return decode(KeyValue(key, value, 7, 8, 9))


@pytest.mark.parametrize("pull", [FULL, a_pull(create_revision=7)])
def test_a_pull_reads_back_as_it_is(pull: Pull) -> None:
    assert decode(ticket(pull, mod_revision=8)) == pull


def test_a_ticket_of_an_older_version_says_less() -> None:
    old = read(json.dumps({"host": "h", "pid": 3, "incarnation": "x"}).encode())
    assert old == Pull("qwen", 0, "x", "load-1", "h", 3, create_revision=7)
    assert old is not None
    assert old.fraction is None


def test_what_a_newer_version_says_besides_is_left_alone() -> None:
    assert read(encode(FULL)[:-1] + b',"speed":{"a":1}}') == FULL


def test_a_load_is_never_more_than_complete() -> None:
    assert [a_pull(nbytes=nbytes, total_nbytes=8).fraction for nbytes in (0, 2, 8, 100)] == [
        0,
        0.25,
        1,
        1,
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"incarnation": ""},
        {"incarnation": 5},
        {"incarnation": None},
        {"incarnation": "x\n"},
        {"incarnation": "x" * 257},
        {"host": "\x1b[2J"},
        {"host": "h" * 257},
        {"host": ["h"]},
        {"host": "\ud800"},
        {"pid": -1},
        {"pid": 1 << 64},
        {"pid": 1.0},
        {"pid": True},
        {"pid": "1"},
        {"nbytes": -1},
        {"nbytes": 1e300},
        {"nbytes": "5"},
        {"total_nbytes": 1 << 64},
        {"total_nbytes": [8]},
        {"began_at": 5},
        {"began_at": "x\x07"},
        {"reader": "b/0"},
        {"reader": {"rank": 0}},
        {"reader": {"instance": "b", "incarnation": "x"}},
        *(
            {"reader": {"instance": "b", "rank": 0, "incarnation": "x", **wrong}}
            for wrong in (
                {"instance": "a/../b"},
                {"instance": 5},
                {"rank": -1},
                {"rank": 100_000},
                {"rank": "0"},
                {"incarnation": ""},
            )
        ),
    ],
)
def test_what_is_of_a_wrong_type_or_out_of_range_is_no_ticket(change: dict[str, object]) -> None:
    assert read(json.dumps({**json.loads(encode(FULL)), **change}).encode()) is None


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"5",
        b"\xff\xfe{",
        b"[" * 4_000,
        b'{"pid":' * 600,
        b'{"pid":' + b"9" * 4_000,
        encode(FULL) + b" " * 5_000,
    ],
)
def test_nonsense_is_no_ticket(value: bytes) -> None:
    assert read(value) is None


@pytest.mark.parametrize(
    "place", ["qwen/0/", "qwen/0", "qwen/x/y", "qwen/00/y", "qwen/0/a/b", "q\udcff/0/a"]
)
def test_what_lies_elsewhere_is_no_ticket(place: str) -> None:
    assert read(encode(FULL), f"/pulls/{place}") is None
