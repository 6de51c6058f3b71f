"""What somebody may have written into etcd on purpose: good encodings that were changed, bombs, and
numbers that no memory has.

A reader gets a good value, RecordDamaged or SchemaUnsupported, in bounded time and memory, and a
message that is short.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine_cli.render.printable import printable
from engine_loader.tensors.state_dict import decode_value, encode_values
from engine_registry import Manifest, RankRecord, Region
from engine_registry.errors import RecordDamaged
from engine_registry.schema import manifest_format, pull_ticket
from engine_registry.schema.eviction_note import EvictionNote
from engine_registry.schema.keyvalue import KeyValue
from engine_registry.schema.manifest import DigestTable, Export
from engine_registry.schema.record import ManifestRef
from engine_registry.schema.record_format import decode, encode
from engine_registry.schema.roster import assess_all
from tests.support.builders import a_manifest, a_pull, a_record, an_entry, garbage, ticket
from tests.support.checkout import ROOT

KEY = "/engines/qwen/0"

# As JSON has them in text: what Python would not write, or reads in an unexpected way, among them.
NASTY = [
    "null",
    "true",
    "0",
    "-1",
    "-0",
    "1.0",
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "-Infinity",
    "1E400",
    str(2**31),
    str(2**62),
    str(2**63),
    str(2**64 - 1),
    str(2**64),
    "9" * 400,
    "9" * 5_000,
    "-" + "9" * 5_000,
    '""',
    '"\\u0000"',
    '"\\ud800"',
    '"\\udfff\\ud800"',
    '"\\u001b[2J"',
    '"\\u202e"',
    '"\\n"',
    '"a/b"',
    '"../.."',
    '"%s%n"',
    json.dumps("x" * 3_000),
    json.dumps("💣" * 500),
    "[]",
    "{}",
    "[[]]",
    '{"":{}}',
    "[" * 60 + "]" * 60,
    "[" * 5_000,
    "[" * 5_000 + "]" * 5_000,
    '{"a":' * 3_000 + "1" + "}" * 3_000,
    "[0,1]",
    "[1,0]",
    "[-1,1]",
    "[" + "0," * 3_000 + "0]",
]
# What may be one in a good encoding: a number, a string, or a word.
_ATOM = r'-?[0-9]+|"[^"]*"|null'

EXAMPLES = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)


def a_large_manifest() -> Manifest:
    """One with all that a manifest may have."""
    entries = [an_entry(f"layer.{number}", 4096 + 16 * number) for number in range(3)]
    boxed = an_entry(
        "b",
        8192,
        24,
        dtype="float32",
        shape=(2, 3),
        global_shape=(4, 6),
        offsets=(2, 3),
        opaque=False,
    )
    some = a_manifest(*entries, boxed, regions=(Region(4096, 48), Region(8192, 24)))
    values = encode_values(
        {"step": 7, "path": [1, (2, b"x")], "nested": {"a": None, 3: float("nan")}}
    )
    exports = (Export(4096, 4096, bytes(range(64))),)
    return Manifest(
        some.tensors, some.regions, DigestTable("xxh3-128", 16384, 8), values, exports=exports
    )


RECORD = encode(a_record()).decode()
RAW_MANIFEST = zlib.decompress(b"".join(manifest_format.encode(a_large_manifest())[1])).decode()
TICKET = pull_ticket.encode(
    a_pull(reader=pull_ticket.Reader("b", 1, "2" * 32), nbytes=5, total_nbytes=9)
).decode()
NOTE = EvictionNote(a_record(), frozenset({"0" * 32, "1" * 32})).encode().decode()


@st.composite
def mutations(draw: st.DrawFn, good: str) -> bytes:
    """The encoding with some of its atoms replaced, or its bytes changed, cut, doubled or moved;
    and keys that are there twice.
    """
    text = good
    for _ in range(draw(st.integers(0, 3))):
        atoms = list(re.finditer(_ATOM, text))
        if atoms:
            atom = draw(st.sampled_from(atoms))
            nasty = draw(
                st.sampled_from(NASTY) | st.sampled_from(atoms).map(lambda match: match[0])
            )
            text = text[: atom.start()] + nasty + text[atom.end() :]
    if draw(st.booleans()) and text.endswith("}"):
        again = draw(st.sampled_from(re.findall(r'"[a-z_]+":', good)))
        text = f"{text[:-1]},{again}{draw(st.sampled_from(NASTY))}}}"
    raw = bytearray(text, "utf-8", "surrogatepass")
    for _ in range(draw(st.integers(0, 2))):
        start, end = sorted(draw(st.tuples(st.integers(0, len(raw)), st.integers(0, len(raw)))))
        end = min(end, start + 40)
        raw[start:end] = draw(
            st.sampled_from([b"", bytes(raw[start:end]) * 2, bytes(raw[start:end])[::-1]])
            | st.binary(max_size=4)
        )
    return bytes(raw)


def good_or_damaged(read: Callable[[], Any]) -> Any:
    """None where it is damage, which is reported in a short line."""
    try:
        return read()
    except RecordDamaged as exc:
        line = printable(str(exc))
        assert "\n" not in line
        assert len(line) < 1_500, line
        return None


@EXAMPLES
@given(mutations(RECORD))
def test_a_changed_record_is_a_good_one_or_damage(value: bytes) -> None:
    found = good_or_damaged(lambda: decode(KEY, value))
    if found is not None:
        assert found.key == KEY
        # readers take more than writers may write
        assert len(value) > 2_000 or decode(KEY, encode(found)) == found
        assert 0 <= found.pid < 1 << 64


@EXAMPLES
@given(mutations(RAW_MANIFEST), st.integers(0, 4))
def test_a_changed_manifest_is_a_good_one_or_damage(raw: bytes, tensors: int) -> None:
    stored = zlib.compress(raw, 1)
    for ref in (
        ManifestRef(hashlib.sha256(stored).hexdigest(), 1, *counts)
        for counts in ((4, 72), (tensors, 16 * tensors))
    ):
        found = good_or_damaged(lambda ref=ref: manifest_format.decode(KEY, ref, [stored]))  # type: ignore[misc]
        if found is not None:
            assert (
                manifest_format.decode(KEY, *manifest_format.encode(found)).tensors == found.tensors
            )
            for entry in found.tensors:
                assert not entry.nbytes or any(
                    region.addr <= entry.addr and entry.addr + entry.nbytes <= region.end
                    for region in found.regions
                )


@EXAMPLES
@given(mutations(NOTE))
def test_a_changed_note_is_a_good_one_or_damage(value: bytes) -> None:
    found = good_or_damaged(lambda: EvictionNote.decode("/eviction-notes/qwen", value))
    assert found is None or isinstance(found.lost, RankRecord)


@EXAMPLES
@given(mutations(TICKET))
def test_a_changed_ticket_is_a_good_one_or_nothing(value: bytes) -> None:
    found = pull_ticket.decode(KeyValue("/pulls/qwen/0/x", value, 5, 6, 7))
    if found is not None:
        assert (found.instance, found.rank, found.load_id, found.create_revision) == (
            "qwen",
            0,
            "x",
            5,
        )
        assert all(
            text.isprintable() and len(text) <= 256
            for text in (found.incarnation, found.host, found.began_at)
        )
        assert found.fraction is None or 0 <= found.fraction <= 1
        assert pull_ticket.decode(ticket(found)) == found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["list", "tuple", "dict", "bytes", "pickle", ""]), inner, max_size=2
        )
    ),
    max_leaves=12,
)


@EXAMPLES
@given(JSON)
def test_a_value_of_a_state_dict_is_plain_data_or_refused(encoded: Any) -> None:
    with suppress(ValueError):
        assert type(decode_value(encoded)) in (
            type(None),
            bool,
            int,
            float,
            str,
            list,
            tuple,
            dict,
            bytes,
        )


@pytest.mark.parametrize(
    "encoded",
    [
        [1, 2],
        {"list": "abc"},
        {"tuple": {"a": 1}},
        {"dict": ["ab"]},
        {"dict": [[1, 2, 3]]},
        {"dict": [[{"list": []}, 1]]},
        {"bytes": ["eA=="]},
        {"bytes": "e"},
        {"bytes": "ä"},
        {"pickle": "gASVBQ=="},
        {"list": [], "dict": []},
        {},
        {"list": [{"list": [{"tuple": 1}]}]},
    ],
)
def test_a_value_that_our_writer_would_not_have_made_is_refused(encoded: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  the message differs
        decode_value(encoded)


def test_values_nested_without_end_are_refused() -> None:
    encoded: Any = 1
    for _ in range(100_000):
        encoded = {"list": [encoded]}
    with pytest.raises(ValueError, match="recursion"):
        decode_value(encoded)


def test_many_damaged_keys_with_long_values_make_short_complaints() -> None:
    long = json.dumps({"schema": 1, "incarnation": "\n" + "x" * 15_000}).encode()
    (status,) = assess_all([garbage(rank=rank, value=long) for rank in range(100)])
    assert len(status.problems) == 100
    assert max(map(len, status.problems)) < 400


def test_a_key_that_is_there_twice_counts_as_its_last() -> None:
    """As for every reader of ours: there are no two that would understand it differently."""
    assert (
        decode(KEY, RECORD.replace('"version":3', '"version":99,"version":3').encode())
        == a_record()
    )


# -- bombs: in a separate process, which has little memory
# ---------------------------------------------------------------------

_CHILD = """
    import hashlib, resource, sys, time, zlib
    from engine_registry.schema import manifest_format
    from engine_registry.errors import RecordDamaged
    from engine_registry.schema.record import ManifestRef

    head, unit, tail = (part.encode() for part in sys.argv[1:4])
    nbytes, room, tensors = map(int, sys.argv[4:7])
    block = unit * max(1, (1 << 20) // len(unit))
    count = nbytes // len(block)
    # Each block is packed alike, without reference to what is before it: so one has to be packed.
    packed = []
    for part in (head, block, tail):
        packer = zlib.compressobj(1, wbits=-15)
        packed.append(packer.compress(part) + packer.flush(zlib.Z_FULL_FLUSH))
    checksum = zlib.adler32(head)
    for _ in range(count):
        checksum = zlib.adler32(block, checksum)
    checksum = zlib.adler32(tail, checksum)
    end = zlib.compressobj(1, wbits=-15).flush() + checksum.to_bytes(4, "big")
    stored = b"\x78\x01" + packed[0] + packed[1] * count + packed[2] + end
    assert len(stored) < 64 << 20
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
    start = time.monotonic()
    try:
        ref = ManifestRef(hashlib.sha256(stored).hexdigest(), 1, tensors, 0)
        manifest_format.decode("/engines/qwen/0", ref, [stored])
    except RecordDamaged as exc:
        print("damaged", exc)
"""


def decoded_with_little_memory(
    head: str, unit: str, tail: str, nbytes: int, room: int, tensors: int = 0
) -> str:
    """What a child says that decodes such a manifest with no more than `room` bytes besides what it
    has already.
    """
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(_CHILD),
        head,
        unit,
        tail,
        *map(str, (nbytes, room, tensors)),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout


_COLUMNS = '{"schema":1,"name":[],"dtype":[],"shape":[],"addr":[],"nbytes":[],"box":[],"regions":['


@pytest.mark.parametrize(
    ("unit", "nbytes", "room"),
    [
        (" ", 1 << 30, 600 << 20),
        ("[],", 250 << 20, 600 << 20),
        ("{},", 250 << 20, 600 << 20),
        ('{"a":0},', 250 << 20, 600 << 20),
        ("[", 250 << 20, 600 << 20),
        ('{"":', 250 << 20, 600 << 20),
        ("0,", 250 << 20, 600 << 20),
        ('"ab",', 250 << 20, 600 << 20),
    ],
)
def test_a_bomb_is_damage_before_it_takes_memory(unit: str, nbytes: int, room: int) -> None:
    """Each of these would unpack, or be parsed, to gigabytes."""
    said = decoded_with_little_memory(_COLUMNS, unit, "0]}", nbytes, room)
    assert said.startswith("damaged")
    assert "is damaged: it unpacks to more than 256 MiB" in said or "20971520 are the limit" in said


@pytest.mark.parametrize("unit", ['{"":0},', '"ab",', "[0],"])
def test_as_much_as_is_parsed_takes_bounded_memory(unit: str) -> None:
    """As many items as there may be, of the dearest kinds: not judged by their number, but by what
    they are.
    """
    items = unit.count(",") + unit.count("[") + 4 * unit.count("{")
    nbytes = len(unit) * (manifest_format.MAX_UNPACKED_ITEMS // items) - (2 << 20)
    said = decoded_with_little_memory(_COLUMNS, unit, "0]}", nbytes, 5 << 29)
    assert said.startswith("damaged")
    assert "limit" not in said
    assert "MemoryError" not in said


def test_a_manifest_for_which_there_is_no_memory_is_damage_and_no_crash() -> None:
    said = decoded_with_little_memory(_COLUMNS, "[1,1],", "[1,1]]}", 30 << 20, 200 << 20)
    assert said.startswith("damaged")
    assert "MemoryError" in said


def joined(items: Iterable[bytes]) -> msgspec.Raw:
    """A list of items that are JSON already."""
    return msgspec.Raw(b"[" + b",".join(items) + b"]")


def repeated(item: bytes, count: int) -> msgspec.Raw:
    return joined([item] * count)


def packed(**columns: Any) -> tuple[ManifestRef, list[bytes]]:
    stored = zlib.compress(msgspec.json.encode({**json.loads(RAW_MANIFEST), **columns}), 1)
    return ManifestRef(hashlib.sha256(stored).hexdigest(), 1, 4, 72), [stored]


@pytest.mark.parametrize(
    "columns",
    [
        lambda: {"shape": [[2**63 - 1] * 500_000, [16], [16], [2, 3]]},
        lambda: {"box": [None, None, None, [[2**63 - 1] * 500_000, [0] * 500_000]]},
        lambda: {"box": [None, None, None, [[2**64 - 1, 2**64 - 1], [2**64 - 2, 2**64 - 3]]]},
        lambda: {"regions": repeated(b"[%d,1]" % 2**62, 1_000_000)},
        lambda: {"regions": joined(b"[%d,16]" % (number * 16) for number in range(1_000_000))},
        lambda: {"regions": repeated(b"[4096,%d],[4097,%d]" % (2**62, 2**62), 500_000)},
        lambda: {"name": ["x" * 50_000_000, "b", "c", "d"]},
    ],
    ids=[
        "dimensions",
        "dimensions of the whole",
        "overflow",
        "one region",
        "regions",
        "regions that overlap",
        "name",
    ],
)
def test_very_many_of_anything_take_bounded_time(columns: Callable[[], dict[str, Any]]) -> None:
    """The limit on a test's time is what would fail: none of these is more than one pass over what
    there is.

    The columns are made by the test, so that collecting the tests does not take so long.
    """
    good_or_damaged(lambda: manifest_format.decode(KEY, *packed(**columns())))
