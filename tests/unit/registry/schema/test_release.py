"""The release in etcd: it says which bytes are meant, and whatever may lie there is no surprise."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_registry import Release
from engine_registry.errors import RecordDamaged, SchemaUnsupported
from engine_registry.schema.keys import parse_release_key
from engine_registry.schema.keyvalue import KeyValue
from engine_registry.schema.record import MAX_VERSION
from engine_registry.schema.release import MAX_CONTENTS, decode_release, digest_of
from tests.support.builders import CONTENT, OTHER_CONTENT, a_release, released

CONTENTS = st.text("0123456789abcdef", min_size=32, max_size=32)


def stored(release: Release, **changes: Any) -> KeyValue:
    fields = {**json.loads(release.encode()), **changes}
    return KeyValue("/releases/qwen", json.dumps(fields).encode(), 1, 1, 1)


@given(st.integers(0, MAX_VERSION - 1), st.lists(CONTENTS, min_size=1, max_size=9).map(tuple))
def test_a_release_is_read_as_it_was_written(version: int, contents: tuple[str, ...]) -> None:
    release = a_release(version=version, contents=contents)
    assert decode_release(released(release)) == release


def test_of_an_instance_with_many_ranks_it_has_the_digest_alone() -> None:
    few, many = (CONTENT,) * MAX_CONTENTS, (CONTENT,) * (MAX_CONTENTS + 1)
    assert decode_release(released(a_release(contents=few))).contents == few
    release = decode_release(released(a_release(contents=many)))
    assert release.contents == ()
    assert release.is_of(3, many)
    assert len(a_release(contents=many).encode()) < 300
    assert len(a_release(contents=few).encode()) < 10_000


def test_it_is_of_the_contents_in_their_order_and_of_no_others() -> None:
    release = a_release(contents=(CONTENT, OTHER_CONTENT))
    assert release.is_of(3, (CONTENT, OTHER_CONTENT))
    assert not release.is_of(3, (OTHER_CONTENT, CONTENT))
    assert not release.is_of(4, (CONTENT, OTHER_CONTENT))
    assert not release.is_of(3, (CONTENT,))
    assert digest_of([CONTENT]) == digest_of((CONTENT,))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": -1}, "version"),
        ({"version": 1 << 62}, "version"),
        ({"digest": "x"}, "its digest is not that of its contents"),
        ({"digest": "x", "contents": []}, "content 'x' is not valid"),
        ({"model": "x"}, "content 'x' is not valid"),
        ({"digest": "00" * 16}, "its digest is not that of its contents"),
        ({"contents": "x"}, "contents"),
        ({"contents": ["x", CONTENT]}, "digest"),
        ({"by": "a\nb"}, "by"),
        ({"released_at": 1}, "released_at"),
    ],
)
def test_a_field_that_is_not_valid_is_named(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(RecordDamaged, match="the release at /releases/qwen is damaged") as caught:
        decode_release(stored(a_release(), **changes))
    assert why in caught.value.what


@given(st.binary(max_size=200))
def test_whatever_lies_there_is_a_release_or_damaged(value: bytes) -> None:
    with pytest.raises(RecordDamaged):
        decode_release(KeyValue("/releases/qwen", value, 1, 1, 1))


def test_a_newer_schema_is_refused_by_name_and_a_new_field_is_ignored() -> None:
    with pytest.raises(SchemaUnsupported, match="has schema 2; this version reads up to 1"):
        decode_release(stored(a_release(), schema=2, version="new"))
    assert decode_release(stored(a_release(), new=1)) == a_release()


def test_a_key_of_another_kind_is_none_of_a_release() -> None:
    assert parse_release_key("/releases/qwen") == "qwen"
    for key in ("/releases/", "/releases/a/b", "/releases/a b", "/engines/qwen", "x/releases/q"):
        assert parse_release_key(key) is None
    with pytest.raises(RecordDamaged, match="its key is not"):
        decode_release(KeyValue("/releases/a/b", a_release().encode(), 1, 1, 1))
