"""Whether a transfer engine starts, and why not: real ones, each in a process of its own, as it reads its settings once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.integration.conftest import ROOT

START = """
import resource, sys
from loader import MooncakeEngine
from loader.errors import EngineUnavailable
limit = int(sys.argv[1])
if limit:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
try:
    with MooncakeEngine("127.0.0.1") as engine:
        print("started")
except EngineUnavailable as exc:
    print(exc)
"""


def start(limit: int = 0, **env: str) -> str:
    """What the process prints."""
    done = subprocess.run(
        [sys.executable, "-c", START, str(limit)],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("limit", [8, 12, 14, 20, 40])
def test_an_engine_without_descriptors_is_unavailable_and_says_how_to_mend_it(limit: int) -> None:
    said = start(limit)
    assert said == "started" or (f"this process may have {limit} files open" in said and "raise ulimit -n" in said)
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
