"""Publications that give their memory back for a while, and offer the same or another again: real
etcd, readers in this process and in others.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from engine_loader import (
    Engine,
    InProcessEngine,
    LoaderError,
    LoadOptions,
    Pace,
    Progress,
    Publication,
    PublishOptions,
    Shard,
    load,
    publish,
    publish_state_dict,
)
from engine_loader.errors import DigestMismatch, MemoryInUse, TensorsUnusable
from engine_loader.tensors.uses import USES
from engine_registry import (
    InstanceDegraded,
    InstanceReady,
    ModelIdentity,
    RankLost,
    RankRecord,
    RankState,
    Registry,
    failpoints,
)
from engine_registry.errors import Evicted, InstanceIncomplete
from engine_registry.etcd.local import LocalEtcd
from tests.integration.conftest import Processes, events_until, line_of
from tests.support.keepers import pid_of_keeper
from tests.support.launches import Origin, origins, the_origin, words
from tests.support.waiting import wait_until

COUNT = 4096
MODEL = ModelIdentity("m")
Tensors = dict[str, torch.Tensor]
A, B = Origin(1), Origin(2)


@contextmanager
def published(
    registry: Registry, engine: Engine, tensors: Tensors, **options: object
) -> Iterator[Publication]:
    with publish(
        registry,
        engine,
        instance="a",
        rank=0,
        world_size=1,
        tensors=tensors,
        model=MODEL,
        options=PublishOptions(**{"ttl_s": 3.0, **options}),  # type: ignore[arg-type]
    ) as publication:
        yield publication


def loaded(registry: Registry, engine: Engine, **options: object) -> tuple[Origin, int, str]:
    found = {"w": torch.zeros(COUNT, dtype=torch.int64)}
    report = load(
        registry,
        engine,
        "a",
        rank=0,
        tensors=found,
        timeout_s=0.0,
        options=LoadOptions(**options),  # type: ignore[arg-type]
    )
    return the_origin(origins(found["w"])), report.version, report.content


def test_a_paused_rank_cannot_be_read_and_then_serves_the_same_version_and_content(
    registry: Registry, new_engine: Callable[[], Engine]
) -> None:
    tensors = {"w": words(A, COUNT)}
    engine, reader = new_engine(), new_engine()
    with published(registry, engine, tensors, version=7) as publication:
        before = loaded(registry, reader)
        for _ in range(3):
            publication.pause()
            assert publication.paused
            (record,) = registry.ranks("a")
            assert record.state is RankState.UPDATING
            with pytest.raises(InstanceIncomplete, match="rank 0 updating"):
                loaded(registry, reader)
            publication.resume()
            assert loaded(registry, reader) == before == (A, 7, publication.content)


@pytest.mark.parametrize("pause", [True, False])
def test_other_tensors_take_the_place_of_a_rank_s_as_the_next_version(
    registry: Registry, new_engine: Callable[[], Engine], pause: bool
) -> None:
    engine, reader = new_engine(), new_engine()
    with published(registry, engine, {"w": words(A, COUNT)}) as publication:
        before = loaded(registry, reader)
        if pause:
            publication.pause()
        publication.replace({"w": words(B, COUNT)})
        after = loaded(registry, reader)
        assert after == (B, 1, publication.content)
        assert after[2] != before[2]
        (record,) = registry.ranks("a")
        assert registry.manifest(record).tensors[0].addr != 0
        publication.replace({"other": torch.zeros(3), "w": words(A, COUNT)})
        assert sorted(entry.name for entry in registry.manifest(publication.record).tensors) == [
            "other",
            "w",
        ]
        with publication.update():
            pass
        assert publication.version == 3
    assert registry.ranks("a") == ()


def test_nothing_keeps_the_memory_of_a_paused_rank(registry: Registry) -> None:
    engine = InProcessEngine()
    tensors = {"w": words(A, COUNT), "view": words(A, COUNT)[3:7]}
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors.values()]
    runs = [(tensor.data_ptr(), tensor.data_ptr() + 8) for tensor in tensors.values()]
    with published(registry, engine, tensors, digests=True) as publication:
        publication.pause()
        assert len(engine._served) == 2  # the header, and the table of digests
        with USES.fill("somebody", runs):
            pass
        tensors.clear()
        gc.collect()
        assert all(storage.expired() for storage in storages)
        with pytest.raises(TensorsUnusable, match="2 of 2 tensors are gone: w: nobody has kept it"):
            publication.resume()
        assert publication.paused
        publication.replace({"w": words(B, COUNT)})
        assert loaded(registry, InProcessEngine())[0] == B
    assert not list(engine._served)


def test_a_tensor_that_only_the_publication_had_is_resumed_as_long_as_its_memory_is_there(
    registry: Registry,
) -> None:
    """As those of a module's state dict, which are views of its parameters."""
    module = torch.nn.Linear(8, 8)
    with publish_state_dict(
        registry,
        InProcessEngine(),
        {"step": 3, **module.state_dict()},
        instance="a",
        rank=0,
        world_size=1,
        model=MODEL,
    ) as publication:
        manifest = registry.manifest(publication.record)
        publication.pause()
        gc.collect()
        publication.resume()
        assert registry.manifest(publication.record) == manifest
        assert manifest.values
        publication.pause()
        module.weight.data = torch.zeros(8, 8)
        with pytest.raises(TensorsUnusable, match="weight: nobody has kept it"):
            publication.resume()


