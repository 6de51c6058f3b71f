"""Loads of the released version: exactly the bytes that all ranks held when it was released, while
the ranks go on. Real etcd, real ranks, some in processes that are killed.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from engine_loader import (
    Cancelled,
    Engine,
    EngineReader,
    InProcessEngine,
    LoadOptions,
    NoFreeSnapshot,
    Publication,
    PublishOptions,
    Shard,
    Snapshots,
    load,
    load_full,
    load_instance,
    load_module,
    publish,
    read_catalogue,
)
from engine_loader.errors import LoaderError, VersionUnavailable
from engine_registry import RankLost, Registry, VersionReleased, failpoints
from engine_registry.errors import EtcdUnavailable, ReleaseIncomplete
from engine_registry.etcd.local import LocalEtcd
from engine_registry.schema import release as release_format
from engine_registry.schema.keys import record_key, release_key
from tests.integration.conftest import Processes, events_until, line_of
from tests.support.launches import origins, the_origin
from tests.support.processes.trainer import MODEL, WORDS, shards_of, tensors_of
from tests.support.transfer import engine_at
from tests.support.waiting import wait_until

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
RELEASED = LoadOptions(version="released")


class Trainer:
    """Two ranks in this process, each with snapshots of its half of a tensor."""

    def __init__(
        self,
        registry: Registry,
        new_engine: Callable[[], Engine],
        stack: ExitStack,
        count: int = 3,
        retain_s: float = 0.2,
    ) -> None:
        self.tensors = [tensors_of(0, rank) for rank in range(2)]
        snapshots = Snapshots(count=count, retain_s=retain_s)
        self.ranks: list[Publication] = [
            stack.enter_context(
                publish(
                    registry,
                    new_engine(),
                    instance="t",
                    rank=rank,
                    world_size=2,
                    tensors=self.tensors[rank],
                    shards=shards_of(rank, 2),
                    model=MODEL,
                    options=PublishOptions(snapshots=snapshots, ttl_s=10.0),
                )
            )
            for rank in range(2)
        ]

    def step(self, rank: int) -> int:
        """The next version of one rank."""
        version = self.ranks[rank].version + 1
        self.tensors[rank]["w"].copy_(tensors_of(version, rank)["w"])
        return self.ranks[rank].snapshot()

    def steps(self) -> int:
        """The next version of both."""
        made = {self.step(rank) for rank in range(2)}
        return made.pop()


@pytest.fixture
def engine() -> Iterator[Engine]:
    with InProcessEngine() as engine:
        yield engine


@pytest.fixture
def trainer(registry: Registry, stack: ExitStack) -> Trainer:
    return Trainer(registry, lambda: stack.enter_context(InProcessEngine()), stack)


def versions_in(whole: torch.Tensor) -> set[int]:
    """Of the words of both ranks, each of which is at its place."""
    found = set()
    for rank in range(2):
        half = whole[rank * WORDS : (rank + 1) * WORDS]
        places = torch.arange(rank * WORDS, (rank + 1) * WORDS)
        found.add(the_origin(origins(half, places)).version)
    return found


def loaded(
    registry: Registry,
    engine: Engine,
    source: Any = "t",
    timeout_s: float = 20.0,
    options: LoadOptions = RELEASED,
) -> int:
    """The version of the whole tensor, as its words say."""
    whole = {"w": torch.zeros(2 * WORDS, dtype=torch.int64)}
    report = load(
        registry,
        engine,
        source,
        tensors=whole,
        shards={"w": Shard((2 * WORDS,), (0,))},
        timeout_s=timeout_s,
        options=options,
    )
    assert versions_in(whole["w"]) == {report.version}
    return report.version


# -- what is loaded
# --------------------------------------------------------------------------------------------------


def test_a_load_brings_what_is_released_whatever_the_ranks_have_by_then(
    registry: Registry, new_engine: Callable[[], Engine], stack: ExitStack
) -> None:
    trainer = Trainer(registry, new_engine, stack)
    engine = new_engine()
    with pytest.raises(VersionUnavailable, match="no version of t is released"):
        loaded(registry, engine, timeout_s=0.0)
    trainer.ranks[0].release()
    for version in range(1, 5):
        trainer.step(0)
        assert loaded(registry, engine) == version - 1
        trainer.step(1)
        assert loaded(registry, engine) == loaded(registry, engine, MODEL) == version - 1
        assert trainer.ranks[version % 2].release().version == version
        assert loaded(registry, engine) == loaded(registry, engine, ["u", "t"]) == version


def test_every_call_that_loads_takes_the_released_version(
    registry: Registry, trainer: Trainer, engine: Engine
) -> None:
    trainer.ranks[0].release()
    trainer.steps()
    whole = torch.zeros(2 * WORDS, dtype=torch.int64)
    catalogue = read_catalogue(registry, engine, "t", options=RELEASED)
    (tensors,) = catalogue.by_group()
    assert catalogue.version == 0
    assert versions_in(tensors["w"]) == {0}
    assert load_full(registry, engine, "t", options=RELEASED).version == 0
    halves = {rank: {"w": torch.zeros(WORDS, dtype=torch.int64)} for rank in range(2)}
    shards = {rank: shards_of(rank, 2) for rank in range(2)}
    load_instance(registry, engine, "t", tensors=halves, shards=shards, options=RELEASED)
    assert versions_in(torch.cat([halves[0]["w"], halves[1]["w"]])) == {0}
    module = nn.Module()
    module.register_buffer("w", whole)
    load_module(registry, engine, "t", module, options=RELEASED)
    assert versions_in(whole) == {0}
    reader = EngineReader(registry, engine, "t", options=RELEASED)
    dcp_load({"w": whole.zero_()}, storage_reader=reader, no_dist=True)
    assert versions_in(whole) == {0}
    assert reader.reports[0].version == 0
    # contents that another process has found decide
    contents = registry.instance("t").contents
    chosen = LoadOptions(version="released", contents=contents)
    assert loaded(registry, engine, options=chosen) == 1


def test_a_load_waits_until_a_version_is_released(
    registry: Registry, trainer: Trainer, engine: Engine
) -> None:
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(loaded, registry, engine, source, 60.0) for source in ("t", MODEL)]
        trainer.ranks[1].release()
        assert [each.result() for each in waiting] == [0, 0]


def test_a_wait_for_a_release_can_be_cancelled(
    registry: Registry, trainer: Trainer, engine: Engine
) -> None:
    cancel = threading.Event()
    options = LoadOptions(version="released", cancel=cancel)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(loaded, registry, engine, "t", 600.0, options)
        cancel.set()
        with pytest.raises(Cancelled):
            waiting.result()
    assert trainer.ranks[0].version == 0


def test_a_released_version_that_is_gone_is_an_error(
    registry: Registry, engine: Engine, stack: ExitStack
) -> None:
    tensors = tensors_of(0, 0)
    publication = stack.enter_context(
        publish(
            registry,
            engine,
            instance="t",
            rank=0,
            world_size=1,
            tensors=tensors,
            model=MODEL,
        )
    )
    publication.release()
    with publication.update():
        pass
    with pytest.raises(VersionUnavailable):
        load(
            registry,
            engine,
            "t",
            rank=0,
            tensors={"w": torch.zeros(WORDS, dtype=torch.int64)},
            options=RELEASED,
            timeout_s=0.0,
        )


def test_a_load_whose_release_is_overtaken_loads_the_next_one(
    registry: Registry, trainer: Trainer, engine: Engine
) -> None:
    """Between its look at the release and its look at the ranks."""
    trainer.ranks[0].release()
    trainer.steps()
    look = registry.ready

    def overtaken(*args: Any, **options: Any) -> Any:
        registry.ready = look  # type: ignore[method-assign]
        trainer.ranks[0].release()
        for _ in range(3):
            trainer.steps()
        trainer.ranks[0].release()
        return look(*args, **options)

    registry.ready = overtaken  # type: ignore[method-assign]
    assert loaded(registry, engine) == 4


def test_of_an_instance_with_very_many_ranks_the_records_say_what_is_released(
    registry: Registry, trainer: Trainer, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release_format, "MAX_CONTENTS", 1)
    made = trainer.ranks[0].release()
    item = registry._etcd.get(release_key("t"))
    assert item is not None
    assert b"contents" not in item.value
    trainer.steps()
    assert registry.released("t") == made
    assert loaded(registry, engine) == 0
    for rank in range(2):
        trainer.ranks[rank]._served.registration.update(retained=[])
    with pytest.raises(VersionUnavailable, match="not all of its ranks hold it any more"):
        loaded(registry, engine, timeout_s=0.0)


# -- who keeps it back
# --------------------------------------------------------------------------------------------------


def test_a_rank_that_has_not_made_its_snapshot_keeps_the_release_back(
    registry: Registry, trainer: Trainer
) -> None:
    trainer.step(0)
    with pytest.raises(ReleaseIncomplete) as caught:
        trainer.ranks[0].release(timeout_s=0.0)
    assert caught.value.details["ranks"] == {1: "version 0"}
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(each.release, 1, timeout_s=60.0) for each in trainer.ranks]
        trainer.step(1)
        assert len({each.result() for each in made}) == 1


def test_a_release_follows_a_snapshot_that_is_still_being_revealed(
    registry: Registry, trainer: Trainer
) -> None:
    for rank in trainer.ranks:
        rank.snapshot(wait=False)
    assert trainer.ranks[0].release().version == 1


def test_a_closed_publication_releases_nothing(trainer: Trainer) -> None:
    trainer.ranks[0].close()
    for version in (None, 0):
        with pytest.raises(LoaderError, match="is closed"):
            trainer.ranks[0].release(version)
    with pytest.raises(ReleaseIncomplete, match=r"rank 0 \(not registered\)"):
        trainer.ranks[1].release(timeout_s=0.0)


def start(processes: Processes, rank: int) -> subprocess.Popen[str]:
    process = processes.start("-m", "tests.support.processes.trainer", "t", str(rank), "2")
    assert line_of(process) == "version 0\n"
    return process


def say(process: subprocess.Popen[str], command: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{command}\n")
    process.stdin.flush()


def ask(process: subprocess.Popen[str], command: str) -> str:
    say(process, command)
    return line_of(process).strip()


def test_a_rank_that_is_killed_between_its_snapshot_and_the_release_keeps_it_back(
    registry: Registry, processes: Processes
) -> None:
    first, second = (start(processes, rank) for rank in range(2))
    with engine_at("127.0.0.1") as engine, registry.watch("t") as watch:
        assert ask(first, "release 0") == "released 0"
        assert {ask(each, "snapshot") for each in (first, second)} == {"version 1"}
        second.kill()
        second.wait()
        wait_until(lambda: registry._etcd.get(record_key("t", 1)) is None)
        with pytest.raises(ReleaseIncomplete, match=r"rank 1 \(not registered\)"):
            registry.release("t", 1)
        say(first, "release 1")
        again = start(processes, 1)
        assert ask(again, "snapshot") == "version 1"
        assert line_of(first) == "released 1\n"
        assert loaded(registry, engine) == 1
        first.kill()
        first.wait()
        wait_until(lambda: registry.released("t") is None)
        last = events_until(
            watch, lambda event: isinstance(event, RankLost) and not event.record.rank
        )
        told = [event.version for event in last if isinstance(event, VersionReleased)]
        assert told == [0, 1]


# -- snapshots respect it
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_a_snapshot_after_each_release_finds_room_in_any_number_of_snapshots(
    registry: Registry, engine: Engine, stack: ExitStack, count: int
) -> None:
    trainer = Trainer(registry, lambda: stack.enter_context(InProcessEngine()), stack, count)
    for version in range(1, 5):
        assert trainer.steps() == version
        trainer.ranks[0].release()
        assert loaded(registry, engine) == version


def test_the_released_version_stays_while_others_go(
    registry: Registry, trainer: Trainer, engine: Engine
) -> None:
    trainer.ranks[0].release()
    for version in range(1, 6):
        trainer.steps()
        assert loaded(registry, engine) == 0
        assert trainer.ranks[0].retained == ((0,) if version == 1 else (version - 1, 0)[-2:])
    trainer.ranks[0].release()
    trainer.steps()
    assert 0 not in trainer.ranks[0].retained


def test_a_snapshot_that_would_overwrite_the_released_version_is_refused(
    registry: Registry, engine: Engine, stack: ExitStack
) -> None:
    trainer = Trainer(registry, lambda: stack.enter_context(InProcessEngine()), stack, count=2)
    trainer.ranks[0].release()
    trainer.steps()
    with pytest.raises(NoFreeSnapshot, match="version 0 of t is released, so it stays") as caught:
        trainer.steps()
    assert caught.value.details == {"version": 0}
    assert (trainer.ranks[0].version, trainer.ranks[0].retained) == (1, (0,))
    assert loaded(registry, engine) == 0
    trainer.ranks[0].release()
    assert trainer.steps() == 2


def test_a_snapshot_waits_for_the_release_that_frees_its_place(
    registry: Registry, stack: ExitStack
) -> None:
    tensors = tensors_of(0, 0)
    publication = stack.enter_context(
        publish(
            registry,
            stack.enter_context(InProcessEngine()),
            instance="t",
            rank=0,
            world_size=1,
            tensors=tensors,
            model=MODEL,
            options=PublishOptions(snapshots=Snapshots(retain_s=60.0)),
        )
    )
    publication.release()
    publication.snapshot()
    with ThreadPoolExecutor(1) as pool:
        next_one = pool.submit(publication.snapshot)
        publication.release(1)
        assert next_one.result() == 2


@pytest.mark.parametrize("rolls_back", [True, False])
def test_of_a_rollback_and_a_snapshot_that_wants_its_place_one_succeeds(
    registry: Registry, engine: Engine, trainer: Trainer, rolls_back: bool
) -> None:
    """A rollback after the snapshot's look at the release: before the record says that the version
    is not there any more, or after that.
    """
    trainer.steps()
    trainer.ranks[0].release()
    trainer.steps()
    assert trainer.ranks[0].retained == (1, 0)

    def roll_back() -> None:
        failpoints.ACTIONS.clear()
        if rolls_back:
            trainer.ranks[1].rollback(0)
            return
        with pytest.raises(ReleaseIncomplete, match=r"rank 0 \(versions 1 and 2\)"):
            trainer.ranks[1].rollback(0, timeout_s=0.0)

    point = "snapshot.slot_chosen" if rolls_back else "snapshot.slot_withdrawn"
    failpoints.ACTIONS[point] = roll_back
    try:
        trainer.step(0)
    finally:
        failpoints.ACTIONS.clear()
    assert trainer.ranks[0].retained == ((2, 0) if rolls_back else (2, 1))
    assert loaded(registry, engine) == (0 if rolls_back else 1)


def test_a_snapshot_does_not_wait_for_an_etcd_that_is_away(own_etcd: LocalEtcd) -> None:
    with (
        ExitStack() as stack,
        Registry.connect(own_etcd.endpoint, timeout_s=2.0) as registry,
        InProcessEngine() as engine,
    ):
        trainer = Trainer(registry, lambda: stack.enter_context(InProcessEngine()), stack, count=2)
        trainer.ranks[0].release()
        trainer.steps()
        own_etcd.kill()
        trainer.steps()
        with pytest.raises(EtcdUnavailable):
            trainer.ranks[0].release(timeout_s=0.0)
        own_etcd.start()
        assert trainer.ranks[0].release(timeout_s=60.0).version == 2
        assert loaded(registry, engine) == 2


def test_a_release_comes_back_with_its_rank_after_the_lease_was_lost(
    registry: Registry, engine: Engine, trainer: Trainer
) -> None:
    made = trainer.ranks[1].release()
    with registry.watch("t") as watch:
        events_until(watch, lambda event: isinstance(event, VersionReleased))
        item = registry._etcd.get(release_key("t"))
        assert item is not None
        registry._etcd.revoke(item.lease_id)
        wait_until(lambda: registry.released("t") == made)
        assert loaded(registry, engine) == 0
        trainer.steps()
        newer = trainer.ranks[0].release()
        told = events_until(watch, lambda event: isinstance(event, VersionReleased))
        assert told[-1] == VersionReleased(newer, made)


@pytest.mark.parametrize("count", [2, 3])
def test_readers_of_the_released_version_never_see_a_mix_while_the_ranks_go_on(
    registry: Registry, stack: ExitStack, count: int
) -> None:
    """The ranks step together, as the collectives of a step make them, one of them releases, and
    two readers look all the time.
    """
    steps = 25
    trainer = Trainer(registry, lambda: stack.enter_context(InProcessEngine()), stack, count, 60.0)
    trainer.ranks[0].release()
    ended, together = threading.Event(), threading.Barrier(2)

    def train(rank: int) -> None:
        for version in range(1, steps + 1):
            together.wait()
            trainer.step(rank)
            if rank == 0:
                trainer.ranks[0].release(version)

    def read() -> list[int]:
        versions = []
        with InProcessEngine() as engine:
            while not ended.is_set():
                versions.append(loaded(registry, engine))
        return versions

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for each in [pool.submit(train, rank) for rank in range(2)]:
                each.result()
        finally:
            ended.set()
        for reader in readers:
            versions = reader.result()
            assert versions
            assert versions == sorted(versions)
    with InProcessEngine() as engine:
        assert loaded(registry, engine) == steps
