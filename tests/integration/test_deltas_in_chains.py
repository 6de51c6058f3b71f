"""Deltas that ranks pass on: a reader behind a replica reads what has changed, as one behind the
trainer does. Whatever goes wrong on the way costs bytes, and what a reader has in the end is exact.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch

from engine_loader import (
    Engine,
    InProcessEngine,
    LoadOptions,
    LoadReport,
    Publication,
    PublishOptions,
    Replica,
    Shard,
    Snapshots,
    SocketEngine,
    load,
    publish,
)
from engine_loader.publishing import delta_shelf
from engine_loader.sources.deltas import Deltas
from engine_registry import Registry
from tests.integration.conftest import Processes, line_of
from tests.integration.test_deltas import COLUMNS, MODEL, ROWS, NewEngine, Tensors, weights
from tests.support.gates import Gate

NBYTES = 4 * ROWS * COLUMNS * 2


def like(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(one) for name, one in tensors.items()}


def assert_same(ours: Tensors, theirs: Tensors) -> None:
    for name, one in theirs.items():
        assert torch.equal(ours[name].view(torch.int16), one.view(torch.int16)), name


class Trainer:
    """Changes 2 % of the elements in each step, and offers each as a snapshot."""

    def __init__(
        self, registry: Registry, engine: Engine, tensors: Tensors | None = None, **snapshots: Any
    ) -> None:
        self.tensors = weights() if tensors is None else tensors
        self._random = torch.Generator().manual_seed(7)
        self.publication = publish(
            registry,
            engine,
            instance="trainer",
            rank=0,
            world_size=1,
            tensors=self.tensors,
            model=MODEL,
            options=PublishOptions(
                ttl_s=3.0, snapshots=Snapshots(**{"count": 3, "deltas": 4, **snapshots})
            ),
        )

    def step(self, share: float = 0.02) -> None:
        for tensor in self.tensors.values():
            tensor.view(torch.int16)[torch.rand(tensor.shape, generator=self._random) < share] ^= 1
        self.publication.snapshot()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.publication.close()


class Reader:
    """Follows an instance, and says what it has."""

    def __init__(
        self,
        registry: Registry,
        engine: Engine,
        source: str | list[str] = "trainer",
        tensors: Tensors | None = None,
    ) -> None:
        self._registry = registry
        self._engine = engine
        self.source = source
        self.tensors = like(weights()) if tensors is None else tensors
        self.base: tuple[str, ...] | None = None

    def load(self, **more: Any) -> LoadReport:
        report = load(
            self._registry,
            self._engine,
            self.source,
            rank=0,
            tensors=self.tensors,
            options=LoadOptions(base=self.base),
            **more,
        )
        self.base = report.contents
        return report

    def follow(self, wanted: Tensors) -> LoadReport:
        report = self.load()
        assert_same(self.tensors, wanted)
        return report


class Serving(Reader):
    """A reader that serves what it has."""

    def __init__(
        self,
        registry: Registry,
        engine: Engine,
        name: str,
        source: str = "trainer",
        deltas: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(registry, engine, source)
        replica = Replica(name, options=PublishOptions(ttl_s=3.0, deltas=deltas, **options))
        publication = self.load(publish=replica).publication
        assert publication is not None
        self.publication: Publication = publication

    def follow(self, wanted: Tensors, version: int | None = None) -> LoadReport:
        with self.publication.update(version=version):
            return super().follow(wanted)

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.publication.close()


def by_delta(report: LoadReport, versions: int = 1) -> bool:
    """Whether all came by deltas, which are short."""
    return report.read_nbytes == 0 and 0 < report.delta_nbytes < 0.05 * versions * NBYTES


def test_a_reader_behind_a_replica_reads_only_what_has_changed(
    registry: Registry, new_engine: NewEngine
) -> None:
    with (
        Trainer(registry, new_engine()) as trainer,
        Serving(registry, new_engine(), "replica") as replica,
    ):
        assert 0 < replica.publication.deltas_nbytes < 2 * 0.09 * NBYTES
        reader = Reader(registry, new_engine(), "replica")
        assert reader.follow(trainer.tensors).delta_nbytes == 0
        for _ in range(4):
            trainer.step()
            assert by_delta(replica.follow(trainer.tensors))
            assert replica.publication.content == trainer.publication.content
            assert by_delta(reader.follow(trainer.tensors))


def test_three_hops_pass_deltas_on(registry: Registry) -> None:
    with ExitStack() as stack:
        engines = [stack.enter_context(SocketEngine("127.0.0.1")) for _ in range(5)]
        trainer = stack.enter_context(Trainer(registry, engines[0]))
        hops = [
            stack.enter_context(Serving(registry, engine, name, source))
            for engine, name, source in zip(
                engines[1:4], ["one", "two", "three"], ["trainer", "one", "two"], strict=True
            )
        ]
        last = Reader(registry, engines[4], "three")
        last.follow(trainer.tensors)
        for _ in range(3):
            trainer.step()
            for each in [*hops, last]:
                assert by_delta(each.follow(trainer.tensors))


@pytest.mark.parametrize("behind", [1, 2, 3])
@pytest.mark.parametrize("at_once", [False, True])
def test_a_reader_may_have_missed_as_many_versions_as_there_are_deltas(
    registry: Registry, behind: int, at_once: bool
) -> None:
    """A replica that follows each version, or skips those between: it keeps two deltas."""
    engine = InProcessEngine()
    with Trainer(registry, engine) as trainer, Serving(registry, engine, "replica") as replica:
        trainer.step()
        replica.follow(trainer.tensors)
        reader = Reader(registry, engine, "replica")
        reader.follow(trainer.tensors)
        for _ in range(behind):
            trainer.step()
            if not at_once:
                assert by_delta(replica.follow(trainer.tensors))
        if at_once:
            assert by_delta(replica.follow(trainer.tensors), behind)
        report = reader.follow(trainer.tensors)
        if behind <= 2:
            assert by_delta(report, behind)
        else:
            assert (report.delta_nbytes, report.read_nbytes) == (0, NBYTES)


def test_readers_may_go_from_the_trainer_to_a_replica_and_back(registry: Registry) -> None:
    engine = InProcessEngine()
    with Trainer(registry, engine) as trainer, Serving(registry, engine, "replica") as replica:
        reader = Reader(registry, engine, "trainer")
        reader.follow(trainer.tensors)
        for source in ("replica", "trainer", "replica"):
            trainer.step()
            replica.follow(trainer.tensors)
            reader.source = source
            assert by_delta(reader.follow(trainer.tensors))
        trainer.step()
        reader.source = "trainer"
        newest = {name: one.clone() for name, one in trainer.tensors.items()}
        assert by_delta(reader.follow(newest))
        reader.source = "replica"  # which has the version before
        before = {name: one.clone() for name, one in replica.tensors.items()}
        report = reader.follow(before)
        assert (report.delta_nbytes, report.read_nbytes) == (0, NBYTES)


def test_a_replica_of_the_same_version_is_a_source_beside_the_trainer(registry: Registry) -> None:
    """Although it has skipped one, and counts no updates."""
    engine = InProcessEngine()
    with Trainer(registry, engine) as trainer, Serving(registry, engine, "replica") as replica:
        reader = Reader(registry, engine, ["trainer", "replica"])
        reader.follow(trainer.tensors)
        for _ in range(2):
            trainer.step()
        replica.follow(trainer.tensors, version=trainer.publication.version)
        report = reader.follow(trainer.tensors)
        assert by_delta(report, versions=2)
        assert {share.name.split("/")[2] for share in report.shares} == {"trainer", "replica"}


def test_a_replica_that_begins_again_passes_on_what_it_comes_by_then(registry: Registry) -> None:
    engine = InProcessEngine()
    with Trainer(registry, engine) as trainer:
        with Serving(registry, engine, "replica") as replica:
            reader = Reader(registry, engine, "replica")
            reader.follow(trainer.tensors)
            trainer.step()
            replica.follow(trainer.tensors)
            assert by_delta(reader.follow(trainer.tensors))
        trainer.step()
        with Serving(registry, engine, "replica") as replica:  # with nothing in its memory
            assert reader.follow(trainer.tensors).read_nbytes == NBYTES
            trainer.step()
            replica.follow(trainer.tensors)
            assert by_delta(reader.follow(trainer.tensors))
        trainer.step()
        again = replica.load(publish=Replica("replica", options=PublishOptions(deltas=1)))
        assert again.publication is not None
        with again.publication:  # with the version before
            assert by_delta(again)
            assert by_delta(reader.follow(trainer.tensors))


@pytest.mark.parametrize("seed", range(2))
def test_whatever_the_order_of_steps_a_reader_has_what_its_source_has(
    registry: Registry, seed: int
) -> None:
    """Two replicas, one behind the other, follow when they like and begin again at times. Two
    readers change their sources.
    """
    choose = random.Random(seed)
    engine = InProcessEngine()
    reports = []
    with ExitStack() as stack, Trainer(registry, engine, deltas=2) as trainer:
        serving = {"one": "trainer", "two": "one"}
        replicas = {
            name: stack.enter_context(Serving(registry, engine, name, source))
            for name, source in serving.items()
        }
        readers = [Reader(registry, engine) for _ in range(2)]

        def has(name: str) -> Tensors:
            tensors = trainer.tensors if name == "trainer" else replicas[name].tensors
            return {name: one.clone() for name, one in tensors.items()}

        for _ in range(40):
            match choose.randrange(8):
                case 0 | 1 | 2:
                    trainer.step()
                case 3 | 4:
                    replica = replicas[choose.choice(["one", "one", "two"])]
                    assert isinstance(replica.source, str)
                    reports.append(replica.follow(has(replica.source)))
                case 5 if choose.random() < 0.3:
                    name = choose.choice(list(serving))
                    replicas[name].publication.close()
                    replica = Serving(registry, engine, name, serving[name])
                    replicas[name] = stack.enter_context(replica)
                case _:
                    reader = choose.choice(readers)
                    reader.source = choose.choice(["trainer", "one", "two"])
                    reports.append(reader.follow(has(reader.source)))
    ways = {(report.delta_nbytes > 0, report.read_nbytes > 0) for report in reports}
    assert {(True, False), (False, True)} <= ways  # by deltas alone, and without any


@pytest.mark.parametrize("newer", [1, 2, 3])
def test_a_delta_may_be_overwritten_while_it_is_read_from_a_replica(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, newer: int
) -> None:
    engine = InProcessEngine()
    with (
        Trainer(registry, engine) as trainer,
        Serving(registry, engine, "replica", deltas=1) as replica,
    ):
        reader = Reader(registry, engine, "replica")
        reader.follow(trainer.tensors)
        trainer.step()
        replica.follow(trainer.tensors)
        chains = Deltas._chains

        def late(self: Deltas, *args: Any) -> Any:
            found = chains(self, *args)
            monkeypatch.undo()
            for _ in range(newer):
                trainer.step()
                replica.follow(trainer.tensors)
            return found

        monkeypatch.setattr(Deltas, "_chains", late)
        report = reader.load()
        assert_same(reader.tensors, trainer.tensors)
        assert report.retries > 0
        trainer.step()
        replica.follow(trainer.tensors)
        assert by_delta(reader.follow(trainer.tensors))


@pytest.mark.parametrize("place", [0, 20, 40, 5000, -9])
def test_a_delta_of_a_replica_that_is_damaged_does_no_harm(registry: Registry, place: int) -> None:
    engine = InProcessEngine()
    with Trainer(registry, engine) as trainer, Serving(registry, engine, "replica") as replica:
        reader = Reader(registry, engine, "replica")
        reader.follow(trainer.tensors)
        trainer.step()
        replica.follow(trainer.tensors)
        (shelf,) = delta_shelf._SHELVES
        buffer = shelf._buffers[-1]  # the newest
        nbytes = int.from_bytes(bytes(buffer[48:56].tolist()), "little")
        buffer[place if place >= 0 else nbytes + place] ^= 0x5A
        assert reader.follow(trainer.tensors).read_nbytes > 0


def test_nothing_is_passed_on_that_has_not_been_proven(registry: Registry) -> None:
    engine = InProcessEngine()
    with Trainer(registry, engine) as trainer, Serving(registry, engine, "replica") as replica:
        reader = Reader(registry, engine, "replica")
        reader.follow(trainer.tensors)
        trainer.step()
        with replica.publication.update():
            replica.tensors["w1"].zero_()
            report = replica.load()
        assert (report.delta_nbytes > 0, report.read_nbytes) == (True, NBYTES // 4)
        report = reader.follow(trainer.tensors)
        assert (report.delta_nbytes, report.read_nbytes) == (0, NBYTES)


def test_a_replica_that_changes_what_it_has_loaded_offers_no_delta_to_that(
    registry: Registry,
) -> None:
    engine = InProcessEngine()
    with Trainer(registry, engine) as trainer, Serving(registry, engine, "replica") as replica:
        reader = Reader(registry, engine, "replica")
        reader.follow(trainer.tensors)
        trainer.step()
        with replica.publication.update():
            replica.load()
            replica.tensors["w1"] += 1
        report = reader.follow(replica.tensors)
        assert (report.delta_nbytes, report.read_nbytes) == (0, NBYTES)


def test_a_delta_that_does_not_fit_is_not_passed_on(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    engine = InProcessEngine()
    with (
        Trainer(registry, engine, changed=0.1) as trainer,
        Serving(registry, engine, "replica", changed=0.01) as replica,
    ):
        reader = Reader(registry, engine, "replica")
        reader.follow(trainer.tensors)
        for _ in range(2):
            trainer.step(share=0.08)
            assert replica.follow(trainer.tensors).delta_nbytes > 0
            assert reader.follow(trainer.tensors).delta_nbytes == 0
        warnings = [one for one in caplog.records if "does not pass on" in one.getMessage()]
        assert [one.levelname for one in warnings][:1] == ["WARNING"]
        assert "changed" in warnings[0].getMessage()
        trainer.step(share=0.005)
        replica.follow(trainer.tensors)
        assert by_delta(reader.follow(trainer.tensors))


def test_an_update_of_values_begins_without_deltas_and_in_the_version_that_it_says(
    registry: Registry,
) -> None:
    engine = InProcessEngine()
    with Trainer(registry, engine) as trainer, Serving(registry, engine, "replica") as replica:
        reader = Reader(registry, engine, "replica")
        reader.follow(trainer.tensors)
        trainer.step()
        with replica.publication.update({"step": 7}, version=7):
            assert by_delta(replica.load())
        report = reader.follow(trainer.tensors)
        assert (report.version, report.delta_nbytes) == (7, 0)


def test_memory_of_deltas_is_given_back_in_a_pause(registry: Registry) -> None:
    engine = InProcessEngine()
    with Trainer(registry, engine) as trainer, Serving(registry, engine, "replica") as replica:
        reader = Reader(registry, engine, "replica")
        reader.follow(trainer.tensors)
        trainer.step()
        replica.follow(trainer.tensors)
        nbytes = replica.publication.deltas_nbytes
        replica.publication.pause()
        assert replica.publication.deltas_nbytes == 0
        replica.publication.resume()
        assert replica.publication.deltas_nbytes == nbytes
        assert reader.follow(trainer.tensors).delta_nbytes == 0  # they begin with none
        trainer.step()
        replica.follow(trainer.tensors)
        assert by_delta(reader.follow(trainer.tensors))


@pytest.mark.parametrize("ended", [False, True])
def test_the_next_source_is_asked_for_deltas_where_the_first_has_none(
    registry: Registry, ended: bool
) -> None:
    """It has come by no delta; or its process has ended, and etcd does not know it yet."""
    with ExitStack() as stack:
        engines = [stack.enter_context(SocketEngine("127.0.0.1")) for _ in range(3)]
        trainer = stack.enter_context(Trainer(registry, engines[0]))
        reader = Reader(registry, engines[1])
        reader.follow(trainer.tensors)
        trainer.step()
        stack.enter_context(Serving(registry, engines[2], "replica"))
        (record,) = registry.ranks("trainer")
        ticket = registry.pull(record)  # so that the replica is preferred
        assert ticket is not None
        stack.enter_context(ticket)
        if ended:
            engines[2].close()
        report = load(
            registry,
            engines[1],
            MODEL,
            rank=0,
            tensors=reader.tensors,
            options=LoadOptions(base=reader.base),
        )
        assert [share.name.split("/")[2] for share in report.shares] == ["replica", "trainer"]
        assert_same(reader.tensors, trainer.tensors)
        assert by_delta(report)


def test_a_rank_that_still_loads_is_asked_for_no_deltas(registry: Registry) -> None:
    """Its readers take those of a complete rank, from which the table of digests comes as well."""
    with ExitStack() as stack:
        engines = [stack.enter_context(SocketEngine("127.0.0.1")) for _ in range(3)]
        trainer = stack.enter_context(Trainer(registry, engines[0]))
        reader = Reader(registry, engines[1])
        reader.follow(trainer.tensors)
        trainer.step()
        gate = Gate(0.5)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        loading = pool.submit(
            load,
            registry,
            engines[2],
            MODEL,
            rank=0,
            tensors=like(trainer.tensors),
            publish=Replica("replica", options=PublishOptions(deltas=2)),
            options=LoadOptions(progress=gate.see),
        )
        stack.callback(gate.open.set)
        assert gate.reached.wait(60)
        report = load(
            registry,
            engines[1],
            MODEL,
            rank=0,
            tensors=reader.tensors,
            publish="reader",
            options=LoadOptions(base=reader.base),
        )
        gate.open.set()
        for publication in (report.publication, loading.result(60).publication):
            assert publication is not None
            publication.close()
        assert "/engines/replica/0" in [share.name for share in report.shares]
        assert_same(reader.tensors, trainer.tensors)
        assert by_delta(report)


def test_a_relay_that_is_killed_while_its_delta_is_read_costs_bytes_only(
    registry: Registry, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader goes on with the trainer. A relay that takes its place passes deltas on again."""

    def start() -> subprocess.Popen[str]:
        relay = processes.start(
            *("-m", "tests.support.processes.relay", "relay", "trainer", str(COLUMNS)),
            TEST_PROTOCOL="socket",
        )
        assert line_of(relay).startswith("version")
        return relay

    def follow(relay: subprocess.Popen[str]) -> tuple[int, int]:
        assert relay.stdin is not None
        relay.stdin.write("\n")
        relay.stdin.flush()
        _, delta, read = line_of(relay).split()
        return int(delta), int(read)

    with SocketEngine("127.0.0.1") as engine, SocketEngine("127.0.0.1") as reading:
        tensors = {"w": torch.zeros(COLUMNS, COLUMNS, dtype=torch.bfloat16)}
        with Trainer(registry, engine, tensors) as trainer:
            reader = Reader(registry, reading, "relay", like(tensors))
            relay = start()
            reader.follow(tensors)
            trainer.step()
            delta, read = follow(relay)
            assert (delta > 0, read) == (True, 0)
            chains = Deltas._chains

            def kill(self: Deltas, *args: Any) -> Any:
                found = chains(self, *args)
                assert found  # that leads to the new content
                monkeypatch.undo()
                relay.kill()
                relay.wait()
                return found

            monkeypatch.setattr(Deltas, "_chains", kill)
            (record,) = registry.ranks("trainer")
            ticket = registry.pull(record)  # so that the relay is preferred
            assert ticket is not None
            with ticket:
                reader.source = ["relay", "trainer"]
                assert reader.follow(tensors).read_nbytes > 0
            reader.source = "relay"
            relay = start()
            assert reader.follow(tensors).read_nbytes == 0  # it has the same
            trainer.step()
            delta, read = follow(relay)
            assert (delta > 0, read) == (True, 0)
            report = reader.follow(tensors)
            assert (report.delta_nbytes, report.read_nbytes) == (delta, 0)


