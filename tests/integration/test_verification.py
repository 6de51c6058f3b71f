"""Never a wrong byte: digests, one version across ranks, and replicas that are only used where they
hold the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from engine_loader import (
    CudaIpcEngine,
    Engine,
    InProcessEngine,
    LoadOptions,
    Progress,
    Publication,
    Shard,
    load,
    load_instance,
    publish,
)
from engine_loader.errors import (
    DigestMismatch,
    DigestsMissing,
    SourceLost,
    TornRead,
    VersionUnavailable,
)
from engine_loader.publishing import offering
from engine_registry import ModelIdentity, Registry
from tests.integration.test_load import Tensors, assert_equal, like, weights
from tests.support.engines import Interrupted
from tests.support.host_gpus import HostGpus
from tests.support.launches import Origin as LaunchOrigin
from tests.support.launches import origins, the_origin, words
from tests.support.options import for_publish


def offer(
    stack: ExitStack,
    registry: Registry,
    tensors: Tensors,
    engine: Engine | None = None,
    **fields: object,
) -> Publication:
    defaults: dict[str, object] = {
        "instance": "a",
        "rank": 0,
        "world_size": 1,
        "model": ModelIdentity("m"),
        "digests": True,
    }
    engine = engine or stack.enter_context(InProcessEngine())
    return stack.enter_context(
        publish(registry, engine, tensors=tensors, **for_publish({**defaults, **fields}))
    )


# -- digests
# --------------------------------------------------------------------------------------------------


def test_digests_of_all_tensors_are_compared_also_after_an_update(
    stack: ExitStack, registry: Registry
) -> None:
    source, destination = weights(), like(weights())
    publication = offer(stack, registry, source)
    load(
        registry,
        InProcessEngine(),
        "a",
        rank=0,
        tensors=destination,
        options=LoadOptions(verify="digest"),
    )
    with publication.update():
        source["layer.0"].mul_(2)
    report = load(
        registry,
        InProcessEngine(),
        "a",
        rank=0,
        tensors=destination,
        options=LoadOptions(verify="digest"),
    )
    assert (report.version, report.nbytes) == (
        1,
        load(registry, InProcessEngine(), "a", rank=0, tensors=destination).nbytes,
    )
    assert_equal(destination, source)


def test_one_flipped_bit_is_found_and_the_tensor_named(
    stack: ExitStack, registry: Registry
) -> None:
    source, destination = weights(), like(weights())
    offer(stack, registry, source)
    source["layer.1"].view(torch.uint8).flatten()[1234] ^= 4
    with pytest.raises(
        DigestMismatch, match=r"1 of 8 tensors are not what /engines/a/0 published.*layer\.1"
    ) as caught:
        load(
            registry,
            InProcessEngine(),
            "a",
            rank=0,
            tensors=destination,
            options=LoadOptions(verify="digest"),
        )
    assert caught.value.details["tensors"] == ["layer.1"]
    assert sorted(caught.value.details["complete"]) == sorted(set(source) - {"layer.1"})


def test_a_source_without_digests_is_refused_before_a_byte_moves_or_passed_over(
    stack: ExitStack, registry: Registry
) -> None:
    offer(stack, registry, weights(), digests=False)
    destination = like(weights())
    with pytest.raises(
        DigestsMissing,
        match="/engines/a/0 offers no digests: publish its weights with `digests=True`",
    ):
        load(
            registry,
            InProcessEngine(),
            "a",
            rank=0,
            tensors=destination,
            options=LoadOptions(verify="digest"),
        )
    assert not destination["layer.0"].any()
    offer(stack, registry, weights(), instance="b")
    report = load(
        registry,
        InProcessEngine(),
        ["a", "b"],
        rank=0,
        tensors=destination,
        options=LoadOptions(verify="digest"),
    )
    assert [share.name for share in report.shares] == ["/engines/b/0"]


@pytest.mark.parametrize("digests", [True, False])
def test_sources_of_one_name_and_version_that_hold_different_weights_are_not_mixed(
    stack: ExitStack, registry: Registry, digests: bool
) -> None:
    """As after a checkpoint was replaced without a new revision."""
    for instance, value in (("a", 1.0), ("b", 2.0)):
        tensors = {f"t{n}": torch.full((1 << 20,), value) for n in range(40)}
        offer(stack, registry, tensors, instance=instance, digests=digests)
    destination = {f"t{n}": torch.zeros(1 << 20) for n in range(40)}
    report = load(registry, InProcessEngine(), ["a", "b"], rank=0, tensors=destination)
    (share,) = report.shares
    value = {"/engines/a/0": 1.0, "/engines/b/0": 2.0}[share.name]
    assert all(bool((tensor == value).all()) for tensor in destination.values())


def test_sources_whose_digests_prove_that_they_hold_the_same_are_read_from_at_once(
    stack: ExitStack, registry: Registry
) -> None:
    for instance in ("a", "b"):
        offer(stack, registry, weights(), instance=instance, digests=True)
    contents = {registry.resolve(instance)[0].content for instance in ("a", "b")}
    report = load(registry, InProcessEngine(), ["a", "b"], rank=0, tensors=like(weights()))
    assert contents == {report.content}
    assert sorted(share.name for share in report.shares) == ["/engines/a/0", "/engines/b/0"]


# -- digests that cost next to nothing
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def mapping(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> Callable[[], CudaIpcEngine]:
    """Makes engines that sum up what they read, with the host's memory in the place of GPUs."""
    monkeypatch.setattr(offering, "algorithm_for", lambda _: "multilinear_64")
    monkeypatch.setattr(offering, "check_can_be_served", lambda *_: None)
    return lambda: stack.enter_context(CudaIpcEngine(gpus=HostGpus()))


