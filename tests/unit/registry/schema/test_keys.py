"""Names and numbers that may be part of a key, and the way back from a key to them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_registry.errors import InvalidField
from engine_registry.schema.keys import (
    check_instance,
    check_rank,
    evicted_key,
    instance_prefix,
    manifest_part_key,
    manifest_prefix,
    parse_record_key,
    record_key,
)

NAMES = st.from_regex(r"[A-Za-z0-9._-]{1,128}", fullmatch=True)


@pytest.mark.parametrize("name", ["a", "qwen-2.5_7B", "..", "-", "0", "x" * 128])
def test_letters_digits_dot_dash_and_underscore_make_an_instance_name(name: str) -> None:
    assert check_instance(name) == name


@pytest.mark.parametrize(
    "name", ["", "a/b", "/", "a b", "ä", "a\n", "a\x00", "x" * 129, "日本", None, 7, b"a"]
)
def test_other_instance_names_are_refused(name: Any) -> None:
    with pytest.raises(InvalidField, match=r"instance name .* is not valid: use 1 to 128 of"):
        check_instance(name)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (99_999, 100_000)])
def test_a_rank_is_below_its_world_size(rank: int, world_size: int) -> None:
    check_rank(rank, world_size)
    assert parse_record_key(record_key("a", rank)) == ("a", rank)


@pytest.mark.parametrize(
    ("rank", "world_size", "field"),
    [
        (1, 1, "rank"),
        (-1, 2, "rank"),
        (True, 2, "rank"),
        (0.0, 2, "rank"),
        ("0", 2, "rank"),
        (None, 2, "rank"),
        (0, 0, "world_size"),
        (0, -1, "world_size"),
        (0, 1_000_001, "world_size"),
        (0, True, "world_size"),
        (0, 2.0, "world_size"),
        (0, None, "world_size"),
    ],
)
def test_a_rank_or_world_size_out_of_range_or_not_whole_is_refused(
    rank: Any, world_size: Any, field: str
) -> None:
    with pytest.raises(InvalidField) as caught:
        check_rank(rank, world_size)
    assert caught.value.details == {"field": field}


@given(NAMES, st.integers(0, 999_999))
def test_a_record_key_is_read_back_into_its_instance_and_rank(instance: str, rank: int) -> None:
    key = record_key(instance, rank)
    assert parse_record_key(key) == (instance, rank)
    assert key.startswith(instance_prefix(instance))


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/engines/",
        "/engines/a",
        "/engines/a/",
        "/engines//0",
        "/engines/a/b",
        "/engines/a/-1",
        "/engines/a/01",
        "/engines/a/0/",
        "/engines/a/0/1",
        "/engines/a/0\n",
        "/engines/a b/0",
        "/engines/a/٣",
        "/engines/a/12345678",
        "x/engines/a/0",
        "/manifests/a/0",
        manifest_part_key("a", 0, "i", 0),
        evicted_key("a", 0, "i"),
    ],
)
def test_foreign_keys_are_no_record_keys(key: str) -> None:
    assert parse_record_key(key) is None


@given(NAMES, NAMES, st.integers(0, 999), st.integers(0, 999))
def test_the_prefix_of_one_instance_or_rank_never_holds_keys_of_another(
    a: str, b: str, rank: int, other: int
) -> None:
    assert record_key(b, rank).startswith(instance_prefix(a)) == (a == b)
    assert manifest_part_key(b, other, "i", 0).startswith(manifest_prefix(a, rank, "i")) == (
        (a, rank) == (b, other)
    )