# -- several ranks

HALF = ROWS // 2
SHAPE = (ROWS, COLUMNS)


def half(tensors: Tensors, rank: int) -> Tensors:
    return {name: one[rank * HALF :][:HALF] for name, one in tensors.items()}


def shards(rank: int) -> dict[str, Shard]:
    return {name: Shard(SHAPE, (rank * HALF, 0)) for name in weights()}


@contextmanager
def two_ranks(
    registry: Registry, engine: Engine, whole: Tensors
) -> Iterator[Callable[[int], None]]:
    """A trainer of two ranks, with half of the rows each; and what makes its next version."""
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                publish(
                    registry,
                    engine,
                    instance="trainer",
                    rank=rank,
                    world_size=2,
                    tensors=half(whole, rank),
                    model=MODEL,
                    shards=shards(rank),
                    options=PublishOptions(ttl_s=3.0, snapshots=Snapshots(count=3, deltas=4)),
                )
            )
            for rank in range(2)
        ]

        def step(seed: int) -> None:
            random = torch.Generator().manual_seed(seed)
            for tensor in whole.values():
                tensor.view(torch.int16)[torch.rand(tensor.shape, generator=random) < 0.02] ^= 1
            for rank in ranks:
                rank.snapshot()

        yield step


def test_each_rank_of_a_replica_passes_on_the_deltas_of_its_part(registry: Registry) -> None:
    whole, engine = weights(), InProcessEngine()
    base: dict[tuple[str, int], tuple[str, ...]] = {}

    def pull(source: str, into: Tensors, rank: int, **more: Any) -> LoadReport:
        report = load(
            registry,
            engine,
            source,
            tensors=into,
            rank=rank,
            shards=shards(rank),
            options=LoadOptions(base=base.get((source, rank))),
            **more,
        )
        base[source, rank] = report.contents
        assert_same(into, half(whole, rank))
        return report

    with two_ranks(registry, engine, whole) as step, ExitStack() as stack:
        copies = [like(half(whole, rank)) for rank in range(2)]
        readers = [like(half(whole, rank)) for rank in range(2)]
        replica = Replica("replica", options=PublishOptions(ttl_s=3.0, deltas=2))
        publications = []
        for rank, copy in enumerate(copies):
            publication = pull("trainer", copy, rank, publish=replica).publication
            assert publication is not None
            publications.append(stack.enter_context(publication))
        for version in range(3):
            for rank in range(2):
                report = pull("replica", readers[rank], rank)
                assert by_delta(report) or not version
            step(version)
            for rank, publication in enumerate(publications):
                with publication.update():
                    assert by_delta(pull("trainer", copies[rank], rank))


