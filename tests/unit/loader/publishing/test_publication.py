"""What readers and the registry see of a publication when it opens, changes and closes: with an
engine of this process and a registry that a test watches.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from engine_loader import (
    Destination,
    InProcessEngine,
    Publication,
    PublishOptions,
    Shard,
    publish,
    publish_state_dict,
)
from engine_loader.engines.region_book import Regions
from engine_loader.errors import LoaderError, MemoryInUse, TensorsUnusable
from engine_loader.publishing import offering, served
from engine_loader.publishing import publication as publications
from engine_loader.publishing.header import Header, HeaderCell
from engine_loader.publishing.opening import open_publication
from engine_loader.tensors.uses import USES, Use
from engine_registry import ModelIdentity, RankRecord, RankState, RegistrationState, Registry
from engine_registry.errors import EtcdUnavailable, InvalidField, RankConflict, RegistryError
from engine_registry.schema.manifest import Manifest, Region
from tests.support.builders import CONTENT, OTHER_CONTENT, a_record

MODEL = ModelIdentity("m")
REGISTERED, SUSPENDED = RegistrationState.REGISTERED, RegistrationState.SUSPENDED


class Registered:
    """As a Registration; `problem` is what a change of the record raises."""

    def __init__(self, record: RankRecord) -> None:
        self.record = record
        self.state = REGISTERED
        self.problem: RegistryError | None = None
        self.states: list[RankState] = []  # that the record was given
        self.reasons: list[str] = []  # of withdrawals
        self.at_withdrawal: Callable[[], object] = lambda: None

    def update(self, *, version: int | None = None, content: str | None = None, state: Any) -> None:
        if self.problem is not None:
            raise self.problem
        self.states.append(state)
        given = {"version": version, "content": content, "state": state}
        changes = {name: value for name, value in given.items() if value is not None}
        self.record = a_record(**{**{f: getattr(self.record, f) for f in FIELDS}, **changes})

    def when_claimed_again(self, call: Callable[[], None]) -> None:
        """It never is."""

    def withdraw(self, reason: str = "withdrawn") -> None:
        self.at_withdrawal()
        self.reasons.append(reason)


FIELDS = ("instance", "rank", "incarnation", "version", "content", "state")


class Etcd:
    """As a Registry, in which so many loads read from every rank."""

    def __init__(self, pulls: int = 0, problem: RegistryError | None = None) -> None:
        self._pulls = pulls
        self._problem = problem
        self.asked: dict[str, Any] = {}  # of the last registration
        self.header: Header | None = None  # that a reader would have found at that time
        self.registered: list[Registered] = []
        self.waits: list[tuple[str, int, float]] = []
        self.watched: list[str] = []

    def register(self, **asked: Any) -> Registered:
        self.asked = asked
        self.header = header_at(asked["header_addr"])
        if self._problem is not None:
            raise self._problem
        self.registered.append(Registered(a_record(**{name: asked[name] for name in FIELDS})))
        return self.registered[-1]

    def wait_for_no_pulls(self, instance: str, rank: int, timeout_s: float) -> int:
        self.waits.append((instance, rank, timeout_s))
        return self._pulls

    @contextmanager
    def watch_pulls(self, record: RankRecord, on_pull: object) -> Iterator[None]:
        self.watched.append(record.key)
        yield
        self.watched.remove(record.key)


def header_at(addr: int) -> Header | None:
    magic, incarnation, sequence, content = struct.unpack(
        "<8s16sQ16s16x", ctypes.string_at(addr, 64)
    )
    return Header(incarnation.hex(), sequence, content.hex()) if magic == b"ENGREG01" else None


class Bench:
    """Publishes `tensors`, from an engine that is interrupted as often as a test wants when memory
    is given back.
    """

    def __init__(self, stack: ExitStack) -> None:
        bench = self
        self.interrupts = 0

        class Interrupting(InProcessEngine):
            def unregister(self, region: Region) -> None:
                super().unregister(region)
                if bench.interrupts:
                    bench.interrupts -= 1
                    raise KeyboardInterrupt

        self._stack = stack
        self.engine: InProcessEngine = stack.enter_context(Interrupting("rack-1"))
        self.etcd = Etcd()
        self.tensors = {"w": torch.arange(16.0), "b": torch.ones(3)}
        self.weights = Destination.of(self.tensors, None)

    def publish(self, **options: Any) -> Publication:
        publication = publish(
            cast(Registry, self.etcd),
            self.engine,
            instance="a",
            rank=1,
            world_size=2,
            tensors=self.tensors,
            model=MODEL,
            topology={"tp": (1, 2)},
            options=PublishOptions(**options),
        )
        self._stack.callback(publication.close)
        return publication

    def publish_what_is_filled(self, filled_by: Use, **options: Any) -> Publication:
        publication = open_publication(
            cast(Registry, self.etcd),
            self.engine,
            self.weights,
            instance="a",
            rank=1,
            world_size=2,
            model=MODEL,
            topology={},
            options=PublishOptions(**options),
            block_nbytes=8,
            content=CONTENT,
            filled_by=filled_by,
        )
        self._stack.callback(publication.close)
        return publication

    @contextmanager
    def filling(self) -> Iterator[Use]:
        with USES.fill("a load", self.weights.runs) as use:
            yield use

    def header(self) -> Header | None:
        return header_at(self.etcd.asked["header_addr"])

    def assert_nothing_is_left(self) -> None:
        assert not list(self.engine._served)
        with self.filling():
            pass


@pytest.fixture
def bench() -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(stack)


# -- opening
# --------------------------------------------------------------------------------------------------


def test_a_reader_finds_the_header_as_soon_as_it_finds_the_record(bench: Bench) -> None:
    publication = bench.publish()
    asked = bench.etcd.asked
    assert bench.etcd.header == Header(asked["incarnation"], 0, asked["content"])
    assert publication.content == asked["content"]
    assert {name: asked[name] for name in ("instance", "rank", "world_size", "topology")} == {
        "instance": "a",
        "rank": 1,
        "world_size": 2,
        "topology": {"tp": (1, 2)},
    }
    assert (asked["state"], asked["version"], asked["ttl_s"]) == (RankState.READY, 0, 10.0)
    assert (asked["session_id"], asked["fabric"]) == (bench.engine.session_id, "rack-1")
    assert asked["rails"] == bench.engine.rails
    assert (asked["protocol"], asked["device"]) == ("in_process", "cpu")
    manifest = asked["manifest"]
    assert manifest.regions == publication.regions
    assert (manifest.block_nbytes, manifest.digests, manifest.values) == (0, None, {})
    # the header can be read, and the weights
    served = [(part.addr, part.end) for part in bench.engine._served]
    for addr in [asked["header_addr"], *[entry.addr for entry in manifest.tensors]]:
        assert any(start <= addr < end for start, end in served)


def test_a_publication_says_how_long_the_memory_of_its_weights_took_to_be_registered(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    register, seconds = bench.engine.register, 0.0

    def slow(region: Region) -> Regions:
        nonlocal seconds
        seconds += 3.0
        return register(region)

    monkeypatch.setattr(bench.engine, "register", slow)
    monkeypatch.setattr(
        "engine_loader.publishing.offering.time", SimpleNamespace(monotonic=lambda: seconds)
    )
    publication = bench.publish(digests=True)
    weights, others = len(publication.regions), 2  # the header and the digests
    assert (publication.register_s, seconds) == (3.0 * weights, 3.0 * (weights + others))


def test_a_publication_begins_with_the_version_and_the_values_that_it_is_given(
    bench: Bench,
) -> None:
    publication = bench.publish(version=3, values={"step": 7})
    assert publication.version == 3
    assert bench.etcd.header is not None
    assert (bench.etcd.header.version, bench.etcd.header.updating) == (3, False)
    assert bench.etcd.asked["manifest"].values


def test_contents_are_equal_only_where_digests_prove_it(bench: Bench) -> None:
    contents = []
    for digests in (False, False, True, True):
        with bench.publish(digests=digests) as publication:
            contents.append(publication.content)
            manifest: Manifest = bench.etcd.asked["manifest"]
            assert (manifest.digests is not None) == digests
            if manifest.digests is not None:  # readers can read it
                addr = manifest.digests.addr
                assert any(part.addr <= addr < part.end for part in bench.engine._served)
    assert len(set(contents)) == 3
    assert contents[2] == contents[3]


def test_a_rank_that_is_refused_leaves_nothing_behind(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    retired: list[HeaderCell] = []
    monkeypatch.setattr(HeaderCell, "retire", lambda cell: retired.append(cell))
    bench.etcd = Etcd(problem=RankConflict("taken"))
    with pytest.raises(RankConflict):
        bench.publish(digests=True)
    assert len(retired) == 1
    bench.assert_nothing_is_left()


def test_a_state_dict_is_published_with_its_values_and_with_whole_tensors(bench: Bench) -> None:
    def publish_it(options: PublishOptions) -> Publication:
        return publish_state_dict(
            cast(Registry, bench.etcd),
            bench.engine,
            {"model": bench.tensors, "step": 7},
            instance="a",
            rank=1,
            world_size=2,
            model=MODEL,
            shards={"model.b": Shard((6,), (3,))},
            options=options,
        )

    with pytest.raises(InvalidField, match="put them into the state dict"):
        publish_it(PublishOptions(values={"step": 8}))
    with publish_it(PublishOptions(version=4)):
        manifest: Manifest = bench.etcd.asked["manifest"]
    assert bench.etcd.asked["version"] == 4
    assert {entry.name: (entry.global_shape, entry.offsets) for entry in manifest.tensors} == {
        "model.w": ((16,), (0,)),
        "model.b": ((6,), (3,)),
    }
    assert not any(entry.opaque for entry in manifest.tensors)
    assert manifest.values


def test_topology_and_rank_are_checked_before_anything_is_registered(bench: Bench) -> None:
    places: list[dict[str, Any]] = [{"rank": 2}, {"topology": {"tp": (2, 2)}}]
    for place in places:
        given: dict[str, Any] = {"rank": 1, "topology": None, **place}
        with pytest.raises(InvalidField):
            publish(
                cast(Registry, bench.etcd),
                bench.engine,
                instance="a",
                world_size=2,
                tensors=bench.tensors,
                model=MODEL,
                **given,
            )
    assert bench.etcd.asked == {}


@pytest.mark.parametrize("counted", [False, True])
def test_who_reads_is_watched_only_where_it_is_counted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, counted: bool
) -> None:
    monkeypatch.setattr(offering, "enabled", lambda: counted)
    with bench.publish():
        assert bench.etcd.watched == (["/engines/a/1"] if counted else [])
    assert bench.etcd.watched == []


def test_a_rank_whose_readers_cannot_be_watched_is_not_registered(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise EtcdUnavailable("away")

    monkeypatch.setattr(offering, "enabled", lambda: True)
    monkeypatch.setattr(bench.etcd, "watch_pulls", fail)
    with pytest.raises(EtcdUnavailable):
        bench.publish()
    assert bench.etcd.registered[0].reasons == ["withdrawn"]
    bench.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("protocol", "remedy"),
    [
        ("nvlink_intra", "move them, or use rdma or tcp"),
        ("cuda_ipc", "move those on the host into an arena (arena_of), or use rdma or tcp"),
    ],
)
def test_within_a_host_only_memory_that_others_can_open_is_served(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, protocol: str, remedy: str
) -> None:
    monkeypatch.setattr(InProcessEngine, "protocol", protocol)
    bench.tensors["empty"] = torch.empty(0)
    with pytest.raises(TensorsUnusable, match="2 tensors cannot be opened") as caught:
        bench.publish()
    assert caught.value.remedy == remedy
    assert caught.value.details["problems"] == ["w", "b"]
    bench.tensors = {"empty": torch.empty(0)}
    with bench.publish():
        pass


class OnGpu(torch.Tensor):
    is_cuda = True


def test_over_sockets_tensors_of_gpus_are_refused_with_the_ways_that_reach_them(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InProcessEngine, "protocol", "socket")
    tensors = {"w": torch.zeros(4).as_subclass(OnGpu), "none": torch.zeros(0), "b": torch.zeros(4)}
    with pytest.raises(TensorsUnusable, match="1 tensors are in memory of GPUs") as caught:
        offering.check_can_be_served(InProcessEngine(), tensors)
    assert caught.value.remedy.startswith("use cuda_ipc within a host, rdma or tcp between hosts")
    assert caught.value.details["problems"] == ["w"]
    with bench.publish():
        pass


def test_weights_that_are_still_filled_are_registered_as_loading_with_the_content_of_their_source(
    bench: Bench,
) -> None:
    with bench.filling() as use:
        publication = bench.publish_what_is_filled(use, digests=True, version=2)
        assert bench.etcd.asked["state"] is RankState.LOADING
        assert bench.etcd.asked["manifest"].block_nbytes == 8
        assert bench.header() == Header(publication.record.incarnation, 4, CONTENT)
        publication.mark(bytes([1, 0, 1]))
        assert publication._header.read_marks()[:3] == bytes([1, 0, 1])


# -- loading
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digests", [False, True])
def test_what_a_load_has_filled_has_the_content_that_its_source_stated(
    bench: Bench, digests: bool
) -> None:
    with bench.filling() as use:
        publication = bench.publish_what_is_filled(use, digests=digests, version=2)
        publication.complete(filled_by=use, content=OTHER_CONTENT)
    assert bench.header() == Header(publication.record.incarnation, 4, OTHER_CONTENT)
    assert (publication.content, publication.version) == (OTHER_CONTENT, 2)
    assert publication.record.state is RankState.READY
    with pytest.raises(MemoryInUse), bench.filling():
        pass


def test_where_no_content_is_stated_digests_prove_it_or_it_stays(bench: Bench) -> None:
    with bench.publish(digests=True) as publication:
        proven = publication.content
    for digests, content in [(True, proven), (False, CONTENT)]:
        with bench.filling() as use, bench.publish_what_is_filled(use, digests=digests) as one:
            one.complete(filled_by=use)
            assert one.content == content
            header = bench.header()
            assert header is not None
            assert header.content == content


def test_what_another_load_still_fills_is_not_complete(bench: Bench) -> None:
    with bench.filling() as use:
        publication = bench.publish_what_is_filled(use)
        other = Use("another load", bench.weights.runs, served=False)
        with pytest.raises(MemoryInUse):
            publication.complete(filled_by=other)
        assert publication.record.state is RankState.LOADING


def test_weights_that_have_moved_while_they_were_filled_are_not_complete(bench: Bench) -> None:
    with bench.filling() as use:
        publication = bench.publish_what_is_filled(use)
        bench.tensors["w"].data = torch.zeros(16)
        with pytest.raises(TensorsUnusable, match=r"tensors of /engines/a/1 .*: copy in"):
            publication.complete(filled_by=use)
    assert publication.record.state is RankState.LOADING


def test_readers_are_let_in_when_all_that_the_device_was_asked_to_write_is_there(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    for module in (offering, publications, served):
        monkeypatch.setattr(module, "wait_for", lambda devices: seen.append(f"{devices[0]} waits"))
    write = HeaderCell.write

    def seen_write(cell: HeaderCell, header: Header) -> None:
        seen.append(f"header {header.sequence}")
        write(cell, header)

    monkeypatch.setattr(HeaderCell, "write", seen_write)
    with bench.publish() as publication, publication.update():
        pass
    assert seen == ["cpu waits", "header 0", "header 1", "cpu waits", "header 2"]
    seen.clear()
    with bench.filling() as use, bench.publish_what_is_filled(use) as publication:
        publication.complete(filled_by=use)
    assert seen == ["cpu waits", "header 0"] * 2


# -- updates
# --------------------------------------------------------------------------------------------------


def test_an_update_is_seen_while_it_lasts_and_makes_a_new_version_of_a_new_content(
    bench: Bench,
) -> None:
    publication = bench.publish(version=3)
    before = publication.record
    with publication.update():
        assert bench.header() == Header(before.incarnation, 7, before.content)
        assert publication.record.state is RankState.UPDATING
        with bench.filling():  # a load may fill it now
            pass
    assert bench.header() == Header(before.incarnation, 8, publication.content)
    assert publication.content != before.content
    assert (publication.version, publication.record.state) == (4, RankState.READY)
    with pytest.raises(MemoryInUse), bench.filling():
        pass


def test_an_update_may_say_which_version_it_makes_if_that_is_newer(bench: Bench) -> None:
    publication = bench.publish(version=3)
    with publication.update(version=9):
        pass
    assert publication.version == 9
    assert bench.header() == Header(publication.record.incarnation, 18, publication.content)
    for version in (9, 8, -1):
        with pytest.raises(InvalidField, match="version"), publication.update(version=version):
            raise AssertionError("the block is not run")
    assert publication.record.state is RankState.READY


def test_an_update_that_changes_nothing_keeps_the_content_that_digests_prove(bench: Bench) -> None:
    publication = bench.publish(digests=True)
    before = publication.content
    with publication.update():
        pass
    assert publication.content == before
    with publication.update():
        bench.tensors["w"].add_(1)
    assert publication.content != before


def test_an_update_that_fails_leaves_the_weights_marked_until_one_has_ended_well(
    bench: Bench,
) -> None:
    publication = bench.publish()
    with pytest.raises(ZeroDivisionError), publication.update():
        raise ZeroDivisionError
    header = bench.header()
    assert header is not None
    assert header.updating
    assert (publication.version, publication.record.state) == (0, RankState.UPDATING)
    with publication.update():
        pass
    assert (publication.version, publication.record.state) == (1, RankState.READY)


def test_an_update_is_begun_once_at_a_time_and_not_after_the_end(bench: Bench) -> None:
    publication = bench.publish()
    with publication.update():
        with pytest.raises(LoaderError, match="is being updated already: end that update first"):
            publication.update().__enter__()
    publication.close()
    with pytest.raises(LoaderError, match=r"is closed, .*: publish it again"):
        publication.update().__enter__()


def test_an_update_does_not_need_etcd(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    publication = bench.publish()
    bench.etcd.registered[0].problem = EtcdUnavailable("away")
    with publication.update():
        header = bench.header()
        assert header is not None
        assert header.updating
    after = bench.header()
    assert after is not None
    assert (after.version, after.updating) == (1, False)
    assert "could not be changed: away" in caplog.text


def test_weights_that_have_moved_or_are_still_filled_stay_marked(bench: Bench) -> None:
    publication, before = bench.publish(), bench.tensors["w"].data
    with pytest.raises(TensorsUnusable), publication.update():
        bench.tensors["w"].data = before * 2
    bench.tensors["w"].data = before
    with pytest.raises(MemoryInUse), ExitStack() as stack, publication.update():
        stack.enter_context(bench.filling())
    header = bench.header()
    assert header is not None
    assert header.updating
    assert publication.record.state is RankState.UPDATING


def test_memory_that_another_publication_serves_is_not_updated(bench: Bench) -> None:
    publication = bench.publish()
    other = USES.serve("another", bench.weights.runs)
    with pytest.raises(MemoryInUse):
        publication.update().__enter__()
    header = bench.header()
    assert header is not None
    assert not header.updating
    USES.end(other)
    with publication.update():
        pass


# -- leaving
# --------------------------------------------------------------------------------------------------


def test_a_publication_leaves_the_registry_first_and_then_erases_its_header(bench: Bench) -> None:
    publication = bench.publish(digests=True)
    registration = bench.etcd.registered[0]
    seen: list[Header | None] = []
    registration.at_withdrawal = lambda: seen.append(publication._header.read())
    assert "ready, version 0" in repr(publication)
    publication.close("for a test")
    assert registration.reasons[0] == "for a test"
    assert seen[0] is not None
    assert publication._header.read() is None
    assert "closed, version 0" in repr(publication)
    bench.assert_nothing_is_left()
    publication.close()
    bench.assert_nothing_is_left()


def test_a_publication_that_closes_during_an_update_is_not_readable_after_it(bench: Bench) -> None:
    publication = bench.publish()
    with publication.update():
        publication.close()
    assert publication._header.read() is None


def test_a_close_that_was_interrupted_is_finished_by_the_next(bench: Bench) -> None:
    publication = bench.publish(digests=True)
    bench.interrupts = 2
    with pytest.raises(KeyboardInterrupt):
        publication.close()
    publication.close()
    bench.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("pulls", "state", "waits", "ended"),
    [
        (0, REGISTERED, [("a", 1, 2.5)], True),
        (2, REGISTERED, [("a", 1, 2.5)], False),
        (2, SUSPENDED, [], True),
    ],
    ids=["they end", "two go on", "etcd is away"],
)
def test_a_rank_that_drains_waits_for_the_loads_that_run_and_closes(
    bench: Bench,
    caplog: pytest.LogCaptureFixture,
    pulls: int,
    state: RegistrationState,
    waits: list[tuple[str, int, float]],
    ended: bool,
) -> None:
    bench.etcd = Etcd(pulls=pulls)
    publication = bench.publish()
    registration = bench.etcd.registered[0]
    registration.state = state
    assert publication.drain(2.5) is ended
    assert bench.etcd.waits == waits
    assert registration.states == [RankState.DRAINING]
    assert registration.reasons
    assert ("closes while 2 loads still read" in caplog.text) is not ended
    bench.assert_nothing_is_left()


def test_a_rank_that_cannot_say_that_it_drains_closes_all_the_same(bench: Bench) -> None:
    publication = bench.publish()
    bench.etcd.registered[0].problem = EtcdUnavailable("away")
    assert publication.drain(2.5)
    assert bench.etcd.waits == []
    bench.assert_nothing_is_left()


def test_a_time_to_drain_that_is_none_is_refused_by_its_name(bench: Bench) -> None:
    publication = bench.publish()
    with pytest.raises(InvalidField) as caught:
        publication.drain(-1.0)
    assert caught.value.details["field"] == "timeout_s"
    assert bench.etcd.registered[0].states == []
