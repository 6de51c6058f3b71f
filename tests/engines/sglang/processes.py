"""The processes of engines: found by what they have in common, and ended."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path


def of_session(session: int) -> list[int]:
    """Those of the session that a process has begun."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == session:
            found.append(int(stat.parent.name))
    return found


def with_mark(mark: str) -> list[int]:
    """The processes that have it in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if mark.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


def kill(pid: int) -> None:
    """At once, if it is still there."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
