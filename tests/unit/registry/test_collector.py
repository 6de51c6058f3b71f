"""The collector stands still for the length of the work, and goes on afterwards, whoever else asked
for the same meanwhile.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from engine_registry.collector import collector_paused


@pytest.fixture(autouse=True)
def _collector() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


@collector_paused
def running() -> bool:
    return gc.isenabled()


@collector_paused
def nested() -> tuple[bool, bool, bool]:
    return gc.isenabled(), running(), gc.isenabled()


def test_nothing_is_collected_during_the_work_and_again_afterwards() -> None:
    assert not running()
    assert gc.isenabled()
    assert nested() == (False, False, False)
    assert gc.isenabled()


def test_it_goes_on_after_work_that_fails() -> None:
    @collector_paused
    def fail() -> None:
        raise ValueError("at work")

    with pytest.raises(ValueError, match="at work"):
        fail()
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    assert not running()
    assert not gc.isenabled()


def test_it_goes_on_when_work_overlaps_in_several_threads() -> None:
    inside, leave = threading.Barrier(3), threading.Barrier(3)

    @collector_paused
    def work() -> None:
        inside.wait(60)
        leave.wait(60)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait(60)
    assert not gc.isenabled()
    leave.wait(60)
    for thread in threads:
        thread.join(60)
    assert gc.isenabled()