@pytest.mark.parametrize(("digests", "verified"), [(None, True), (True, True), (False, False)])
def test_digests_are_compared_by_default_where_both_sides_sum_them_up(
    stack: ExitStack,
    registry: Registry,
    mapping: Callable[[], CudaIpcEngine],
    digests: bool | None,
    verified: bool,
) -> None:
    source, destination = weights(), like(weights())
    with offer(stack, registry, source, engine=mapping(), digests=digests) as publication:
        for _ in range(2):
            report = load(registry, mapping(), "a", rank=0, tensors=destination)
            assert_equal(destination, source)
            assert (report.verified, report.outlived) == (verified, ())
            with publication.update():
                source["layer.0"].add_(1)


def test_they_are_compared_although_rows_and_columns_come_from_several_ranks(
    stack: ExitStack, registry: Registry, mapping: Callable[[], CudaIpcEngine]
) -> None:
    whole = torch.arange(64 * 48, dtype=torch.float32).view(64, 48)
    for rank, columns in enumerate(whole.chunk(2, 1)):
        offer(
            stack,
            registry,
            {"w": columns.contiguous()},
            engine=mapping(),
            digests=None,
            rank=rank,
            world_size=2,
            shards={"w": Shard((64, 48), (0, 24 * rank))},
        )
    ours = {"w": torch.zeros(64, 48)}
    report = load(registry, mapping(), "a", tensors=ours, shards={"w": Shard((64, 48), (0, 0))})
    assert torch.equal(ours["w"], whole)
    assert report.verified
    assert (report.read_nbytes, report.reads) == (report.nbytes, 2)


def test_a_part_of_what_a_rank_holds_is_proven_by_its_header_alone(
    stack: ExitStack, registry: Registry, mapping: Callable[[], CudaIpcEngine]
) -> None:
    whole = torch.arange(64 * 48, dtype=torch.float32).view(64, 48)
    shards = {"w": Shard((64, 48), (0, 0))}
    offer(stack, registry, {"w": whole}, engine=mapping(), digests=None, shards=shards)
    ours = {"w": torch.zeros(64, 12)}
    part = {"w": Shard((64, 48), (0, 12))}
    report = load(registry, mapping(), "a", tensors=ours, shards=part)
    assert torch.equal(ours["w"], whole[:, 12:24])
    assert not report.verified
    assert report.read_nbytes == report.nbytes == ours["w"].nbytes
    with pytest.raises(DigestsMissing):
        load(
            registry,
            mapping(),
            "a",
            tensors=ours,
            shards=part,
            options=LoadOptions(verify="digest"),
        )


def test_weights_that_were_changed_outside_of_an_update_are_a_mismatch_by_default(
    stack: ExitStack, registry: Registry, mapping: Callable[[], CudaIpcEngine]
) -> None:
    source, destination = weights(), like(weights())
    offer(stack, registry, source, engine=mapping(), digests=None)
    source["layer.1"].add_(1)
    with pytest.raises(DigestMismatch) as caught:
        load(registry, mapping(), "a", rank=0, tensors=destination)
    assert caught.value.details["tensors"] == ["layer.1"]


