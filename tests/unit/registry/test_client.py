"""`Registry` over an etcd in memory: what it makes of what lies there, and what it refuses before
anything is written.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from engine_registry import (
    InstanceState,
    Location,
    Manifest,
    ModelIdentity,
    Place,
    RankRecord,
    RankState,
    Registry,
    client,
)
from engine_registry.errors import (
    EtcdUnavailable,
    InstanceIncomplete,
    InstanceNotFound,
    InvalidField,
    RecordDamaged,
    SchemaUnsupported,
)
from engine_registry.etcd.backoff import Backoff
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.holders.query import HolderQuery
from engine_registry.registration import manifests
from engine_registry.schema import manifest_format
from engine_registry.schema.keys import manifest_part_key, record_key
from engine_registry.schema.keyvalue import Found, Range, Snapshot
from engine_registry.schema.record_format import _record, encode
from tests.support.builders import (
    OTHER_INCARNATION,
    a_manifest,
    a_record,
    an_entry,
    deleted,
    stored,
)
from tests.support.fake_etcd import FakeEtcd
from tests.support.feed import Feed

A, B = a_record(rank=0), a_record(rank=1)


@pytest.fixture
def etcd() -> FakeEtcd:
    return FakeEtcd()


@pytest.fixture
def registry(etcd: FakeEtcd) -> Iterator[Registry]:
    with Registry(EtcdConfig(parse_endpoints("fake:1"))) as registry:
        registry._etcd = etcd
        yield registry


def put(etcd: FakeEtcd, *records: RankRecord) -> None:
    for record in records:
        etcd.put(record.key, encode(record))


# -- looking
# --------------------------------------------------------------------------------------------------


def test_instances_come_by_name_each_with_its_own_ranks(registry: Registry, etcd: FakeEtcd) -> None:
    alone = a_record(instance="a", world_size=1)
    put(etcd, B, A, alone)
    statuses = registry.instances()
    assert [(status.instance, status.state, status.records) for status in statuses] == [
        ("a", InstanceState.READY, (alone,)),
        ("qwen", InstanceState.READY, (A, B)),
    ]
    assert all(record.mod_revision for status in statuses for record in status.records)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (record_key("qwen", 1), b"junk", "the record at /engines/qwen/1 is damaged"),
        (record_key("qwen", 1), b'{"schema":3}', "the record at /engines/qwen/1 has schema 3"),
        (
            "/engines/qwen/readme",
            b"hello",
            "the key /engines/qwen/readme is not /engines/<instance>/<rank>",
        ),
    ],
)
def test_what_cannot_be_read_is_a_problem_of_its_instance_and_of_no_other(
    registry: Registry, etcd: FakeEtcd, key: str, value: bytes, said: str
) -> None:
    put(etcd, A, B, a_record(instance="other", world_size=1))
    etcd.put(key, value)
    other, qwen = registry.instances()
    assert other.state is InstanceState.READY
    assert qwen.state is InstanceState.DEGRADED
    assert any(problem.startswith(said) for problem in qwen.problems)


def test_an_instance_whose_ranks_have_all_ended_is_not_listed(
    registry: Registry, etcd: FakeEtcd
) -> None:
    put(etcd, replace(A, ended="withdrawn"))
    assert registry.instances() == ()
    assert registry.instance("qwen").state is InstanceState.GONE
    assert registry.ranks("qwen") == ()


@pytest.mark.parametrize(
    ("now", "found"),
    [
        (replace(A, version=9), True),
        (replace(A, ended="withdrawn"), False),
        (replace(A, incarnation=OTHER_INCARNATION), False),
        (None, False),
    ],
)
def test_a_registration_is_current_while_it_stands_in_whatever_version(
    registry: Registry, etcd: FakeEtcd, now: RankRecord | None, found: bool
) -> None:
    if now is not None:
        put(etcd, now)
    current = registry.current(A)
    assert (current is not None) == found
    assert current is None or (current.incarnation, current.version) == (A.incarnation, 9)


def test_a_registration_whose_record_is_damaged_is_not_current(
    registry: Registry, etcd: FakeEtcd
) -> None:
    etcd.put(A.key, b"junk")
    assert registry.current(A) is None


def test_the_ranks_are_the_good_ones_with_a_warning_for_each_other(
    registry: Registry, etcd: FakeEtcd, caplog: pytest.LogCaptureFixture
) -> None:
    put(etcd, A)
    etcd.put(B.key, b"junk")
    with caplog.at_level(logging.WARNING):
        assert registry.ranks("qwen") == (A,)
    assert len(caplog.messages) == 1
    assert B.key in caplog.messages[0]


def test_ranks_that_only_differ_are_all_listed_without_a_warning(
    registry: Registry, etcd: FakeEtcd, caplog: pytest.LogCaptureFixture
) -> None:
    put(etcd, A, replace(B, version=9, state=RankState.LOADING))
    with caplog.at_level(logging.WARNING):
        assert [record.version for record in registry.ranks("qwen")] == [3, 9]
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["", "a/b", "a b"])
def test_a_name_that_cannot_be_one_is_refused_everywhere(registry: Registry, name: str) -> None:
    for ask in (registry.instance, registry.ranks, registry.resolve, registry.watch):
        with pytest.raises(InvalidField, match="instance name"):
            ask(name)


# -- resolving
# --------------------------------------------------------------------------------------------------


def test_an_instance_that_is_ready_resolves_to_all_its_ranks(
    registry: Registry, etcd: FakeEtcd
) -> None:
    put(etcd, B, A, a_record(instance="qwen.draft", world_size=7))
    assert registry.resolve("qwen") == (A, B)


def test_an_instance_that_is_not_there_is_not_found(registry: Registry) -> None:
    with pytest.raises(
        InstanceNotFound, match="instance 'qwen' is not registered: start its ranks"
    ):
        registry.resolve("qwen")


def test_missing_ranks_and_problems_are_listed(registry: Registry, etcd: FakeEtcd) -> None:
    put(etcd, a_record(world_size=4), a_record(rank=2, world_size=4, state=RankState.LOADING))
    with pytest.raises(
        InstanceIncomplete,
        match="instance 'qwen' is not ready: missing ranks 1,3 of 4; rank 2 loading",
    ):
        registry.resolve("qwen")


@pytest.mark.parametrize(
    ("value", "kind"), [(b"junk", RecordDamaged), (b'{"schema":3}', SchemaUnsupported)]
)
def test_a_damaged_record_is_an_error_of_its_own(
    registry: Registry, etcd: FakeEtcd, value: bytes, kind: type[RecordDamaged]
) -> None:
    put(etcd, A)
    etcd.put(B.key, value)
    with pytest.raises(kind, match=B.key):
        registry.resolve("qwen")


def test_without_time_to_wait_an_etcd_that_is_away_is_reported_at_once(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = iter(range(3))

    class Away(FakeEtcd):
        def snapshot(self, prefix: str, exact: bool = False) -> Snapshot:
            if next(tries, None) is None:
                raise AssertionError("still trying")
            raise EtcdUnavailable("etcd is away")

    monkeypatch.setattr(Backoff, "next_s", lambda _: 0.0)
    registry._etcd = Away()
    with pytest.raises(EtcdUnavailable):
        registry.resolve("qwen")


def test_an_etcd_that_was_away_all_the_time_is_what_a_resolve_fails_with(
    registry: Registry, etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(etcd, A, B)
    etcd.available = False
    monkeypatch.setattr(Backoff, "next_s", lambda _: 0.0)
    with pytest.raises(EtcdUnavailable):
        registry.resolve("qwen", timeout_s=0.01)


def test_a_resolve_that_waits_reads_each_record_once(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [a_record(rank=rank, world_size=100) for rank in range(100)]
    feed = Feed(stored(records[0]))
    registry._etcd = feed
    reads: list[object] = []
    monkeypatch.setattr(
        "engine_registry.schema.record_format._record",
        lambda *args: reads.append(args) or _record(*args),  # type: ignore[func-returns-value]
    )
    for number, each in enumerate(records[1:], 2):
        feed.give(stored(each, number), stored(replace(each, instance="other"), number))
    assert registry.resolve("qwen", timeout_s=60) == tuple(records)
    assert len(reads) <= 2 * len(records)


def test_a_resolve_of_several_instances_looks_at_those_alone(registry: Registry) -> None:
    feed = Feed()
    registry._etcd = feed
    feed.give(stored(a_record(instance="other", world_size=1), 2))
    feed.give(stored(a_record(instance="second", world_size=1), 3))
    (found,) = registry.resolve(["first", "second"], timeout_s=60)
    assert found.instance == "second"


@pytest.mark.parametrize("timeout_s", [0, 60])
def test_of_several_instances_one_that_is_ready_is_found_without_reading_any_other(
    registry: Registry, etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch, timeout_s: float
) -> None:
    put(etcd, A, B, a_record(instance="other", world_size=1))
    read: list[str] = []
    snapshot = etcd.snapshot

    def noted(prefix: str) -> Snapshot:
        read.append(prefix)
        return snapshot(prefix)

    monkeypatch.setattr(etcd, "snapshot", noted)
    assert registry.resolve(["first", "qwen"], timeout_s) == (A, B)
    assert read == ["/engines/first/", "/engines/qwen/"]


def test_an_etcd_that_is_away_at_the_first_look_at_several_is_waited_for(
    registry: Registry, etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    def comes_back(_: Backoff) -> float:
        etcd.available = True
        return 0.0

    put(etcd, A, B)
    etcd.available = False
    monkeypatch.setattr(Backoff, "next_s", comes_back)
    assert registry.resolve(["first", "qwen"], timeout_s=60) == (A, B)


def test_what_changes_for_the_worse_while_a_resolve_waits_is_what_it_reports(
    registry: Registry,
) -> None:
    feed = Feed(stored(A))
    registry._etcd = feed
    feed.give(
        stored(a_record(rank=1, state=RankState.LOADING), 2),
        stored(replace(A, ended="withdrawn"), 3),
        deleted(A, 4),
    )
    with pytest.raises(InstanceIncomplete, match="missing rank 0 of 2; rank 1 loading"):
        registry.resolve("qwen", timeout_s=0.5)


# -- manifests
# --------------------------------------------------------------------------------------------------


def published(etcd: FakeEtcd, wanted: Manifest) -> RankRecord:
    ref, parts = manifest_format.encode(wanted)
    record = a_record(manifest=ref)
    for number, part in enumerate(parts):
        etcd.put(manifest_part_key(record.instance, record.rank, record.incarnation, number), part)
    return record


@pytest.fixture
def in_many_parts(monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.setattr(manifest_format, "PART_NBYTES", 10)
    return a_manifest(
        *[an_entry(f"layer.{number}", addr=4096 * (number + 1)) for number in range(50)]
    )


def test_a_manifest_is_put_together_from_its_parts_in_their_order(
    registry: Registry, etcd: FakeEtcd, in_many_parts: Manifest
) -> None:
    record = published(etcd, in_many_parts)
    assert record.manifest.parts > 11  # so that part 10 sorts before part 2
    assert registry.manifest(record) == in_many_parts


@pytest.mark.parametrize("missing", [0, 5, -1])
def test_a_manifest_with_a_part_missing_is_not_there(
    registry: Registry, etcd: FakeEtcd, in_many_parts: Manifest, missing: int
) -> None:
    record = published(etcd, in_many_parts)
    etcd.delete(manifest_part_key("qwen", 0, record.incarnation, missing % record.manifest.parts))
    with pytest.raises(
        RecordDamaged, match=r"is not there \(any more\): the rank has gone or registered again"
    ):
        registry.manifest(record)


def test_manifests_of_several_ranks_are_read_a_few_parts_at_a_time(
    registry: Registry,
    etcd: FakeEtcd,
    in_many_parts: Manifest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = published(etcd, in_many_parts)
    absent = replace(record, incarnation=OTHER_INCARNATION)
    absurd = replace(record, manifest=replace(record.manifest, parts=10**12))
    requests: list[int] = []
    read = etcd.read

    def counted(ranges: Sequence[Range]) -> tuple[int, list[Found]]:
        requests.append(len(ranges))
        return read(ranges)

    monkeypatch.setattr(etcd, "read", counted)
    found = registry.manifests([record, absent, absurd, record])
    assert [found[0], found[3]] == [in_many_parts] * 2
    assert [type(each) for each in found[1:3]] == [RecordDamaged] * 2
    assert sum(requests) == 3 * record.manifest.parts
    assert max(requests) == 32
    assert len(requests) == -(-sum(requests) // 32)


def test_a_manifest_of_another_incarnation_is_not_taken_for_ours(
    registry: Registry, etcd: FakeEtcd
) -> None:
    record = published(etcd, a_manifest())
    with pytest.raises(RecordDamaged, match="is not there"):
        registry.manifest(replace(record, incarnation=OTHER_INCARNATION))


def test_a_manifest_that_is_not_the_one_of_the_record_is_damage(
    registry: Registry, etcd: FakeEtcd
) -> None:
    record = published(etcd, a_manifest())
    with pytest.raises(RecordDamaged, match="does not match the digest"):
        registry.manifest(replace(record, manifest=replace(record.manifest, digest="0" * 64)))


def test_a_claim_of_absurdly_many_parts_is_damage(registry: Registry, etcd: FakeEtcd) -> None:
    record = published(etcd, a_manifest())
    with pytest.raises(RecordDamaged, match="claims a manifest of 1000000000000 parts"):
        registry.manifest(replace(record, manifest=replace(record.manifest, parts=10**12)))


# -- registering
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What registrations would have been made of."""
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(client, "Registration", lambda *args: made.append(args))
    return made


