"""The manifest: written, cut into parts, checked and read again; whatever is wrong with it shows as
damage.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import zlib
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_registry import Manifest, Region, TensorEntry
from engine_registry.errors import InvalidField, RecordDamaged, SchemaUnsupported
from engine_registry.schema import manifest_format
from engine_registry.schema.manifest import DigestTable, Export
from engine_registry.schema.manifest_format import PART_NBYTES, decode, encode
from engine_registry.schema.record import ManifestRef
from tests.support.builders import a_manifest, an_entry

OWNER = "/engines/qwen/0"
U64 = st.integers(0, 2**64 - 1)


@st.composite
def regions(draw: st.DrawFn) -> list[Region]:
    """Up to four, in memory and apart, in any order."""
    some, end = [], 0
    for gap, nbytes in draw(
        st.lists(st.tuples(st.integers(0, 2**60), st.integers(1, 2**60)), max_size=4)
    ):
        some.append(Region(end + gap, nbytes))
        end = some[-1].end
    return draw(st.permutations(some))


@st.composite
def entries(draw: st.DrawFn, places: list[Region]) -> TensorEntry:
    """Opaque or a box of something larger; scalars and tensors without bytes among them.

    They may share memory.
    """
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    if not places and 0 not in shape:
        shape = (*shape, 0)
    addr = nbytes = 0
    if 0 not in shape:
        place = draw(st.sampled_from(places))
        begin = draw(st.integers(0, place.nbytes - 1))
        addr, nbytes = place.addr + begin, draw(st.integers(1, place.nbytes - begin))
    name, dtype, opaque = (
        draw(st.text(max_size=20)),
        draw(st.sampled_from(["float32", "bfloat16"])),
        draw(st.booleans()),
    )
    if opaque:
        return TensorEntry(name, dtype, shape, addr, nbytes, shape, (0,) * len(shape))
    if 0 not in shape and draw(st.booleans()):
        return draw(fused(name, dtype, shape, addr, nbytes))
    offsets = tuple(draw(st.integers(0, 9)) for _ in shape)
    whole = tuple(
        size + offset + draw(st.integers(0, 9)) for size, offset in zip(shape, offsets, strict=True)
    )
    return TensorEntry(name, dtype, shape, addr, nbytes, whole, offsets, opaque=False)


@st.composite
def fused(
    draw: st.DrawFn, name: str, dtype: str, shape: tuple[int, ...], addr: int, nbytes: int
) -> TensorEntry:
    """Several boxes, though along no dimension need there be more than one slice."""
    slices = []
    for size in shape:
        cuts = sorted({0, size} | draw(st.sets(st.integers(0, size), max_size=3)))
        starts = [draw(st.integers(0, 9)) for _ in cuts[1:]]
        sizes = [stop - start for start, stop in itertools.pairwise(cuts)]
        slices.append(
            tuple([(start, start + some) for start, some in zip(starts, sizes, strict=True)])
        )
    whole = tuple(max(stop for _, stop in some) + draw(st.integers(0, 9)) for some in slices)
    offsets = tuple(some[0][0] for some in slices)
    return TensorEntry(
        name, dtype, shape, addr, nbytes, whole, offsets, opaque=False, slices=tuple(slices)
    )


BLOCKS = st.sampled_from([0, 1 << 50])


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    places = draw(regions())
    some = draw(st.lists(entries(places), max_size=6, unique_by=lambda entry: entry.name))
    exports = [
        Export(place.addr, place.nbytes, draw(st.binary(min_size=1, max_size=64)))
        for place in places
        if draw(st.booleans())
    ]
    return Manifest(
        tuple(some),
        tuple(places),
        digests=draw(st.none() | st.builds(DigestTable, st.just("x"), st.just(64), BLOCKS)),
        block_nbytes=draw(st.sampled_from([0, 1 << 50])),
        exports=tuple(exports),
        deltas=tuple(draw(st.lists(st.sampled_from(places), max_size=3)) if places else ()),
    )


def pack(data: Any, tensors: int = 0, nbytes: int = 0) -> tuple[ManifestRef, list[bytes]]:
    """Any JSON as a manifest whose digest is right."""
    stored = zlib.compress(data if isinstance(data, bytes) else json.dumps(data).encode())
    return ManifestRef(hashlib.sha256(stored).hexdigest(), 1, tensors, nbytes), [stored]


def as_json(**changes: Any) -> dict[str, Any]:
    """A manifest of one tensor, 2x3 of float32 in a whole of 4x6."""
    _, parts = encode(
        a_manifest(
            an_entry(
                dtype="float32",
                shape=(2, 3),
                global_shape=(4, 6),
                offsets=(2, 3),
                nbytes=24,
                opaque=False,
            )
        )
    )
    data: dict[str, Any] = json.loads(zlib.decompress(b"".join(parts)))
    return {**data, **changes}


def incompressible(nbytes: int) -> Manifest:
    """Names of hexadecimal digits, of which zlib saves no more than half."""
    count = nbytes // 100
    names = [hashlib.sha512(str(number).encode()).hexdigest() for number in range(count)]
    entries = [an_entry(name, addr=4096 + 16 * number) for number, name in enumerate(names)]
    return a_manifest(*entries, regions=(Region(4096, 16 * count),))


@given(manifests())
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


@given(manifests(), st.integers(-(1 << 40), 1 << 40))
def test_a_manifest_that_is_shifted_says_the_same_of_other_memory(
    manifest: Manifest, by: int
) -> None:
    shifted = manifest.shifted(by)
    for one, other in zip(manifest.tensors, shifted.tensors, strict=True):
        assert other.addr - one.addr == (by if one.nbytes else 0)
        assert replace(other, addr=one.addr) == one
    assert [region.addr - by for region in shifted.regions] == [
        region.addr for region in manifest.regions
    ]
    assert (shifted.exports, shifted.deltas) == (manifest.exports, manifest.deltas)
    assert shifted.shifted(-by) == manifest


@pytest.mark.parametrize("deltas", [5, [[1]], [[0, 0]], [[-1, 8]], [[1 << 63, 8]], [[64, 8]] * 65])
def test_buffers_of_deltas_that_no_memory_has_are_damage(deltas: object) -> None:
    ref, parts = pack(as_json(deltas=deltas), 1, 24)
    with pytest.raises(RecordDamaged):
        decode(OWNER, ref, parts)


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


def test_a_manifest_that_unpacks_without_end_is_not_unpacked_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(manifest_format, "MAX_UNPACKED_NBYTES", 1 << 20)
    ref, parts = pack(b" " * (64 << 20) + json.dumps(as_json()).encode())
    assert len(parts[0]) < 1 << 17
    with pytest.raises(RecordDamaged, match="unpacks to more than 1 MiB or is cut short"):
        decode(OWNER, ref, parts)


def test_a_newer_schema_is_refused_by_its_number() -> None:
    with pytest.raises(SchemaUnsupported, match="schema 4; this version reads up to 3"):
        decode(OWNER, *pack({"schema": 4}))


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


# rows 2 and 0, columns 3 to 6
FUSED = as_json(schema=3, slices=[[[[2, 3], [0, 1]], [[3, 6]]]], exports=[[4096, 24, "aGFuZGxl"]])


def test_a_manifest_with_more_exports_than_readers_open_is_neither_written_nor_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = decode(OWNER, *pack(FUSED, 1, 24))
    assert found.exports == (Export(4096, 24, b"handle"),)
    monkeypatch.setattr(manifest_format, "MAX_EXPORTS", 0)
    with pytest.raises(RecordDamaged, match="it has 1 exports, 0 are the limit"):
        decode(OWNER, *pack(FUSED, 1, 24))
    with pytest.raises(InvalidField, match="it has 1 exports, 0 are the limit"):
        encode(found)


def test_a_manifest_without_exports_does_not_speak_of_them() -> None:
    """So releases that know of none read it, and its digest is what it was."""
    assert "exports" not in as_json()


def test_only_a_manifest_with_fused_tensors_has_the_schema_of_these() -> None:
    found = decode(OWNER, *pack(FUSED, 1, 24))
    assert found.tensors[0].slices == (((2, 3), (0, 1)), ((3, 6),))
    _, parts = encode(found)
    assert json.loads(zlib.decompress(b"".join(parts)))["schema"] == 3
    with pytest.raises(RecordDamaged, match="slices or not: only schema 3 has them"):
        decode(OWNER, *pack({**FUSED, "schema": 1}, 1, 24))


@pytest.mark.parametrize(
    "slices",
    [
        [],
        None,
        [7],
        [[]],
        [[[[2, 4]]]],
        [[[[2, 3], [0, 1]], []]],
        [[[[2, 3], [0, 1]], [[3, 5]]]],
        [[[[2, 3], [0, 1]], [[4, 7]]]],
        [[[[2, 3], [4, 5]], [[3, 6]]]],
        [[[[3, 4], [0, 1]], [[3, 6]]]],
        [[[[2, 4], [1, 1]], [[3, 6]]]],
        [[[[2, 4], [2, 1], [0, 1]], [[3, 6]]]],
        [[[[2, 3], [0, 1]], [[3, 6]], [[0, 1]]]],
        [[[[2, 3], [0, 1.0]], [[3, 6]]]],
        [[[[2, 3], [0]], [[3, 6]]]],
        [[[[2, 3], [-1, 0]], [[3, 6]]]],
        "slices",
    ],
)
def test_slices_that_do_not_make_the_tensor_are_damage(slices: Any) -> None:
    with pytest.raises(RecordDamaged, match=f"the manifest of {OWNER} is damaged"):
        decode(OWNER, *pack({**FUSED, "slices": slices}, 1, 24))


def test_slices_of_a_whole_that_is_not_stated_are_damage() -> None:
    with pytest.raises(RecordDamaged, match="has slices of a whole that it does not state"):
        decode(OWNER, *pack({**FUSED, "box": [None]}, 1, 24))


def test_more_boxes_than_readers_compare_are_neither_written_nor_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = decode(OWNER, *pack(FUSED, 1, 24))
    for limit, said in (
        ("MAX_BOXES", "'w' is 2 boxes of its whole, 1 are the limit"),
        ("MAX_FUSED_BOXES", "several boxes have 2 of them, 1 are the limit"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(manifest_format, limit, 1)
            with pytest.raises(RecordDamaged, match=said):
                decode(OWNER, *pack(FUSED, 1, 24))
            with pytest.raises(InvalidField, match=said):
                encode(found)


TOP = 1 << 63


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"addr": [4095]}, "tensor 'w' lies outside its regions: 24 bytes at 0xfff"),
        ({"addr": [4097]}, "lies outside its regions"),
        ({"addr": [0]}, "lies outside its regions"),
        ({"regions": []}, "lies outside its regions"),
        ({"regions": [[4096, 23]]}, "lies outside its regions"),
        ({"regions": [[4096, 12], [4108, 12]]}, "lies outside its regions"),
        ({"regions": [[4096, 24], [4119, 8]]}, "two of its regions overlap"),
        ({"regions": [[4096, 24], [4096, 24]]}, "two of its regions overlap"),
        ({"regions": [[4096, 24], [0, TOP]]}, "two of its regions overlap"),
        ({"regions": [[4096, 24], [9000, 0]]}, "a region is empty"),
        ({"regions": [[4096, TOP]]}, "reaches beyond what memory there is"),
        ({"regions": [[4096, 24], [TOP, 1]]}, "reaches beyond what memory there is"),
        ({"nbytes": [TOP], "regions": [[0, TOP]]}, "tensors of"),
        ({"shape": [[1 << 62, 2]], "box": [None]}, "cannot take 24 bytes"),
        ({"box": [[[1 << 62, 6], [2, 3]]]}, "cannot take 24 bytes"),
        ({"box": [[[(1 << 64) - 1, 6], [(1 << 64) - 1, 3]]]}, "is not inside"),
        ({"shape": [[1] * 65], "box": [None]}, "has 65 dimensions, 64 are the limit"),
        ({"name": ["half of \ud800"]}, "name or dtype is not text"),
        ({"dtype": ["float\x1b[2J"]}, "name or dtype is not text"),
        ({"digests": ["xxh3\n", 4096]}, "algorithm of its digests"),
        ({"digests": ["xxh3", TOP - 8]}, "the table of its digests reaches beyond"),
        ({"digests": ["xxh3", 0], "digest_block_nbytes": -1}, "is not a natural number"),
        ({"digests": ["xxh3", TOP - 64], "digest_block_nbytes": 1}, "of its digests reaches"),
        ({"block_nbytes": -1}, "is not a natural number"),
        ({"exports": [[4096, 24, ""]]}, "no allocation with a handle"),
        ({"exports": [[4096, 0, "eA=="]]}, "no allocation with a handle"),
        ({"exports": [[TOP, 1, "eA=="]]}, "no allocation with a handle"),
        ({"exports": [[4096, 24, "eA" * 200]]}, "no allocation with a handle"),
        ({"exports": [[4096, 24, "eA=="], [4100, 9, "eA=="]]}, "two of its exports overlap"),
        ({"exports": [[-1, 24, "eA=="]]}, "is not a natural number"),
        ({"exports": [[4096, True, "eA=="]]}, "is not a natural number"),
        ({"exports": [[4096, 24, "not base64"]]}, "base64"),
        ({"exports": [[4096, 24, "\u00e9"]]}, "ASCII"),
        ({"exports": [[4096, 24, 7]]}, "not 'int'"),
        ({"exports": [[4096, 24]]}, "unpack"),
        ({"exports": None}, "not iterable"),
        ({"exports": 7}, "not iterable"),
        (
            {"block_nbytes": 1, "regions": [[4096, 24], [5000, 1 << 23]]},
            "its blocks of 1 bytes have 8388632 marks",
        ),
        ({"values": {"\ud800": 1}}, "names that are text"),
        ({"values": [1]}, "its values are no object"),
    ],
)
def test_places_that_no_memory_has_are_damage(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecordDamaged, match=f"the manifest of {OWNER} is damaged") as caught:
        decode(OWNER, *pack(as_json(**changes), 1, 24))
    assert said in str(caught.value)
    assert decode(OWNER, *pack(as_json(), 1, 24)).nbytes == 24


def test_tensors_may_share_memory() -> None:
    """Tied weights do, and views of one storage."""
    shared = a_manifest(
        an_entry("a"),
        an_entry("b"),
        an_entry("c", 4100, 12),
        an_entry("d", 4104, 20),
        regions=(Region(4096, 28),),
    )
    assert decode(OWNER, *encode(shared)) == shared


@pytest.mark.parametrize(
    "wrong",
    [
        a_manifest(regions=()),
        a_manifest(regions=(Region(4096, 16), Region(4100, 16))),
        a_manifest(regions=(Region(0, TOP + 1),)),
        replace(a_manifest(), exports=(Export(0, 1, b""),)),
        replace(a_manifest(), exports=(Export(0, 1, bytes(257)),)),
        replace(a_manifest(), exports=(Export(0, 2, b"x"), Export(1, 2, b"x"))),
        a_manifest(an_entry(global_shape=(1 << 70,), opaque=False)),
        a_manifest(
            an_entry(
                nbytes=0, shape=(0, 1), global_shape=(0, 1 << 70), offsets=(0, 0), opaque=False
            )
        ),
        a_manifest(
            an_entry(shape=(4, 4), global_shape=(1 << 40, 1 << 40), offsets=(0, 0), opaque=False)
        ),
    ],
)
def test_a_manifest_that_no_reader_would_take_is_not_written(wrong: Manifest) -> None:
    with pytest.raises(InvalidField, match="the manifest is not valid: ") as caught:
        encode(wrong)
    assert caught.value.details == {"field": "manifest"}


@pytest.mark.parametrize("limit", ["MAX_UNPACKED_NBYTES", "MAX_UNPACKED_ITEMS"])
def test_a_manifest_that_would_be_too_large_to_read_is_not_written(
    monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    ref, parts = encode(a_manifest())
    monkeypatch.setattr(manifest_format, limit, 10)
    with pytest.raises(
        InvalidField, match=r"a manifest of 1 tensors cannot be published: it .* are the limit"
    ):
        encode(a_manifest())
    with pytest.raises(
        RecordDamaged, match=r"unpacks to more than|it holds .* items, 10 are the limit"
    ):
        decode(OWNER, ref, parts)


def test_two_tensors_of_one_name_are_damage() -> None:
    with pytest.raises(RecordDamaged, match="a tensor is named twice"):
        decode(OWNER, *encode(a_manifest(an_entry(addr=4096), an_entry(addr=8192))))


def test_bytes_that_are_not_compressed_are_damage() -> None:
    stored = b"not zlib"
    with pytest.raises(RecordDamaged, match="is damaged"):
        decode(OWNER, ManifestRef(hashlib.sha256(stored).hexdigest(), 1, 0, 0), [stored])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.sampled_from(sorted(FUSED)), JSON)
def test_any_json_in_any_column_is_a_good_manifest_or_damage(column: str, value: Any) -> None:
    found = None
    with suppress(RecordDamaged):
        found = decode(OWNER, *pack({**FUSED, column: value}, 1, 24))
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


def test_an_older_reader_finds_the_digests_of_tensors_where_it_expects_them() -> None:
    some = replace(a_manifest(an_entry()), digests=DigestTable("xxh3_128", 64, 1 << 20))
    data = json.loads(zlib.decompress(b"".join(encode(some)[1])))
    assert (data["schema"], data["digests"]) == (1, ["xxh3_128", 64])
    del data["digest_block_nbytes"]  # as an older source
    assert decode(OWNER, *pack(data, 1, some.nbytes)).digests == DigestTable("xxh3_128", 64)


def test_digests_of_the_blocks_lie_behind_those_of_the_tensors_of_longer_ones() -> None:
    table = DigestTable("xxh3_128", 64, 10)
    slots = table.slots({"c": 11, "a": 25, "b": 10, "none": 0})
    assert slots == {"a": range(4, 7), "b": range(1, 2), "c": range(7, 9), "none": range(3, 4)}
    assert DigestTable("xxh3_128", 64).slots({"b": 10, "a": 25}) == {
        "a": range(1),
        "b": range(1, 2),
    }


def test_blocks_so_short_that_a_table_would_fill_the_memory_of_readers_are_refused() -> None:
    some = a_manifest(an_entry(nbytes=5 << 20, shape=(5 << 18,), dtype="float32"))
    with pytest.raises(InvalidField, match="its blocks of 1 bytes have 5242880 digests"):
        encode(replace(some, digests=DigestTable("xxh3_128", 64, 1)))
