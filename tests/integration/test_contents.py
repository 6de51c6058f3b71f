"""One content or none: sources that start again under the same version, are evicted, or hold
something else of the same name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine_loader import (
    InProcessEngine,
    LoadOptions,
    Pace,
    Progress,
    Publication,
    PublishOptions,
    Replica,
    Shard,
    load,
    load_full,
    load_or_seed,
    open_engine,
    publish,
)
from engine_loader.errors import SourceEvicted, SourceLost
from engine_loader.files.whole_files import WholeFiles
from engine_loader.publishing.header import Header
from engine_registry import ModelIdentity, RankState, Registry, failpoints
from engine_registry.errors import InvalidField
from tests.integration.conftest import Processes, line_of
from tests.integration.test_chain import Members
from tests.support.launches import Origin, origins, origins_of_bytes, the_origin, words
from tests.support.options import for_publish
from tests.support.processes.source import empty
from tests.support.waiting import wait_until

COUNT = 1 << 19  # words: 4 MiB
PACE = Pace(64 << 10, 2, check_s=0.01)
MODEL = ModelIdentity("m")
A, B = Origin(launch=1), Origin(launch=2)

Offer = Callable[..., Publication]


@pytest.fixture
def offer(registry: Registry) -> Iterator[Offer]:
    """Publishes the words of an origin, with a separate engine."""
    with ExitStack() as stack:

        def offer(instance: str, origin: Origin, **options: Any) -> Publication:
            given = {
                "rank": 0,
                "world_size": 1,
                "model": MODEL,
                "tensors": {"w": words(origin, COUNT)},
                "ttl_s": 2.0,
                **options,
            }
            return stack.enter_context(
                publish(registry, InProcessEngine(), instance=instance, **for_publish(given))
            )

        yield offer


def into() -> dict[str, torch.Tensor]:
    return {"w": torch.zeros(COUNT, dtype=torch.int64)}


def once_at(part: float, action: Callable[[], object]) -> Callable[[Progress], None]:
    left = [action]

    def on_progress(progress: Progress) -> None:
        if progress.nbytes >= part * progress.total_nbytes and left:
            left.pop()()

    return on_progress


# -- the same version, another content -------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["tcp", "socket"])
def test_a_source_that_starts_again_under_the_same_version_while_a_reader_waits_gives_one_launch(
    registry: Registry, processes: Processes, protocol: str
) -> None:
    """It begins an update, whose end the reader waits for.

    Then it is killed, and comes back with another checkpoint.
    """
    nbytes = 32 << 20
    program = ("-m", "tests.support.processes.source", "a", str(nbytes), "127.0.0.1", "2")
    source = processes.start(*program, "1", TEST_PROTOCOL=protocol)
    assert line_of(source) == "version 0\n"
    tensors = empty(nbytes)

    def begin_an_update() -> None:
        assert source.stdin is not None
        source.stdin.write("begin\n")
        source.stdin.flush()
        assert line_of(source) == "begun\n"
        threading.Thread(target=start_again, daemon=True).start()

    def start_again() -> None:
        (record,) = registry.ranks("a")
        assert record.state is RankState.UPDATING
        wait_until(lambda: not registry.pulls(record))  # the reader has found that out
        source.kill()
        source.wait()
        again = processes.start(*program, "2", TEST_PROTOCOL=protocol)
        started.append(line_of(again))

    started: list[str] = []
    with open_engine("127.0.0.1", protocol) as engine:
        progress = once_at(0.5, begin_an_update)
        report = load(
            registry,
            engine,
            "a",
            rank=0,
            tensors=tensors,
            options=LoadOptions(pace=Pace(256 << 10, 2, check_s=0.01), progress=progress),
            timeout_s=40,
        )
    assert the_origin(origins_of_bytes(tensors)) == Origin(launch=2)
    assert (report.version, report.retries > 0, started) == (0, True, ["version 0\n"])


@pytest.mark.parametrize("kind", ["rank", "resharded"])
def test_a_source_that_starts_again_between_a_torn_read_and_the_next_look_gives_one_launch(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    whole = words(A, COUNT).reshape(2, -1)

    def launch(origin: Origin) -> tuple[ExitStack, list[Publication]]:
        """All ranks of the instance; version 0 in each launch."""
        content, stack = words(origin, COUNT).reshape(2, -1), ExitStack()
        parts = (
            [content] if kind == "rank" else [content[rank : rank + 1].clone() for rank in range(2)]
        )
        publications = [
            stack.enter_context(
                publish(
                    registry,
                    InProcessEngine(),
                    instance="a",
                    rank=rank,
                    world_size=len(parts),
                    tensors={"w": part},
                    shards={"w": _whole() if kind == "rank" else _half(rank)},
                    model=MODEL,
                )
            )
            for rank, part in enumerate(parts)
        ]
        return stack, publications

    running = [launch(A)]
    torn: list[str] = []

    def change() -> None:
        for publication in running[0][1]:
            # as an update that begins
            publication._header.write(replace(_header_of(publication), sequence=1))

    def start_again() -> None:
        torn.append("yes")
        if len(torn) == 1:
            running.pop()[0].close()
            running.append(launch(B))

    monkeypatch.setitem(failpoints.ACTIONS, "load.torn", start_again)
    found = {"w": torch.zeros_like(whole)}
    report = load(
        registry,
        InProcessEngine(),
        "a",
        tensors=found,
        shards={"w": _whole()},
        options=LoadOptions(pace=PACE, progress=once_at(0.5, change)),
        timeout_s=20,
    )
    running[0][0].close()
    assert torn
    assert the_origin(origins(found["w"])) == B
    assert report.version == 0


def _header_of(publication: Publication) -> Header:
    header = publication._header.read()
    assert header is not None
    return header


def test_files_that_are_loaded_one_after_another_are_of_one_launch(
    registry: Registry, offer: Offer, tmp_path: Path
) -> None:
    """The source starts again, under the same version, when the first file is there."""
    half = COUNT // 2

    def halves(origin: Origin) -> dict[str, torch.Tensor]:
        return {"t0": words(origin, half), "t1": words(origin, half, half)}

    running = [offer("a", A, tensors=halves(A))]
    times: list[int] = []

    def start_again(progress: Progress) -> None:
        if progress.nbytes > progress.total_nbytes // 2 and not times:
            times.append(1)
            running.pop().close()
            running.append(offer("a", B, tensors=halves(B)))

    with WholeFiles(tmp_path) as files:
        load_full(
            registry,
            InProcessEngine(),
            "a",
            files=files,
            max_file_nbytes=8 * half,
            options=LoadOptions(progress=start_again),
            timeout_s=20,
        )
    found = {
        name: tensor
        for path in sorted(tmp_path.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    assert times
    assert the_origin(origins(torch.cat([found["t0"], found["t1"]]))) == B


def test_a_load_that_goes_on_with_another_content_of_the_same_version_forgets_what_had_come(
    registry: Registry, offer: Offer
) -> None:
    publications = {"a": offer("a", A), "b": offer("b", B)}
    left: list[str] = []

    def close_the_one_that_is_read() -> None:
        (reading,) = [name for name in publications if registry.pulls(publications[name].record)]
        publications.pop(reading).close()
        left.extend(publications)

    tensors = into()
    progress = once_at(0.5, close_the_one_that_is_read)
    report = load(
        registry,
        InProcessEngine(),
        ["a", "b"],
        rank=0,
        tensors=tensors,
        options=LoadOptions(pace=PACE, progress=progress),
    )
    assert the_origin(origins(tensors["w"])) == {"a": A, "b": B}[left[0]]
    assert report.content == publications[left[0]].record.content
    assert [share.name for share in report.shares] == [f"/engines/{left[0]}/0"]


def test_each_publication_and_each_update_has_a_content_of_its_own_unless_digests_prove_the_same(
    offer: Offer,
) -> None:
    contents = [offer(f"a{number}", A).record.content for number in range(2)]
    publication = offer("b", A)
    contents.append(publication.record.content)
    with publication.update():
        pass
    contents.append(publication.record.content)
    proven = [offer(f"c{number}", A, digests=True) for number in range(2)]
    other = offer("d", B, digests=True)
    assert proven[0].record.content == proven[1].record.content
    with proven[0].update():
        pass
    assert proven[0].record.content == proven[1].record.content  # nothing was changed
    contents += [proven[0].record.content, other.record.content]
    assert len(set(contents)) == len(contents) == 6


def test_a_rank_that_has_loaded_holds_what_its_source_held(
    registry: Registry, offer: Offer
) -> None:
    source = offer("a", A)
    with InProcessEngine() as engine:
        report = load(
            registry,
            engine,
            "a",
            rank=0,
            tensors=into(),
            publish=Replica("copy", options=PublishOptions(digests=True)),
        )
        assert report.publication is not None
        with report.publication as publication:
            assert report.content == source.record.content == publication.record.content
            assert registry.resolve("copy")[0].content == report.content
            again = load(registry, InProcessEngine(), ["a", "copy"], rank=0, tensors=into())
            assert len(again.shares) == 2


def test_loads_that_put_the_same_instance_together_in_one_layout_have_one_content(
    registry: Registry, offer: Offer
) -> None:
    whole = words(A, COUNT).reshape(2, -1)
    for rank in range(2):
        offer(
            "a",
            A,
            rank=rank,
            world_size=2,
            tensors={"w": whole[rank : rank + 1].clone()},
            shards={"w": _half(rank)},
        )

    def load_whole() -> str:
        found = {"w": torch.zeros_like(whole)}
        report = load(registry, InProcessEngine(), "a", tensors=found, shards={"w": _whole()})
        assert the_origin(origins(found["w"])) == A
        return report.content

    assert load_whole() == load_whole()
    publications = offer("b", A, rank=0, world_size=1, tensors={"w": whole}, shards={"w": _whole()})
    assert publications.record.content != load_whole()  # nothing proves that it is the same


def _half(rank: int) -> Shard:
    return Shard((2, COUNT // 2), (rank, 0))


def _whole() -> Shard:
    return Shard((2, COUNT // 2), (0, 0))


# -- evicted ---------------------------------------------------------------------------------------


def spoilt(offer: Offer, instance: str) -> Publication:
    """Says that it holds A, and holds B: as one that somebody evicts because its memory is bad."""
    tensors = {"w": words(A, COUNT)}
    publication = offer(instance, A, tensors=tensors, digests=True)
    tensors["w"].copy_(words(B, COUNT))
    return publication


def test_nothing_of_a_source_that_was_evicted_half_way_is_left(
    registry: Registry, offer: Offer
) -> None:
    bad = spoilt(offer, "bad")
    offer("good", A, digests=True)
    tensors = into()
    report = load(
        registry,
        InProcessEngine(),
        ["bad", "good"],
        rank=0,
        tensors=tensors,
        options=LoadOptions(
            pace=PACE, progress=once_at(0.5, lambda: registry.evict(registry.ranks("bad")[0]))
        ),
    )
    assert the_origin(origins(tensors["w"])) == A
    assert {share.name: share.nbytes for share in report.shares} == {
        "/engines/bad/0": 0,
        "/engines/good/0": 8 * COUNT,
    }
    wait_until(lambda: bad.state.value == "lost")


def test_nothing_of_a_source_is_left_that_was_lost_first_and_evicted_before_the_load_had_ended(
    registry: Registry, offer: Offer
) -> None:
    """Nobody watches it any more then: its mark in etcd says so."""
    bad = spoilt(offer, "bad")
    good = offer("good", A, digests=True)
    engine = bad._served  # keeps its memory registered
    tensors = into()
    stopped = threading.Event()

    def stop_then_evict() -> None:
        record = registry.ranks("bad")[0]
        paused = InProcessEngine._peers[record.session_id]
        paused.pause()
        stopped.set()

    def evict_at_the_end() -> None:
        if stopped.is_set():
            registry.evict(registry.ranks("bad")[0])

    first, last = once_at(0.3, stop_then_evict), once_at(1.0, evict_at_the_end)

    def progress(now: Progress) -> None:
        first(now)
        last(now)

    pace = Pace(64 << 10, 2, check_s=0.01, stall_s=1.0)
    load(
        registry,
        InProcessEngine(),
        ["bad", "good"],
        rank=0,
        tensors=tensors,
        options=LoadOptions(pace=pace, progress=progress),
    )
    assert engine is not None
    assert good.record.content
    assert the_origin(origins(tensors["w"])) == A


def test_the_only_source_that_is_evicted_leaves_no_tensor_that_counts(
    registry: Registry, offer: Offer
) -> None:
    offer("a", A)
    evict = once_at(1.0, lambda: registry.evict(registry.ranks("a")[0]))
    with pytest.raises(SourceEvicted, match="no tensor is usable") as caught:
        load(
            registry,
            InProcessEngine(),
            "a",
            rank=0,
            tensors=into(),
            options=LoadOptions(pace=PACE, progress=evict),
        )
    assert caught.value.details["complete"] == []


def test_a_source_that_leaves_in_order_once_all_has_come_is_as_good_as_any(
    registry: Registry, offer: Offer
) -> None:
    publication = offer("a", A)
    tensors = into()

    class Leaving(InProcessEngine):
        """When the last header has been read."""

        def take_back(self, region: Any) -> None:
            publication.close()
            super().take_back(region)

    load(registry, Leaving(), "a", rank=0, tensors=tensors, options=LoadOptions(pace=PACE))
    assert the_origin(origins(tensors["w"])) == A


def test_what_a_replica_had_from_an_evicted_source_does_not_count_for_those_behind_it_either(
    registry: Registry, offer: Offer
) -> None:
    """A reads from the bad one, B from A; once it is evicted both read from the good one, which
    comes when it is needed. B stays behind A however long that takes: else it may have ended before
    the eviction, as a complete source.
    """
    spoilt(offer, "bad")
    members = Members(registry, InProcessEngine, into)
    try:
        members.start_stopped("first", 0.8, source=MODEL, pace=PACE)
        members.start("second", source=MODEL, pace=replace(PACE, starve_s=60.0))
        wait_until(lambda: members.gates["second"].at > 0.2)
        offer("good", A, digests=True)
        registry.evict(registry.ranks("bad")[0])
        members.gates["first"].open.set()
        for name in ("first", "second"):
            report = members.loads[name].result(60)
            assert the_origin(origins(members.tensors[name]["w"])) == A
            assert all(
                share.name != "/engines/bad/0" or not share.nbytes for share in report.shares
            )
    finally:
        members.end()


def test_what_came_through_a_rank_that_stands_still_goes_with_its_evicted_source(
    registry: Registry, offer: Offer
) -> None:
    """The rank stands still, so it says nothing of the eviction, and the load has left it."""
    spoilt(offer, "bad")
    members = Members(registry, InProcessEngine, into)
    try:
        members.start_stopped("first", 0.8, source=MODEL, pace=PACE)
        members.start_stopped("second", 0.3, source=MODEL, pace=replace(PACE, starve_s=0.2))
        offer("good", A, digests=True)
        registry.evict(registry.ranks("bad")[0])
        members.gates["second"].open.set()
        report = members.loads["second"].result(60)
        assert the_origin(origins(members.tensors["second"]["w"])) == A
        assert {share.name for share in report.shares if share.nbytes} == {"/engines/good/0"}
    finally:
        members.end()


# -- another place ---------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_a_rank_gets_the_weights_of_its_own_place_on_every_axis(
    registry: Registry, offer: Offer, tmp_path: Any, index: int
) -> None:
    """The experts of another rank have the same names and shapes."""
    for place, origin in enumerate((A, B)):
        offer(f"ep{place}", origin, topology={"ep": (place, 2)})
    for _ in range(3):
        tensors = into()
        options: dict[str, Any] = {"rank": 0, "world_size": 1, "topology": {"ep": (index, 2)}}
        with (
            InProcessEngine() as engine,
            load_or_seed(
                registry,
                engine,
                MODEL,
                tensors,
                instance="me",
                fallback=tmp_path,
                timeout_s=5,
                **options,
            ) as seeded,
        ):
            assert seeded.source == "peers"
            assert the_origin(origins(tensors["w"])) == (A, B)[index]
            load(registry, InProcessEngine(), MODEL, tensors=into(), **options)


def test_files_are_read_where_only_other_places_are_served(
    registry: Registry, offer: Offer, tmp_path: Any
) -> None:
    offer("ep0", A, topology={"ep": (0, 2)})
    save_file({"w": words(B, COUNT)}, tmp_path / "model.safetensors")
    tensors = into()
    with (
        InProcessEngine() as engine,
        load_or_seed(
            registry,
            engine,
            MODEL,
            tensors,
            rank=0,
            world_size=1,
            topology={"ep": (1, 2)},
            instance="me",
            fallback=tmp_path,
        ) as seeded,
    ):
        assert seeded.source == "disk"
        assert the_origin(origins(tensors["w"])) == B
        with pytest.raises(InvalidField, match="which rank is meant is not clear"):
            load(registry, InProcessEngine(), MODEL, rank=0, tensors=into())


# -- an update that lasts --------------------------------------------------------------------------


def test_ranks_behind_a_source_that_is_being_updated_wait_for_it_as_at_the_beginning(
    registry: Registry,
) -> None:
    tensors = {"w": words(A, COUNT)}
    with ExitStack() as stack:
        root = stack.enter_context(
            publish(
                registry,
                InProcessEngine(),
                instance="root",
                rank=0,
                world_size=1,
                tensors=tensors,
                model=MODEL,
                options=PublishOptions(digests=True),
            )
        )
        members = Members(registry, InProcessEngine, into)
        stack.callback(members.end)
        names = [f"m{number}" for number in range(4)]
        options: dict[str, Any] = {
            "source": MODEL,
            "pace": replace(PACE, starve_s=0.3),
            "timeout_s": 60,
        }
        for number, name in enumerate(names):  # each of which reads from the one before it
            members.start_stopped(name, 0.5 - number / 10, **options)
        with root.update():
            tensors["w"].copy_(words(Origin(1, 1), COUNT))
            for name in names:
                members.gates[name].open.set()
            # all of them have lost what they read from
            wait_until(lambda: not registry.all_pulls())
            # and nobody has given up
            assert not any(load.done() for load in members.loads.values())
        for name in names:
            assert members.loads[name].result(60).version == 1
            assert the_origin(origins(members.tensors[name]["w"])) == Origin(1, 1)


def test_a_load_that_has_lost_all_its_sources_does_not_wait_for_new_ones(
    registry: Registry, offer: Offer
) -> None:
    publication = offer("a", A)
    with pytest.raises(SourceLost):
        load(
            registry,
            InProcessEngine(),
            "a",
            rank=0,
            tensors=into(),
            options=LoadOptions(pace=PACE, progress=once_at(0.5, publication.close)),
            timeout_s=600,
        )
