"""Ranks that publish later than they load, and other tensors: the others wait for these, and one
process reads.
"""

from __future__ import annotations

import gc
import json
import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine_loader import (
    Engine,
    InProcessEngine,
    PublishOptions,
    Seeded,
    load,
)
from engine_loader.errors import LoaderError, TensorsUnusable
from engine_registry import RankState, Registry
from engine_registry.errors import EtcdUnavailable, InvalidField, RankConflict
from engine_registry.etcd.local import LocalEtcd
from engine_registry.schema.keys import ELECTIONS
from tests.integration import test_seeding
from tests.integration.conftest import Processes, line_of
from tests.integration.test_seeding import KEY, NBYTES, Starts, events, go_on, ready, runs
from tests.integration.test_start_without_etcd import lazily
from tests.support.processes.start import content
from tests.support.ranks import register
from tests.support.waiting import wait_until


def raw() -> dict[str, torch.Tensor]:
    return {"raw": torch.zeros(64)}


def packed(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"packed": torch.full((8, 8), float(value))}


class OwnLoader:
    """Counts its calls, and fills nothing that anybody sees."""

    def __init__(self) -> None:
        self.calls = 0
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.calls += 1


def start(
    registry: Registry,
    engine: Engine,
    fallback: Callable[[], object],
    instance: str = "a",
    tensors: Any = packed,
    **options: Any,
) -> Seeded:
    later = {"publish_later": True, **options}
    return test_seeding.start(registry, engine, fallback, instance, tensors, **later)


def lead(registry: Registry) -> int:
    """The lease of the turn to read; 0 where nobody has it."""
    found = registry._etcd.get(KEY)
    return found.lease_id if found is not None else 0


# -- many
# --------------------------------------------------------------------------------------------------


@pytest.mark.timeout(350)
def test_of_8_processes_that_publish_what_they_make_of_their_weights_one_reads(
    processes: Processes, registry: Registry, tmp_path: Any
) -> None:
    outcomes, started = [], start_processes(processes, tmp_path, 8)
    with ThreadPoolExecutor(8) as pool:
        lines = {pool.submit(line_of, process): process for process in started.processes}
        first = _first(lines)
        assert first.result() == "has read\n"
        assert registry.ranks(f"rank-{started.processes.index(lines[first])}")[0].state is (
            RankState.LOADING
        )
        go_on(lines.pop(first))
        outcomes = [json.loads(each.result()) for each in lines]
    assert all(one["right"] for one in outcomes)
    assert [(one["source"], one["read"], one["reason"]) for one in outcomes] == [
        ("peers", 0, "")
    ] * 7
    wait_until(lambda: len(ready(registry)) == 8)
    wait_until(lambda: registry._etcd.snapshot(ELECTIONS).items == ())


def test_when_a_process_is_killed_before_it_publishes_another_reads(
    processes: Processes, registry: Registry, tmp_path: Any
) -> None:
    started = start_processes(processes, tmp_path, 1)
    (first,) = started.processes
    assert line_of(first) == "has read\n"
    assert lead(registry)
    second = start_processes(processes, tmp_path, 1, "next").processes[0]
    first.kill()
    assert line_of(second) == "has read\n"
    go_on(second)
    assert json.loads(line_of(second))["read"] == NBYTES
    assert ready(registry) == ["next-0"]


def start_processes(processes: Processes, folder: Any, count: int, name: str = "rank") -> Starts:
    path = folder / "model.safetensors"
    save_file(content(), path)
    return Starts(processes, path, *(f"{name}-{each}" for each in range(count)), how="later")


def _first(lines: dict[Future[str], Any]) -> Future[str]:
    wait_until(lambda: any(future.done() for future in lines), 200)
    return next(future for future in lines if future.done())


# -- the turn
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def engines() -> Any:
    with ExitStack() as stack:
        yield [stack.enter_context(InProcessEngine()) for _ in range(3)]


