"""Weights are published and loaded: real etcd, real transfer engine, sources that change, die and
are replaced meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

from engine_loader import (
    Destination,
    Engine,
    InProcessEngine,
    LoadOptions,
    MooncakeEngine,
    Pace,
    Progress,
    Publication,
    PublishOptions,
    Replica,
    Shard,
    load,
    publish,
)
from engine_loader.engines.base import read
from engine_loader.errors import (
    Cancelled,
    LoaderError,
    SourceLost,
    TensorsUnusable,
    TornRead,
    WeightsMismatch,
)
from engine_loader.planning.plan import ReadOp
from engine_loader.publishing.header import Header
from engine_registry import ModelIdentity, RankState, Region, Registry
from engine_registry.errors import InstanceIncomplete, InstanceNotFound, InvalidField, RankConflict
from tests.integration.conftest import Processes, line_of
from tests.support.engines import Interrupted
from tests.support.options import for_publish
from tests.support.waiting import wait_until

Tensors = dict[str, torch.Tensor]


def weights(seed: int = 0) -> Tensors:
    """A bit of everything: dtypes, a tied pair, views of one storage, a scalar, an empty tensor."""
    generator = torch.Generator().manual_seed(seed)
    storage = torch.rand(4096, generator=generator)
    embedding = torch.rand(64, 32, generator=generator).to(torch.bfloat16)
    return {
        "embed": embedding,
        "head": embedding,
        "layer.0": storage[:1024].view(32, 32),
        "layer.1": storage[1024:2048].view(32, 32),
        "scale": torch.tensor(2.5 + seed, dtype=torch.float64),
        "bytes": torch.randint(0, 255, (3, 5), generator=generator, dtype=torch.uint8),
        "fp8": torch.rand(16, generator=generator).to(torch.float8_e4m3fn),
        "empty": torch.empty(0, 7),
    }


def like(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Zeroed tensors of the same names, shapes, dtypes and ties."""
    made: dict[int, torch.Tensor] = {}
    return {
        name: made.setdefault(tensor.data_ptr(), torch.zeros_like(tensor))
        if tensor.numel()
        else torch.zeros_like(tensor)
        for name, tensor in tensors.items()
    }


