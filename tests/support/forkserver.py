"""Programs of tests as forks of one process, which has imported torch, grpc and our packages.

Python takes two seconds of a CPU for these imports, and the tests start hundreds of programs. The
fork server imports once; a program then starts within milliseconds. It is otherwise what
`python -m MODULE` starts: a process with its own pid, environment, folder and pipes, which ends as
any Python ends.

The server runs nothing but imports. Between it and each program stands a process that waits for
the end of the program and reports its exit status.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

_IMPORTED = (
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


class ForkServer:
    """Starts programs, from any thread, until it is closed."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # gRPC reads this when it is imported; `engines` sets it before.
                env={**os.environ, "GRPC_VERBOSITY": "NONE"},
            )

    def start(self, args: Sequence[str], cwd: Path, env: Mapping[str, str]) -> Program:
        """As `python -m ARGS`, with pipes for standard input, output and errors."""
        (their_in, stdin), (stdout, their_out), (stderr, their_err), (status, their_status) = (
            os.pipe() for _ in range(4)
        )
        given = [their_in, their_out, their_err, their_status]
        message = json.dumps({"args": list(args), "cwd": str(cwd), "env": dict(env)}).encode()
        try:
            socket.send_fds(self._socket, [message], given)
        finally:
            for descriptor in given:
                os.close(descriptor)
        return Program([sys.executable, "-m", *args], stdin, stdout, stderr, status)

    def close(self) -> None:
        """End the server. Programs that run go on."""
        # A process may have a copy of the descriptor, so closing it need not reach the server.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._process.wait()


class Program(subprocess.Popen[str]):
    """A program that the server has started. All that tests use of Popen works."""

    _child_created = False  # for Popen's finaliser: this process has no child to wait for

    def __init__(self, args: list[str], stdin: int, stdout: int, stderr: int, status: int) -> None:
        self.args = args
        self.stdin: IO[str] | None = os.fdopen(stdin, "w")
        self.stdout: IO[str] | None = os.fdopen(stdout)
        self.stderr: IO[str] | None = os.fdopen(stderr)
        self._reports = os.fdopen(status)
        self._waiting = threading.Lock()
        self._readers: dict[str, _Reader] = {}
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

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

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


def _serve(commands: socket.socket) -> list[str]:
    """Serve until the tests close their end. Returns in each program, with its arguments."""
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which close the server
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system then reaps those that wait below
    while True:
        message, given, _, _ = socket.recv_fds(commands, _MESSAGE_NBYTES, 4)
        if not message:
            sys.exit()
        if os.fork() == 0:
            commands.close()
            return _become(json.loads(message), *given)
        for descriptor in given:
            os.close(descriptor)


def _become(
    program: dict[str, Any], stdin: int, stdout: int, stderr: int, status: int
) -> list[str]:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():
        for descriptor in (stdin, stdout, stderr):
            os.close(descriptor)
        _report(pid, status)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, descriptor in enumerate((stdin, stdout, stderr)):
        os.dup2(descriptor, number)
    os.closerange(3, max(stdin, stdout, stderr, status) + 1)
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
    module, *sys.argv[1:] = _serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_module(module, run_name="__main__", alter_sys=True)
