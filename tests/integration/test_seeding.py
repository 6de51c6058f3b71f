"""Ranks that start together, from files that one of them reads; holders, peers and etcd that go
away meanwhile.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import engine_loader.files.disk
from engine_loader import (
    Engine,
    InProcessEngine,
    MooncakeEngine,
    Publication,
    PublishOptions,
    Seeded,
    Shard,
    load_or_seed,
    publish,
)
from engine_loader.errors import Cancelled, WeightsFileInvalid, WeightsMismatch
from engine_loader.starting.lock import lock_name
from engine_registry import ModelIdentity, RankState, Registry
from engine_registry.errors import InvalidField, RankConflict
from engine_registry.etcd.local import LocalEtcd
from engine_registry.schema.keys import ELECTIONS, election_key
from engine_registry.schema.keyvalue import Put
from engine_registry.watching.election import Election
from tests.integration.conftest import Processes, line_of
from tests.support.engines import Interrupted
from tests.support.options import for_start
from tests.support.processes.start import MODEL, content
from tests.support.ranks import register
from tests.support.waiting import wait_until

NBYTES = 4 << 20
KEY = election_key(lock_name(MODEL, 0, 1, {}))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(content(), path)
    return path


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in content().items()}


def start(
    registry: Registry,
    engine: Engine,
    fallback: Path | Callable[[], object],
    instance: str = "a",
    tensors: Any = None,
    **options: Any,
) -> Seeded:
    arguments: dict[str, Any] = {
        "rank": 0,
        "world_size": 1,
        "instance": instance,
        "fallback": fallback,
        "timeout_s": 60,
        **options,
    }
    return load_or_seed(
        registry, engine, MODEL, zeros() if tensors is None else tensors, **for_start(arguments)
    )


def runs(
    registry: Registry,
    engine: Engine,
    instance: str,
    tensors: Mapping[str, torch.Tensor] | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    options: PublishOptions | None = None,
) -> Publication:
    """A rank of the model that has these weights, or the right ones."""
    return publish(
        registry,
        engine,
        instance=instance,
        rank=rank,
        world_size=world_size,
        tensors=content() if tensors is None else tensors,
        model=MODEL,
        options=options or PublishOptions(),
    )


def ready(registry: Registry) -> list[str]:
    return [
        one.instance
        for status in registry.instances()
        for one in status.records
        if one.state is RankState.READY
    ]


def events(caplog: pytest.LogCaptureFixture, event: str) -> list[str]:
    """The levels at which it was logged."""
    return [
        record.levelname
        for record in caplog.records
        if getattr(record, "fields", {}).get("event") == event
    ]


@contextmanager
def somebody_reads(registry: Registry) -> Iterator[Election]:
    with registry.election(lock_name(MODEL, 0, 1, {})) as election:
        wait_until(lambda: election.leading)
        yield election


class Starts:
    """Processes that start together."""

    def __init__(self, processes: Processes, path: Path, *names: str, how: str = "") -> None:
        self.processes = [
            processes.start("-m", "tests.support.processes.start", name, str(path), how)
            for name in names
        ]
        for process in self.processes:
            assert line_of(process) == "starts\n"
        for process in self.processes:
            go_on(process)

    def outcomes(self) -> list[dict[str, Any]]:
        return [outcome(process) for process in self.processes]


def held(processes: Processes, path: Path, how: str = "held") -> subprocess.Popen[str]:
    """One that leads, and has not read a byte yet."""
    (process,) = Starts(processes, path, "first", how=how).processes
    assert line_of(process) == "reading\n"
    return process


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def outcome(process: subprocess.Popen[str]) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(line_of(process))
    assert answer["right"]
    return answer


# -- one reads
# --------------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_of_32_processes_one_reads_the_disk(
    processes: Processes, registry: Registry, path: Path
) -> None:
    outcomes = Starts(processes, path, *(f"start-{number}" for number in range(32))).outcomes()
    assert sorted(one["read"] for one in outcomes) == [0] * 31 + [NBYTES]
    assert sorted(one["source"] for one in outcomes) == ["disk"] + ["peers"] * 31
    assert [one["reason"] for one in outcomes] == [""] * 32
    assert len(ready(registry)) == 32  # all are sources in turn
    assert registry._etcd.snapshot(ELECTIONS).items == ()


def test_when_the_one_that_reads_is_killed_another_takes_over(
    processes: Processes, registry: Registry, path: Path
) -> None:
    first = held(processes, path)
    found, record = registry._etcd.get(KEY), registry._etcd.get("/engines/first/0")
    assert found is not None
    assert record is not None
    assert found.lease_id == record.lease_id  # its keeper sees the death, no lease has to expire
    assert registry.ranks("first")[0].state is RankState.LOADING
    others = Starts(processes, path, "next-0", "next-1", "next-2")
    first.kill()
    outcomes = others.outcomes()
    assert sorted(one["read"] for one in outcomes) == [0, 0, NBYTES]
    assert sorted(ready(registry)) == ["next-0", "next-1", "next-2"]


def test_those_that_wait_load_as_soon_as_it_is_complete(
    processes: Processes, registry: Registry, path: Path
) -> None:
    first = held(processes, path)
    with ThreadPoolExecutor() as pool, ExitStack() as stack:
        engines = [stack.enter_context(MooncakeEngine("127.0.0.1")) for _ in range(4)]
        waiting = [
            pool.submit(start, registry, engine, path, f"later-{number}")
            for number, engine in enumerate(engines)
        ]
        go_on(first)
        assert outcome(first)["source"] == "disk"
        for future in waiting:
            seeded = stack.enter_context(future.result(60))
            assert (seeded.source, seeded.reason) == ("peers", "")
            assert seeded.report is not None
            assert seeded.report.nbytes == NBYTES
            assert seeded.publication is not None
            assert seeded.publication.record.instance.startswith("later-")
            assert seeded.publication.record.state is RankState.READY


def test_one_that_fails_to_read_lets_the_next_try(
    registry: Registry, path: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(path.read_bytes()[:-1])
    with InProcessEngine() as engine:
        with pytest.raises(WeightsFileInvalid, match=r"broken\.safetensors"):
            start(registry, engine, broken)
        with pytest.raises(WeightsMismatch):
            start(registry, engine, path, tensors={"t0": torch.zeros(3)})
        assert registry._etcd.snapshot("/").items == ()
        with start(registry, engine, path) as seeded:
            assert seeded.source == "disk"


def test_another_rank_or_revision_waits_for_nobody(registry: Registry, path: Path) -> None:
    with somebody_reads(registry), InProcessEngine() as engine:
        with start(registry, engine, path, rank=1, world_size=2) as seeded:
            assert (seeded.source, seeded.reason) == ("disk", "")
        assert (
            lock_name(MODEL, 0, 1, {})
            != lock_name(ModelIdentity("start", "r2"), 0, 1, {})
            != lock_name(MODEL, 0, 1, {"tp": (0, 1)})
        )


# -- from peers
# --------------------------------------------------------------------------------------------------


def test_where_a_rank_like_it_runs_nothing_is_read_from_disk(
    registry: Registry, path: Path
) -> None:
    """Whether or not the rest of its instance is there."""
    with InProcessEngine() as first, InProcessEngine() as second:
        with (
            runs(registry, first, "part", rank=1, world_size=2),
            start(registry, second, path / "is not there", rank=1, world_size=2) as seeded,
        ):
            assert seeded.source == "peers"
        assert ready(registry) == []


def test_tensors_that_say_which_part_they_are_come_from_ranks_of_another_layout(
    registry: Registry, path: Path
) -> None:
    whole, half = content()["t0"], torch.zeros(NBYTES // 16, dtype=torch.uint8)
    all_of_it, second_half = (
        {"t0": Shard(tuple(whole.shape), (offset,))} for offset in (0, NBYTES // 16)
    )
    with InProcessEngine() as first, InProcessEngine() as second:
        with (
            publish(
                registry,
                first,
                instance="one",
                rank=0,
                world_size=1,
                tensors={"t0": whole},
                shards=all_of_it,
                model=MODEL,
            ),
            start(
                registry,
                second,
                path,
                "two",
                {"t0": half},
                rank=1,
                world_size=2,
                shards=second_half,
            ) as seeded,
        ):
            assert (seeded.source, seeded.reason) == ("peers", "")
            assert torch.equal(half, whole[NBYTES // 16 :])


def test_peers_that_fail_in_the_middle_are_replaced_by_the_disk_and_it_is_reported(
    registry: Registry, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = zeros()
    with InProcessEngine() as engine:
        source = runs(registry, engine, "dies")
        with (
            Interrupted(source.close) as second,
            caplog.at_level(logging.WARNING),
            start(registry, second, path, tensors=tensors) as seeded,
        ):
            assert seeded.source == "disk"
            assert seeded.reason.startswith("SourceLost: ")
            assert seeded.report is None
            assert all(torch.equal(tensors[name], tensor) for name, tensor in content().items())
            assert ready(registry) == ["a"]
    assert events(caplog, "peers_failed") == ["WARNING"]


def test_peers_with_other_tensors_are_an_error_in_the_log_and_the_disk_is_read(
    registry: Registry, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with InProcessEngine() as first, InProcessEngine() as second, caplog.at_level(logging.WARNING):
        with (
            runs(registry, first, "odd", {"t0": torch.zeros(3)}),
            start(registry, second, path) as seeded,
        ):
            assert seeded.source == "disk"
            assert seeded.reason.startswith("WeightsMismatch: ")
    assert events(caplog, "peers_failed") == ["ERROR"]


def test_peers_out_of_reach_are_replaced_by_the_disk(registry: Registry, path: Path) -> None:
    with InProcessEngine("here") as first, InProcessEngine("there") as second:
        with (
            runs(registry, first, "far"),
            start(registry, second, path) as seeded,
        ):
            assert seeded.source == "disk"
            assert seeded.reason.startswith("SourceUnreachable: ")


def test_those_whose_peers_fail_still_read_the_disk_one_after_another(
    registry: Registry,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    read, led = engine_loader.files.disk.DiskRead.read, []
    with InProcessEngine() as first, InProcessEngine() as second, ThreadPoolExecutor() as pool:
        with runs(registry, first, "odd", {"t0": torch.zeros(3)}):
            with somebody_reads(registry) as election:

                def seen(*args: Any) -> object:
                    led.append(election.leading)
                    return read(*args)

                monkeypatch.setattr(engine_loader.files.disk.DiskRead, "read", seen)
                waiting = pool.submit(start, registry, second, path)
                wait_until(lambda: bool(events(caplog, "peers_failed")))
            with waiting.result(60) as seeded:
                assert seeded.source == "disk"
    assert led == [False]


def test_a_rank_that_somebody_has_is_refused_before_anything_is_read(
    registry: Registry, path: Path
) -> None:
    with InProcessEngine() as engine, register(registry, "a"):
        tensors = zeros()
        with pytest.raises(RankConflict):
            start(registry, engine, path, tensors=tensors)
        assert not any(tensor.any() for tensor in tensors.values())
    assert registry._etcd.snapshot(ELECTIONS).items == ()


def test_what_cannot_be_is_refused(registry: Registry, path: Path) -> None:
    with InProcessEngine() as engine:
        for wrong in ({"rank": 1}, {"timeout_s": -1}, {"instance": "a b"}):
            with pytest.raises(InvalidField):
                start(registry, engine, path, **wrong)


# -- waiting ends
# --------------------------------------------------------------------------------------------------


def test_a_wait_can_be_cancelled(registry: Registry, path: Path) -> None:
    cancel = threading.Event()
    with somebody_reads(registry), InProcessEngine() as engine, ThreadPoolExecutor() as pool:
        waiting = pool.submit(start, registry, engine, path, cancel=cancel)
        cancel.set()
        with pytest.raises(Cancelled):
            waiting.result(60)
    assert registry._etcd.snapshot("/").items == ()


def test_ctrl_c_ends_a_wait(processes: Processes, registry: Registry, path: Path) -> None:
    with somebody_reads(registry):
        (waiting,) = Starts(processes, path, "waits").processes
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(60) != 0
        assert ready(registry) == []


def test_a_start_that_does_not_wait_loads_from_peers_all_the_same(
    registry: Registry, path: Path
) -> None:
    with InProcessEngine() as first, InProcessEngine() as second:
        with (
            runs(registry, first, "runs"),
            start(registry, second, path, timeout_s=0) as seeded,
        ):
            assert seeded.source == "peers"


def test_a_start_that_has_waited_long_enough_reads_alone(
    registry: Registry, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        somebody_reads(registry) as election,
        InProcessEngine() as engine,
        start(registry, engine, path, timeout_s=0.2) as seeded,
    ):
        assert seeded.source == "disk"
        assert seeded.reason == "no peer had the weights within 0.2 s"
        assert ready(registry) == ["a"]
        assert election.leading
    assert events(caplog, "seeding_alone") == ["WARNING"]


# -- etcd goes away
# --------------------------------------------------------------------------------------------------


def connect(etcd: LocalEtcd) -> Registry:
    return Registry.connect(etcd.endpoint, timeout_s=3)


def test_without_etcd_the_disk_is_read_and_the_rank_is_not_published(
    own_etcd: LocalEtcd, path: Path
) -> None:
    tensors = zeros()
    with connect(own_etcd) as registry, InProcessEngine() as engine:
        own_etcd.kill()
        with start(registry, engine, path, tensors=tensors, without_etcd_s=0.5) as seeded:
            assert (seeded.source, seeded.publication) == ("disk", None)
            assert "could not be reached" in seeded.reason
            assert seeded.unpublished is not None
            assert all(torch.equal(tensors[name], tensor) for name, tensor in content().items())


def test_an_etcd_that_goes_away_and_comes_back_while_one_reads_costs_no_second_read(
    own_etcd: LocalEtcd, path: Path
) -> None:
    reading, go_on, reads = threading.Event(), threading.Event(), []
    read = engine_loader.files.disk.DiskRead.read

    def slowly(*args: Any) -> object:
        reads.append(args)
        reading.set()
        assert go_on.wait(60)
        return read(*args)

    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(engine_loader.files.disk.DiskRead, "read", slowly)
        registry = stack.enter_context(connect(own_etcd))
        engines = [stack.enter_context(InProcessEngine()) for _ in range(2)]
        pool = stack.enter_context(ThreadPoolExecutor())
        first = pool.submit(start, registry, engines[0], path, "first")
        assert reading.wait(60)
        second = pool.submit(start, registry, engines[1], path, "second")
        own_etcd.kill()
        own_etcd.start()
        go_on.set()
        with first.result(60) as one, second.result(60) as other:
            assert (one.source, other.source) == ("disk", "peers")
        assert len(reads) == 1


# -- the lead
# --------------------------------------------------------------------------------------------------


def test_a_lead_that_a_registration_keeps_ends_with_it_and_not_it_with_the_lead(
    registry: Registry,
) -> None:
    with (
        registry.election("x") as first,
        registry.election("x") as second,
        register(registry, "a") as registration,
    ):
        leader, other = (first, second) if _first_to_lead(first, second) else (second, first)
        assert leader.keep_with(registration.record)
        wait_until(lambda: not leader._campaign._thread.is_alive())
        assert leader.leading
        assert not other.keep_with(registration.record)
        registration.withdraw()
        wait_until(lambda: other.leading)
    with register(registry, "b") as registration, registry.election("x") as third:
        wait_until(lambda: third.leading)
        assert third.keep_with(registration.record)
        third.close()
        assert registry._etcd.get(election_key("x")) is None
        assert ready(registry) == ["b"]


def _first_to_lead(first: Election, second: Election) -> bool:
    wait_until(lambda: first.leading or second.leading)
    return first.leading


@pytest.mark.parametrize("whose", ["another registration", "nobody"])
def test_a_lead_is_kept_by_no_other_registration(registry: Registry, whose: str) -> None:
    with registry.election("x") as election, register(registry, "a") as registration:
        wait_until(lambda: election.leading)
        record = registration.record
        if whose == "nobody":
            registration.withdraw()
        else:
            registry.evict(registry.ranks("a")[0])
            registry._etcd.commit([], [Put(record.key, b"{", registry._etcd.grant(60))])
        assert not election.keep_with(record)
        assert election.leading