def test_a_tensor_that_was_given_other_memory_meanwhile_is_refused_by_name(
    registry: Registry,
) -> None:
    tensors = {"w": words(A, COUNT), "v": words(A, 7)}
    with published(registry, InProcessEngine(), tensors) as publication:
        publication.pause()
        tensors["w"].data = words(A, COUNT)
        with pytest.raises(
            TensorsUnusable, match="1 tensors have other memory than before the pause: w"
        ):
            publication.resume()
        publication.replace(tensors)
        assert publication.version == 1


def test_digests_prove_that_the_bytes_are_those_before_the_pause(registry: Registry) -> None:
    tensors = {"w": words(A, COUNT)}
    with published(registry, InProcessEngine(), tensors, digests=True) as publication:
        before = loaded(registry, InProcessEngine(), verify="digest")
        publication.pause()
        tensors["w"].zero_()
        with pytest.raises(DigestMismatch, match=r"1 tensors of a/0 have other bytes .*: w"):
            publication.resume()
        assert publication.paused
        tensors["w"].copy_(words(A, COUNT))
        publication.resume()
        assert loaded(registry, InProcessEngine(), verify="digest") == before


def test_weights_that_are_in_doubt_are_replaced_and_not_resumed(registry: Registry) -> None:
    tensors = {"w": words(A, COUNT)}
    with published(registry, InProcessEngine(), tensors) as publication:
        with pytest.raises(ZeroDivisionError), publication.update():
            raise ZeroDivisionError
        publication.pause()
        with pytest.raises(LoaderError, match="are in doubt, because their last update failed"):
            publication.resume()
        publication.replace(tensors)
        assert loaded(registry, InProcessEngine())[:2] == (A, 1)


def test_what_makes_no_sense_is_refused_by_name(registry: Registry) -> None:
    tensors = {"w": words(A, COUNT)}
    with published(registry, InProcessEngine(), tensors) as publication:
        with pytest.raises(LoaderError, match="is not paused, so there is nothing to resume"):
            publication.resume()
        with publication.update():
            for change in (publication.pause, publication.resume):
                with pytest.raises(LoaderError, match="is being updated already"):
                    change()
            with pytest.raises(LoaderError, match="is being updated already"):
                publication.replace(tensors)
        with pytest.raises(TensorsUnusable, match="w: "):
            publication.replace({"w": torch.zeros(4, 4)[:, 1]})
        assert not publication.paused
        assert loaded(registry, InProcessEngine())[1] == 1
        publication.pause()
        with pytest.raises(LoaderError, match="is paused, so there is nothing to pause"):
            publication.pause()
        with (
            pytest.raises(LoaderError, match="is paused, so there is nothing to update"),
            publication.update(),
        ):
            pass
    for call in (publication.pause, publication.resume, lambda: publication.replace(tensors)):
        with pytest.raises(LoaderError, match="is closed, so there is nothing to"):
            call()


def test_memory_that_a_load_fills_is_not_resumed(registry: Registry) -> None:
    tensors = {"w": words(A, COUNT)}
    at = tensors["w"].data_ptr()
    with published(registry, InProcessEngine(), tensors) as publication:
        publication.pause()
        with USES.fill("a load", [(at, at + 8)]), pytest.raises(MemoryInUse, match="a load fills"):
            publication.resume()
        publication.resume()
        assert loaded(registry, InProcessEngine())[0] == A


