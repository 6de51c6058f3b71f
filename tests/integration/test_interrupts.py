"""Ctrl-C at any moment, and more than once: what is left is nothing, or a handle that `close` still
works on.
"""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from types import FrameType
from typing import Any

import pytest

from engine_registry import (
    RankState,
    Registration,
    RegistrationState,
    Registry,
    failpoints,
    uninterrupted,
)
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd
from engine_registry.registration import handle
from engine_registry.registration.keeper import link, process
from tests.integration.conftest import Processes
from tests.support.processes.interrupt import keepers
from tests.support.ranks import register
from tests.support.waiting import wait_until

TTL_S = 60.0  # a key that goes only with its lease is left for as long
OURS = {module.__file__ for module in (handle, link, uninterrupted)}

# Of its own: a keeper that an earlier test left, whose etcd is gone, goes on for minutes.
INSTANCE = f"interrupted-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def etcd(shared_etcd: LocalEtcd, namespace: str) -> Iterator[Etcd]:
    with closing(Etcd(EtcdConfig(parse_endpoints(shared_etcd.endpoint), namespace))) as etcd:
        yield etcd


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["registration", "publication"])
@pytest.mark.slow
def test_a_rank_interrupted_at_random_moments_is_gone_once_it_is_closed(
    processes: Processes, kind: str
) -> None:
    # Without coverage: an interrupt inside of coverage would leave its locks held.
    program = ["-X", "faulthandler", "-m", "tests.support.processes.interrupt", kind, "0", "60"]
    process = processes.start(*program, COVERAGE_PROCESS_CONFIG="")
    try:
        out, err = process.communicate(timeout=250)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # says where every thread is
        pytest.fail(process.communicate()[1])
    assert process.returncode == 0, err
    lives = out.splitlines()
    assert len(lives) == 60
    assert [life for life in lives if not life.endswith(": []")] == []


@contextmanager
def interrupted_at(*lines: int) -> Iterator[list[str]]:
    """Raises KeyboardInterrupt before the n-th line of ours that this thread runs, for each number
    given; yields where.
    """
    wanted, hit, count = set(lines), list[str](), 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in OURS:
            return None
        if event == "line":
            count += 1
            if count in wanted:
                hit.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield hit
    finally:
        sys.settrace(before)


def at_every_line(call: Callable[[], object], gaps: Sequence[int]) -> Iterator[str]:
    """Interrupts the call at its first line, its second, and so on, each time again a few lines
    later; until it has none left.
    """
    for first in range(1, 1_000):
        for gap in gaps:
            with suppress(KeyboardInterrupt), interrupted_at(first, first + gap) as hit:
                call()
            if not hit:
                return
            yield ", ".join(hit)
    raise AssertionError("the call has no end")


def threads() -> list[str]:
    return [
        each.name for each in threading.enumerate() if each.name.endswith(f"/engines/{INSTANCE}/0")
    ]


def wait_until_gone(etcd: Etcd) -> None:
    """All that works on a registration, and then what it has left."""
    gc.collect()
    wait_until(lambda: not threads() and not keepers(INSTANCE))
    assert etcd.snapshot("/").items == ()


@pytest.fixture
def _short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a handle that nobody has is missed soon."""
    monkeypatch.setattr(process, "LOOK_S", 0.02)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("_short_looks")
@pytest.mark.slow
def test_a_register_that_is_interrupted_at_any_line_leaves_nothing(
    registry: Registry, etcd: Etcd
) -> None:
    made: list[Registration] = []
    where = []
    for hit in at_every_line(
        lambda: made.append(register(registry, INSTANCE, ttl_s=TTL_S)), gaps=[0, 1]
    ):
        where.append(hit)
        assert made == [], where
        wait_until_gone(etcd)
    made.pop().withdraw()
    wait_until_gone(etcd)
    assert {"__init__", "uninterrupted"} <= {line.partition(":")[0] for line in where}


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_close_that_is_interrupted_at_any_line_is_finished_by_the_next(
    registry: Registry, etcd: Etcd
) -> None:
    for first in itertools.count(1):
        registration = register(registry, INSTANCE, ttl_s=TTL_S)
        where = []
        for line in (first, 1, 2):
            with suppress(KeyboardInterrupt), interrupted_at(line, line + 1) as hit:
                registration.close()
            where.append(hit)
        registration.close()
        assert registration.state is RegistrationState.CLOSED, where
        assert registration.withdrawn, where
        wait_until_gone(etcd)
        if not where[0]:
            break
    assert first > 5


def test_a_close_that_is_interrupted_half_way_is_not_done_until_the_next_has_waited_for_it(
    registry: Registry, etcd: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    caught = threading.Event()

    def press() -> None:
        if threading.current_thread().name not in threads():
            return  # what an earlier test has left ends now
        os.kill(os.getpid(), signal.SIGINT)
        assert caught.wait(60)

    monkeypatch.setitem(failpoints.ACTIONS, "session.before_abandon", press)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        registration = register(registry, INSTANCE, ttl_s=TTL_S)
        with pytest.raises(KeyboardInterrupt):
            registration.close()
        half_way = registration.state
    finally:
        caught.set()
        signal.signal(signal.SIGINT, before)
    registration.close()
    assert (half_way, registration.state) == (
        RegistrationState.REGISTERED,
        RegistrationState.CLOSED,
    )
    wait_until_gone(etcd)


def test_a_change_that_is_interrupted_leaves_the_registration_in_order(registry: Registry) -> None:
    with register(registry, INSTANCE) as registration:
        for version in itertools.count(1):
            with suppress(KeyboardInterrupt), interrupted_at(version, version + 1) as hit:
                registration.update(version=version)
            registration.update(state=RankState.UPDATING)
            assert registry.ranks(INSTANCE) == (registration.record,)
            if not hit:
                break
        assert registration.record.version == version > 5