def register(registry: Registry, **changes: Any) -> None:
    good = {
        "instance": "qwen",
        "rank": 0,
        "world_size": 2,
        "model": ModelIdentity("qwen"),
        "manifest": a_manifest(),
    }
    registry.register(
        **{**good, "session_id": "h:1", "protocol": "tcp", "header_addr": 4096, **changes}
    )


def test_a_registration_is_made_of_a_record_that_reads_back_as_it_is(
    registry: Registry, registered: list[tuple[Any, ...]]
) -> None:
    register(
        registry,
        topology={"tp": (0, 2)},
        version=7,
        generation="g",
        fabric="rack",
        rails={"mlx5_0": "10.1.0.0/24"},
        location=Location("eu-1a", "r17"),
        device="cuda:0",
        ttl_s=5,
    )
    ((_, record, parts, *others),) = registered
    assert others == [5, 30.0, None, None, None, ""]  # from the TTL on to what it replaces
    etcd = FakeEtcd()
    put(etcd, record)
    registry._etcd = etcd
    (found,) = registry.ranks("qwen")
    assert found == record
    assert manifest_format.decode(record.key, record.manifest, parts) == a_manifest()
    assert record.registered_at.endswith("Z")
    assert len(bytes.fromhex(record.incarnation)) == 16


