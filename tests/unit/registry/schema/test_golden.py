"""Bytes of each format as its first version wrote them: they read as ever, and the bytes that are
written now are the same.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from engine_registry import ModelIdentity, Pull, RankRecord, RankState
from engine_registry.schema import pull_ticket
from engine_registry.schema.eviction_note import EvictionNote
from engine_registry.schema.keyvalue import KeyValue
from engine_registry.schema.pull_ticket import Reader
from engine_registry.schema.record import ManifestRef, implied_content
from engine_registry.schema.record_format import decode, encode

FULL = RankRecord(
    incarnation="0" * 32,
    instance="qwen-a",
    rank=1,
    world_size=2,
    model=ModelIdentity("qwen", "r1", "bfloat16", "fp8", {"engine": "vllm"}),
    session_id="10.0.0.7:15001",
    protocol="rdma",
    manifest=ManifestRef("ab" * 32, 2, 291, 1 << 34),
    header_addr=(1 << 64) - 4096,
    registered_at="2026-01-02T03:04:05.678+00:00",
    generation="g7",
    topology={"tp": (1, 2)},
    version=3,
    content="c" * 32,
    state=RankState.DRAINING,
    fabric="f",
    host="node-1",
    pid=4711,
    device="cuda:1",
    writer="0.1.0",
    kept_by="gateway",
    unresponsive_since="2026-01-02T03:05:00.000+00:00",
    ended="process ended",
)
SMALL = RankRecord(
    incarnation="1" * 32,
    instance="a",
    rank=0,
    world_size=1,
    model=ModelIdentity("m"),
    session_id="h:1",
    protocol="tcp",
    manifest=ManifestRef("", 0, 0, 0),
    header_addr=0,
    registered_at="",
)
PULL = Pull(
    "qwen-a",
    1,
    "0" * 32,
    "load-1",
    host="node-2",
    pid=12,
    reader=Reader("b", 0, "2" * 32),
    nbytes=5,
    total_nbytes=8,
    began_at="2026-01-02T03:04:05.678+00:00",
)
EMPTY_PULL = Pull("qwen-a", 1, "0" * 32, "load-1")

FULL_BYTES = (
    b'{"schema":1,"incarnation":"00000000000000000000000000000000","generation":"g'
    b'7","instance":"qwen-a","rank":1,"world_size":2,"topology":{"tp":[1,2]},"mode'
    b'l":{"name":"qwen","revision":"r1","dtype":"bfloat16","quantization":"fp8","e'
    b'xtra":{"engine":"vllm"}},"version":3,"content":"cccccccccccccccccccccccccccc'
    b'cccc","state":"draining","session_id":"10.0.0.7:15001","protocol":"rdma","fa'
    b'bric":"f","host":"node-1","pid":4711,"device":"cuda:1","header":{"addr":1844'
    b'6744073709547520},"manifest":{"digest":"abababababababababababababababababab'
    b'abababababababababababababab","parts":2,"tensors":291,"nbytes":17179869184},'
    b'"registered_at":"2026-01-02T03:04:05.678+00:00","writer":"0.1.0","kept_by":"'
    b'gateway","unresponsive_since":"2026-01-02T03:05:00.000+00:00","ended":"proce'
    b'ss ended"}'
)
SMALL_BYTES = (
    b'{"schema":1,"incarnation":"11111111111111111111111111111111","generation":""'
    b',"instance":"a","rank":0,"world_size":1,"topology":{},"model":{"name":"m","r'
    b'evision":"","dtype":"","quantization":"","extra":{}},"version":0,"state":"re'
    b'ady","session_id":"h:1","protocol":"tcp","fabric":"","host":"","pid":0,"devi'
    b'ce":"","header":{"addr":0},"manifest":{"digest":"","parts":0,"tensors":0,"nb'
    b'ytes":0},"registered_at":"","writer":""}'
)
PULL_BYTES = (
    b'{"host":"node-2","pid":12,"incarnation":"00000000000000000000000000000000","'
    b'reader":{"instance":"b","rank":0,"incarnation":"2222222222222222222222222222'
    b'2222"},"nbytes":5,"total_nbytes":8,"began_at":"2026-01-02T03:04:05.678+00:00'
    b'"}'
)
EMPTY_PULL_BYTES = (
    b'{"host":"","pid":0,"incarnation":"00000000000000000000000000000000","nbytes"'
    b':0,"total_nbytes":0,"began_at":""}'
)
NOTE_HEAD = b'{"schema": 1, "lost": {"key": "/engines/qwen-a/1", "record": '
NOTE_TAIL = (
    b'}, "incarnations": ["00000000000000000000000000000000", "11111111111111111111111111111111"]}'
)
NOTE_BYTES = NOTE_HEAD + json.dumps(FULL_BYTES.decode()).encode() + NOTE_TAIL


@pytest.mark.parametrize(("record", "stored"), [(FULL, FULL_BYTES), (SMALL, SMALL_BYTES)])
def test_a_record_reads_and_is_written_as_ever(record: RankRecord, stored: bytes) -> None:
    found = decode(record.key, stored)
    content = record.content or implied_content(record.incarnation, record.version)
    assert found == replace(record, content=content)
    assert encode(record) == stored


def test_a_record_with_escaped_text_reads_as_ever() -> None:
    """Texts were escaped, and are UTF-8 now, which all readers take."""
    escaped = SMALL_BYTES.replace(b'"name":"m"', b'"name":"mod\\u00e8le \\ud83d\\udca3"')
    record = replace(SMALL, model=ModelIdentity("modèle 💣"))
    assert decode(record.key, escaped).model == record.model
    assert json.loads(encode(record)) == json.loads(escaped)
    assert len(encode(record)) < len(escaped)


@pytest.mark.parametrize(("pull", "stored"), [(PULL, PULL_BYTES), (EMPTY_PULL, EMPTY_PULL_BYTES)])
def test_a_ticket_reads_and_is_written_as_ever(pull: Pull, stored: bytes) -> None:
    assert pull_ticket.decode(KeyValue(pull.key, stored, 0, 0, 0)) == pull
    assert pull_ticket.encode(pull) == stored


def test_a_note_reads_as_ever_and_is_written_with_the_same_fields_in_the_same_order() -> None:
    note = EvictionNote(FULL, frozenset({"0" * 32, "1" * 32}))
    assert EvictionNote.decode("/eviction-notes/qwen-a", NOTE_BYTES) == note
    pairs = json.loads(note.encode(), object_pairs_hook=list)
    assert pairs == json.loads(NOTE_BYTES, object_pairs_hook=list)