@pytest.mark.parametrize("copies", [False, True])
def test_a_replica_of_another_layout_writes_deltas_from_its_own_snapshots(
    registry: Registry, caplog: pytest.LogCaptureFixture, copies: bool
) -> None:
    """And without snapshots it has none, as those that came are not of its tensors."""
    whole, engine = weights(), InProcessEngine()
    of_whole = {name: Shard(SHAPE, (0, 0)) for name in whole}
    base: dict[str, tuple[str, ...]] = {}

    def pull(source: str, into: Tensors) -> LoadReport:
        report = load(
            registry,
            engine,
            source,
            tensors=into,
            shards=of_whole,
            options=LoadOptions(base=base.get(source)),
        )
        base[source] = report.contents
        assert_same(into, whole)
        return report

    with two_ranks(registry, engine, whole) as step:
        ours, theirs = like(whole), like(whole)
        pull("trainer", ours)
        with publish(
            registry,
            engine,
            instance="replica",
            rank=0,
            world_size=1,
            tensors=ours,
            model=MODEL,
            shards=of_whole,
            options=PublishOptions(
                ttl_s=3.0,
                deltas=0 if copies else 2,
                snapshots=Snapshots(deltas=2) if copies else None,
            ),
        ) as publication:
            pull("replica", theirs)
            for seed in range(3):
                step(seed)
                if copies:
                    assert by_delta(pull("trainer", ours))
                    publication.snapshot()
                    assert by_delta(pull("replica", theirs))
                else:
                    with publication.update():
                        assert by_delta(pull("trainer", ours))
                    report = pull("replica", theirs)
                    assert (report.delta_nbytes, report.read_nbytes) == (0, NBYTES)
    assert caplog.text.count("their layout are not those of the source") == (0 if copies else 1)
