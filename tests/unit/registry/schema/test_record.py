"""The record: what is written is what is read, and nothing that lies in etcd makes a reader fail in
an unknown way.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine_registry import Location, ModelIdentity, RankRecord, RankState
from engine_registry.errors import InvalidField, RecordDamaged, SchemaUnsupported
from engine_registry.schema.record import GATEWAY, MAX_VERSION, ManifestRef, Retained
from engine_registry.schema.record_format import MAX_RECORD_NBYTES, decode, encode
from tests.support.builders import a_record

# what `str.isprintable` takes; a filter would throw most texts away
PRINTABLE = st.characters(exclude_categories=("C", "Z"), include_characters=" ")
TEXT = st.text(PRINTABLE, max_size=20)
LABEL = st.from_regex(r"[A-Za-z0-9]{1,8}", fullmatch=True)
U64 = st.integers(0, 2**64 - 1)
CONTENT = st.from_regex(r"[0-9a-f]{32}", fullmatch=True)
VERSION = st.integers(0, MAX_VERSION - 1)
CONTENTS = ["1" * 32, "2" * 32, "3" * 32]
SHIFT = st.integers(1 - 2**63, 2**63 - 1)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def places(draw: st.DrawFn) -> tuple[int, int]:
    size = draw(st.integers(1, 4096))
    return draw(st.integers(0, size - 1)), size


@st.composite
def records(draw: st.DrawFn) -> RankRecord:
    world_size = draw(st.integers(1, 100_000))
    return RankRecord(
        incarnation=draw(TEXT),
        instance=draw(st.from_regex(r"[A-Za-z0-9._-]{1,128}", fullmatch=True)),
        rank=draw(st.integers(0, world_size - 1)),
        world_size=world_size,
        model=ModelIdentity(
            draw(st.text(PRINTABLE, min_size=1, max_size=20)),
            draw(TEXT),
            draw(TEXT),
            draw(TEXT),
            draw(st.dictionaries(TEXT, TEXT, max_size=3)),
        ),
        session_id=draw(TEXT),
        protocol=draw(TEXT),
        manifest=ManifestRef(draw(TEXT), draw(U64), draw(U64), draw(U64)),
        header_addr=draw(U64),
        registered_at=draw(TEXT),
        generation=draw(TEXT),
        topology=draw(st.dictionaries(TEXT, places(), max_size=3)),
        version=draw(VERSION),
        content=draw(CONTENT),
        state=draw(st.sampled_from(RankState)),
        shift=draw(SHIFT),
        retained=tuple(
            draw(st.lists(st.builds(Retained, VERSION, CONTENT, U64, SHIFT), max_size=3))
        ),
        fabric=draw(TEXT),
        rails=draw(st.dictionaries(TEXT, TEXT, max_size=3)),
        location=draw(st.builds(Location, *3 * [st.just("") | LABEL])),
        host=draw(TEXT),
        pid=draw(st.integers(0, 2**31)),
        device=draw(TEXT),
        writer=draw(TEXT),
        kept_by=draw(TEXT),
        unresponsive_since=draw(TEXT),
        ended=draw(TEXT),
        labels=draw(st.dictionaries(LABEL, st.just("") | LABEL, max_size=3)),
    )


def as_json(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(encode(a_record()))
    return {**data, **changes}


def changed(path: str, value: Any) -> bytes:
    """A good record with the field at the dotted path set, or removed if `value` is Ellipsis."""
    data = copy.deepcopy(as_json())
    *way, name = path.split(".")
    place = data
    for step in way:
        place = place[step]
    if value is ...:
        del place[name]
    else:
        place[name] = value
    return json.dumps(data).encode()


def read(value: bytes) -> RankRecord | None:
    """The record under the key of qwen's rank 0; None if damaged, and the error says so."""
    try:
        return decode("/engines/qwen/0", value)
    except RecordDamaged as exc:
        if "/engines/qwen/0" not in str(exc):
            raise
        return None


