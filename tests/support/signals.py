"""Signals that have taken effect when the call returns."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from tests.support.waiting import wait_until


def signal_and_wait(pid: int, number: signal.Signals) -> None:
    """Each thread stops or ends when it next runs: on a busy machine the rest of a load is quicker.

    Waits until all threads of the process have stopped after SIGSTOP, or ended after SIGKILL.
    """
    os.kill(pid, number)
    expected = {signal.SIGSTOP: "T", signal.SIGKILL: "Z"}.get(number)
    if expected is not None:
        wait_until(lambda: _states(pid) <= {expected})


def _states(pid: int) -> set[str]:
    """Of its threads, as /proc has them: T is stopped, Z has ended and nobody has asked for it.

    There are none any more once somebody has.
    """
    states = set()
    with suppress(OSError):  # the process is gone
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):  # the thread has just ended
                stat = Path(f"/proc/{pid}/task/{thread}/stat").read_text()
                states.add(stat.rpartition(")")[2].split()[0])
    return states
