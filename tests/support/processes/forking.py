"""The process that `tests.support.forkserver` starts: it runs nothing but imports, and becomes, by
forks, the programs that it is asked for.

`forking NAME DESCRIPTORS MODULE …`: DESCRIPTORS are that of its socket, and that of the server of
keepers if the programs shall have forked ones. The server reports the pid of each program, and its
exit status when it ends.

A program ends as any Python ends: its threads are waited for, and what was registered for the exit
is called. Only the interpreter and its libraries are not taken apart, as `engines` does not do that
either: with torch it takes a fifth of a second of a CPU. With TEST_WHOLE_END in its environment, a
program ends with that, too.
"""

from __future__ import annotations

import atexit
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
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from tests.support import forked_keepers
from tests.support.forkserver import Forker

_MESSAGE_NBYTES = 128 << 10
_MOST_DESCRIPTORS = 8


def serve(commands: socket.socket, keepers: int | None, imported: Sequence[str]) -> list[str]:
    """Serve until the tests close their end. Returns in each program, with its arguments."""
    for name in imported:
        importlib.import_module(name)
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False  # of torch's libraries
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which close the server
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else nobody could ask how a program ended
    running: dict[int, tuple[int, int]] = {}  # by what tells of its end: the pid, and who asks
    events = select.poll()
    events.register(commands, select.POLLIN)
    while True:
        for descriptor, _ in events.poll():
            if descriptor in running:
                events.unregister(descriptor)
                _report_end(*running.pop(descriptor))
                os.close(descriptor)
                continue
            message, given, _, _ = socket.recv_fds(commands, _MESSAGE_NBYTES, _MOST_DESCRIPTORS)
            if not message:
                sys.exit()
            pid = os.fork()
            if pid == 0:
                commands.close()
                for end, (_, status) in running.items():
                    os.close(end)
                    os.close(status)
                return _become(json.loads(message), given, keepers)
            stdin, stdout, stderr, status, *passed = given
            for unused in (stdin, stdout, stderr, *passed):
                os.close(unused)
            _tell(status, pid)
            running[end := os.pidfd_open(pid)] = pid, status
            events.register(end, select.POLLIN)


def _report_end(pid: int, status: int) -> None:
    """The exit status, as Popen has it."""
    _, ended = os.waitpid(pid, 0)
    _tell(status, os.waitstatus_to_exitcode(ended))
    os.close(status)


def _tell(status: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody asks any more
        os.write(status, f"{number}\n".encode())


def _become(program: dict[str, Any], given: Sequence[int], keepers: int | None) -> list[str]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if program["new_session"]:
        os.setsid()
    above = max(*given, *program["passed"]) + 1
    moved = [fcntl.fcntl(each, fcntl.F_DUPFD, above) for each in given]
    if keepers is not None:
        keepers = fcntl.fcntl(keepers, fcntl.F_DUPFD_CLOEXEC, above)
    os.closerange(3, above)
    for descriptor, number in zip(moved, (0, 1, 2, None, *program["passed"]), strict=True):
        if number is not None:
            os.dup2(descriptor, number)
        os.close(descriptor)
    # Made anew: those of the server know what its own descriptors can do.
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    env: dict[str, str] = program["env"]
    os.chdir(program["cwd"])
    os.environ.clear()
    os.environ.update(env)
    # The environment that others see is that of the server.
    Path("/proc/self/comm").write_text(env.get("TEST_PROCESSES", "python"))
    if keepers is not None:
        if "TEST_FORKED_KEEPERS" in env:
            forked_keepers.ForkedKeepers(Forker(socket.socket(fileno=keepers))).install()
        else:
            os.close(keepers)
    sys.path[0] = program["cwd"]
    args: list[str] = program["args"]
    return args


def _run(option: str, what: str) -> None:
    if option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, globals())  # noqa: S102  as `python -c`


def _status(program: Callable[[], None]) -> int:
    """How it ends: an exit status, or negative the signal."""
    try:
        program()
    except SystemExit as exc:
        if exc.code is None or isinstance(exc.code, int):
            return exc.code or 0
        print(exc.code, file=sys.stderr)
        return 1
    except BaseException as exc:  # noqa: BLE001  as Python does it
        sys.excepthook(type(exc), exc, exc.__traceback__)
        return -signal.SIGINT if isinstance(exc, KeyboardInterrupt) else 1
    return 0


def _end(status: int) -> NoReturn:
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)  # the one of Ctrl-C
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    _, _name, _given, *_imported = sys.argv
    _number, *_keepers = map(int, _given.split(","))
    _option, _what, *sys.argv[1:] = serve(
        socket.socket(fileno=_number), _keepers[0] if _keepers else None, _imported
    )
    if "TEST_WHOLE_END" in os.environ:
        _run(_option, _what)
    else:
        _end(_status(partial(_run, _option, _what)))
