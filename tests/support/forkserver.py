"""Programs of tests as forks of one process, which has imported torch, grpc and our packages.

Python takes two seconds of a CPU for these imports, and the tests start hundreds of programs. The
fork server imports once; a program then starts within milliseconds. It is otherwise what
`python -m MODULE` or `python -c CODE` starts: a process with its own pid, environment, folder and
pipes, which ends as any Python ends.

The server runs nothing but imports. Between it and each program stands a process that waits for
the end of the program and reports its exit status.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, AnyStr, NoReturn

IMPORTED = (
    "engine_cli.commands.load",
    "engine_cli.commands.register",
    "engine_cli.main",
    "engine_loader.loading.load",
    "engine_loader.publishing.publish",
    "engine_registry.client",
    "safetensors.torch",
    "torch",
)
_MESSAGE_NBYTES = 128 << 10
_MOST_DESCRIPTORS = 8
_OUT_OF_THE_WAY = 500  # descriptors from here on are nobody's


class ForkServer:
    """Starts programs, from any thread, until it is closed."""

    def __init__(self, imported: Sequence[str] = IMPORTED, name: str = "fork-server") -> None:
        """`name` is on the command line of the server and of what it starts."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, name, str(theirs.fileno()), *imported],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # gRPC reads this when it is imported; `engines` sets it before.
                env={**os.environ, "GRPC_VERBOSITY": "NONE"},
            )

    def start(self, args: Sequence[str], cwd: Path, env: Mapping[str, str]) -> Program:
        """As `python -m ARGS`, with pipes for standard input, output and errors."""
        stderr, their_err = os.pipe()
        try:
            stdin, stdout, status = self.fork(["-m", *args], cwd, env, their_err)
        finally:
            os.close(their_err)
        return Program([sys.executable, "-m", *args], stdin, stdout, stderr, status)

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
            socket.send_fds(self._socket, [json.dumps(program).encode()], given)
        finally:
            for descriptor in (their_in, their_out, their_status):
                os.close(descriptor)
        return stdin, stdout, status

    def close(self) -> None:
        """End the server. Programs that run go on."""
        # A process may have a copy of the descriptor, so closing it need not reach the server.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
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
                    self.returncode = int(self._reports.readline())
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


# -- in the server
# --------------------------------------------------------------------------------------------------


def _serve(commands: socket.socket, imported: Sequence[str]) -> list[str]:
    """Serve until the tests close their end. Returns in each program, with its arguments."""
    for name in imported:
        importlib.import_module(name)
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which close the server
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system then reaps those that wait below
    while True:
        message, given, _, _ = socket.recv_fds(commands, _MESSAGE_NBYTES, _MOST_DESCRIPTORS)
        if not message:
            sys.exit()
        if os.fork() == 0:
            commands.close()
            return _become(json.loads(message), given)
        for descriptor in given:
            os.close(descriptor)


def _become(program: dict[str, Any], given: Sequence[int]) -> list[str]:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    stdin, stdout, stderr, status, *passed = given
    if pid := os.fork():
        for descriptor in (stdin, stdout, stderr, *passed):
            os.close(descriptor)
        _report(pid, status)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if program["new_session"]:
        os.setsid()
    above = [fcntl.fcntl(each, fcntl.F_DUPFD, _OUT_OF_THE_WAY) for each in given]
    os.closerange(3, max(given) + 1)
    for descriptor, number in zip(above, (0, 1, 2, None, *program["passed"]), strict=True):
        if number is not None:
            os.dup2(descriptor, number)
        os.close(descriptor)
    # Made anew: those of the server know what its own descriptors can do.
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    os.chdir(program["cwd"])
    os.environ.clear()
    os.environ.update(program["env"])
    sys.path[0] = program["cwd"]
    args: list[str] = program["args"]
    return args


def _report(pid: int, status: int) -> NoReturn:
    """Its pid, and when it has ended its exit status, as Popen has it."""
    os.write(status, f"{pid}\n".encode())
    _, ended = os.waitpid(pid, 0)
    os.write(status, f"{os.waitstatus_to_exitcode(ended)}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    _, _name, _number, *_imported = sys.argv
    option, what, *sys.argv[1:] = _serve(socket.socket(fileno=int(_number)), _imported)
    if option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what)  # noqa: S102  as `python -c`