@given(records(), U64)
def test_what_is_encoded_decodes_to_an_equal_record(record: RankRecord, mod_revision: int) -> None:
    found = decode(record.key, encode(record), mod_revision)
    assert found == record
    assert found.mod_revision == mod_revision


def test_fields_of_a_later_writer_are_ignored() -> None:
    data = as_json(colour="blue")
    data["manifest"]["compression"] = "zstd"
    data["model"]["licence"] = None
    assert decode(a_record().key, json.dumps(data).encode()) == a_record()


def test_the_fields_that_may_be_left_out_have_defaults() -> None:
    data = as_json()
    for name in ("generation", "topology", "fabric", "host", "pid", "device", "writer"):
        del data[name]
    for name in ("revision", "dtype", "quantization", "extra"):
        del data["model"][name]
    wanted = a_record(
        generation="",
        topology={},
        fabric="",
        host="",
        pid=0,
        device="",
        writer="",
        model=ModelIdentity("qwen"),
    )
    assert decode(a_record().key, json.dumps(data).encode()) == wanted


def test_only_a_record_whose_weights_lie_elsewhere_is_kept_from_readers_of_schema_1() -> None:
    """They would read at the addresses of the manifest."""
    assert as_json()["schema"] == 1
    kept = Retained(6, CONTENTS[0], 64, 0)
    assert json.loads(encode(a_record(retained=(kept,))))["schema"] == 1
    assert json.loads(encode(a_record(shift=4096)))["schema"] == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shift", "1"),
        ("shift", 2**63),
        ("shift", -(2**63)),
        ("shift", True),
        ("retained", {}),
        ("retained", [{"version": 1}]),
        ("retained", [{"version": -1, "content": "0" * 32, "header": {"addr": 0}}]),
        ("retained", [{"version": 1, "content": "x", "header": {"addr": 0}}]),
        ("retained", [{"version": 1, "content": "0" * 32, "header": {"addr": 2**64}}]),
        ("retained", [{"version": 1, "content": "0" * 32, "header": {"addr": 0}, "shift": 2**63}]),
    ],
)
def test_a_place_that_no_memory_has_is_damage(field: str, value: object) -> None:
    assert read(json.dumps(as_json(**{field: value})).encode()) is None


def test_a_record_says_where_each_of_its_versions_lies() -> None:
    first, second, third = CONTENTS
    kept = Retained(6, second, 64, 4096), Retained(5, first, 32, 8192)
    record = a_record(version=7, content=third, header_addr=128, retained=kept)
    assert record.as_of() is record.as_of(7) is record.as_of(content=third) is record
    assert record.as_of(4) is record.as_of(7, first) is record.as_of(content="0" * 32) is None
    past = record.as_of(5)
    assert past is not None
    assert past == record.as_of(content=first) == record.as_of(5, first)
    assert (past.version, past.content, past.header_addr, past.shift) == (5, first, 32, 8192)
    assert {one.version for one in past.retained} == {6, 7}
    again = past.as_of(7)
    assert again is not None
    assert (again.content, again.header_addr, again.shift) == (third, 128, 0)


def test_rails_are_written_only_where_there_are_some() -> None:
    assert "rails" not in as_json()
    rails = {"mlx5_0": "10.1.0.0/24", "mlx5_1": ""}
    assert decode(a_record().key, encode(a_record(rails=rails))).rails == rails


@pytest.mark.parametrize("rails", [[], "mlx5_0", None, {"mlx5_0": 1}, {"a\nb": ""}, {"a": "\x1b"}])
def test_rails_that_are_no_texts_by_names_are_damage(rails: object) -> None:
    assert read(json.dumps(as_json(rails=rails)).encode()) is None


def test_a_location_is_written_only_where_it_is_known() -> None:
    assert "location" not in as_json()
    stands = a_record(location=Location("eu-1a", "", "node-5"))
    assert json.loads(encode(stands))["location"] == "eu-1a//node-5"
    assert decode(stands.key, encode(stands)).location == stands.location


