"""SGLang's words: what its seeds send becomes a manifest, what else is sent is refused with a
reason, and clients get it back.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_registry.errors import InvalidField
from engine_registry.gateway.sglang import (
    MAX_TENSORS,
    instance_of_role,
    parse_registration,
    render,
)
from engine_registry.schema.manifest import Region
from engine_registry.schema.manifest_format import MAX_PARTS, decode, encode
from tests.support.builders import a_manifest, a_record, an_entry

SESSION = "10.0.0.7:15001"
# embed and head are tied
WEIGHTS: dict[str, Any] = {
    "embed": [4096, 1000, 2],
    "head": [4096, 1000, 2],
    "empty": [0, 0, 4],
}


def body(**fields: Any) -> dict[str, Any]:
    return {
        "rank": 3,
        "transfer_engine_info": {"session_id": SESSION, "weights_info_dict": WEIGHTS},
        **fields,
    }


def with_info(**fields: Any) -> dict[str, Any]:
    return body(
        transfer_engine_info={"session_id": SESSION, "weights_info_dict": WEIGHTS, **fields}
    )


def sent(data: Any) -> bytes:
    return json.dumps(data).encode()


def test_what_a_seed_sends_becomes_a_manifest_that_claims_no_more_than_was_said() -> None:
    info = parse_registration(sent(body()))
    assert (info.rank, info.session_id, info.world_size, info.role) == (3, SESSION, None, "")
    embed, head, empty = info.manifest.tensors
    assert (embed.name, embed.dtype, embed.shape, embed.addr, embed.nbytes) == (
        "embed",
        "2-byte",
        (1000,),
        4096,
        2000,
    )
    assert (head.addr, head.nbytes, empty.shape, empty.nbytes) == (4096, 2000, (0,), 0)
    assert embed.opaque
    assert info.manifest.regions == (Region(4096, 2000),)


def test_tensors_that_share_memory_in_part_lie_in_one_region() -> None:
    views = {"a": [4096, 10, 4], "b": [4116, 10, 4], "c": [4156, 1, 4], "inside": [4100, 1, 4]}
    info = parse_registration(sent(with_info(weights_info_dict=views)))
    assert info.manifest.regions == (Region(4096, 60), Region(4156, 4))
    encode(info.manifest)


@pytest.mark.parametrize(
    ("ranks", "wanted"), [({"rank": 0, "tp_rank": 5}, 0), ({"tp_rank": 5}, 5), ({"tp_rank": 0}, 0)]
)
def test_rank_wins_over_tp_rank_and_both_may_be_zero(ranks: dict[str, int], wanted: int) -> None:
    data = body(**ranks)
    if "rank" not in ranks:
        del data["rank"]
    assert parse_registration(sent(data)).rank == wanted


def test_what_a_client_is_answered_can_be_sent_as_a_registration() -> None:
    info = parse_registration(sent(body()))
    answer = render(a_record(rank=1, session_id=SESSION), info.manifest)
    assert json.loads(answer) == {
        "rank": 1,
        "remote_instance_transfer_engine_info": [SESSION, WEIGHTS],
    }
    again = parse_registration(answer)
    assert (again.rank, again.session_id, again.manifest) == (1, SESSION, info.manifest)


def test_an_answer_is_written_as_ever_and_bytes_of_before_are_read() -> None:
    manifest = a_manifest(an_entry("w", 4096, 24, dtype="float32", shape=(2, 3)))
    answer = (
        b'{"rank":1,"remote_instance_transfer_engine_info":["10.0.0.1:15000",{"w":[4096,6,4]}]}'
    )
    assert render(a_record(rank=1), manifest) == answer
    info = parse_registration(answer)
    assert (info.rank, info.session_id) == (1, "10.0.0.1:15000")
    spaced = json.dumps(json.loads(answer), indent=1).encode()
    assert parse_registration(spaced).manifest == info.manifest


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([], "the body is not valid: `.`: an object was expected, a list was found"),
        ({}, r"the body is not valid: `\$.rank` is missing"),
        (body(rank=-1), r"`\$.rank`: a whole number of at least 0 was expected"),
        (body(rank=True), r"`\$.rank`: a whole number was expected, true or false was found"),
        (body(rank="0"), r"`\$.rank`: a whole number was expected, a text was found"),
        (body(rank=1.0), r"`\$.rank`: a whole number was expected, a number with a fraction"),
        (body(rank=None, tp_rank=1), r"`\$.rank`: a whole number was expected, null was found"),
        (body(rank=10**30), r"`\$.rank`: a whole number of at most 99999 was expected"),
        (body(rank=10**300), r"`\$.rank`: a whole number of at most 99999 was expected"),
        (body(rank=100_000), r"`\$.rank`: a whole number of at most 99999 was expected"),
        (body(world_size=0), r"`\$.world_size`: a whole number of at least 1 was expected"),
        (body(world_size="2"), r"`\$.world_size`: a whole number or null was expected, a text"),
        (body(role=["draft"]), r"`\$.role`: a text was expected, a list was found"),
        (body(role=None), r"`\$.role`: a text was expected, null was found"),
        ({"rank": 0}, r"`\$.transfer_engine_info` is missing"),
        (body(transfer_engine_info=5), r"`\$.transfer_engine_info`: an object was expected"),
        (
            {"rank": 0, "remote_instance_transfer_engine_info": [SESSION]},
            r"`\$.remote_instance_transfer_engine_info` is not .session_id, weights_info_dict.",
        ),
        (
            {"rank": 0, "remote_instance_transfer_engine_info": [7, {}]},
            r"`\$.session_id`: a text was expected, a whole number was found",
        ),
        (
            with_info(session_id=None),
            r"`\$.transfer_engine_info.session_id`: a text was expected, null was found",
        ),
        (with_info(session_id=""), "session_id '' is not valid"),
        (with_info(session_id="host"), "session_id 'host' is not valid"),
        (with_info(session_id="host:0"), "session_id 'host:0' is not valid"),
        (with_info(session_id="host:65536"), "session_id 'host:65536' is not valid"),
        (
            with_info(session_id="0.0.0.0:1"),
            "session_id '0.0.0.0:1' is not valid: 0.0.0.0 stands for all addresses of a machine",
        ),
        (with_info(session_id="[ff02::1]:1"), "is not valid: ff02::1 is a multicast address"),
        (with_info(session_id="http://host:1"), "is not valid: it is host:port"),
        (with_info(session_id="host\n:1"), "is not valid: it is host:port"),
        (
            with_info(weights_info_dict=[]),
            r"`\$.transfer_engine_info.weights_info_dict`: an object was expected, a list",
        ),
        (with_info(weights_info_dict={"": [1, 1, 1]}), "tensor name '' is not valid"),
        (
            with_info(weights_info_dict={"\ud800": [1, 1, 1]}),
            "the body is not valid: it is not JSON",
        ),
        (with_info(weights_info_dict={"w": [1, 1]}), "tensor 'w' is not valid: it is .address"),
        (
            with_info(weights_info_dict={"w": [1, 1, 1, 1]}),
            "tensor 'w' is not valid: it is .address",
        ),
        (
            with_info(weights_info_dict={"w": [1, 1, True]}),
            "tensor 'w' is not valid: it is .address",
        ),
        (
            with_info(weights_info_dict={"w": [1.0, 1, 1]}),
            "tensor 'w' is not valid: it is .address",
        ),
        (
            with_info(weights_info_dict={"w": {"addr": 1}}),
            "tensor 'w' is not valid: it is .address",
        ),
        (with_info(weights_info_dict={"w": [-1, 1, 1]}), "are in no memory"),
        (with_info(weights_info_dict={"w": [0, 1, 1]}), "are in no memory"),
        (with_info(weights_info_dict={"w": [1, -1, 1]}), "are in no memory"),
        (with_info(weights_info_dict={"w": [1, 1, 0]}), "are in no memory"),
        (with_info(weights_info_dict={"w": [1, 1, 257]}), "are in no memory"),
        (with_info(weights_info_dict={"w": [2**64 - 1, 1, 2]}), "are in no memory"),
        (with_info(weights_info_dict={"w": [2**65, 0, 2]}), "are in no memory"),
        (
            with_info(weights_info_dict={str(n): [1, 2**62, 1] for n in range(4)}),
            "which no memory has",
        ),
    ],
)
def test_what_is_malformed_is_refused_with_the_reason(data: Any, reason: str) -> None:
    with pytest.raises(InvalidField, match=reason):
        parse_registration(sent(data))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 900,
        b"[" * 100_000,
        b'{"rank":' + b"9" * 5000 + b"}",
        b"NaN",
        b'"\\ud800"',
    ],
)
def test_what_is_no_json_object_or_too_deep_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidField, match="body"):
        parse_registration(raw)


@pytest.mark.parametrize("filler", ["[],", "{},", "0,", '"",'])
def test_a_body_of_more_parts_than_tensors_could_have_is_refused_before_it_is_parsed(
    filler: str,
) -> None:
    raw = f'{{"x": [{filler * 10_000}0]}}'.encode()
    with pytest.raises(InvalidField, match="the body holds more than 1000 tensors"):
        parse_registration(raw, max_tensors=1000)


def test_as_many_tensors_as_are_allowed_fit_into_a_manifest_and_one_more_is_refused() -> None:
    names = [
        f"model.layers.{n}.mlp.experts.{n}.gate_up_proj.weight_scale_inv"
        for n in range(MAX_TENSORS + 1)
    ]
    weights = {name: [4096 + 128 * n, 64, 2] for n, name in enumerate(names)}
    with pytest.raises(InvalidField, match="200001 tensors are more than 200000"):
        parse_registration(msgspec.json.encode(with_info(weights_info_dict=weights)))
    del weights[names[-1]]
    raw = msgspec.json.encode(with_info(weights_info_dict=weights))
    ref, parts = encode(parse_registration(raw).manifest)
    assert ref.tensors == MAX_TENSORS
    assert len(parts) < MAX_PARTS


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
)


@given(
    st.one_of(
        JSON.map(sent),
        st.binary(),
        st.builds(lambda rank, world: sent(body(rank=rank, world_size=world)), JSON, JSON),
    )
)
def test_whatever_is_sent_is_a_registration_or_an_invalid_field(raw: bytes) -> None:
    with contextlib.suppress(InvalidField):
        parse_registration(raw)


@given(
    st.dictionaries(
        st.text(max_size=6), st.lists(st.integers(-2, 2**66), min_size=2, max_size=4), max_size=5
    )
)
def test_whatever_tensors_are_taken_can_be_stored_and_read_again(weights: dict[str, Any]) -> None:
    try:
        manifest = parse_registration(sent(with_info(weights_info_dict=weights))).manifest
    except InvalidField:
        return
    ref, parts = encode(manifest)
    assert decode("/engines/q/0", ref, parts) == manifest
    _, info = json.loads(render(a_record(), manifest))["remote_instance_transfer_engine_info"]
    assert info == weights


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes", "wanted"),
    [
        ("float32", (2, 3), 24, [6, 4]),
        ("bfloat16", (), 2, [1, 2]),
        ("float8_e4m3fn", (5,), 5, [5, 1]),
        ("float4_e2m1fn_x2", (8,), 8, [8, 1]),
        ("bool", (0,), 0, [0, 1]),
        ("bfloat16", (4, 0), 0, [0, 2]),
        ("float8_e4m3fn", (0,), 0, [0, 1]),
        ("complex64", (0,), 0, [0, 8]),
        ("2-byte", (0,), 0, [0, 2]),
        ("packed", (3,), 4, [4, 1]),
    ],
)
def test_a_tensor_of_a_library_rank_is_reported_by_its_elements_and_their_size(
    dtype: str, shape: tuple[int, ...], nbytes: int, wanted: list[int]
) -> None:
    manifest = a_manifest(an_entry("w", 4096, nbytes, dtype=dtype, shape=shape))
    info = json.loads(render(a_record(), manifest))["remote_instance_transfer_engine_info"]
    assert info == ["10.0.0.1:15000", {"w": [4096, *wanted]}]


def test_a_draft_model_is_an_instance_of_its_own() -> None:
    assert [instance_of_role("q", role) for role in ("", "target", "draft")] == [
        "q",
        "q",
        "q.draft",
    ]