def test_each_registration_has_an_incarnation_of_its_own(
    registry: Registry, registered: list[tuple[Any, ...]]
) -> None:
    for _ in range(2):
        register(registry)
    (_, first, *_), (_, second, *_) = registered
    assert first.incarnation != second.incarnation


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"ttl_s": 1.9}, "ttl_s"),
        ({"ttl_s": float("nan")}, "ttl_s"),
        ({"instance": "a b"}, "instance"),
        ({"rank": 2}, "rank"),
        ({"world_size": 0}, "world_size"),
        ({"topology": {"tp": (2, 2)}}, "topology"),
        ({"version": -1}, "version"),
        ({"version": 1 << 63}, "version"),
        ({"device": "\ud800"}, "device"),
    ],
)
def test_what_cannot_be_registered_is_refused_by_its_field(
    registry: Registry, registered: list[tuple[Any, ...]], changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidField) as caught:
        register(registry, **changes)
    assert caught.value.details["field"] == field
    assert registered == []


@pytest.mark.parametrize("time_s", [math.nan, -1.0, math.inf, "10", None, True])
def test_a_time_that_is_none_is_refused_by_its_field(registry: Registry, time_s: Any) -> None:
    calls: dict[str, list[Callable[[], object]]] = {
        "ttl_s": [lambda: register(registry, ttl_s=time_s)],
        "grace_s": [lambda: registry.cleaning_watch(grace_s=time_s)],
        "timeout_s": [
            lambda: registry.resolve("a", time_s),
            lambda: registry.ready("a", time_s),
            lambda: registry.holders(HolderQuery(ModelIdentity("m"), Place(0)), time_s),
            lambda: registry.wait_for_no_pulls("a", 0, time_s),
        ],
    }
    for field, of_field in calls.items():
        for call in of_field:
            with pytest.raises(InvalidField, match=f"{field} .* is not valid") as caught:
                call()
            assert caught.value.details["field"] == field


def test_a_manifest_of_too_many_parts_is_refused(
    registry: Registry,
    registered: list[tuple[Any, ...]],
    in_many_parts: Manifest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(manifests, "MAX_PARTS", 3)
    with pytest.raises(InvalidField, match=r"the manifest of 50 tensors takes .* more than 3"):
        register(registry, manifest=in_many_parts)
    assert registered == []