@pytest.mark.parametrize("location", [None, 7, [], "a/b/c/d", "a b", "a/:"])
def test_what_is_no_location_is_damage(location: object) -> None:
    assert read(json.dumps(as_json(location=location)).encode()) is None


def test_who_keeps_a_lease_is_written_only_where_it_is_no_keeper_of_the_ranks_own() -> None:
    assert "kept_by" not in as_json()
    assert decode(a_record().key, encode(a_record(kept_by=GATEWAY))).kept_by == GATEWAY


def test_labels_are_written_only_where_there_are_some_and_are_checked_when_they_are_read() -> None:
    assert "labels" not in as_json()
    labelled = a_record(labels={"team": "search"})
    assert json.loads(encode(labelled))["labels"] == {"team": "search"}
    with pytest.raises(RecordDamaged, match="label 'te am' is not valid"):
        decode(labelled.key, json.dumps(as_json(labels={"te am": "x"})).encode())


def test_the_largest_labels_fit_into_a_record_with_room_to_spare() -> None:
    labels = {f"{'n' * 61}{number:02d}": "v" * 63 for number in range(16)}
    assert len(encode(a_record(labels=labels))) < MAX_RECORD_NBYTES - 500


def test_a_holder_whose_pid_nobody_knows_is_named_without() -> None:
    assert a_record(pid=0).holder == "host node-1, since 2026-01-02T03:04:05.678+00:00"


def test_a_newer_schema_is_refused_by_its_number_whatever_else_the_record_holds() -> None:
    with pytest.raises(SchemaUnsupported, match="schema 7; this version reads up to 2") as caught:
        decode("/engines/qwen/0", b'{"schema": 7}')
    assert caught.value.details == {"key": "/engines/qwen/0", "schema": 7}


REQUIRED = [
    "schema",
    "incarnation",
    "instance",
    "rank",
    "world_size",
    "model",
    "model.name",
    "session_id",
    "protocol",
    "manifest",
    "manifest.digest",
    "manifest.parts",
    "manifest.tensors",
    "manifest.nbytes",
    "header",
    "header.addr",
    "registered_at",
    "version",
    "state",
]
STRINGS = [
    "incarnation",
    "instance",
    "session_id",
    "protocol",
    "registered_at",
    "generation",
    "state",
    "fabric",
    "host",
    "device",
    "writer",
    "kept_by",
    "unresponsive_since",
    "ended",
    "model.name",
    "model.revision",
    "model.dtype",
    "model.quantization",
    "manifest.digest",
]
NUMBERS = [
    "schema",
    "rank",
    "world_size",
    "version",
    "pid",
    "manifest.parts",
    "manifest.tensors",
    "manifest.nbytes",
    "header.addr",
]
OBJECTS = ["model", "model.extra", "manifest", "header", "topology"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *[(path, ...) for path in REQUIRED],
        *[(path, value) for path in STRINGS for value in (None, 7, True, ["a"], {"a": "b"})],
        *[
            (path, value)
            for path in NUMBERS
            for value in (None, "7", True, False, 1.0, float("nan"), [1])
        ],
        *[(path, value) for path in OBJECTS for value in (None, "x", 7, True, ["a"])],
        *[(path, -1) for path in ("rank", "world_size", "version")],
        *[
            (path, value)
            for path in NUMBERS
            if path.startswith(("manifest", "header"))
            for value in (-1, 2**64)
        ],
        ("rank", 2),
        ("world_size", 0),
        ("world_size", 1_000_001),
        ("version", MAX_VERSION),
        ("state", "sleeping"),
        ("instance", ""),
        ("instance", "a/b"),
        ("model.name", ""),
        *[
            ("topology", {"tp": place})
            for place in (
                [2, 2],
                [-1, 2],
                [0],
                [0, 1, 2],
                [0, "2"],
                [False, 2],
                [0, 2.0],
                "02",
                3,
                None,
            )
        ],
    ],
)
def test_a_field_that_is_missing_or_wrong_is_damage_that_names_the_key(
    path: str, value: Any
) -> None:
    with pytest.raises(RecordDamaged, match="the record at /engines/qwen/0 is damaged") as caught:
        decode("/engines/qwen/0", changed(path, value))
    assert caught.value.details["key"] == "/engines/qwen/0"


