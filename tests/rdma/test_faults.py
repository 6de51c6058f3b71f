"""Sources and cables that fail in the middle of a load over RDMA."""

from __future__ import annotations

import signal

import pytest

from tests.rdma.guest import Guest
from tests.rdma.hosts import NBYTES, RDMA, Load, finish, source
from tests.rdma.switch import Switch

pytestmark = pytest.mark.rdma

PATIENCE_S = 15.0
IMPATIENT = ("--stall", "5", "--patience", str(PATIENCE_S))
SOON_S = 100.0  # a load that ends late on an emulated, busy machine; one that hangs takes longer


def half_loaded(guest: Guest, instances: str, *options: str) -> Load:
    load = Load(guest, instances, NBYTES, "--pause", *(options or IMPATIENT))
    load.wait_for_pause()
    return load


def test_the_bytes_of_a_killed_source_come_from_the_other(guests: list[Guest]) -> None:
    here, there = guests
    lost, other = source(there, "a", launch=1), source(here, "b", launch=1)
    load = half_loaded(here, "a,b")
    lost.signal(signal.SIGKILL)
    load.go_on()
    outcome = load.outcome()
    assert outcome.get("origin") == [1, 0, 0], outcome
    assert "a/0" in outcome["lost"]
    finish(load.program, other)


def test_a_load_from_a_killed_source_alone_ends_soon(guests: list[Guest]) -> None:
    here, there = guests
    lost = source(there, "a")
    load = half_loaded(here, "a")
    lost.signal(signal.SIGKILL)
    load.go_on()
    outcome = load.outcome(SOON_S)
    assert outcome.get("error") in {"SourceLost", "SourceUnreachable"}, outcome
    finish(load.program)


def test_a_source_that_stopped_before_the_first_contact_does_not_hold_up_the_other(
    guests: list[Guest],
) -> None:
    here, there = guests
    stopped, other = source(there, "a", launch=1), source(here, "b", launch=1)
    stopped.signal(signal.SIGSTOP)
    load = Load(here, "a,b", NBYTES, *IMPATIENT)
    outcome = load.outcome()
    assert outcome.get("origin") == [1, 0, 0], outcome
    assert outcome["nbytes"].get("b/0") == NBYTES
    stopped.signal(signal.SIGCONT)
    finish(load.program, stopped, other)


def test_a_process_that_stops_after_the_first_contact_is_read_to_the_end(
    guests: list[Guest],
) -> None:
    """The device reads memory without the process."""
    here, there = guests
    stopped = source(there, "a", launch=1)
    load = half_loaded(here, "a")
    stopped.signal(signal.SIGSTOP)
    load.go_on()
    outcome = load.outcome()
    assert outcome.get("origin") == [1, 0, 0], outcome
    stopped.signal(signal.SIGCONT)
    finish(load.program, stopped)


def test_the_bytes_behind_a_cut_cable_come_from_the_other(
    guests: list[Guest], switch: Switch
) -> None:
    here, there = guests
    cut, other = source(there, "a", launch=1), source(here, "b", launch=1)
    load = half_loaded(here, "a,b")
    switch.cut("2")
    load.go_on()
    outcome = load.outcome()
    assert outcome.get("origin") == [1, 0, 0], outcome
    assert "a/0" in outcome["lost"]
    switch.mend("2")
    finish(load.program, cut, other)


def test_a_load_over_a_cut_cable_ends_soon(guests: list[Guest], switch: Switch) -> None:
    here, there = guests
    served = source(there, "a")
    load = half_loaded(here, "a")
    switch.cut("2")
    load.go_on()
    outcome = load.outcome(SOON_S)
    assert outcome.get("error") in {"SourceLost", "Stalled"}, outcome
    switch.mend("2")
    finish(load.program, served)


def test_a_load_goes_on_when_the_cable_is_back(guests: list[Guest], switch: Switch) -> None:
    here, there = guests
    served = source(there, "a", launch=1)
    load = half_loaded(here, "a", "--patience", "120")
    switch.cut("2")
    load.go_on()
    switch.wait_for_loss()
    switch.mend("2")
    outcome = load.outcome()
    assert outcome.get("origin") == [1, 0, 0], outcome
    finish(load.program, served)


def test_a_source_that_closes_while_it_is_read_ends_the_load(guests: list[Guest]) -> None:
    here, there = guests
    served = source(there, "a")
    load = half_loaded(here, "a")
    finish(served)
    load.go_on()
    outcome = load.outcome(SOON_S)
    assert "error" in outcome, outcome
    finish(load.program)


def test_memory_that_may_not_be_locked_is_an_error_that_says_so(guests: list[Guest]) -> None:
    _, there = guests
    there.shell("chmod 666 /dev/infiniband/*")
    program = there.start(
        "tests.support.processes.source",
        *("a", str(NBYTES), there.address),
        env=RDMA,
        memlock=1 << 20,
    )
    _, err = program.finish()
    assert program.returncode == 1
    assert "EngineFailed" in err
    assert "check the limit on locked memory (ulimit -l)" in err
