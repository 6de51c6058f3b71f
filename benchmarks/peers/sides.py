"""The driver's end of a side: its processes, their CPU and memory, and the questions it is asked.

All processes that a side starts inherit a mark in their environment. By it they are found, stopped
and, at the end, killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.figures import share_nbytes
from benchmarks.peers import candidates, side
from benchmarks.peers.candidates import Candidate
from engine_cli.runtime.children import python

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".peers"
_MARK = "PEERS_SIDE"
_CLOCK_OF_PROCESS = 2  # CPUCLOCK_SCHED of the kernel: the id of a process's clock is made of it
_END_S, _LOOK_S = 5.0, 0.01
_MEMORY = "/dev/shm"  # noqa: S108  files of sides are in memory, each in a folder of mkdtemp
_begun: dict[str, str] = {}  # sides that have not ended: the mark and the folder of each


class SideFailed(Exception):
    """What a side has said of its failure: the type and the message of its error."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message


class Side:
    """A service, a source or a reader, in processes of its own, until the block ends.

    `within`: the `command` of a Host, to run it there.
    """

    def __init__(
        self, candidate: Candidate, role: str, within: Callable[..., list[str]] | None = None
    ) -> None:
        self._candidate = candidate
        self._role = role
        self._within = within
        self._mark = uuid.uuid4().hex
        self._buffer = b""
        self._paused = False

    def __enter__(self) -> Side:
        """It starts, and imports what it needs. SideFailed if the product is not installed."""
        command = _command(self._candidate, self._role)
        self.folder = tempfile.mkdtemp(prefix="engines-peers-", dir=_MEMORY)
        _begun[self._mark] = self.folder
        self._log = Path(self.folder) / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._within(*command) if self._within else command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | self._candidate.env | {_MARK: self._mark},
                cwd=self.folder,
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.go_on()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        if kind is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
        _end(self._mark)
        with self._process:  # its pipes
            pass

    def order(self, **what: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # then it has said why, which is read next
            if self._process.stdin is not None:
                self._process.stdin.write(f"{json.dumps(what)}\n".encode())
                self._process.stdin.flush()

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """SideFailed if it is an error, or none comes."""
        line = self._line(time.monotonic() + timeout_s)
        if line is None:
            raise SideFailed("no answer", f"of the {self._role} within {timeout_s:.0f} s")
        if not line:
            raise SideFailed(f"the {self._role} has ended", self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SideFailed(answer["error"]["type"], answer["error"]["message"])
        return answer

    def _line(self, end: float) -> bytes | None:
        """Empty when it has ended; None when the time has."""
        stdout = self._process.stdout
        while stdout is not None and b"\n" not in self._buffer:
            if not select.select([stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            more = os.read(stdout.fileno(), 1 << 16)
            if not more:
                return b""
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "without a word"

    def pids(self) -> list[int]:
        return list(_marked(self._mark))

    def cpu_s(self) -> float:
        """Of all its processes that live."""
        return sum(filter(None, map(_cpu_s, self.pids())))

    def memory_nbytes(self) -> int:
        """Of all its processes now, memory that they share counted once, and of its files."""
        return sum(filter(None, map(_memory_nbytes, self.pids()))) + _files_nbytes(self.folder)

    def pause(self) -> None:
        self._paused = True
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        if self._paused:
            self._signal(signal.SIGCONT)
            self._paused = False

    def _signal(self, number: signal.Signals) -> None:
        send(self.pids(), number)


@contextmanager
def none_left() -> Iterator[None]:
    """At the end of the block no side is left, whatever a signal has cut short."""
    try:
        yield
    finally:
        for mark in list(_begun):
            _end(mark)


def _end(mark: str) -> None:
    """Kills until none is left: one that is killed may have started another meanwhile."""
    while pids := list(_marked(mark)):
        send(pids, signal.SIGKILL)
        time.sleep(_LOOK_S)
    shutil.rmtree(_begun[mark], ignore_errors=True)
    del _begun[mark]


def send(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _command(candidate: Candidate, role: str) -> list[str]:
    module = f"{candidates.__name__}.{candidate.module}"
    code = f"from {side.__name__} import main; main({role!r}, {module!r})"
    if not candidate.product:
        return python(code)
    theirs = PEERS / "bin" / "python"
    if not theirs.exists():
        raise SideFailed("not installed", f"{candidate.product}: run scripts/peers_setup.sh")
    return [str(theirs), "-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"]


def _marked(mark: str) -> Iterator[int]:
    wanted = f"{_MARK}={mark}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended; a zombie's environment is empty
            if wanted in (process / "environ").read_bytes():
                yield int(process.name)


def _cpu_s(pid: int) -> float | None:
    with contextlib.suppress(OSError):
        return time.clock_gettime((~pid << 3) | _CLOCK_OF_PROCESS)
    return None


def _memory_nbytes(pid: int) -> int | None:
    with contextlib.suppress(OSError, StopIteration):
        return share_nbytes(pid)
    return None


def _files_nbytes(folder: str) -> int:
    with contextlib.suppress(OSError):  # one has gone meanwhile
        return sum(path.stat().st_blocks << 9 for path in Path(folder).rglob("*"))
    return 0