@pytest.mark.parametrize("path", ["host", "incarnation", "model.name", "session_id"])
def test_text_that_no_encoding_can_write_is_damage(path: str) -> None:
    with pytest.raises(RecordDamaged):
        decode("/engines/qwen/0", changed(path, "\ud800"))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("state", ..., "`$.state` is missing"),
        ("state", "sleeping", "`$.state`: 'sleeping' is none of the words that may stand there"),
        ("manifest.parts", ..., "`$.manifest.parts` is missing"),
        (
            "manifest.parts",
            None,
            "`$.manifest.parts`: a whole number was expected, null was found",
        ),
        ("pid", "7", "`$.pid`: a whole number was expected, a text was found"),
        ("pid", 7.0, "`$.pid`: a whole number was expected, a number with a fraction was found"),
        ("rank", True, "`$.rank`: a whole number was expected, true or false was found"),
        ("manifest.nbytes", -1, "`$.manifest.nbytes`: a whole number of at least 0 was expected"),
        (
            "manifest.nbytes",
            2**64,
            "`$.manifest`: nbytes is out of range: 18446744073709551616",
        ),
        ("header", [], "`$.header`: an object was expected, a list was found"),
        ("model.extra", 5, "`$.model.extra`: an object was expected, a whole number was found"),
        (
            "topology",
            {"tp": [0]},
            "topology 'tp': [0] is not valid: an axis has (index, size), and the index is from 0 "
            "to size - 1",
        ),
    ],
)
def test_damage_is_reported_with_the_field_and_what_is_wrong_with_it(
    path: str, value: Any, said: str
) -> None:
    with pytest.raises(RecordDamaged) as caught:
        decode("/engines/qwen/0", changed(path, value))
    assert str(caught.value) == f"the record at /engines/qwen/0 is damaged: {said}"


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@example(b"")
@example(b"[" * 10_000)
@example(b'{"schema": ' + b"1" * 5_000 + b"}")
@example(b"\xff\xfe{\x00}\x00")
def test_whatever_lies_under_a_record_key_is_a_record_or_damage(value: bytes) -> None:
    with pytest.raises(RecordDamaged, match="/engines/qwen/0"):
        decode("/engines/qwen/0", value)


@given(st.sampled_from(sorted({*REQUIRED, *STRINGS, *NUMBERS, *OBJECTS})), JSON)
def test_any_json_in_any_field_is_a_good_record_or_damage(path: str, value: Any) -> None:
    found = read(changed(path, value))
    assert found is None or decode(found.key, encode(found)) == found


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_record_with_a_flipped_byte_is_another_good_record_or_damage(
    place: int, flip: int
) -> None:
    value = bytearray(encode(a_record()))
    value[place % len(value)] ^= flip
    found = read(bytes(value))
    assert found is None or found.key == "/engines/qwen/0"


@pytest.mark.parametrize("key", ["/engines/qwen/1", "/engines/other/0", "/elsewhere"])
def test_a_record_that_lies_under_another_key_is_damage(key: str) -> None:
    with pytest.raises(RecordDamaged, match="it says that it belongs at /engines/qwen/0"):
        decode(key, encode(a_record()))


def test_a_value_that_is_far_too_long_is_not_even_parsed() -> None:
    value = encode(a_record()) + b" " * 4 * MAX_RECORD_NBYTES
    with pytest.raises(RecordDamaged, match="is no record's size"):
        decode(a_record().key, value)


@pytest.mark.parametrize(
    ("changes", "largest"),
    [
        ({"model": ModelIdentity("m", extra={"notes": "x" * 5000})}, "model"),
        ({"host": "h" * 5000}, "host"),
        ({"topology": {f"axis-{n}": (0, 1) for n in range(400)}}, "topology"),
    ],
)
def test_a_record_over_4_kb_is_refused_with_the_name_of_its_largest_field(
    changes: dict[str, Any], largest: str
) -> None:
    with pytest.raises(InvalidField, match=f"more than 4096: shorten '{largest}'") as caught:
        encode(a_record(**changes))
    assert caught.value.details == {"field": largest}