def test_an_engine_that_sums_up_nothing_compares_and_publishes_no_digests_by_default(
    stack: ExitStack, registry: Registry
) -> None:
    source, destination = weights(), like(weights())
    offer(stack, registry, source, digests=None)
    assert registry.manifest(registry.ranks("a")[0]).digests is None
    report = load(registry, InProcessEngine(), "a", rank=0, tensors=destination)
    assert not report.verified


# -- versions
# --------------------------------------------------------------------------------------------------


def test_a_version_that_is_asked_for_is_loaded_or_refused(
    stack: ExitStack, registry: Registry
) -> None:
    publication = offer(stack, registry, weights(), version=7)
    assert (
        load(
            registry,
            InProcessEngine(),
            "a",
            rank=0,
            tensors=like(weights()),
            options=LoadOptions(version=7),
        ).version
        == 7
    )
    with publication.update():
        pass
    with pytest.raises(VersionUnavailable, match="version 7 is not served: a has 8"):
        load(
            registry,
            InProcessEngine(),
            "a",
            rank=0,
            tensors=like(weights()),
            options=LoadOptions(version=7),
        )


def test_ranks_loaded_together_are_of_one_version_though_the_source_goes_on_in_between(
    stack: ExitStack, registry: Registry
) -> None:
    sources = [weights(rank) for rank in range(2)]
    publications = [
        offer(stack, registry, source, rank=rank, world_size=2)
        for rank, source in enumerate(sources)
    ]
    updates = [1]

    def go_on(_: Progress) -> None:
        if updates and updates.pop():
            with ExitStack() as together:
                for publication in publications:
                    together.enter_context(publication.update())
                for source in sources:
                    source["layer.0"].add_(1)

    wanted = [like(source) for source in sources]
    reports = load_instance(
        registry,
        InProcessEngine(),
        "a",
        tensors=dict(enumerate(wanted)),
        options=LoadOptions(progress=lambda progress: go_on(progress)),
    )
    assert [reports[rank].version for rank in range(2)] == [1, 1]
    for found, source in zip(wanted, sources, strict=True):
        assert_equal(found, source)


def test_ranks_that_never_stay_at_one_content_are_an_error(
    stack: ExitStack, registry: Registry
) -> None:
    sources = [weights(rank) for rank in range(2)]
    publications = [
        offer(stack, registry, source, rank=rank, world_size=2)
        for rank, source in enumerate(sources)
    ]

    ready = registry.ready

    def ready_after_an_update(*args: Any, **named: Any) -> object:
        with ExitStack() as together:
            for publication in publications:
                together.enter_context(publication.update())
            for source in sources:
                source["layer.0"].add_(1)
        return ready(*args, **named)

    registry.ready = ready_after_an_update  # type: ignore[method-assign, assignment]
    with pytest.raises(TornRead, match="between one rank and the next, in 5 tries"):
        load_instance(
            registry,
            InProcessEngine(),
            "a",
            tensors={rank: like(weights(rank)) for rank in range(2)},
        )


def test_an_instance_that_starts_again_between_two_ranks_gives_one_launch(
    stack: ExitStack, registry: Registry
) -> None:
    """Under the same version, with other weights."""

    def launch(number: int) -> ExitStack:
        running = ExitStack()
        for rank in range(2):
            tensors = {"w": words(LaunchOrigin(number, 0, rank), 1000)}
            offer(running, registry, tensors, rank=rank, world_size=2, digests=False)
        return running

    running = [launch(1)]
    ready, calls = registry.ready, 0

    def ready_after_a_restart(*args: Any, **named: Any) -> object:
        """Asked once for the instance, and once for each rank."""
        nonlocal calls
        calls += 1
        if calls == 3:
            running.pop().close()
            running.append(stack.enter_context(launch(2)))
        return ready(*args, **named)

    registry.ready = ready_after_a_restart  # type: ignore[method-assign, assignment]
    found = {rank: {"w": torch.zeros(1000, dtype=torch.int64)} for rank in range(2)}
    reports = load_instance(registry, InProcessEngine(), "a", tensors=found, timeout_s=5)
    assert calls > 3
    assert {rank: the_origin(origins(found[rank]["w"])) for rank in range(2)} == {
        rank: LaunchOrigin(2, 0, rank) for rank in range(2)
    }
    assert [reports[rank].version for rank in range(2)] == [0, 0]


