"""Members of a chain that are killed or stopped while they load from each other: real processes,
real transfer engine.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator

import pytest

from engine_registry import Registry
from tests.integration.conftest import Processes, line_of
from tests.support.waiting import wait_until


def started(
    processes: Processes, count: int, pause_s: float
) -> tuple[subprocess.Popen[str], list[subprocess.Popen[str]]]:
    """A source of 32 MiB, and replicas, which all wait for a line."""
    nbytes = str(32 << 20)
    source = processes.start("-m", "tests.support.processes.source", "root", nbytes)
    replicas = [
        processes.start("-m", "tests.support.processes.replica", f"r{number}", nbytes, str(pause_s))
        for number in range(count)
    ]
    assert line_of(source) == "version 0\n"
    for replica in replicas:
        assert line_of(replica) == "up\n"
    return source, replicas


@pytest.fixture
def chain(processes: Processes, registry: Registry) -> Iterator[list[subprocess.Popen[str]]]:
    _, replicas = started(processes, 4, 0.01)
    yield replicas
    for replica in replicas:
        replica.send_signal(signal.SIGCONT)


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("victim", range(4))
def test_whichever_member_of_a_chain_dies_all_others_finish(
    chain: list[subprocess.Popen[str]], registry: Registry, victim: int, fault: signal.Signals
) -> None:
    for replica in chain:
        go(replica)
    assert line_of(chain[victim]) == "half\n"
    chain[victim].send_signal(fault)
    for number, replica in enumerate(chain):
        if number != victim:
            assert line_of(replica) == "half\n"
            assert line_of(replica).startswith("loaded 0 equal ")


def test_a_chain_whose_source_ends_fails_in_time_and_says_so(
    processes: Processes, registry: Registry
) -> None:
    source, replicas = started(processes, 2, 0.05)
    go(replicas[0])
    wait_until(lambda: bool(registry.ranks("r0")))  # so that the other one reads from it
    go(replicas[1])
    assert line_of(replicas[1]) == "half\n"
    source.kill()
    assert line_of(replicas[0]) == "half\n"
    for replica in replicas:
        assert line_of(replica).startswith("failed SourceLost: ")
    wait_until(lambda: not registry.instances())
