"""A rank whose process is stopped, or holds the GIL: it is marked, keeps its place, and is read
only where no other rank has its weights.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from engine_loader import LoadReport, MooncakeEngine, load
from engine_registry import Event, InstanceState, RankLost, RankUpdated, Registry
from tests.integration.conftest import Processes, events_until, line_of
from tests.support.processes.source import MODEL, content, empty
from tests.support.signals import signal_and_wait

NBYTES = 1 << 20
LEASE_S = 2.0
LIMIT_S = 1.0


class How(NamedTuple):
    begin: Callable[[subprocess.Popen[str]], object]
    end: Callable[[subprocess.Popen[str]], object]
    can_be_read: bool  # over TCP


def _write(line: str) -> Callable[[subprocess.Popen[str]], object]:
    def write(process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        process.stdin.write(line)
        process.stdin.flush()

    return write


HOWS = {
    "stopped": How(
        lambda process: signal_and_wait(process.pid, signal.SIGSTOP),
        lambda process: process.send_signal(signal.SIGCONT),
        can_be_read=False,
    ),
    "holds the GIL": How(_write("hold\n"), _write("\n"), can_be_read=True),
}


def start(processes: Processes, name: str) -> subprocess.Popen[str]:
    arguments = (name, str(NBYTES), "127.0.0.1", str(LEASE_S), "0", "4", str(LIMIT_S))
    process = processes.start("-m", "tests.support.processes.source", *arguments)
    assert line_of(process) == "version 0\n"
    return process


def is_marked(marked: bool) -> Callable[[Event], bool]:
    return lambda event: (
        isinstance(event, RankUpdated) and bool(event.record.unresponsive_since) is marked
    )


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_a_rank_that_does_not_answer_is_marked_until_it_does_and_others_are_read_instead(
    registry: Registry, processes: Processes, how: How
) -> None:
    def loaded() -> LoadReport:
        tensors = empty(NBYTES, 4)
        with MooncakeEngine("127.0.0.1") as engine:
            report = load(registry, engine, MODEL, rank=0, tensors=tensors)
        assert all(
            torch.equal(tensors[name], tensor) for name, tensor in content(0, NBYTES, 0, 4).items()
        )
        return report

    victim = start(processes, "a")
    with registry.watch("a") as watch:
        try:
            how.begin(victim)
            events = events_until(watch, is_marked(True))
            status = registry.instance("a")
            assert (status.state, status.unresponsive) == (InstanceState.READY, (0,))
            if how.can_be_read:
                assert [share.name for share in loaded().shares] == ["/engines/a/0"]
            start(processes, "b")
            assert [share.name for share in loaded().shares] == ["/engines/b/0"]
        finally:
            how.end(victim)
        events += events_until(watch, is_marked(False))
    assert not [event for event in events if isinstance(event, RankLost)]
    assert {share.name for share in loaded().shares} == {"/engines/a/0", "/engines/b/0"}
