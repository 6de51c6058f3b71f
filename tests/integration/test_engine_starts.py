"""Whether a transfer engine starts, and why not: real ones, each in a separate process, as it
reads its settings once.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.support.checkout import ROOT

START = """
import resource, sys
from engine_loader import MooncakeEngine
from engine_loader.errors import EngineUnavailable
limit = int(sys.argv[1])
if limit:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
try:
    for host in sys.argv[2:]:
        with MooncakeEngine(host):
            print("started")
except EngineUnavailable as exc:
    print(exc)
"""


def start(*hosts: str, limit: int = 0, **env: str) -> str:
    """What a process prints that starts an engine at each."""
    done = subprocess.run(
        [sys.executable, "-c", START, str(limit), *(hosts or ("127.0.0.1",))],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("limit", [8, 12, 14, 20, 40])
def test_an_engine_without_descriptors_is_unavailable_and_says_how_to_mend_it(limit: int) -> None:
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


def test_an_engine_whose_ports_are_all_taken_is_unavailable_and_names_them() -> None:
    with ports_taken(10) as low:
        said = start(MC_MIN_RPC_PORT=str(low), MC_MAX_RPC_PORT=str(low + 9))
    assert f"it takes two of the ports {low} to {low + 9}, of which 0 are free" in said
    assert "set MC_MIN_RPC_PORT and MC_MAX_RPC_PORT to others" in said


def test_an_engine_has_ports_of_the_range_that_is_set() -> None:
    with ports_taken(40) as low:
        pass
    assert start(MC_MIN_RPC_PORT=str(low), MC_MAX_RPC_PORT=str(low + 39)) == "started"


@pytest.mark.parametrize(("first", "other"), [("127.0.0.1", "::1"), ("::1", "127.0.0.1")])
def test_a_process_has_engines_of_one_family(first: str, other: str) -> None:
    families = {"127.0.0.1": "IPv4", "::1": "IPv6"}
    started, refused = start(first, other).splitlines()
    assert started == "started"
    assert (
        f"{other!r} is an address of {families[other]}, but the transfer engine of this process"
        in refused
    )
    assert f"was loaded to speak {families[first]}" in refused


def test_a_library_that_others_have_loaded_keeps_the_family_that_it_has() -> None:
    """As an inference engine may have that has its own transfer engine."""
    loads_it_first = START.replace("limit =", "import mooncake.engine; limit =")
    done = subprocess.run(
        [sys.executable, "-c", loads_it_first, "0", "::1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "was loaded to speak IPv4" in done.stdout
