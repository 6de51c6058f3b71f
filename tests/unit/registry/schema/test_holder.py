"""Entries of the index of holders: what their keys say, and in which order they come."""

from __future__ import annotations

import string
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_registry import ModelIdentity, RankRecord, RankState
from engine_registry.schema.holder import (
    Entry,
    holder_key,
    holder_keys,
    holders_prefix,
    loading_key,
    model_digest,
    parse_entry,
)
from engine_registry.schema.keys import HOLDERS, NEAR_HOLDERS
from engine_registry.schema.keyvalue import KeyValue, end_of
from engine_registry.schema.location import Location
from engine_registry.schema.record import MAX_REVISION, MAX_VERSION, Retained
from tests.support.builders import INCARNATION, a_record

HERE = Location("z", "r", "n")
RECORDS = st.builds(
    lambda rank, state, version, order, incarnation: a_record(
        rank=rank,
        world_size=rank + 1,
        state=state,
        version=version,
        order=order,
        incarnation=incarnation,
    ),
    st.integers(0, 2000),
    st.sampled_from(RankState),
    st.integers(0, MAX_VERSION - 1),
    st.integers(1, MAX_REVISION),
    st.text(string.ascii_letters + string.digits + "-", min_size=1, max_size=40),
)


def entry_of(record: RankRecord) -> Entry | None:
    return parse_entry(KeyValue(holder_key(record), record.key.encode(), 1, 1, 1))


@given(RECORDS)
def test_an_entry_says_what_the_record_does(record: RankRecord) -> None:
    order = record.order if record.state is RankState.LOADING else 0
    assert entry_of(record) == Entry(
        record.key, record.rank, record.state, record.version, order, record.incarnation
    )


@given(RECORDS, RECORDS)
def test_the_newest_version_comes_first_and_of_those_that_load_the_last_to_begin(
    one: RankRecord, other: RankRecord
) -> None:
    other = replace(other, rank=one.rank, world_size=one.world_size, state=one.state)
    newer = one.version > other.version
    if one.version == other.version:
        if one.state is not RankState.LOADING or one.order == other.order:
            return
        newer = one.order > other.order
    assert (holder_key(one) < holder_key(other)) == newer


@given(RECORDS, st.text(string.ascii_letters + "-", min_size=1, max_size=4), st.booleans())
def test_of_those_that_load_the_entry_of_the_one_that_began_before_comes_behind(
    one: RankRecord, incarnation: str, at_once: bool
) -> None:
    """Also of two that registered at one revision: else each might read from the other."""
    one = replace(one, state=RankState.LOADING)
    order = one.order if at_once else one.order // 2 + 1
    other = replace(one, incarnation=incarnation, order=order)
    if one.incarnation != other.incarnation:
        assert (holder_key(one) > holder_key(other)) == (one.began < other.began)


@given(st.integers(0, MAX_REVISION), st.integers(1, MAX_REVISION))
def test_a_range_from_an_order_on_has_those_that_began_by_then(at: int, order: int) -> None:
    record = a_record(state=RankState.LOADING, order=order)
    start = loading_key(record.model, 0, record.version, at)
    assert (holder_key(record) >= start) == (order <= at)
    prefix = holders_prefix(record.model, 0, RankState.LOADING, record.version)
    assert start < end_of(prefix)


def test_a_record_without_an_order_has_no_entry() -> None:
    assert holder_keys(a_record(location=HERE)) == []


def test_a_rank_has_an_entry_in_each_area_that_it_lies_in_and_no_two_areas_are_one() -> None:
    record = a_record(order=7, location=HERE)
    main, *near = holder_keys(record)
    assert main == holder_key(record)
    assert [key.removesuffix(main.removeprefix("/holders")) for key in near] == [
        "/holders/near/z::n",
        "/holders/near/z:r",
        "/holders/near/z",
    ]
    for key in (main, *near):
        found = parse_entry(KeyValue(key, record.key.encode(), 1, 1, 1))
        assert found == entry_of(record)
    assert holder_keys(replace(record, location=Location())) == [main]


def test_the_digest_of_a_model_is_that_of_the_page_and_tells_every_field_apart() -> None:
    model = ModelIdentity("qwen", "r1", "bfloat16", "none", {"b": "2", "a": "1"})
    # printf '%s' '["qwen","r1","bfloat16","none",{"a":"1","b":"2"}]' | b2sum -l 128
    assert model_digest(model) == "2bde29772ec57fd12ae014cf11e7dabc"
    others = [
        replace(model, name="qwen2"),
        replace(model, revision="r2"),
        replace(model, dtype="float16"),
        replace(model, quantization="fp8"),
        replace(model, extra={"a": "1"}),
        ModelIdentity("qwen", "r1bfloat16", "", "none", model.extra),
    ]
    assert len({model_digest(each) for each in [model, *others]}) == 1 + len(others)


GOOD = holder_key(a_record(order=7))
LOADING = holder_key(a_record(order=7, state=RankState.LOADING))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (GOOD, b""),
        (GOOD, b"\xff"),
        (GOOD, b"/engines/qwen/1"),  # another rank
        (GOOD, b"/engines/qwen/0/1"),
        (GOOD, b"/manifests/qwen/0"),
        (GOOD.replace("/holders/", "/engines/"), b"/engines/qwen/0"),
        (GOOD.replace("/ready/", "/asleep/"), b"/engines/qwen/0"),
        (GOOD.replace("/0/ready/", "/x/ready/"), b"/engines/qwen/0"),
        (GOOD.replace("/ready/3", "/ready/z"), b"/engines/qwen/0"),
        (GOOD + "/1", b"/engines/qwen/0"),
        (GOOD.removesuffix(INCARNATION), b"/engines/qwen/0"),
        (LOADING.replace(f"-{INCARNATION}", ""), b"/engines/qwen/0"),
        (LOADING.replace("-", "x-"), b"/engines/qwen/0"),
    ],
)
def test_what_is_no_entry_is_none(key: str, value: bytes) -> None:
    assert parse_entry(KeyValue(key, value, 1, 1, 1)) is None
    assert parse_entry(KeyValue(GOOD, b"/engines/qwen/0", 1, 1, 1)) is not None


@given(RECORDS, RECORDS, st.booleans())
def test_those_that_load_are_in_one_order_in_the_index_and_by_their_records(
    one: RankRecord, other: RankRecord, at_once: bool
) -> None:
    """Ranks that register at once have one `order`, and read from each other all the same."""
    one = replace(one, state=RankState.LOADING)
    other = replace(
        one,
        order=one.order if at_once else other.order,
        incarnation=other.incarnation,
    )
    assert (holder_key(one) < holder_key(other)) is (one.began > other.began)


@given(RECORDS)
def test_versions_that_are_retained_have_entries_apart_from_the_present_ones(
    record: RankRecord,
) -> None:
    record = replace(record, retained=(Retained(5, "0" * 32, 64), Retained(4, "1" * 32, 64)))
    present = {holder_key(record)}
    past = set(holder_keys(record)) - present
    assert len(past) == 2
    assert not any(NEAR_HOLDERS > key >= HOLDERS for key in past)
    if record.state is not RankState.LOADING:  # whose memory is filled: it has retained none
        entries = [parse_entry(KeyValue(key, record.key.encode(), 1, 1, 1)) for key in past]
        assert {entry.version for entry in entries if entry is not None} == {4, 5}
        prefix = holders_prefix(record.model, record.rank, record.state, 5, retained=True)
        assert sum(key.startswith(prefix) for key in past) == 1
