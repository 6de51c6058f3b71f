"""The manifest: written, cut into parts, checked and read again; whatever is wrong with it shows as damage."""

from __future__ import annotations

import hashlib
import json
import zlib
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import Manifest, Region, TensorEntry, manifest
from registry.errors import RecordDamaged, SchemaUnsupported
from registry.manifest import PART_NBYTES, decode, encode
from registry.record import ManifestRef
from tests.builders import a_manifest, an_entry

OWNER = "/engines/qwen/0"
U64 = st.integers(0, 2**64 - 1)


@st.composite
def entries(draw: st.DrawFn) -> TensorEntry:
    """Opaque or a box of something larger; scalars and tensors without bytes among them."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    empty = 0 in shape
    addr, nbytes = (0, 0) if empty else (draw(U64), draw(st.integers(1, 2**64 - 1)))
    name, dtype, opaque = draw(st.text(max_size=20)), draw(st.sampled_from(["float32", "bfloat16"])), draw(st.booleans())
    if opaque:
        return TensorEntry(name, dtype, shape, addr, nbytes, shape, (0,) * len(shape))
    offsets = tuple(draw(st.integers(0, 9)) for _ in shape)
    whole = tuple(size + offset + draw(st.integers(0, 9)) for size, offset in zip(shape, offsets, strict=True))
    return TensorEntry(name, dtype, shape, addr, nbytes, whole, offsets, opaque=False)


MANIFESTS = st.builds(
    Manifest,
    st.lists(entries(), max_size=6, unique_by=lambda entry: entry.name).map(tuple),
    st.lists(st.builds(Region, U64, U64), max_size=4).map(tuple),
)


def pack(data: Any) -> tuple[ManifestRef, list[bytes]]:
    """Any JSON as a manifest whose digest is right."""
    stored = zlib.compress(data if isinstance(data, bytes) else json.dumps(data).encode())
    return ManifestRef(hashlib.sha256(stored).hexdigest(), 1, 0, 0), [stored]


def as_json(**changes: Any) -> dict[str, Any]:
    """A manifest of one tensor, 2x3 of float32 in a whole of 4x6."""
    _, parts = encode(
        a_manifest(an_entry(dtype="float32", shape=(2, 3), global_shape=(4, 6), offsets=(2, 3), nbytes=24, opaque=False))
    )
    data: dict[str, Any] = json.loads(zlib.decompress(b"".join(parts)))
    return {**data, **changes}


def incompressible(nbytes: int) -> Manifest:
    """Names of hexadecimal digits, of which zlib saves no more than half."""
    count = nbytes // 100
    names = [hashlib.sha512(str(number).encode()).hexdigest() for number in range(count)]
    return a_manifest(*[an_entry(name, addr=4096 + 16 * number) for number, name in enumerate(names)], regions=())


@given(MANIFESTS)
def test_what_is_encoded_decodes_to_an_equal_manifest(wanted: Manifest) -> None:
    ref, parts = encode(wanted)
    assert decode(OWNER, ref, parts) == wanted
    assert (ref.parts, ref.tensors, ref.nbytes) == (len(parts), len(wanted.tensors), wanted.nbytes)


def test_a_manifest_beyond_etcds_request_limit_is_cut_into_parts_of_at_most_1_mib() -> None:
    wanted = incompressible(4 << 20)
    ref, parts = encode(wanted)
    assert len(parts) == ref.parts > 2
    assert {len(part) for part in parts[:-1]} == {PART_NBYTES}
    assert 0 < len(parts[-1]) <= PART_NBYTES
    assert decode(OWNER, ref, parts) == wanted


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_flipped_byte_anywhere_is_damage(place: int, flip: int) -> None:
    ref, (part,) = encode(a_manifest())
    flipped = bytearray(part)
    flipped[place % len(part)] ^= flip
    with pytest.raises(RecordDamaged, match=f"the manifest of {OWNER} does not match the digest"):
        decode(OWNER, ref, [bytes(flipped)])


def test_a_part_that_is_missing_doubled_or_out_of_order_is_damage() -> None:
    ref, parts = encode(incompressible(2 << 20))
    for wrong in (parts[:-1], parts[1:], [parts[0], *parts], parts[::-1], []):
        with pytest.raises(RecordDamaged, match="does not match the digest"):
            decode(OWNER, ref, wrong)


def test_a_manifest_that_unpacks_without_end_is_not_unpacked_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "MAX_UNPACKED_NBYTES", 1 << 20)
    ref, parts = pack(b" " * (64 << 20) + json.dumps(as_json()).encode())
    assert len(parts[0]) < 1 << 17
    with pytest.raises(RecordDamaged, match="unpacks to more than 1 MiB or is cut short"):
        decode(OWNER, ref, parts)


def test_a_newer_schema_is_refused_by_its_number() -> None:
    with pytest.raises(SchemaUnsupported, match="schema 2; this version reads up to 1"):
        decode(OWNER, *pack({"schema": 2}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 100_000,
        [],
        None,
        {},
        {"schema": 1},
        {"schema": "1"},
        {"schema": True},
        *[{name: value for name, value in as_json().items() if name != gone} for gone in as_json()],
        as_json(name=["w", "v"]),
        as_json(name=[]),
        as_json(name=7),
        as_json(name=[None]),
        as_json(dtype=[32]),
        as_json(shape=[[2, -3]]),
        as_json(shape=[[2, 3.0]]),
        as_json(shape=[[2]]),
        as_json(shape=[6]),
        as_json(shape=[None]),
        as_json(addr=[-1]),
        as_json(addr=[1 << 64]),
        as_json(addr=["4096"]),
        as_json(addr=[True]),
        as_json(nbytes=[0]),
        as_json(nbytes=[-24]),
        as_json(nbytes=[24.5]),
        as_json(shape=[[0, 3]]),
        as_json(box=[[[4, 6], [3, 3]]]),
        as_json(box=[[[4, 6], [2, -1]]]),
        as_json(box=[[[4, 6], [2]]]),
        as_json(box=[[[4], [2]]]),
        as_json(box=[[[4, 6]]]),
        as_json(box=[[[4, 6], [2, 3], [0, 0]]]),
        as_json(box=[7]),
        as_json(regions=None),
        as_json(regions=[[1]]),
        as_json(regions=[[1, 2, 3]]),
        as_json(regions=[[1, -2]]),
        as_json(regions=[1]),
    ],
)
def test_a_manifest_of_another_form_is_damage_that_names_its_owner(data: Any) -> None:
    with pytest.raises(RecordDamaged, match=f"the manifest of {OWNER} is damaged"):
        decode(OWNER, *pack(data))


def test_two_tensors_of_one_name_are_damage() -> None:
    with pytest.raises(RecordDamaged, match="a tensor is named twice"):
        decode(OWNER, *encode(a_manifest(an_entry(addr=4096), an_entry(addr=8192))))


def test_bytes_that_are_not_compressed_are_damage() -> None:
    stored = b"not zlib"
    with pytest.raises(RecordDamaged, match="is damaged"):
        decode(OWNER, ManifestRef(hashlib.sha256(stored).hexdigest(), 1, 0, 0), [stored])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(as_json())), JSON)
def test_any_json_in_any_column_is_a_good_manifest_or_damage(column: str, value: Any) -> None:
    found = None
    with suppress(RecordDamaged):
        found = decode(OWNER, *pack(as_json(**{column: value})))
    assert found is None or decode(OWNER, *encode(found)) == found


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_arbitrary_bytes_are_damage_stored_or_unpacked(stored: bytes, unpacked: bytes) -> None:
    digest = hashlib.sha256(stored).hexdigest()
    for ref, parts in ((ManifestRef(digest, 1, 0, 0), [stored]), pack(unpacked)):
        with pytest.raises(RecordDamaged, match=OWNER):
            decode(OWNER, ref, parts)


def test_the_digest_is_checked_before_anything_is_unpacked() -> None:
    ref, parts = pack({"schema": 99})
    with pytest.raises(RecordDamaged, match="does not match the digest"):
        decode(OWNER, replace(ref, digest="0" * 64), parts)