@pytest.mark.parametrize("paused", [True, False])
def test_a_rank_that_was_evicted_does_not_come_back(registry: Registry, paused: bool) -> None:
    tensors = {"w": words(A, COUNT)}
    engine = InProcessEngine()
    with published(registry, engine, tensors) as publication:
        if paused:
            publication.pause()
        (record,) = registry.ranks("a")
        assert registry.evict(record)
        for _ in range(2):
            with pytest.raises(Evicted):
                publication.resume() if paused else publication.replace(tensors)
        assert registry.ranks("a") == ()
        assert len(engine._served) == (1 if publication.paused else 2)
    assert not list(engine._served)


def test_an_eviction_that_nobody_has_noticed_yet_is_not_undone(registry: Registry) -> None:
    """It comes between the look whether the rank is registered and the offer."""
    tensors = {"w": words(A, COUNT)}
    with published(registry, InProcessEngine(), tensors) as publication:
        publication.pause()
        (record,) = registry.ranks("a")
        failpoints.ACTIONS["publication.before_offer"] = lambda: registry.evict(record)
        try:
            with pytest.raises(Evicted):
                publication.resume()
        finally:
            del failpoints.ACTIONS["publication.before_offer"]
        assert registry.ranks("a") == ()
        assert publication.paused


def test_it_is_closed_while_it_is_being_resumed(registry: Registry) -> None:
    engine = InProcessEngine()
    with published(registry, engine, {"w": words(A, COUNT)}) as publication:
        publication.pause()
        failpoints.ACTIONS["publication.before_offer"] = publication.close
        try:
            with pytest.raises(Exception, match="closed"):
                publication.resume()
        finally:
            del failpoints.ACTIONS["publication.before_offer"]
        assert not list(engine._served)
        assert registry.ranks("a") == ()


def test_watchers_see_a_pause_as_an_update_and_lose_no_rank(registry: Registry) -> None:
    with (
        published(registry, InProcessEngine(), {"w": words(A, COUNT)}) as publication,
        registry.watch("a") as watch,
    ):
        events_until(watch, lambda event: isinstance(event, InstanceReady))
        publication.pause()
        seen = events_until(watch, lambda event: isinstance(event, InstanceDegraded))
        publication.resume()
        seen += events_until(watch, lambda event: isinstance(event, InstanceReady))
        publication.replace({"w": words(B, COUNT)})
        seen += events_until(watch, lambda event: isinstance(event, InstanceReady))
    assert not [event for event in seen if isinstance(event, RankLost)]


def test_a_shard_is_resumed_as_a_shard(registry: Registry) -> None:
    whole = words(A, 2 * COUNT)
    halves = [whole[:COUNT].clone(), whole[COUNT:].clone()]
    publications = [
        publish(
            registry,
            InProcessEngine(),
            instance="a",
            rank=rank,
            world_size=2,
            tensors={"w": halves[rank]},
            shards={"w": Shard((2 * COUNT,), (rank * COUNT,))},
            model=MODEL,
        )
        for rank in range(2)
    ]
    for publication in publications:
        publication.pause()
        publication.resume()
    found = {"w": torch.zeros(2 * COUNT, dtype=torch.int64)}
    load(
        registry,
        InProcessEngine(),
        "a",
        tensors=found,
        shards={"w": Shard((2 * COUNT,), (0,))},
        timeout_s=5.0,
    )
    assert the_origin(origins(found["w"])) == A
    for publication in publications:
        publication.close()


# -- in other processes
# --------------------------------------------------------------------------------------------------

NBYTES = 16 << 20


def is_read(registry: Registry, record: RankRecord) -> bool:
    return bool(registry.pulls(record))


def test_a_reader_that_loads_in_a_loop_gets_whole_versions_of_a_rank_that_sleeps_and_moves(
    registry: Registry, processes: Processes
) -> None:
    """Over Mooncake. What is paused is written over at once, and what is replaced is unmapped."""
    sleeper = processes.start("-m", "tests.support.processes.sleeper", "a", str(NBYTES))
    assert line_of(sleeper) == "published\n"
    follower = processes.start("-m", "tests.support.processes.follower", "a", str(NBYTES))
    lines = [line_of(follower)]
    todo = ["pause", "resume", "replace", "pause", "replace", "pause", "resume"] * 6
    for number, one in enumerate(todo):
        (record,) = registry.ranks("a")
        if number % 2 and record.state is RankState.READY:  # in the middle of a load
            wait_until(partial(is_read, registry, record))
        assert sleeper.stdin is not None
        sleeper.stdin.write(f"{one}\n")
        sleeper.stdin.flush()
        assert line_of(sleeper) == f"{one}\n"
    versions = len([one for one in todo if one == "replace"])
    while lines[-1] != f"loaded {versions}\n":
        lines.append(line_of(follower))
    # a load that every one of its tries meets a change in
    assert {line.split()[0] for line in lines} <= {"loaded", "TornRead"}
    assert sleeper.poll() is None


