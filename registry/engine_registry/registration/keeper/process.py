"""A keeper process as its rank handles it: started, written to and listened to without ever waiting
for one that hangs.

Used by `keeper.link`. Starts no thread. The process is started with subprocess, never by forking:
the rank may have CUDA and gRPC threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import IO

from engine_registry.errors import KeeperFailed
from engine_registry.etcd.descriptors import check_left, explain
from engine_registry.forks import closed_in_child, prevented
from engine_registry.registration.descriptors import Descriptors
from engine_registry.registration.keeper import passing
from engine_registry.registration.keeper.protocol import ANSWER_S, Frame, FrameBuffer

# The module search path comes through the pipe, so that the keeper finds what the rank found, and
# `ps` shows what it is for. Until then -I keeps the working directory off it: a file of the user's
# named json.py would be run.
_BOOT = (
    "import json, sys; boot = json.loads(sys.stdin.buffer.readline()); sys.path[:] = boot['path']; "
    "from engine_registry.registration.keeper.main import run; "
    "run(boot['rank'], boot['descriptors'])"
)
_DESCRIPTORS = 10  # that starting one takes, of which four stay
START_TIMEOUT_S = 20.0  # a loaded machine may take long to start a process

# Time without a sign of life is counted in looks. A rank that was itself stopped, or held the GIL,
# finds one look that took long, and not that its keeper was silent all the while.
LOOK_S = 1.0


def check_can_start(key: str) -> None:
    """Raise KeeperFailed where it is known beforehand that no keeper of this key can start."""
    if not sys.executable:
        raise KeeperFailed(
            "cannot start a keeper: sys.executable is empty, so there is no Python to run it with"
        )
    try:
        check_left(_DESCRIPTORS)
    except OSError as exc:
        why, remedy = explain(exc)
        raise KeeperFailed(f"cannot start a keeper of {key}: {why}", remedy) from exc


def launch(
    args: Sequence[str], env: Mapping[str, str], stderr: IO[bytes], passed: Collection[int]
) -> subprocess.Popen[bytes]:
    """Starts Python with pipes, in a new session, with the descriptors `passed`."""
    return subprocess.Popen(
        [sys.executable, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
        pass_fds=passed,
        bufsize=0,
        env=env,
    )


class KeeperProcess:
    """`read` is for one thread; a caller that shares the rest between threads locks it."""

    def __init__(self, key: str, secret: str | None = None) -> None:
        """KeeperFailed where no process can be started now.

        It inherits no variable that holds `secret`: it comes by its pipe.
        """
        check_can_start(key)
        self.spoke = False  # a message of it has come
        self.silent_s = 0.0  # since then
        self.hung = False  # and was killed for it
        self._key = key
        self._frames = FrameBuffer()
        with prevented(), contextlib.ExitStack() as undo:
            try:
                self._complaints = undo.enter_context(_scratch())
                self._hands, theirs = passing.pair()
                undo.callback(self._hands.close)
                with theirs, _this_process() as rank:
                    self._process = launch(
                        ["-I", "-c", _BOOT, "engine-registry-keeper", key],
                        {
                            name: value
                            for name, value in os.environ.items()
                            if not secret or value != secret
                        },
                        self._complaints,
                        [theirs.fileno(), *([] if rank is None else [rank])],
                    )
                    boot = {
                        "path": [os.path.abspath(path) for path in sys.path],
                        "rank": rank,
                        "descriptors": theirs.fileno(),
                    }
            except OSError as exc:
                why, remedy = explain(exc)
                raise KeeperFailed(
                    f"cannot start a keeper of {key} with {sys.executable}: {why}", remedy
                ) from exc
            undo.pop_all()
            self._input, self._output = _pipe(self._process.stdin), _pipe(self._process.stdout)
            closed_in_child(self, KeeperProcess._close_in_child)
        os.set_blocking(self._input.fileno(), False)
        self._writable, self._readable = select.poll(), select.poll()
        self._writable.register(self._input, select.POLLOUT)
        self._readable.register(self._output, select.POLLIN)
        self.write(json.dumps(boot).encode() + b"\n", START_TIMEOUT_S)

    @property
    def pid(self) -> int:
        return self._process.pid

    def write(self, data: bytes, patience_s: float = ANSWER_S) -> None:
        """Kills a keeper that takes nothing for so long.

        That it has died, now or before, is for `read` to find.
        """
        if self._input.closed:
            return
        rest = memoryview(data)
        silent_s = 0.0
        with contextlib.suppress(OSError, ValueError):
            while rest and silent_s < patience_s:
                if self._writable.poll(LOOK_S * 1000):
                    rest = rest[os.write(self._input.fileno(), rest) :]
                    silent_s = 0.0
                else:
                    silent_s += LOOK_S
            if rest:
                self.kill_hung()

    def hand_over(self, given: Descriptors | None, patience_s: float = ANSWER_S) -> None:
        """Makes it hand out these descriptors and no others; kills one that is silent for so long.

        KeeperFailed where it cannot hold as many. That it has died is for `read` to find.
        """
        if not passing.pass_on(self._hands, given, patience_s, LOOK_S):
            self.kill_hung()

    def read(self) -> list[Frame] | None:
        """What it has said, after a look's time at most, which may be nothing; None when it has
        ended or talks nonsense.
        """
        if not self._readable.poll(LOOK_S * 1000):
            self.silent_s += LOOK_S
            return []
        self.spoke, self.silent_s = True, 0.0
        try:
            data = os.read(self._output.fileno(), 65536)
            return list(self._frames.feed(data)) if data else None
        except (LookupError, TypeError, ValueError):
            return None

    def close_input(self) -> None:
        """It takes that for the end of the rank, unless a forked child of the rank holds the pipe
        open as well.
        """
        with contextlib.suppress(OSError):
            self._input.close()

    def _close_in_child(self) -> None:
        """Closes the copies that a forked child has got: else a keeper would not see the end of a
        rank that becomes another program, as its pid stays and the child holds the pipe open.
        """
        for each in (self._input, self._output, self._complaints, self._hands):
            with contextlib.suppress(OSError):
                each.close()

    def kill_hung(self) -> None:
        self.hung = True
        self._process.kill()

    def reap(self) -> KeeperFailed:
        """To be called once, after it has ended: frees what it leaves in our process, and returns
        how it ended.
        """
        self._process.kill()  # it may still run if it talked nonsense
        code = self._process.wait()
        self.close_input()
        self._output.close()
        self._hands.close()
        with self._complaints as complaints:
            complaints.seek(0)
            lines = complaints.read().decode(errors="replace").strip().splitlines()
        complaint = lines[-1] if lines else "it said nothing"
        how = "did not answer and was killed" if self.hung else f"ended with code {code}"
        return KeeperFailed(f"the keeper of {self._key} (pid {self.pid}) {how}: {complaint}")


def _scratch() -> IO[bytes]:
    """What one process writes another can read.

    Memory where there is such a thing: a root may be read-only.
    """
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("complaints of a keeper"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


@contextlib.contextmanager
def _this_process() -> Iterator[int | None]:
    """A descriptor that shows when this process ends; None where the system has no such thing."""
    try:
        process = os.pidfd_open(os.getpid())
    except (AttributeError, OSError):
        yield None
        return
    try:
        yield process
    finally:
        os.close(process)


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise KeeperFailed("the keeper was started without pipes")
    return pipe
