"""Ranks that load from each other while they load: who reads from whom, and what becomes of the
others when one gives up.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine_loader import (
    Engine,
    InProcessEngine,
    LoadReport,
    Pace,
    Publication,
    PublishOptions,
    Replica,
    Shard,
    load,
    publish,
)
from engine_loader.errors import Cancelled
from engine_loader.transfer import pipe
from engine_registry import ModelIdentity, RankState, Registry
from engine_registry.errors import InvalidField, RankConflict
from tests.support.gates import Gate
from tests.support.options import for_load
from tests.support.processes.source import MODEL, content, empty
from tests.support.waiting import wait_until

NBYTES = 16 << 20  # 64 chunks
SLOW = Pace(256 << 10, 1, starve_s=30.0)


class Members:
    """Loads in threads of this process, each with a separate engine; what they published is
    closed in the end.
    """

    def __init__(
        self,
        registry: Registry,
        new_engine: Callable[[], Engine],
        new_tensors: Callable[[], dict[str, torch.Tensor]] = lambda: empty(NBYTES),
    ) -> None:
        self.registry = registry
        self._new_engine = new_engine
        self._new_tensors = new_tensors
        self._pool = ThreadPoolExecutor(16)
        self._cancel = threading.Event()
        self.gates: dict[str, Gate] = {}
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        self.engines: dict[str, Engine] = {}
        self.loads: dict[str, Future[LoadReport]] = {}

    def start(self, name: str, stop_at: float = 2.0, **options: Any) -> None:
        """Stops there, of 1, until it is let go."""
        gate = self.gates[name] = Gate(stop_at)
        tensors = self.tensors[name] = self._new_tensors()
        engine = self.engines[name] = self._new_engine()
        given = {
            "publish": name,
            "pace": SLOW,
            "rank": 0,
            "source": MODEL,
            "cancel": self._cancel,
            **options,
        }
        source = given.pop("source")
        self.loads[name] = self._pool.submit(
            load,
            self.registry,
            engine,
            source,
            tensors=tensors,
            **for_load({**given, "progress": gate.see}),
        )

    def start_stopped(self, name: str, stop_at: float, **options: Any) -> None:
        self.start(name, stop_at, **options)
        wait_until(lambda: self.gates[name].reached.is_set() or self.loads[name].done())

    def report(self, name: str, version: int = 0) -> LoadReport:
        report = self.loads[name].result(60)
        wanted = content(version, NBYTES)
        assert all(torch.equal(self.tensors[name][key], wanted[key]) for key in wanted)
        assert report.version == version
        return report

    def sources(self, name: str) -> dict[str, int]:
        return {
            share.name.split("/")[2]: share.nbytes
            for share in self.report(name).shares
            if share.nbytes
        }

    def end(self) -> None:
        self._cancel.set()
        for gate in self.gates.values():
            gate.open.set()
        for name in self.loads:
            if (publication := self.publication(name)) is not None:
                publication.close()
        self._pool.shutdown()

    def publication(self, name: str) -> Publication | None:
        error = self.loads[name].exception(60)
        return self.loads[name].result().publication if error is None else None


@pytest.fixture
def members(registry: Registry, new_engine: Callable[[], Engine]) -> Iterator[Members]:
    members = Members(registry, new_engine)
    yield members
    members.end()


@pytest.fixture
def seed(registry: Registry, new_engine: Callable[[], Engine]) -> Iterator[dict[str, torch.Tensor]]:
    tensors = content(0, NBYTES)
    with publish(
        registry,
        new_engine(),
        instance="seed",
        rank=0,
        world_size=1,
        tensors=tensors,
        model=MODEL,
        options=PublishOptions(ttl_s=2),
    ):
        yield tensors


pytestmark = pytest.mark.usefixtures("seed")


def test_ranks_that_load_at_once_read_from_each_other_and_the_source_is_read_once(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    # on a busy machine a rank may rightly leave a slow one, for the source
    monkeypatch.setattr(pipe, "_SLOW_AFTER_S", 60.0)
    names = [f"m{number}" for number in range(6)]
    members.start_stopped(names[0], 0.5)
    for name in names[1:]:
        members.start(name)
    wait_until(lambda: len(members.registry.all_pulls()) == len(names))  # each has chosen
    members.gates[names[0]].open.set()
    read = Counter[str]()
    for name in names:
        read.update(members.sources(name))
    assert sum(read.values()) == len(names) * NBYTES
    assert read["seed"] == NBYTES
    assert max(read.values()) == NBYTES  # nobody has two readers
    for name in names:
        (record,) = members.registry.resolve(name)
        assert record.state is RankState.READY


def test_from_one_that_is_loading_comes_what_it_has_and_the_rest_when_it_has_it(
    members: Members,
) -> None:
    members.start_stopped("a", 0.5)
    members.start("b")
    wait_until(lambda: members.gates["b"].at > 0.2)
    assert not members.loads["b"].done()
    assert members.gates["b"].at <= 0.5
    members.gates["a"].open.set()
    assert members.sources("b") == {"a": NBYTES}
    assert members.sources("a") == {"seed": NBYTES}


def test_a_load_that_publishes_nothing_reads_from_one_that_is_loading_too(members: Members) -> None:
    members.start_stopped("a", 0.5)
    members.start("b", publish=False)
    wait_until(lambda: members.gates["b"].at > 0.2)
    members.gates["a"].open.set()
    assert members.sources("b") == {"a": NBYTES}
    assert members.report("b").publication is None
    assert [status.instance for status in members.registry.instances()] == ["a", "seed"]


@pytest.mark.parametrize(
    "options", [{"pipelined": False}, {"source": "seed"}, {"source": ["seed"]}]
)
def test_only_complete_ranks_are_read_from_where_that_is_wanted(
    members: Members, options: dict[str, Any]
) -> None:
    members.start_stopped("a", 0.5)
    members.start("b", **options)
    assert members.sources("b") == {"seed": NBYTES}


def test_digests_are_not_compared_with_those_of_one_that_is_loading(
    registry: Registry, members: Members, new_engine: Callable[[], Engine]
) -> None:
    model = ModelIdentity("with digests")
    with publish(
        registry,
        new_engine(),
        instance="root",
        rank=0,
        world_size=1,
        tensors=content(0, NBYTES),
        model=model,
        options=PublishOptions(digests=True),
    ):
        members.start_stopped(
            "a", 0.5, source=model, publish=Replica("a", options=PublishOptions(digests=True))
        )
        members.start("b", source=model, verify="digest")
        assert members.sources("b").keys() == {"root"}
        members.gates["a"].open.set()
        members.report("a")
    members.start("c", source=model, verify="digest")
    assert members.sources("c").keys() == {"a"}  # b has none


def test_what_is_there_already_is_not_read_from_one_that_is_loading_either(
    registry: Registry, new_engine: Callable[[], Engine]
) -> None:
    """Only a complete rank says what that is."""
    whole = content(0, NBYTES)

    def older() -> dict[str, torch.Tensor]:
        half = dict(list(whole.items())[:8])
        return {**empty(NBYTES), **{name: tensor.clone() for name, tensor in half.items()}}

    with publish(
        registry,
        new_engine(),
        instance="complete",
        rank=0,
        world_size=1,
        tensors=whole,
        model=MODEL,
        options=PublishOptions(digests=True),
    ) as complete:
        members = Members(registry, new_engine, older)
        try:
            wanted: dict[str, Any] = {"contents": [complete.content], "reuse": True}
            members.start_stopped("a", 0.5, **wanted)
            members.start("b", **wanted)
            wait_until(lambda: members.gates["b"].at > 0.2)
            members.gates["a"].open.set()
            differing = sum(tensor.nbytes for tensor in list(whole.values())[8:])
            for name in ("a", "b"):
                report = members.report(name)
                assert report.skipped_nbytes == NBYTES - differing
            from_whom = members.sources("b")
            assert from_whom["a"] == differing
            assert from_whom["complete"] < 1000  # its table
        finally:
            members.end()


def test_ranks_that_load_from_each_other_take_equal_blocks_from_others_as_well(
    registry: Registry, new_engine: Callable[[], Engine]
) -> None:
    """What these have brought is passed on, once it is proven."""
    base = content(0, NBYTES)
    base["t3"].zero_()
    options = PublishOptions(digests=True)
    with (
        publish(
            registry,
            new_engine(),
            instance="complete",
            rank=0,
            world_size=1,
            tensors=content(0, NBYTES),
            model=MODEL,
            options=options,
        ) as complete,
        publish(
            registry,
            new_engine(),
            instance="base",
            rank=0,
            world_size=1,
            tensors=base,
            model=ModelIdentity("base"),
            options=options,
        ),
    ):
        members = Members(registry, new_engine)
        try:
            wanted: dict[str, Any] = {"contents": [complete.content], "also_from": "base"}
            members.start_stopped("a", 0.5, **wanted)
            members.start("b", **wanted)
            wait_until(lambda: members.gates["b"].at > 0.2)
            members.gates["a"].open.set()
            for name in ("a", "b"):
                report = members.report(name)
                assert 0 < report.lent["/engines/base/0"] < NBYTES - base["t3"].nbytes + 1
        finally:
            members.end()


def test_one_that_has_loaded_is_a_source_like_any_other_until_it_is_closed(
    members: Members,
) -> None:
    members.start(
        "a", publish=Replica("copy", options=PublishOptions(generation="g", on_state=None))
    )
    publication = members.report("a").publication
    assert publication is not None
    (record,) = members.registry.resolve("copy")
    assert (record.model, record.world_size, record.version, record.generation) == (
        MODEL,
        1,
        0,
        "g",
    )
    members.start("b", source="copy", publish=False)
    assert members.sources("b") == {"copy": NBYTES}
    publication.close()
    assert members.registry.ranks("copy") == ()


def test_weights_that_are_updated_after_they_were_loaded_are_loaded_in_the_new_version(
    members: Members,
) -> None:
    members.start("a")
    publication = members.report("a").publication
    assert publication is not None
    with publication.update():
        for name, tensor in content(1, NBYTES).items():
            members.tensors["a"][name].copy_(tensor)
    members.start("b", publish=False)
    members.report("b", version=1)


def test_a_name_is_made_up_for_one_that_is_to_be_published_without(members: Members) -> None:
    members.start("a", publish=True)
    publication = members.report("a").publication
    assert publication is not None
    assert publication.record.instance.startswith("served.")


def test_a_load_that_cannot_publish_or_fails_leaves_nothing_behind(members: Members) -> None:
    members.start("a", publish="seed")
    with pytest.raises(RankConflict):
        members.loads["a"].result(60)
    cancel = threading.Event()
    members.start_stopped("b", 0.5, cancel=cancel)
    cancel.set()
    members.gates["b"].open.set()
    with pytest.raises(Cancelled):
        members.loads["b"].result(60)
    assert [status.instance for status in members.registry.instances()] == ["seed"]


def test_the_one_behind_a_rank_that_gives_up_goes_on_where_it_was(members: Members) -> None:
    cancel = threading.Event()
    members.start_stopped("a", 0.5, cancel=cancel)
    members.start("b")
    wait_until(lambda: members.gates["b"].at > 0.1)  # so that the next one reads from it
    members.start("c")
    wait_until(lambda: members.gates["c"].at > 0.2)
    cancel.set()
    members.gates["a"].open.set()
    assert members.sources("c") == {"b": NBYTES}
    sources = members.sources("b")
    assert sources.keys() == {"a", "seed"}
    assert sum(sources.values()) == NBYTES  # nothing twice


def test_a_rank_that_gets_nothing_new_any_more_is_done_without(members: Members) -> None:
    members.start_stopped("a", 0.5)
    members.start("b", pace=replace(SLOW, starve_s=0.5))
    sources = members.sources("b")  # though a is still where it was
    assert sources.keys() == {"a", "seed"}
    assert sum(sources.values()) == NBYTES


def test_a_rank_that_stops_answering_is_done_without(registry: Registry) -> None:
    with ExitStack() as stack:
        members = Members(registry, lambda: stack.enter_context(InProcessEngine()))
        stack.callback(members.end)
        # the seed of this module's fixture is of another kind of engine for every other run, so
        # there is one here
        tensors, model = content(0, NBYTES), ModelIdentity("stops")
        stack.enter_context(
            publish(
                registry,
                members._new_engine(),
                instance="root",
                rank=0,
                world_size=1,
                tensors=tensors,
                model=model,
            )
        )
        members.start_stopped("a", 0.5, source=model)
        members.start_stopped("b", 0.25, source=model)
        paused = members.engines["a"]
        assert isinstance(paused, InProcessEngine)
        paused.pause()
        members.gates["b"].open.set()
        assert members.sources("b").keys() == {"a", "root"}
        paused.resume()


def test_all_have_one_version_each_when_the_source_is_updated_meanwhile(
    registry: Registry, members: Members, new_engine: Callable[[], Engine]
) -> None:
    tensors, model = content(0, NBYTES), ModelIdentity("updated")
    with publish(
        registry, new_engine(), instance="root", rank=0, world_size=1, tensors=tensors, model=model
    ) as root:
        members.start_stopped("a", 0.5, source=model)
        members.start("b", source=model)
        wait_until(lambda: members.gates["b"].at > 0.2)
        with root.update():
            for name, tensor in content(1, NBYTES).items():
                tensors[name].copy_(tensor)
        members.gates["a"].open.set()
        for name in ("a", "b"):
            members.report(name, version=1)
        assert {record.version for name in ("a", "b") for record in registry.resolve(name)} == {1}


def test_a_rank_of_another_layout_becomes_a_source_of_its_own_layout(
    registry: Registry, members: Members, new_engine: Callable[[], Engine]
) -> None:
    """Two ranks hold a half each; one that wants all of it is filled from both, as rank 0 of 1, and
    marks what it has.
    """
    model = ModelIdentity("halves")
    whole = torch.arange(1 << 20, dtype=torch.int32).reshape(1024, 1024)
    with ExitStack() as stack:
        for rank in range(2):
            part = whole[:, 512 * rank : 512 * (rank + 1)].contiguous()
            shard = {"w": Shard((1024, 1024), (0, 512 * rank))}
            stack.enter_context(
                publish(
                    registry,
                    new_engine(),
                    instance="halves",
                    rank=rank,
                    world_size=2,
                    tensors={"w": part},
                    shards=shard,
                    model=model,
                )
            )
        found = torch.zeros_like(whole)
        options: dict[str, Any] = {
            "tensors": {"w": found},
            "shards": {"w": Shard((1024, 1024), (0, 0))},
        }
        with pytest.raises(InvalidField, match="which rank to publish as is not known"):
            load(registry, new_engine(), model, publish="whole", **options)
        replica = Replica("whole", rank=0, world_size=1)
        report = load(registry, new_engine(), model, publish=replica, **options)
        assert torch.equal(found, whole)
        assert report.publication is not None
        stack.enter_context(report.publication)
        again = torch.zeros_like(whole)
        options["tensors"] = {"w": again}
        load(registry, new_engine(), "whole", rank=0, **options)
        assert torch.equal(again, whole)
