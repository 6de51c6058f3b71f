"""Runs in the guest and does what tests ask for over TCP, a connection a request.

It imports once what takes a minute under emulation. Each program of a test is a fork of it. A
request is a line of JSON:

- `{"do": "files"}`: unpack the tar archive that follows under /project.
- `{"do": "import", "modules": [...]}`: import them here, for all later programs.
- `{"do": "keepers"}`: from now on the keepers of programs are forks, too, of a process that is
  forked here.
- `{"do": "clock", "now": S}`: set the clock, which stood still while the guest was on disk.
- `{"do": "run", "args": [...], "env": {...}}`: run `python -m ARGS`, or `exec` ARGS if `"exec"` is
  true. What follows is its standard input. The answer is frames: a letter, four bytes of length,
  and as much data. `p` is its pid, `o` and `e` are of its output and errors, `x`, the last, is its
  exit status. With `"memlock": NBYTES` it may lock so much memory, and is not root.

All but `run` answer with a line of JSON: null, or what failed.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import struct
import sys
import tarfile
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

PORT = 7000
_OWN_DESCRIPTORS = 256  # from here on they stay open in programs
# Of others. Ours are sent, and imported, in each run.
IMPORTED = (
    "click",
    "google.protobuf.descriptor_pb2",
    "google.protobuf.internal.builder",
    "google.protobuf.reflection",
    "grpc.experimental",
    "http.server",
    "mooncake.engine",
    "msgspec",
    "numpy",
    "pytest",
    "rich.console",
    "rich.table",
    "rich.tree",
    "safetensors.torch",
    "six",
    "tenacity",
    "torch",
    "wsgiref.simple_server",
    "xxhash",
)


def serve() -> list[str]:
    """Answers requests. Returns in each program: `-m` or `-c`, what to run, its arguments."""
    server = socket.create_server(("0.0.0.0", PORT), backlog=64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("guest: ready", flush=True)
    while True:
        connection, _ = server.accept()
        with connection:
            request = json.loads(_line(connection))
            if request["do"] == "run":
                if os.fork() == 0:
                    server.close()
                    return ["-m", *_watch_program(connection, request)]
                continue
            try:
                program = _DEEDS[request["do"]](connection, request)
                if program is not None:
                    server.detach()  # it is closed, and its number may be another's
                    return program
                failed = None
            except BaseException:  # noqa: BLE001  the test is to see it
                failed = traceback.format_exc()
            connection.sendall(json.dumps(failed).encode() + b"\n")


def _line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += connection.recv(1) or b"\n"
    return line


def _unpack(connection: socket.socket, _: dict[str, Any]) -> None:
    with connection.makefile("rb") as file, tarfile.open(fileobj=file, mode="r|") as archive:
        archive.extractall("/project")  # noqa: S202  from the test


def _import(_: socket.socket, request: dict[str, Any]) -> None:
    sys.path[:0] = [path for path in request["path"] if path not in sys.path]
    for name in request["modules"]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def _set_clock(_: socket.socket, request: dict[str, Any]) -> None:
    time.clock_settime(time.CLOCK_REALTIME, request["now"])


def _fork_keepers(connection: socket.socket, _: dict[str, Any]) -> list[str] | None:
    """Returns in each keeper what it runs."""
    from engine_registry.registration.keeper import process
    from tests.support.forked_keepers import ForkedKeepers
    from tests.support.forkserver import Forker
    from tests.support.processes.forking import serve

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        connection.close()
        return serve(theirs, None, ())
    theirs.close()
    kept = fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, _OWN_DESCRIPTORS)
    ours.close()
    process.launch = ForkedKeepers(Forker(socket.socket(fileno=kept))).launch
    return None


_Deed = Callable[[socket.socket, dict[str, Any]], "list[str] | None"]
_DEEDS: dict[str, _Deed] = {
    "files": _unpack,
    "import": _import,
    "clock": _set_clock,
    "keepers": _fork_keepers,
}


# -- a program and the process that watches it
# --------------------------------------------------------------------------------------------------


def _watch_program(connection: socket.socket, request: dict[str, Any]) -> list[str]:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    (their_in, stdin), (stdout, their_out), (stderr, their_err) = (os.pipe() for _ in range(3))
    if pid := os.fork():
        for theirs in (their_in, their_out, their_err):
            os.close(theirs)
        _report(connection, pid, stdin, {stdout: b"o", stderr: b"e"})
    os.setsid()
    connection.close()
    for number, descriptor in enumerate((their_in, their_out, their_err)):
        os.dup2(descriptor, number)
    os.closerange(3, _OWN_DESCRIPTORS)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    os.environ.update(request["env"])
    os.chdir(request.get("cwd", "/tmp"))  # noqa: S108  the guest's
    if "memlock" in request:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (request["memlock"], request["memlock"]))
        os.setuid(65534)  # root may lock as much as it likes
    args: list[str] = request["args"]
    if request.get("exec"):
        try:
            os.execvp(args[0], args)  # noqa: S606  nothing here is for a shell
        except OSError as exc:
            sys.exit(f"{args[0]}: {exc}")
    return args


def _report(connection: socket.socket, pid: int, stdin: int, outputs: dict[int, bytes]) -> NoReturn:
    """Between the program and the test until the program has ended and its output has come."""
    _send(connection, b"p", str(pid).encode())
    waiting = selectors.DefaultSelector()
    waiting.register(connection, selectors.EVENT_READ)
    for output in outputs:
        waiting.register(output, selectors.EVENT_READ)
    ended = os.pidfd_open(pid)
    waiting.register(ended, selectors.EVENT_READ)
    over = False
    while True:
        ready = [key.fd for key, _ in waiting.select(0 if over else None)]
        if over and not set(ready) & set(outputs):
            break
        for fd in ready:
            if fd in outputs:
                data = os.read(fd, 1 << 16)
                if data:
                    _send(connection, outputs[fd], data)
                else:
                    waiting.unregister(fd)
                    del outputs[fd]
            elif fd == ended:
                over = True
                waiting.unregister(fd)
            elif fd == connection.fileno():
                data = connection.recv(1 << 16)
                if data:
                    with contextlib.suppress(BrokenPipeError):
                        os.write(stdin, data)
                else:
                    waiting.unregister(fd)
                    os.close(stdin)
    _, status = os.waitpid(pid, 0)
    _send(connection, b"x", str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _send(connection: socket.socket, kind: bytes, data: bytes) -> None:
    with contextlib.suppress(OSError):  # the test has ended
        connection.sendall(kind + struct.pack("!I", len(data)) + data)


if __name__ == "__main__":
    for each in IMPORTED:
        start = time.monotonic()
        importlib.import_module(each)
        print(f"guest: imported {each} in {time.monotonic() - start:.1f} s", flush=True)
    gc.freeze()
    option, what, *sys.argv[1:] = serve()
    if option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what)  # noqa: S102  as `python -c`