# -- faults
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expired", [False, True])
@pytest.mark.parametrize("away", ["from the start", "at the end"])
def test_a_rank_sleeps_moves_and_wakes_while_etcd_is_away(
    own_etcd: LocalEtcd, away: str, expired: bool
) -> None:
    tensors = {"w": words(A, COUNT)}
    with (
        Registry.connect(own_etcd.endpoint, timeout_s=10) as registry,
        published(registry, InProcessEngine(), tensors) as publication,
    ):
        if away == "at the end":
            publication.pause()
        own_etcd.kill()
        if away == "from the start":
            publication.pause()
        publication.resume()
        publication.replace({"w": words(B, COUNT)})
        content = publication.content
        if expired:
            own_etcd.wipe()
        own_etcd.start()
        wait_until(lambda: [one.version for one in registry.ranks("a")] == [1])
        assert loaded(registry, InProcessEngine()) == (B, 1, content)
        publication.close()
        assert registry.ranks("a") == ()


@pytest.mark.parametrize("point", ["before", "after"])
def test_the_keeper_dies_while_a_rank_is_resumed(registry: Registry, point: str) -> None:
    with published(registry, InProcessEngine(), {"w": words(A, COUNT)}) as publication:
        for change in (publication.resume, lambda: publication.replace({"w": words(A, COUNT)})):
            publication.pause()
            keeper = pid_of_keeper(publication.registration)
            if point == "before":
                os.kill(keeper, signal.SIGKILL)
            change()
            if point == "after":
                os.kill(keeper, signal.SIGKILL)
            wait_until(lambda: publication.registration.keeper_pid not in (None, keeper))  # noqa: B023
            record = publication.record
            wait_until(lambda: registry.ranks("a") == (record,))  # noqa: B023
            assert loaded(registry, InProcessEngine())[0] == A
        assert publication.version == 1
    assert registry.ranks("a") == ()


def test_a_rank_that_is_killed_in_its_sleep_is_lost_at_once(
    registry: Registry, processes: Processes
) -> None:
    sleeper = processes.start("-m", "tests.support.processes.sleeper", "a", str(NBYTES))
    assert line_of(sleeper) == "published\n"
    assert sleeper.stdin is not None
    sleeper.stdin.write("pause\n")
    sleeper.stdin.flush()
    assert line_of(sleeper) == "pause\n"
    with registry.watch("a") as watch:
        events_until(watch, lambda event: isinstance(event, InstanceDegraded))
        sleeper.kill()
        events = events_until(watch, lambda event: isinstance(event, RankLost))
    assert isinstance(events[-1], RankLost)
    assert events[-1].reason == "process ended"


@pytest.mark.parametrize("drain", [True, False])
def test_a_paused_rank_leaves_as_any_other(registry: Registry, drain: bool) -> None:
    engine = InProcessEngine()
    with published(registry, engine, {"w": words(A, COUNT)}, digests=True) as publication:
        publication.pause()
        if drain:
            assert publication.drain(1.0)
        publication.close()
        assert not list(engine._served)
        assert registry.ranks("a") == ()


def test_a_load_under_way_goes_on_with_another_source_when_its_own_is_paused(
    registry: Registry,
) -> None:
    """Both have the same content, by their digests. What had come stays."""
    tensors = [{"w": words(A, COUNT)} for _ in range(2)]
    with ExitStack() as stack:
        first, second = [
            stack.enter_context(
                publish(
                    registry,
                    InProcessEngine(),
                    instance=name,
                    rank=0,
                    world_size=1,
                    tensors=tensors[number],
                    model=MODEL,
                    options=PublishOptions(digests=True, ttl_s=3.0),
                )
            )
            for number, name in enumerate(("a", "b"))
        ]

        def pause_at_half(progress: Progress) -> None:
            if progress.nbytes * 2 >= progress.total_nbytes and not first.paused:
                first.pause()
                tensors[0]["w"].zero_()

        found = {"w": torch.zeros(COUNT, dtype=torch.int64)}
        report = load(
            registry,
            InProcessEngine(),
            ["a", "b"],
            rank=0,
            tensors=found,
            timeout_s=5.0,
            options=LoadOptions(pace=Pace(4096, 1), progress=pause_at_half),
        )
        assert the_origin(origins(found["w"])) == A
        assert report.content == second.content
        assert first.paused
