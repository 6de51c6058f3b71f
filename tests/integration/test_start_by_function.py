"""Ranks that start from peers, or by a function of their engine in place of files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine_loader import InProcessEngine, load
from engine_loader.errors import Cancelled, TensorsUnusable
from engine_registry import RankState, Registry
from engine_registry.errors import InvalidField
from engine_registry.schema.keys import ELECTIONS
from tests.integration.conftest import Processes
from tests.integration.test_seeding import (
    KEY,
    NBYTES,
    Starts,
    go_on,
    held,
    outcome,
    ready,
    runs,
    somebody_reads,
    start,
    zeros,
)
from tests.support.engines import Interrupted
from tests.support.processes.start import content


class Broken(Exception):
    """What an engine's own loader raises."""


def filling(tensors: Mapping[str, torch.Tensor]) -> Callable[[], None]:
    def fill() -> None:
        for name, tensor in content().items():
            tensors[name].copy_(tensor)

    return fill


def right(tensors: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensors[name], tensor) for name, tensor in content().items())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(content(), path)
    return path


# -- processes
# --------------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_of_8_processes_that_start_one_calls_its_function(
    processes: Processes, registry: Registry, path: Path
) -> None:
    names = [f"start-{number}" for number in range(8)]
    outcomes = Starts(processes, path, *names, how="call").outcomes()
    assert sorted(one["read"] for one in outcomes) == [0] * 7 + [NBYTES]
    assert sorted(one["source"] for one in outcomes) == ["disk"] + ["peers"] * 7
    assert [one["reason"] for one in outcomes] == [""] * 8
    assert sorted(ready(registry)) == names
    assert registry._etcd.snapshot(ELECTIONS).items == ()


def test_a_function_that_lets_no_thread_run_keeps_its_turn(
    processes: Processes, registry: Registry, path: Path
) -> None:
    first = held(processes, path, "held-call")
    found, record = registry._etcd.get(KEY), registry._etcd.get("/engines/first/0")
    assert found is not None
    assert record is not None
    assert found.lease_id == record.lease_id  # of its keeper, which is another process
    assert registry.ranks("first")[0].state is RankState.LOADING
    others = Starts(processes, path, "next-0", "next-1", how="call")
    go_on(first)
    assert outcome(first)["source"] == "disk"
    assert [one["read"] for one in others.outcomes()] == [0, 0]


def test_when_a_process_is_killed_in_its_function_another_takes_over(
    processes: Processes, registry: Registry, path: Path
) -> None:
    first = held(processes, path, "held-call")
    others = Starts(processes, path, "next-0", "next-1", how="call")
    first.kill()
    assert sorted(one["read"] for one in others.outcomes()) == [0, NBYTES]
    assert sorted(ready(registry)) == ["next-0", "next-1"]


# -- what the function does
# --------------------------------------------------------------------------------------------------


def test_its_own_error_passes_through_and_the_next_reads_at_once(registry: Registry) -> None:
    error, called, go = Broken("no checkpoint"), threading.Event(), threading.Event()

    def fail() -> None:
        called.set()
        assert go.wait(60)
        raise error

    tensors = zeros()
    with InProcessEngine() as first, InProcessEngine() as second, ThreadPoolExecutor() as pool:
        failing = pool.submit(start, registry, first, fail, "first")
        assert called.wait(60)
        waiting = pool.submit(start, registry, second, filling(tensors), "second", tensors)
        go.set()
        assert failing.exception(60) is error
        with waiting.result(60) as seeded:
            assert (seeded.source, seeded.reason) == ("disk", "")
            assert right(tensors)
            assert ready(registry) == ["second"]
    assert registry._etcd.snapshot("/").items == ()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, InvalidField])
def test_whatever_it_raises_nothing_stays_behind(
    registry: Registry, kind: type[BaseException]
) -> None:
    def fail() -> None:
        raise kind("of the engine")

    tensors = zeros()
    with InProcessEngine() as engine:
        with pytest.raises(kind, match="of the engine"):
            start(registry, engine, fail, tensors=tensors)
        assert registry._etcd.snapshot("/").items == ()
        with start(registry, engine, filling(tensors), tensors=tensors) as seeded:
            assert seeded.source == "disk"


def test_a_tensor_that_it_gives_other_memory_is_named_and_nothing_is_published(
    registry: Registry,
) -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    kept = torch.zeros(4)

    def replace() -> None:
        weight.data = torch.ones(4)

    with InProcessEngine() as engine:
        with pytest.raises(TensorsUnusable, match=r"`fallback` gave .* weight: .*in place"):
            start(registry, engine, replace, tensors={"weight": weight, "kept": kept})
        assert registry._etcd.snapshot("/").items == ()


def test_it_overwrites_what_peers_have_half_filled(registry: Registry) -> None:
    tensors = zeros()
    with InProcessEngine() as engine:
        source = runs(registry, engine, "dies")
        with (
            Interrupted(source.close) as second,
            start(registry, second, filling(tensors), tensors=tensors) as seeded,
        ):
            assert seeded.source == "disk"
            assert seeded.reason.startswith("SourceLost: ")
            assert right(tensors)


def test_it_is_not_called_where_peers_are(registry: Registry) -> None:
    def fail() -> None:
        raise Broken("called")

    with InProcessEngine() as first, InProcessEngine() as second:
        with (
            runs(registry, first, "runs"),
            start(registry, second, fail) as seeded,
        ):
            assert seeded.source == "peers"


def test_a_cancelled_start_ends_when_it_returns(registry: Registry) -> None:
    cancel = threading.Event()
    with InProcessEngine() as engine:
        with pytest.raises(Cancelled, match="`fallback`"):
            start(registry, engine, cancel.set, cancel=cancel)
    assert registry._etcd.snapshot("/").items == ()


def test_a_rank_that_may_not_wait_any_longer_calls_it_alone(registry: Registry) -> None:
    tensors = zeros()
    with (
        somebody_reads(registry),
        InProcessEngine() as engine,
        start(registry, engine, filling(tensors), tensors=tensors, timeout_s=0.2) as seeded,
    ):
        assert (seeded.source, seeded.reason) == ("disk", "no peer had the weights within 0.2 s")
        assert right(tensors)


# -- what is published then
# --------------------------------------------------------------------------------------------------


def test_digests_prove_the_content_of_what_it_has_read(registry: Registry) -> None:
    contents, versions = [], []
    for digests in (True, True, False, False):
        tensors = zeros()
        with (
            InProcessEngine() as engine,
            start(
                registry, engine, filling(tensors), tensors=tensors, digests=digests, version=7
            ) as seeded,
        ):
            assert seeded.publication is not None
            contents.append(seeded.publication.content)
            versions.append(seeded.publication.version)
            load(registry, engine, "a", rank=0, tensors=zeros())
    assert contents[0] == contents[1]
    assert len(set(contents)) == 3
    assert versions == [7] * 4


def test_what_is_no_fallback_is_refused_at_once(registry: Registry) -> None:
    with InProcessEngine() as engine, pytest.raises(InvalidField) as caught:
        start(registry, engine, 5)  # type: ignore[arg-type]
    assert caught.value.details["field"] == "fallback"