def assert_equal(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        ours, theirs = (t.reshape(-1).view(torch.uint8).tolist() for t in (found[name], tensor))
        assert ours == theirs, name


def assert_untouched(tensors: Tensors) -> None:
    assert all(not tensor.reshape(-1).view(torch.uint8).any() for tensor in tensors.values())


def offer(registry: Registry, engine: Engine, tensors: Tensors, **fields: object) -> Publication:
    options = {
        "instance": "a",
        "rank": 0,
        "world_size": 1,
        "model": ModelIdentity("m"),
        "ttl_s": 3.0,
        **fields,
    }
    return publish(registry, engine, tensors=tensors, **for_publish(options))


def test_a_load_fills_every_tensor_byte_for_byte_and_reports_it(
    registry: Registry, new_engine: Callable[[], Engine]
) -> None:
    source, destination, seen = weights(), like(weights()), list[Progress]()
    with offer(registry, new_engine(), source, version=4):
        report = load(
            registry,
            new_engine(),
            "a",
            rank=0,
            tensors=destination,
            options=LoadOptions(progress=seen.append),
        )
    assert_equal(destination, source)
    assert (report.instance, report.rank, report.version, report.tensors, report.retries) == (
        "a",
        0,
        4,
        8,
        0,
    )
    assert report.nbytes == sum(tensor.nbytes for name, tensor in source.items() if name != "head")
    assert seen[-1] == Progress(report.nbytes, report.nbytes)


def test_a_destination_is_filled_as_often_as_it_is_loaded_into(
    registry: Registry, new_engine: Callable[[], Engine]
) -> None:
    source, engine = weights(), new_engine()
    destination = Destination(like(source))
    assert list(destination) == list(source)
    assert len(destination) == len(source)
    with offer(registry, new_engine(), source) as publication:
        for version in range(3):
            load(registry, engine, "a", rank=0, tensors=destination)
            assert_equal(dict(destination), source)
            assert publication.record.version == version
            with publication.update():
                source["scale"].add_(1)
        with pytest.raises(InvalidField, match="leave `shards` out"):
            load(registry, engine, "a", rank=0, tensors=destination, shards={})


def test_a_load_that_is_cancelled_before_it_reads_says_that_nothing_is_complete(
    registry: Registry, new_engine: Callable[[], Engine]
) -> None:
    cancel = threading.Event()
    cancel.set()
    with offer(registry, new_engine(), weights()), pytest.raises(Cancelled) as cancelled:
        load(
            registry,
            new_engine(),
            "a",
            rank=0,
            tensors=like(weights()),
            options=LoadOptions(cancel=cancel),
        )
    assert cancelled.value.details["complete"] == []


def test_a_publication_says_which_version_and_content_it_serves(
    registry: Registry, new_engine: Callable[[], Engine]
) -> None:
    source = weights()
    with offer(registry, new_engine(), source, version=4) as publication:
        first = publication.content
        report = load(registry, new_engine(), "a", rank=0, tensors=like(source))
        assert (publication.version, publication.content) == (4, report.content)
        assert (
            repr(publication)
            == f"<Publication /engines/a/0: ready, version 4, content {first[:8]}…>"
        )
        with publication.update():
            source["scale"].add_(1)
        assert publication.version == 5
        assert publication.content != first
    assert repr(publication).startswith("<Publication /engines/a/0: closed, version 5")


def test_two_ranks_are_resolved_together_and_each_loader_gets_its_own(
    registry: Registry, new_engine: Callable[[], Engine]
) -> None:
    sources = [weights(1), weights(2)]
    with ExitStack() as stack:
        stack.enter_context(offer(registry, new_engine(), sources[0], rank=0, world_size=2))
        with pytest.raises(InstanceIncomplete, match="missing rank 1 of 2"):
            load(registry, new_engine(), "a", rank=0, tensors=like(sources[0]), timeout_s=0.1)
        stack.enter_context(offer(registry, new_engine(), sources[1], rank=1, world_size=2))
        for rank, source in enumerate(sources):
            destination = like(source)
            load(registry, new_engine(), "a", rank=rank, tensors=destination)
            assert_equal(destination, source)
        with pytest.raises(InvalidField, match="ranks 0 to 1"):
            load(registry, new_engine(), "a", rank=2, tensors=like(sources[0]))


def test_a_load_from_other_processes_over_the_network(
    registry: Registry, processes: Processes
) -> None:
    for rank in range(2):
        process = processes.start(
            "-m", "tests.support.processes.weights", "a", str(rank), "2", str(rank + 10)
        )
        assert line_of(process) == "published\n"
    for rank in range(2):
        destination = like(weights())
        with MooncakeEngine("127.0.0.1", protocol="tcp") as engine:
            load(registry, engine, "a", rank=rank, tensors=destination)
        assert_equal(destination, weights(rank + 10))


def test_all_differences_are_reported_in_one_error_and_nothing_is_read(
    registry: Registry, new_engine: Callable[[], Engine]
) -> None:
    destination = like(weights())
    del destination["bytes"]
    destination |= {
        "extra": torch.zeros(2),
        "layer.0": torch.zeros(16, 64),
        "head": torch.zeros(64, 32, dtype=torch.float16),
        "fp8": torch.zeros(16, dtype=torch.float8_e5m2),
    }
    with offer(registry, new_engine(), weights()), pytest.raises(WeightsMismatch) as refused:
        load(registry, new_engine(), "a", rank=0, tensors=destination)
    assert sorted(refused.value.details["problems"]) == [
        "bytes: in the source, but not here",
        "extra: here, but not in the source",
        "fp8: dtype float8_e4m3fn in the source, float8_e5m2 here",
        "head: dtype bfloat16 in the source, float16 here",
        "layer.0: shape 32x32 in the source, 16x64 here",
    ]
    assert "\n" not in str(refused.value)
    assert_untouched(destination)


def test_a_rank_of_another_box_of_the_same_shape_is_a_mismatch(
    registry: Registry, new_engine: Callable[[], Engine]
) -> None:
    half = torch.rand(4, 4)
    left, right = Shard((8, 4), (0, 0)), Shard((8, 4), (4, 0))
    with offer(registry, new_engine(), {"w": half}, shards={"w": left}):
        destination = {"w": torch.zeros(4, 4)}
        with pytest.raises(
            WeightsMismatch, match=r"no rank of the source holds the box at \[4, 0\]"
        ):
            load(registry, new_engine(), "a", rank=0, tensors=destination, shards={"w": right})
        assert_untouched(destination)
        load(registry, new_engine(), "a", rank=0, tensors=destination, shards={"w": left})
        assert_equal(destination, {"w": half})


@pytest.mark.parametrize("rank", [None, 0])
def test_a_load_of_no_tensors_is_refused(
    registry: Registry, new_engine: Callable[[], Engine], rank: int | None
) -> None:
    with pytest.raises(InvalidField) as caught:
        load(registry, new_engine(), "a", rank=rank, tensors={})
    assert str(caught.value) == "there are no tensors to fill: name one at least in `tensors`"


def test_tensors_without_a_box_need_a_rank(
    registry: Registry, new_engine: Callable[[], Engine]
) -> None:
    with pytest.raises(
        InvalidField,
        match="w does not say which part of the whole it is: say it in `shards`, or say from which "
        "`rank`",
    ):
        load(
            registry,
            new_engine(),
            "a",
            tensors={"v": torch.zeros(1), "w": torch.zeros(1)},
            shards={"v": Shard((1,), (0,))},
        )


def test_tensors_that_cannot_be_read_as_they_lie_are_all_named_and_nothing_is_registered(
    registry: Registry, new_engine: Callable[[], Engine]
) -> None:
    tensors = {
        "good": torch.zeros(4),
        "part": torch.rand(4, 8)[:, :3],
        "meta": torch.empty(2, device="meta"),
    }
    with pytest.raises(
        TensorsUnusable, match=r"part: .*call \.contiguous.*meta: is on the meta device"
    ):
        offer(registry, new_engine(), tensors)
    assert registry.instances() == ()


def test_memory_is_given_back_when_registering_fails(
    registry: Registry, new_engine: Callable[[], Engine]
) -> None:
    engine, source = new_engine(), weights()
    with offer(registry, engine, source), pytest.raises(RankConflict):
        offer(registry, engine, weights(1))
    with offer(registry, engine, source):
        pass
    _assert_all_regions_are_free(engine, source)


def test_after_closing_nobody_can_read_the_memory(
    registry: Registry, new_engine: Callable[[], Engine]
) -> None:
    engine, reader, source = new_engine(), new_engine(), weights()
    with offer(registry, engine, source):
        pass
    _assert_all_regions_are_free(engine, source)
    target = torch.zeros(64, dtype=torch.uint8)
    reader.register(Region(target.data_ptr(), 64))
    with pytest.raises(LoaderError):
        read(
            reader,
            engine.session_id,
            ReadOp("a", source["embed"].data_ptr(), target.data_ptr(), 64),
        )
    with pytest.raises(InstanceNotFound):
        load(registry, reader, "a", rank=0, tensors=like(source), timeout_s=0.0)


def _assert_all_regions_are_free(engine: Engine, tensors: Tensors) -> None:
    """Memory that still were registered would be a separate part."""
    storage = tensors["layer.0"].untyped_storage()
    around = Region(storage.data_ptr() - 1, storage.nbytes() + 2)
    assert engine.register(around) == (around,)
    engine.unregister(around)


def test_weights_that_changed_in_place_are_loaded_in_their_new_version(
    registry: Registry, new_engine: Callable[[], Engine]
) -> None:
    source, destination = weights(), like(weights())
    with offer(registry, new_engine(), source) as publication:
        with publication.update():
            assert registry.ranks("a")[0].state is RankState.UPDATING
            with pytest.raises(InstanceIncomplete, match="rank 0 updating"):
                load(registry, new_engine(), "a", rank=0, tensors=destination, timeout_s=0.0)
            source["layer.0"].add_(1)
        report = load(registry, new_engine(), "a", rank=0, tensors=destination)
    assert report.version == 1
    assert_equal(destination, source)


def test_an_update_that_fails_leaves_the_weights_unloadable_until_one_succeeds(
    registry: Registry, new_engine: Callable[[], Engine]
) -> None:
    destination = like(weights())
    with offer(registry, new_engine(), weights()) as publication:
        with pytest.raises(ZeroDivisionError), publication.update():
            raise ZeroDivisionError
        with pytest.raises(InstanceIncomplete, match="updating"):
            load(registry, new_engine(), "a", rank=0, tensors=destination, timeout_s=0.0)
        with publication.update():
            pass
        assert load(registry, new_engine(), "a", rank=0, tensors=destination).version == 1


def test_an_update_that_ends_while_the_rank_drains_invites_no_new_readers(
    registry: Registry,
) -> None:
    source = weights()
    with offer(registry, InProcessEngine(), source) as publication, ThreadPoolExecutor(1) as pool:
        ticket = registry.pull(registry.ranks("a")[0])
        assert ticket is not None
        with ticket:
            with publication.update():
                drained = pool.submit(publication.drain, 20.0)
                wait_until(lambda: registry.ranks("a")[0].state is RankState.DRAINING)
            assert (registry.ranks("a")[0].version, registry.ranks("a")[0].state) == (
                1,
                RankState.DRAINING,
            )
        assert drained.result(60)
    assert registry.ranks("a") == ()


def test_a_publication_that_closes_during_an_update_stays_closed_when_the_update_ends(
    registry: Registry,
) -> None:
    publication = offer(registry, InProcessEngine(), weights())
    header = publication._header
    with publication.update():
        publication.close()
        assert header.read() is None
    assert header.read() is None
    assert registry.ranks("a") == ()


def test_weights_that_nobody_reads_any_more_are_not_updated(registry: Registry) -> None:
    with offer(registry, InProcessEngine(), weights()) as publication:
        pass
    with pytest.raises(LoaderError, match="is closed"), publication.update():
        raise AssertionError("the block must not run")


def test_an_update_during_the_read_is_noticed_and_the_read_repeated(registry: Registry) -> None:
    source, destination = weights(), like(weights())
    with offer(registry, InProcessEngine(), source) as publication:

        def step() -> None:
            with publication.update():
                source["layer.0"].add_(1)

        report = load(registry, Interrupted(step), "a", rank=0, tensors=destination)
    assert (report.version, report.retries) == (1, 1)
    assert_equal(destination, source)


def test_a_source_that_changes_during_every_try_ends_in_a_torn_read(registry: Registry) -> None:
    with offer(registry, InProcessEngine(), weights()) as publication:

        def step() -> None:
            with publication.update():
                pass

        with pytest.raises(TornRead, match="changed while they were being read"):
            load(registry, Interrupted(step, always=True), "a", rank=0, tensors=like(weights()))


def test_a_source_evicted_during_the_read_does_not_count_as_loaded(registry: Registry) -> None:
    with offer(registry, InProcessEngine(), weights()):
        engine = Interrupted(lambda: registry.evict(registry.ranks("a")[0]))
        with pytest.raises(SourceLost, match="evicted"):
            load(registry, engine, "a", rank=0, tensors=like(weights()))


def test_another_process_at_the_address_of_the_source_is_not_taken_for_it(
    registry: Registry,
) -> None:
    """As when a process dies, another gets its port, and etcd still has the old record."""
    engine = InProcessEngine()
    with offer(registry, engine, weights()) as publication:
        publication._header.write(Header("0" * 32, 0, "0" * 32))
        destination = like(weights())
        with pytest.raises(SourceLost, match="not the process that registered"):
            load(registry, InProcessEngine(), "a", rank=0, tensors=destination)
        assert_untouched(destination)


def test_a_source_that_dies_between_resolve_and_read_is_reported_with_what_was_lost(
    registry: Registry, processes: Processes
) -> None:
    process = processes.start("-m", "tests.support.processes.weights", "a", "0", "1", "0")
    assert line_of(process) == "published\n"
    ready = registry.ready("a", 10)
    process.kill()
    process.wait()
    registry.ready = lambda *_, **__: ready  # type: ignore[method-assign]
    with (
        MooncakeEngine("127.0.0.1", protocol="tcp") as engine,
        pytest.raises(SourceLost, match="/engines/a/0") as lost,
    ):
        load(registry, engine, "a", rank=0, tensors=like(weights()), timeout_s=5)
    assert "load again" in str(lost.value)


def test_the_next_instance_is_used_when_the_first_is_lost(registry: Registry) -> None:
    source, destination = weights(5), like(weights())
    with pytest.raises(InstanceNotFound, match="'a' or 'b' is not registered"):
        load(registry, InProcessEngine(), ["a", "b"], rank=0, tensors=destination, timeout_s=0.0)
    with (
        offer(registry, InProcessEngine(), weights(4), instance="a"),
        offer(registry, InProcessEngine(), source, instance="b"),
    ):
        engine = Interrupted(lambda: registry.evict(registry.ranks("a")[0]))
        report = load(registry, engine, ["a", "b"], rank=0, tensors=destination)
    assert report.instance == "b"
    assert_equal(destination, source)


def test_a_lost_source_names_the_tensors_that_are_whole(registry: Registry) -> None:
    source = {
        f"t{number}": torch.full((8 << 20,), number, dtype=torch.float32) for number in range(4)
    }
    publication = offer(registry, InProcessEngine(delay_s=0.05), source)

    destination = {name: torch.zeros_like(tensor) for name, tensor in source.items()}
    with pytest.raises(SourceLost, match=r"[123] of 4 tensors are whole") as lost:
        load(
            registry,
            Interrupted(publication.close, at=28),
            "a",
            rank=0,
            tensors=destination,
            options=LoadOptions(pace=Pace(4 << 20, 2)),
        )
    complete = lost.value.details["complete"]
    assert 1 <= len(complete) < 4
    assert_equal(
        {name: destination[name] for name in complete}, {name: source[name] for name in complete}
    )


def test_loading_into_tensors_that_are_published_from_the_same_engine(registry: Registry) -> None:
    """As a replica does that serves others and takes an update from its peer."""
    engine, ours = InProcessEngine(), weights(1)
    with (
        offer(registry, InProcessEngine(), weights(2), instance="peer"),
        offer(registry, engine, ours, instance="ours") as mine,
    ):
        with mine.update():
            load(registry, engine, "peer", rank=0, tensors=ours)
        fresh = like(weights())
        load(registry, InProcessEngine(), "ours", rank=0, tensors=fresh)
    assert_equal(fresh, weights(2))


def test_a_replica_publishes_the_values_that_it_is_given(registry: Registry) -> None:
    replica = Replica("copy", options=PublishOptions(values={"step": 3}))
    found = like(weights())
    with offer(registry, InProcessEngine(), weights()), InProcessEngine() as engine:
        report = load(registry, engine, "a", rank=0, tensors=found, publish=replica)
        assert report.publication is not None
        with report.publication as publication:
            assert registry.manifest(publication.record).values == {"step": 3}
