"""Programs of tests as forks of one process, which has imported torch, grpc and our packages.

Python takes two seconds of a CPU for these imports, and the tests start hundreds of programs. The
fork server imports once; a program then starts within milliseconds. It is otherwise what
`python -m MODULE` or `python -c CODE` starts: a process with its own pid, environment, folder and
pipes. `processes.forking` is the server's side.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, AnyStr

IMPORTED = (
    "engine_cli.commands.dashboard",
    "engine_cli.commands.gateway",
    "engine_cli.commands.load",
    "engine_cli.commands.register",
    "engine_cli.commands.watch",
    "engine_cli.main",
    "engine_loader.engines.mooncake.engine",
    "engine_loader.loading.checkpoint",
    "engine_loader.loading.load",
    "engine_loader.publishing.publish",
    "engine_loader.starting.load_or_seed",
    "engine_registry.client",
    "engine_registry.gateway.limits",
    "engine_registry.gateway.server",
    "safetensors.torch",
    "torch",
)
_SERVER = "tests.support.processes.forking"


class Forker:
    """Starts processes, from any thread, by the server that listens at the other end."""

    def __init__(self, server: socket.socket) -> None:
        self.socket = server

    def start(self, args: Sequence[str], cwd: Path, env: Mapping[str, str]) -> Program:
        """As `python ARGS`, with pipes for standard input, output and errors."""
        stderr, their_err = os.pipe()
        try:
            stdin, stdout, status = self.fork(args, cwd, env, their_err)
        finally:
            os.close(their_err)
        return Program([sys.executable, *args], stdin, stdout, stderr, status)

    def fork(
        self,
        args: Sequence[str],
        cwd: Path,
        env: Mapping[str, str],
        stderr: int,
        passed: Collection[int] = (),
        new_session: bool = False,
    ) -> tuple[int, int, int]:
        """As `python ARGS`, with the descriptors `passed` under their numbers.

        Returns the ends of pipes: to its standard input, from its standard output, and of a report
        about its end.
        """
        (their_in, stdin), (stdout, their_out), (status, their_status) = (
            os.pipe() for _ in range(3)
        )
        given = [their_in, their_out, stderr, their_status, *passed]
        program = {
            "args": list(args),
            "cwd": str(cwd),
            "env": dict(env),
            "passed": list(passed),
            "new_session": new_session,
        }
        try:
            socket.send_fds(self.socket, [json.dumps(program).encode()], given)
        finally:
            for descriptor in (their_in, their_out, their_status):
                os.close(descriptor)
        return stdin, stdout, status


class ForkServer(Forker):
    """Starts programs, from any thread, until it is closed."""

    def __init__(
        self,
        imported: Sequence[str] = IMPORTED,
        name: str = "fork-server",
        keepers: Forker | None = None,
    ) -> None:
        """`name` is on the command line of the server and of what it starts. `keepers` starts those
        of its programs.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        given = [theirs.fileno(), *([] if keepers is None else [keepers.socket.fileno()])]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _SERVER, name, ",".join(map(str, given)), *imported],
                stdin=subprocess.DEVNULL,
                pass_fds=given,
                # gRPC reads this when it is imported; `engines` sets it before.
                env={**os.environ, "GRPC_VERBOSITY": "NONE"},
            )
        super().__init__(ours)

    def close(self) -> None:
        """End the server. Programs that run go on, and nobody learns how they end."""
        # A process may have a copy of the descriptor, so closing it need not reach the server.
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self._process.wait()


class Forked(subprocess.Popen[AnyStr]):
    """A process that the server has started, of which `reports` tells the pid and the end."""

    _child_created = False  # for Popen's finaliser: this process has no child to wait for

    def __init__(
        self, args: list[str], stdin: IO[AnyStr], stdout: IO[AnyStr], reports: int
    ) -> None:
        self.args = args
        self.stdin: IO[AnyStr] | None = stdin
        self.stdout: IO[AnyStr] | None = stdout
        self._reports = os.fdopen(reports)
        self._waiting = threading.Lock()
        self.pid = int(self._reports.readline())
        self.returncode: Any = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode  # type: ignore[no-any-return]

    def wait(self, timeout: float | None = None) -> int:
        if not self._waiting.acquire(timeout=-1 if timeout is None else timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        try:
            if self.returncode is None:
                reported = select.poll()  # select() takes no descriptor from 1,024 on
                reported.register(self._reports, select.POLLIN)
                if not reported.poll(None if timeout is None else 1000 * timeout):
                    raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
                with self._reports:
                    # no report is one that a closed server has not made
                    self.returncode = int(self._reports.readline() or -signal.SIGKILL)
        finally:
            self._waiting.release()
        return self.returncode  # type: ignore[no-any-return]

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Program(Forked[str]):
    """All that tests use of Popen works."""

    def __init__(self, args: list[str], stdin: int, stdout: int, stderr: int, status: int) -> None:
        super().__init__(args, os.fdopen(stdin, "w"), os.fdopen(stdout), status)
        self.stderr: IO[str] | None = os.fdopen(stderr)
        self._readers: dict[str, _Reader] = {}

    def communicate(
        self, input: str | None = None, timeout: float | None = None
    ) -> tuple[str, str]:
        assert self.stdin is not None
        until = None if timeout is None else time.monotonic() + timeout
        if not self.stdin.closed:
            with contextlib.suppress(BrokenPipeError), self.stdin:
                self.stdin.write(input or "")
        for name in ("stdout", "stderr"):
            if name not in self._readers:
                self._readers[name] = _Reader(getattr(self, name))
        for reader in self._readers.values():
            reader.join(None if until is None else max(0.0, until - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        self.wait(None if until is None else max(0.0, until - time.monotonic()))
        return self._readers["stdout"].text, self._readers["stderr"].text

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        self.wait()


class _Reader(threading.Thread):
    """Reads a stream to its end, unless it is closed, and closes it."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(name="reads a program's output", daemon=True)
        self._stream = stream
        self.text = ""
        self.start()

    def run(self) -> None:
        if not self._stream.closed:
            with self._stream:
                self.text = self._stream.read()
