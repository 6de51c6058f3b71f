"""Whether a transfer engine starts, and why not: real ones, each in a separate process, as it
reads its settings once.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.integration.conftest import Processes
from tests.support.checkout import ROOT

Start = Callable[..., str]


@pytest.fixture
def start(processes: Processes) -> Start:
    """What a process prints that starts an engine at each address."""

    def run(*hosts: str, limit: int = 0, loaded: str = "", **env: str) -> str:
        process = processes.start(
            *("-m", "tests.support.processes.starts", str(limit), loaded),
            *(hosts or ("127.0.0.1",)),
            cwd=ROOT,
            **env,
        )
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        return out.strip()

    return run


@pytest.mark.parametrize("limit", [8, 12, 14, 20, 40])
def test_an_engine_without_descriptors_is_unavailable_and_says_how_to_mend_it(
    start: Start, limit: int
) -> None:
    said = start(limit=limit)
    assert said == "started" or "raise ulimit -n" in said
    assert (said == "started") is (limit == 40)


@contextmanager
def ports_taken(count: int) -> Iterator[int]:
    """So many in a row, from one on that is returned; beyond those that the system gives away."""
    for low in range(61_000, 65_000, count):
        with ExitStack() as stack:
            try:
                for port in range(low, low + count):
                    held = stack.enter_context(socket.socket())
                    held.bind(("", port))
            except OSError:
                continue
            yield low
            return
    raise AssertionError("no such ports are free")


def test_an_engine_whose_ports_are_all_taken_is_unavailable_and_names_them(start: Start) -> None:
    with ports_taken(10) as low:
        said = start(MC_MIN_RPC_PORT=str(low), MC_MAX_RPC_PORT=str(low + 9))
    assert f"it takes two of the ports {low} to {low + 9}, of which 0 are free" in said
    assert "set MC_MIN_RPC_PORT and MC_MAX_RPC_PORT to others" in said


def test_an_engine_has_ports_of_the_range_that_is_set(start: Start) -> None:
    with ports_taken(40) as low:
        pass
    assert start(MC_MIN_RPC_PORT=str(low), MC_MAX_RPC_PORT=str(low + 39)) == "started"


@pytest.mark.parametrize(("first", "other"), [("127.0.0.1", "::1"), ("::1", "127.0.0.1")])
def test_a_process_has_engines_of_one_family(start: Start, first: str, other: str) -> None:
    families = {"127.0.0.1": "IPv4", "::1": "IPv6"}
    started, refused = start(first, other).splitlines()
    assert started == "started"
    assert (
        f"{other!r} is an address of {families[other]}, but the transfer engine of this process"
        in refused
    )
    assert f"was loaded to speak {families[first]}" in refused


def test_a_library_that_others_have_loaded_keeps_the_family_that_it_has(start: Start) -> None:
    """As an inference engine may have that has its own transfer engine."""
    assert "was loaded to speak IPv4" in start("::1", loaded="loaded")
