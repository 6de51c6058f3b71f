"""Snapshots: readers have versions that stay as they are, while the publisher's tensors change.

Real etcd and each engine that serves the host's memory. Every word of the weights says of which
version and rank it is.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch

from engine_loader import (
    Engine,
    InProcessEngine,
    LoaderError,
    LoadOptions,
    LoadReport,
    Pace,
    Publication,
    PublishOptions,
    Replica,
    Shard,
    Snapshots,
    SocketEngine,
    load,
    load_full,
    load_instance,
    publish,
    snapshot_nbytes,
)
from engine_loader.errors import (
    SnapshotsUnfit,
    SourceLost,
    TensorsUnusable,
    TornRead,
    VersionUnavailable,
)
from engine_loader.files.whole_files import WholeFiles
from engine_loader.publishing import slots
from engine_loader.sources.entrance import Entrance
from engine_registry import (
    InstanceDegraded,
    InstanceState,
    ModelIdentity,
    RankState,
    RankUpdated,
    Registry,
    failpoints,
)
from engine_registry.errors import Evicted, InvalidField
from engine_registry.etcd.local import LocalEtcd
from tests.support.gates import Gate
from tests.support.launches import Origin, origins, the_origin, words
from tests.support.waiting import wait_until

COUNT = 1 << 16  # words: 512 KiB
MODEL = ModelIdentity("m")
PACE = Pace(32 << 10, 2, check_s=0.01, stall_s=30)
Tensors = dict[str, torch.Tensor]
NewEngine = Callable[[], Engine]


def at(version: int, rank: int = 0) -> Origin:
    return Origin(1, version, rank)


@contextmanager
def trainer(
    registry: Registry,
    engine: Engine,
    tensors: Tensors,
    rank: int = 0,
    world_size: int = 1,
    shards: dict[str, Shard] | None = None,
    **options: Any,
) -> Iterator[Publication]:
    given = {"ttl_s": 3.0, "snapshots": 2, "digests": True, **options}
    with publish(
        registry,
        engine,
        instance="t",
        rank=rank,
        world_size=world_size,
        tensors=tensors,
        model=MODEL,
        shards=shards,
        options=PublishOptions(**given),
    ) as publication:
        yield publication


def step(tensors: Tensors, version: int, rank: int = 0) -> None:
    tensors["w"].copy_(words(at(version, rank), COUNT))


def read(
    registry: Registry, engine: Engine, source: Any = "t", **options: Any
) -> tuple[Origin, LoadReport]:
    found = {"w": torch.zeros(COUNT, dtype=torch.int64)}
    given = {"verify": "digest", "pace": PACE, **options}
    report = load(
        registry, engine, source, rank=0, tensors=found, options=LoadOptions(**given), timeout_s=20
    )
    return the_origin(origins(found["w"])), report


def test_each_version_is_read_as_it_was_when_it_was_made(
    registry: Registry, new_engine: NewEngine
) -> None:
    tensors = {"w": words(at(0), COUNT)}
    engine = new_engine()
    with trainer(registry, new_engine(), tensors) as publication:
        for version in range(5):
            step(tensors, 99)  # the trainer goes on
            found, report = read(registry, engine)
            assert (found, report.version, report.content) == (
                at(version),
                publication.version,
                publication.content,
            )
            if version:
                assert publication.retained == (version - 1,)
                for source in ("t", MODEL):
                    found, report = read(registry, engine, source, version=version - 1)
                    assert (found, report.version, report.retries) == (
                        at(version - 1),
                        version - 1,
                        0,
                    )
            step(tensors, version + 1)
            assert publication.snapshot() == version + 1
        with pytest.raises(VersionUnavailable):
            read(registry, engine, version=1)


def test_tensors_of_every_kind_are_copied_as_they_lie(
    registry: Registry, new_engine: NewEngine
) -> None:
    """Ties, views, other orders, odd sizes, types of one byte, none at all."""
    base = torch.arange(1000, dtype=torch.float32)
    tensors = {
        "base": base,
        "tied": base,
        "inside": base[100:200],
        "column": torch.arange(12.0).reshape(3, 4).t(),
        "odd": torch.arange(7, dtype=torch.int8),
        "half": torch.arange(33, dtype=torch.bfloat16),
        "byte": torch.arange(5, dtype=torch.float32).to(torch.float8_e4m3fn),
        "flag": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.5),
    }
    found = {name: torch.zeros_like(one) for name, one in tensors.items()}
    with trainer(registry, new_engine(), tensors) as publication:
        engine = new_engine()
        for _ in range(3):
            load(
                registry,
                engine,
                "t",
                rank=0,
                tensors=found,
                options=LoadOptions(verify="digest"),
            )
            for name, one in tensors.items():
                assert torch.equal(
                    found[name].reshape(-1).view(torch.uint8), one.reshape(-1).view(torch.uint8)
                ), name
            base += 1.5
            tensors["odd"] += 1
            publication.snapshot()
        assert publication.snapshots_nbytes == 2 * snapshot_nbytes(tensors)
        assert snapshot_nbytes(tensors) < 4000 + 10 * 512 + 1024


def test_a_reader_of_a_version_keeps_it_until_it_has_finished(
    registry: Registry, new_engine: NewEngine
) -> None:
    tensors = {"w": words(at(0), COUNT)}
    gate = Gate(0.3)
    with (
        trainer(registry, new_engine(), tensors, snapshots=Snapshots(retain_s=60)) as publication,
        ThreadPoolExecutor(2) as pool,
    ):
        reading = pool.submit(read, registry, new_engine(), progress=gate.see)
        assert gate.reached.wait(60)
        step(tensors, 1)
        assert publication.snapshot() == 1  # there is a place for it
        step(tensors, 2)
        second = pool.submit(publication.snapshot)
        wait_until(lambda: publication.record.retained == ())  # nobody else begins to read 0
        assert not second.done()
        assert read(registry, new_engine())[0] == at(1)
        assert not second.done()
        gate.open.set()
        found, report = reading.result(60)
        assert (found, report.version, report.retries) == (at(0), 0, 0)
        assert second.result(60) == 2
        assert read(registry, new_engine())[0] == at(2)


def test_a_ticket_keeps_a_version_for_several_loads(registry: Registry) -> None:
    tensors = {"w": words(at(0), COUNT)}
    with (
        trainer(registry, InProcessEngine(), tensors) as publication,
        ThreadPoolExecutor(1) as pool,
    ):
        step(tensors, 1)
        publication.snapshot()
        (record,) = registry.ranks("t")
        past = record.as_of(0)
        assert past is not None
        ticket = registry.pull(past)
        assert ticket is not None
        with ticket:
            step(tensors, 2)
            second = pool.submit(publication.snapshot)
            wait_until(lambda: publication.record.retained == ())
            assert not second.done()
        assert second.result(60) == 2
        assert registry.pull(past) is None


def test_a_reader_of_a_version_stops_nobody_where_there_is_another_place(
    registry: Registry, new_engine: NewEngine
) -> None:
    tensors = {"w": words(at(0), COUNT)}
    gate = Gate(0.3)
    snapshots = Snapshots(count=3, retain_s=1000)
    with (
        trainer(registry, new_engine(), tensors, snapshots=snapshots) as publication,
        ThreadPoolExecutor(1) as pool,
    ):
        reading = pool.submit(read, registry, new_engine(), progress=gate.see)
        assert gate.reached.wait(60)
        for version in range(1, 6):
            step(tensors, version)
            assert publication.snapshot() == version
            assert read(registry, new_engine())[0] == at(version)
        assert publication.retained == (4, 0)
        gate.open.set()
        found, report = reading.result(60)
        assert (found, report.version, report.retries) == (at(0), 0, 0)
        publication.snapshot()
        assert publication.retained == (5, 4)


def test_a_reader_that_is_too_slow_reads_the_newest_and_never_a_mix(
    registry: Registry, new_engine: NewEngine, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {"w": words(at(0), COUNT)}
    gate = Gate(0.3)
    with (
        trainer(registry, new_engine(), tensors, snapshots=Snapshots(retain_s=0.2)) as publication,
        ThreadPoolExecutor(1) as pool,
    ):
        reading = pool.submit(read, registry, new_engine(), progress=gate.see)
        assert gate.reached.wait(60)
        for version in (1, 2):
            step(tensors, version)
            publication.snapshot()
        gate.open.set()
        found, report = reading.result(60)
        assert (found, report.version, report.retries) == (at(2), 2, 1)
    assert "overwrites version 0, from which 1 loads still read" in caplog.text


def test_only_what_has_changed_is_copied_and_nothing_is_forgotten(
    registry: Registry, new_engine: NewEngine
) -> None:
    """The slot that is filled has the version before the last: what changed then is copied, too."""
    some = {name: words(at(0), COUNT) for name in ("w", "x", "y")}
    found = {name: torch.zeros_like(one) for name, one in some.items()}
    with trainer(registry, new_engine(), some, snapshots=3) as publication:
        engine = new_engine()
        wanted = dict.fromkeys(some, 0)
        for version, names in enumerate(["w", "x", "", "wy", "x", "w", "w", "w"], start=1):
            for name in names:
                some[name].copy_(words(at(version), COUNT))
                wanted[name] = version
            publication.snapshot(changed=list(names))
            load(registry, engine, "t", rank=0, tensors=found)
            assert {name: the_origin(origins(one)).version for name, one in found.items()} == wanted
        some["x"].zero_()
        publication.snapshot(changed=["w"])  # it is not said that x has changed
        load(registry, engine, "t", rank=0, tensors=found)
        assert the_origin(origins(found["x"])) == at(5)
        with pytest.raises(InvalidField, match="'z' is not among"):
            publication.snapshot(changed=["z"])


def test_ranks_that_go_on_one_after_another_are_read_in_one_version(
    registry: Registry, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors = [{"w": words(at(0, rank), COUNT)} for rank in range(2)]
    shards = [{"w": Shard((2 * COUNT,), (rank * COUNT,))} for rank in range(2)]
    engine = InProcessEngine()

    def versions() -> set[int]:
        """Of all the ways to read all ranks."""
        seen = set()
        into = {rank: {"w": torch.zeros(COUNT, dtype=torch.int64)} for rank in range(2)}
        reports = load_instance(registry, engine, "t", tensors=into, shards=dict(enumerate(shards)))
        for rank in range(2):
            origin = the_origin(origins(into[rank]["w"]))
            assert origin == at(reports[rank].version, rank)
            seen.add(origin.version)
        with WholeFiles(tmp_path_factory.mktemp("full")) as files:
            seen.add(load_full(registry, engine, "t", files=files).version)
        status = registry.instance("t")
        assert status.state is InstanceState.READY
        assert not status.problems
        assert status.version is not None
        return seen | {status.version}

    with (
        trainer(registry, InProcessEngine(), tensors[0], 0, 2, shards[0]) as first,
        trainer(registry, InProcessEngine(), tensors[1], 1, 2, shards[1]) as second,
        registry.watch("t") as watch,
    ):
        assert versions() == {0}
        for version in range(1, 5):
            for rank, publication in ((0, first), (1, second)):
                step(tensors[rank], version, rank)
                publication.snapshot()
                assert versions() == {version - 1 + rank}
        pinned = registry.instance("t").contents
        for rank, publication in ((0, first), (1, second)):
            step(tensors[rank], 5, rank)
            publication.snapshot()
        into = {"w": torch.zeros(COUNT, dtype=torch.int64)}
        options = LoadOptions(contents=pinned)
        report = load(registry, engine, "t", tensors=into, shards=shards[1], options=options)
        assert the_origin(origins(into["w"])) == at(4, 1)  # what was pinned is retained
        assert report.version == 4
        updated = 0
        for event in watch:
            assert not isinstance(event, InstanceDegraded)
            updated += isinstance(event, RankUpdated)
            if updated == 10:
                break


def test_no_reader_is_torn_by_snapshots_that_follow_each_other(
    registry: Registry, new_engine: NewEngine
) -> None:
    follow_snapshots(registry, new_engine, 60)


@pytest.mark.slow
def test_no_reader_is_torn_by_a_thousand_snapshots(registry: Registry) -> None:
    with ExitStack() as engines:
        follow_snapshots(
            registry, lambda: engines.enter_context(SocketEngine("127.0.0.1")), rounds=1000
        )


def follow_snapshots(registry: Registry, new_engine: NewEngine, rounds: int) -> None:
    """Four readers load again and again meanwhile, and none begins anew."""
    tensors = {"w": words(at(0), COUNT)}
    over = threading.Event()
    seen: Counter[int] = Counter()

    def follow(engine: Engine) -> int:
        retries = 0
        for _ in count():
            done = over.is_set()
            found, report = read(registry, engine, pace=None)
            assert found == at(report.version)
            seen[report.version] += 1
            retries += report.retries
            if done:
                return retries
        raise AssertionError

    with (
        trainer(registry, new_engine(), tensors, snapshots=Snapshots(retain_s=60)) as publication,
        ThreadPoolExecutor(4) as pool,
    ):
        readers = [pool.submit(follow, new_engine()) for _ in range(4)]
        try:
            for version in range(1, rounds + 1):
                step(tensors, version)
                publication.snapshot(wait=bool(version % 2))
        finally:
            over.set()
        assert [reader.result(60) for reader in readers] == [0, 0, 0, 0]
    assert len(seen) > 4


def test_a_record_that_changes_before_the_ticket_is_taken_tears_nothing(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"w": words(at(0), COUNT)}
    enter = Entrance.enter
    with trainer(registry, InProcessEngine(), tensors) as publication:

        def late(self: Entrance, *args: Any) -> Any:
            monkeypatch.undo()
            step(tensors, 1)
            publication.snapshot()
            return enter(self, *args)

        monkeypatch.setattr(Entrance, "enter", late)
        found, report = read(registry, InProcessEngine())
        assert (found, report.retries) == (at(0), 0)
        assert read(registry, InProcessEngine())[0] == at(1)


# -- what is done while the trainer goes on


def test_tensors_may_change_as_soon_as_they_are_copied(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"w": words(at(0), COUNT)}
    going = threading.Event()
    monkeypatch.setitem(failpoints.ACTIONS, "snapshot.before_reveal", lambda: going.wait(60))
    with trainer(registry, InProcessEngine(), tensors) as publication:
        step(tensors, 1)
        assert publication.snapshot(wait=False) == 1
        step(tensors, 2)
        assert read(registry, InProcessEngine())[0] == at(0)
        going.set()
        assert publication.snapshot() == 2
        assert read(registry, InProcessEngine())[0] == at(2)
        assert read(registry, InProcessEngine(), version=1)[0] == at(1)


def test_what_fails_behind_the_caller_is_raised_by_the_next_call(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"w": words(at(0), COUNT)}

    def fail() -> None:
        raise ValueError("the disk is on fire")

    with trainer(registry, InProcessEngine(), tensors) as publication:
        monkeypatch.setitem(failpoints.ACTIONS, "snapshot.before_reveal", fail)
        publication.snapshot(wait=False)
        with pytest.raises(ValueError, match="fire"):
            publication.snapshot()
        monkeypatch.undo()
        assert read(registry, InProcessEngine())[0] == at(0)
        step(tensors, 1)
        assert publication.snapshot() == 1
        assert read(registry, InProcessEngine())[0] == at(1)


def test_a_publication_that_closes_meanwhile_leaves_nothing(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"w": words(at(0), COUNT)}
    engine = InProcessEngine()
    with trainer(registry, engine, tensors) as publication:
        reached, going = threading.Event(), threading.Event()

        def wait() -> None:
            reached.set()
            going.wait(60)

        monkeypatch.setitem(failpoints.ACTIONS, "snapshot.before_reveal", wait)
        publication.snapshot(wait=False)
        assert reached.wait(60)
        threading.Timer(0.2, going.set).start()
    assert registry.instance("t").state is InstanceState.GONE
    assert not any("snapshots" in thread.name for thread in threading.enumerate())
    with pytest.raises(LoaderError, match="is closed"):
        publication.snapshot()
    tensors["w"].fill_(0)  # it is the caller's


def test_a_rank_that_is_evicted_or_drains_makes_no_snapshot(registry: Registry) -> None:
    tensors = {"w": words(at(0), COUNT)}
    with trainer(registry, InProcessEngine(), tensors) as publication:
        (record,) = registry.ranks("t")
        registry.evict(record)
        wait_until(lambda: publication.registration.lost is not None)
        with pytest.raises(Evicted):
            publication.snapshot()
    with trainer(registry, InProcessEngine(), tensors) as publication:
        publication.registration.update(state=RankState.DRAINING)
        with pytest.raises(LoaderError, match="is draining, so there is nothing to snapshot"):
            publication.snapshot()


def test_snapshots_go_on_while_etcd_is_away(own_etcd: LocalEtcd) -> None:
    tensors = {"w": words(at(0), COUNT)}
    with Registry.connect(own_etcd.endpoint, timeout_s=0.5) as registry:
        with trainer(registry, InProcessEngine(), tensors) as publication:
            for version in (1, 2):
                step(tensors, version)
                publication.snapshot()
            own_etcd.kill()
            for version in (3, 4):
                step(tensors, version)
                publication.snapshot()
            own_etcd.start()
            wait_until(lambda: registry.instance("t").version == 4)
            found, report = read(registry, InProcessEngine())
            assert (found, report.version) == (at(4), 4)
            assert read(registry, InProcessEngine(), version=3)[0] == at(3)


# -- wrong ways


def test_what_does_not_go_with_snapshots_is_refused_and_nothing_changes(registry: Registry) -> None:
    tensors = {"w": words(at(0), COUNT)}
    with trainer(registry, InProcessEngine(), tensors) as publication:
        refused = partial(pytest.raises, LoaderError, match="publishes snapshots, so there is")
        with refused(), publication.update():
            pass
        with refused():
            publication.pause()
        with refused():
            publication.replace(tensors)
        with pytest.raises(InvalidField, match="version 0 is not newer than 0"):
            publication.snapshot(0)
        assert publication.snapshot(7) == 7
        tensors["w"].data = torch.zeros(COUNT, dtype=torch.int64)
        with pytest.raises(TensorsUnusable, match="no snapshot of them: w"):
            publication.snapshot()
        assert read(registry, InProcessEngine())[1].version == 7
    with publish(
        registry,
        InProcessEngine(),
        instance="live",
        rank=0,
        world_size=1,
        tensors=tensors,
        model=MODEL,
    ) as live:
        assert live.snapshots_nbytes == 0
        with pytest.raises(LoaderError, match="live/0 publishes no snapshots"):
            live.snapshot()
    with pytest.raises(InvalidField, match="snapshots"):
        Replica("r", options=PublishOptions(snapshots=2))


def test_snapshots_that_do_not_fit_are_refused_before_anything_is_registered(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"w": words(at(0), COUNT)}
    monkeypatch.setattr(slots, "available_nbytes", lambda device: 1_000_000)
    with (
        pytest.raises(SnapshotsUnfit, match=r"2 snapshots of 0\.0 GB do not fit .* 0\.0 GB are"),
        trainer(registry, InProcessEngine(), tensors),
    ):
        pass
    assert registry.instance("t").state is InstanceState.GONE


def test_snapshots_lie_in_memory_that_the_caller_lends(registry: Registry) -> None:
    tensors = {"w": words(at(0), COUNT)}
    nbytes = snapshot_nbytes(tensors)
    lent = [torch.empty(nbytes + 512, dtype=torch.uint8) for _ in range(2)]
    lent = [one[-one.data_ptr() % 512 :] for one in lent]
    with trainer(
        registry, InProcessEngine(), tensors, snapshots=Snapshots(buffers=lent)
    ) as publication:
        for version in (1, 2, 3):
            step(tensors, version)
            publication.snapshot()
        assert read(registry, InProcessEngine())[0] == at(3)
        assert read(registry, InProcessEngine(), version=2)[0] == at(2)
        regions = publication.regions
        assert {region.addr for region in regions} <= {one.data_ptr() for one in lent}
    for wrong in (
        [lent[0], lent[1][: nbytes - 1]],
        [lent[0], lent[1].view(torch.int8)],
        [lent[0], lent[1][1:]],
    ):
        with (
            pytest.raises(InvalidField, match="a buffer for snapshots will not do"),
            trainer(registry, InProcessEngine(), tensors, snapshots=Snapshots(buffers=wrong)),
        ):
            pass
    with (
        pytest.raises(InvalidField, match="torch knows no such device"),
        trainer(registry, InProcessEngine(), tensors, snapshots=Snapshots(device="tape")),
    ):
        pass


def test_a_reader_without_a_ticket_notices_that_its_version_is_overwritten(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose etcd is away: the publisher cannot know of it."""
    tensors = {"w": words(at(0), COUNT)}
    gate = Gate(0.3)
    with (
        trainer(registry, InProcessEngine(), tensors) as publication,
        ThreadPoolExecutor(1) as pool,
    ):
        monkeypatch.setattr(type(registry), "wait_for_no_pulls", lambda *_: 0)
        reading = pool.submit(read, registry, InProcessEngine(), progress=gate.see, version=0)
        assert gate.reached.wait(60)
        for version in (1, 2):
            step(tensors, version)
            publication.snapshot()
        gate.open.set()
        with pytest.raises((TornRead, SourceLost, VersionUnavailable)):
            reading.result(60)


def test_nothing_of_another_version_is_ever_seen_in_the_memory_of_one(registry: Registry) -> None:
    """While a slot is filled its header says so."""
    tensors = {"w": words(at(0), COUNT)}
    with trainer(registry, InProcessEngine(), tensors, digests=False) as publication:
        for version in range(1, 4):
            step(tensors, version)
            publication.snapshot()
            found = {"w": torch.zeros(COUNT, dtype=torch.int64)}
            load(registry, InProcessEngine(), "t", rank=0, tensors=found)
            assert origins(found["w"]) == {at(version): COUNT}