def test_the_mark_that_a_registration_has_ended_is_never_refused_for_its_length() -> None:
    room = MAX_RECORD_NBYTES - len(encode(a_record(host="")))
    full = a_record(host="h" * room)
    assert len(encode(full)) == MAX_RECORD_NBYTES
    ended = replace(full, ended="lease expired")
    assert decode(full.key, encode(ended)).ended == "lease expired"


def test_a_live_record_says_nothing_of_an_end() -> None:
    assert "ended" not in as_json()
    assert decode(a_record().key, encode(a_record())).ended == ""


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"instance": "a b"}, "instance"),
        ({"rank": 2}, "rank"),
        ({"rank": True}, "rank"),
        ({"world_size": 0}, "world_size"),
        ({"topology": {"tp": (2, 2)}}, "topology"),
        ({"topology": {"tp": (0, 0)}}, "topology"),
        ({"topology": {"tp": (0, 1, 2)}}, "topology"),
        ({"topology": {"tp": ("x", "y")}}, "topology"),
        ({"topology": {"tp": 2}}, "topology"),
        ({"topology": {"t\x1bp": (0, 2)}}, "topology"),
        ({"topology": {7: (0, 2)}}, "topology"),
        ({"topology": [("tp", (0, 2))]}, "topology"),
        ({"model": "qwen"}, "model"),
        ({"manifest": {"parts": 1}}, "manifest"),
        ({"state": "ready"}, "state"),
        ({"header_addr": "0x1000"}, "header_addr"),
        ({"pid": True}, "pid"),
        ({"version": -1}, "version"),
        ({"version": MAX_VERSION}, "version"),
        ({"version": True}, "version"),
        ({"host": None}, "host"),
        ({"session_id": b"h:1"}, "session_id"),
        ({"device": "\ud800"}, "device"),
        ({"labels": {"te am": "x"}}, "labels"),
        ({"labels": [("team", "x")]}, "labels"),
    ],
)
def test_a_record_out_of_range_cannot_be_made(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        a_record(**changes)
    assert caught.value.details == {"field": field}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": ""}, "model.name"),
        ({"name": None}, "model.name"),
        ({"revision": None}, "model.revision"),
        ({"dtype": 16}, "model.dtype"),
        ({"quantization": "\ud800"}, "model.quantization"),
        ({"extra": {"layers": 28}}, "model.extra"),
        ({"extra": "layers=28"}, "model.extra"),
    ],
)
def test_a_model_is_named_and_described_in_text(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        ModelIdentity(**{"name": "qwen", **fields})
    assert caught.value.details == {"field": field}


def test_a_record_that_states_no_content_has_one_of_its_own_in_each_version_and_launch() -> None:
    """As those of older releases, whose headers are read in the same way."""
    found = {
        decode(
            "/engines/qwen/0", changed_all(content=..., version=version, incarnation=incarnation)
        ).content
        for version, incarnation in ((0, "a"), (1, "a"), (0, "b"), (0, "b"))
    }
    assert len(found) == 3
    assert encode(a_record(content="")) == changed_all(content=...)


def changed_all(**changes: Any) -> bytes:
    data = as_json(**changes)
    return json.dumps(
        {name: value for name, value in data.items() if value is not ...}, separators=(",", ":")
    ).encode()


@pytest.mark.parametrize("content", ["c0", "C0" * 16, "g0" * 16, "c0" * 17, 7, None, ["c0"]])
def test_a_content_that_is_not_32_hexadecimal_digits_is_damage(content: object) -> None:
    assert read(changed("content", content)) is None
    with pytest.raises(InvalidField, match="is not valid: it is 32 hexadecimal digits"):
        a_record(content=content)