def test_the_others_wait_until_it_publishes_and_load_that(
    registry: Registry, engines: list[Engine]
) -> None:
    own, made = OwnLoader(), packed()
    with start(registry, engines[0], own) as seeded, ThreadPoolExecutor() as pool:
        assert (seeded.source, seeded.publication, seeded.unpublished) == ("disk", None, None)
        assert registry.ranks("a")[0].state is RankState.LOADING
        assert lead(registry)
        waiting = pool.submit(start, registry, engines[1], own, "b", lambda: made)
        publication = seeded.publish(packed(5.0))
        assert publication is seeded.publication
        assert publication is not None
        with waiting.result(60) as other:
            assert (other.source, other.reason) == ("peers", "")
            assert torch.equal(made["packed"], packed(5.0)["packed"])
            assert other.publication is None
            other.publish(made)
            assert sorted(ready(registry)) == ["a", "b"]
    assert own.calls == 1
    assert registry._etcd.snapshot("/").items == ()


def test_the_turn_lasts_while_one_registration_takes_the_place_of_another(
    registry: Registry, engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    with start(registry, engines[0], OwnLoader()) as seeded:
        before, register = lead(registry), Registry.register

        def registering(self: Registry, **options: Any) -> Any:
            seen.append((lead(registry), ready(registry), registry.ranks("a")))
            return register(self, **options)

        monkeypatch.setattr(Registry, "register", registering)
        seeded.publish(packed())
        ((between, whole, ranks),) = seen
        assert between not in (0, before)
        assert (whole, ranks) == ([], ())
        assert lead(registry) == 0


def test_a_rank_that_never_publishes_gives_its_turn_up_in_time(
    registry: Registry, engines: list[Engine], caplog: pytest.LogCaptureFixture
) -> None:
    own = OwnLoader()
    with start(registry, engines[0], own, timeout_s=1) as seeded:
        with start(registry, engines[1], own, "b") as other:
            assert (other.source, other.reason) == ("disk", "")
            assert own.calls == 2
            assert registry.ranks("a") == ()
        assert events(caplog, "turn_expired") == ["WARNING"]
        assert seeded.publish(packed()) is not None  # late is better than never
        assert ready(registry) == ["a"]


def test_a_rank_that_is_closed_gives_its_turn_up(registry: Registry, engines: list[Engine]) -> None:
    seeded = start(registry, engines[0], OwnLoader())
    assert lead(registry)
    seeded.close()
    seeded.close()
    assert registry._etcd.snapshot("/").items == ()


def test_tensors_that_are_refused_leave_it_its_turn_and_other_errors_do_not(
    registry: Registry, engines: list[Engine]
) -> None:
    with start(registry, engines[0], OwnLoader()) as seeded:
        with pytest.raises(TensorsUnusable):
            seeded.publish({"packed": torch.zeros(4, 4)[:, 1]})
        assert lead(registry)
        engines[0].close()
        with pytest.raises(LoaderError):
            seeded.publish(packed())
        assert registry._etcd.snapshot("/").items == ()


def test_an_error_of_the_function_leaves_nothing(registry: Registry, engines: list[Engine]) -> None:
    def fail() -> None:
        raise OSError("no checkpoint")

    with pytest.raises(OSError, match="no checkpoint"):
        start(registry, engines[0], fail)
    assert registry._etcd.snapshot("/").items == ()


# -- what is published
# --------------------------------------------------------------------------------------------------


def test_what_was_loaded_may_be_published_later_too_with_other_options(
    registry: Registry, engines: list[Engine]
) -> None:
    tensors = packed()
    with start(
        registry, engines[0], lambda: tensors["packed"].fill_(3), tensors=tensors, version=4
    ) as seeded:
        seeded.publish(tensors, options=PublishOptions(digests=True))
        assert seeded.publication is not None
        assert seeded.publication.version == 4
        found = packed()
        load(registry, engines[1], "a", rank=0, tensors=found)
        assert torch.equal(found["packed"], packed(3)["packed"])


def test_weights_of_peers_keep_their_version_and_get_a_new_content(
    registry: Registry, engines: list[Engine]
) -> None:
    with runs(registry, engines[0], "runs", packed(2), options=PublishOptions(version=9)) as source:
        tensors = packed()
        with start(registry, engines[1], OwnLoader(), tensors=tensors, version=4) as seeded:
            assert ready(registry) == ["runs"]
            publication = seeded.publish(tensors)
            assert publication is not None
            assert publication.version == 9
            assert publication.content != source.content


def test_a_rank_is_published_once(registry: Registry, engines: list[Engine]) -> None:
    with start(registry, engines[0], OwnLoader()) as seeded:
        seeded.publish(packed())
        with pytest.raises(LoaderError, match="published already"):
            seeded.publish(packed())
    tensors = packed()
    with (
        start(registry, engines[0], OwnLoader(), tensors=tensors, publish_later=False) as seeded,
        pytest.raises(LoaderError, match="published already"),
    ):
        seeded.publish(tensors)


def test_a_rank_that_somebody_has_is_refused_before_it_reads(
    registry: Registry, engines: list[Engine]
) -> None:
    own = OwnLoader()
    with register(registry, "a"), pytest.raises(RankConflict):
        start(registry, engines[0], own)
    assert own.calls == 0


def test_no_memory_of_the_loaded_tensors_is_kept(registry: Registry, engines: list[Engine]) -> None:
    tensors = raw()
    freed = threading.Event()
    weakref.finalize(tensors["raw"], freed.set)
    with start(registry, engines[0], OwnLoader(), tensors=tensors) as seeded:
        del tensors
        gc.collect()
        assert freed.is_set()
        seeded.publish(packed())


def test_a_function_for_both_needs_to_publish_later(
    registry: Registry, engines: list[Engine]
) -> None:
    with pytest.raises(InvalidField, match="publish_later=True") as caught:
        start(registry, engines[0], OwnLoader(), publish_later=False)
    assert caught.value.details["field"] == "tensors"


def test_an_error_of_the_function_that_makes_tensors_for_peers_passes_through(
    registry: Registry, engines: list[Engine]
) -> None:
    def fail() -> dict[str, torch.Tensor]:
        raise OSError("no memory")

    with (
        runs(registry, engines[0], "runs", packed(2)),
        pytest.raises(OSError, match="no memory"),
    ):
        start(registry, engines[1], OwnLoader(), tensors=fail)
    assert registry._etcd.snapshot("/").items == ()


# -- without etcd
# --------------------------------------------------------------------------------------------------


def test_without_etcd_nothing_is_published_until_it_is_back(
    own_etcd: LocalEtcd, engines: list[Engine], caplog: pytest.LogCaptureFixture
) -> None:
    own_etcd.kill()
    with lazily(own_etcd.endpoint) as registry, caplog.at_level(logging.WARNING):
        with start(registry, engines[0], OwnLoader(), without_etcd_s=0.5) as seeded:
            assert seeded.publish(packed()) is None
            assert type(seeded.unpublished) is EtcdUnavailable
            own_etcd.start()
            assert seeded.publish(packed()) is not None
            assert [seeded.unpublished] == [None]
            assert ready(registry) == ["a"]


def test_an_etcd_that_goes_away_before_the_publication_comes_back_with_the_rank(
    own_etcd: LocalEtcd, engines: list[Engine]
) -> None:
    with lazily(own_etcd.endpoint) as registry:
        with start(registry, engines[0], OwnLoader()) as seeded:
            own_etcd.kill()
            assert seeded.publish(packed()) is None
            own_etcd.start()
            wait_until(lambda: registry.ranks("a") == ())  # the keeper withdraws what was loading
            assert seeded.publish(packed()) is not None
            assert ready(registry) == ["a"]