# -- replicas within an instance
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stated", [True, False])
def test_a_replica_along_dp_is_read_from_only_if_the_manifests_say_that_it_holds_the_same(
    stack: ExitStack, registry: Registry, stated: bool
) -> None:
    tensors = {f"t{n}": torch.rand(1 << 20) for n in range(40)}
    shards = {name: Shard((2 << 20,), (0,)) for name in tensors} if stated else None
    for rank in range(2):
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        offer(
            stack,
            registry,
            copies,
            rank=rank,
            world_size=2,
            topology={"dp": (rank, 2)},
            shards=shards,
        )
    destination = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    report = load(registry, InProcessEngine(), "a", rank=1, tensors=destination, shards=shards)
    assert {share.name for share in report.shares if share.nbytes} == (
        {"/engines/a/0", "/engines/a/1"} if stated else {"/engines/a/1"}
    )
    assert_equal_tensors(destination, tensors)


def assert_equal_tensors(found: Tensors, wanted: Tensors) -> None:
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("stated", [True, False])
def test_however_many_replicas_along_dp_hold_something_else_the_rank_itself_is_read(
    stack: ExitStack, registry: Registry, stated: bool
) -> None:
    for rank in range(6):
        shards = {"experts": Shard((6 << 10,), (rank << 10,))} if stated else None
        source = {"experts": torch.full((1 << 10,), float(rank))}
        offer(
            stack,
            registry,
            source,
            rank=rank,
            world_size=6,
            topology={"dp": (rank, 6)},
            shards=shards,
        )
    for rank in range(6):
        shards = {"experts": Shard((6 << 10,), (rank << 10,))} if stated else None
        destination = {"experts": torch.zeros(1 << 10)}
        report = load(
            registry,
            InProcessEngine(),
            "a",
            rank=rank,
            tensors=destination,
            shards=shards,
            options=LoadOptions(max_sources=1),
        )
        assert [share.name for share in report.shares] == [f"/engines/a/{rank}"]
        assert bool((destination["experts"] == rank).all())


def test_a_rank_lost_on_the_way_is_lost_though_it_has_replicas_along_dp_that_state_no_boxes(
    stack: ExitStack, registry: Registry
) -> None:
    publications = [
        offer(stack, registry, weights(), rank=rank, world_size=2, topology={"dp": (rank, 2)})
        for rank in range(2)
    ]
    engine = Interrupted(lambda: registry.evict(registry.ranks("a")[1]))
    with pytest.raises(SourceLost, match="/engines/a/1"):
        load(registry, engine, "a", rank=1, tensors=like(weights()))
    assert publications[0].record.rank == 0


def test_of_more_sources_than_are_wanted_only_so_many_are_read(
    stack: ExitStack, registry: Registry
) -> None:
    for instance in "abc":
        offer(stack, registry, weights(), instance=instance)
    stack.enter_context(registry.pull(registry.ranks("a")[0]) or ExitStack())
    report = load(
        registry,
        InProcessEngine(),
        ["a", "b", "c"],
        rank=0,
        tensors=like(weights()),
        options=LoadOptions(max_sources=2),
    )
    # a has a reader already
    assert {share.name for share in report.shares} == {
        "/engines/b/0",
        "/engines/c/0",
    }


def test_a_replica_along_dp_with_another_box_is_left_out(
    stack: ExitStack, registry: Registry
) -> None:
    """Expert parallelism spread over dp: equal shapes, different experts."""
    for rank in range(2):
        shards = {"experts": Shard((2 << 20,), (rank << 20,))}
        source = {"experts": torch.full((1 << 20,), float(rank))}
        offer(
            stack,
            registry,
            source,
            rank=rank,
            world_size=2,
            topology={"dp": (rank, 2)},
            shards=shards,
        )
    destination = {"experts": torch.zeros(1 << 20)}
    report = load(
        registry,
        InProcessEngine(),
        "a",
        rank=1,
        tensors=destination,
        shards={"experts": Shard((2 << 20,), (1 << 20,))},
    )
    assert [share.name for share in report.shares] == ["/engines/a/1"]
    assert bool((destination["experts"] == 1).all())
