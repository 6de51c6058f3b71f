"""The probe process as `engines doctor` handles it: started, given its tasks, listened to,
killed when it is not needed.

One process and one thread that reads its reports. It dies with us, as it ends with its standard
input.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from engine_cli.runtime.children import python

if TYPE_CHECKING:
    from engine_registry.schema.manifest import Export

Fact = dict[str, Any]


class Died(Exception):
    """The process has ended before it reported what was asked for; says how."""


class Late(Exception):
    """It has not reported in time what was asked for."""


class RankTask(NamedTuple):
    """A rank whose header is to be read: its key, its stored record, and the memory that readers
    map, where the protocol wants that.
    """

    key: str
    record: bytes
    exports: Sequence[Export] = ()


class Probe:
    def __init__(self, debug: bool) -> None:
        """It imports torch meanwhile; `begin` says what to try then."""
        command = python(
            "from engine_cli.doctor.trial import main; main()", *(["--debug"] if debug else [])
        )
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if debug else subprocess.DEVNULL,
            text=True,
            # so that a kill reaches whatever it has started, and Ctrl-C does not
            start_new_session=True,
        )
        self._facts: list[Fact] = []
        self._news = threading.Condition()
        self._ended = False
        self._listener = threading.Thread(target=self._listen, name="doctor probe", daemon=True)
        self._listener.start()

    def begin(self, host: str, protocol: str, device: str) -> None:
        self._say({"engine": {"host": host, "protocol": protocol, "device": device}})

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in _stream(self._process.stdout):
                fact = json.loads(line)
                with self._news:
                    self._facts.append(fact)
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def _say(self, data: object) -> None:
        with contextlib.suppress(
            OSError, ValueError
        ):  # it has ended, which the next question finds
            stdin = _stream(self._process.stdin)
            stdin.write(json.dumps(data) + "\n")
            stdin.flush()

    def read_ranks(self, tasks: Sequence[RankTask]) -> None:
        """Has it read the headers of these ranks, once it has an engine."""
        self._say(
            {
                "ranks": [
                    {
                        "rank": f"{task.key} {task.record.decode()}",
                        "exports": [
                            (one.addr, one.nbytes, one.handle.hex()) for one in task.exports
                        ],
                    }
                    for task in tasks
                ]
            }
        )

    def measure(self, key: str, record: bytes, addr: int, nbytes: int) -> None:
        """Has it read these bytes of the rank for as long as that takes, a second at most."""
        self._say({"speed": {"rank": f"{key} {record.decode()}", "addr": addr, "nbytes": nbytes}})

    def fact(self, name: str, limit_s: float) -> Fact:
        """The first of that name; Late or Died where there will be none."""
        found = self.facts(name, bool, limit_s)
        if not found:
            raise Died(self.ended()) if self._ended else Late(f"no answer within {limit_s:g} s")
        return found[0]

    def facts(self, name: str, enough: Callable[[list[Fact]], bool], limit_s: float) -> list[Fact]:
        """Those of that name that there are when they are enough, the time is over or the process
        has ended.
        """

        def found() -> list[Fact]:
            return [fact for fact in self._facts if fact["fact"] == name]

        with self._news:
            self._news.wait_for(lambda: self._ended or enough(found()), limit_s)
            return found()

    def ended(self) -> str:
        """How the process has ended; empty while it runs."""
        return self._how() if self._ended else ""

    def _how(self) -> str:
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "closed its output"
        return (
            f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        )

    def close(self) -> None:
        """Kills it, with whatever it has started; any number of times."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                _stream(stream).close()


def _stream(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise ValueError("the probe was started without pipes")
    return pipe
