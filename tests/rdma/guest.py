"""A host with an RDMA device: a guest, the programs that tests run there, and their output."""

from __future__ import annotations

import io
import json
import os
import queue
import signal
import socket
import struct
import tarfile
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from tests.rdma.emulator import Emulator
from tests.support.checkout import ROOT

# What a request, or a line of a program, may take under emulation on a busy machine.
PATIENCE_S = 300.0
_SENT = ("registry", "loader", "cli", "tests/support", "tests/rdma/programs", "tests/contract")
_SENT_FILES = ("pyproject.toml", "tests/conftest.py")
_IMPORTED = (
    "engine_cli.commands.doctor",
    "engine_cli.doctor.trial",
    "engine_cli.commands.list",
    "engine_cli.commands.load",
    "engine_cli.commands.register",
    "engine_cli.main",
    "engine_loader.loading.load",
    "engine_loader.publishing.publish",
    "engine_registry.client",
    "engine_registry.registration.keeper.main",
    "tests.support.launches",
)
_PATH = ["/project", "/project/registry", "/project/loader", "/project/cli"]


class Guest:
    """`number` makes its address."""

    add_device = "rdma link add rxe0 type rxe netdev eth1"

    def __init__(self, emulator: Emulator, number: int) -> None:
        self.emulator = emulator
        self.number = number
        self.name = f"host {number}"
        self.address = f"10.9.0.{number}"
        self._mac = f"52:54:00:09:00:{number:02x}"
        self.env: dict[str, str] = {}  # of its programs
        self._started: list[Program] = []

    def prepare(self) -> None:
        """Sends the project, imports it and sets the network up. Once."""
        self.emulator.go_on()
        self.ask({"do": "clock", "now": time.time()})
        self.ask({"do": "files"}, _project())
        self.ask({"do": "import", "path": _PATH, "modules": list(_IMPORTED)})
        self.ask({"do": "keepers"})
        self.shell(
            f"hostname host{self.number} && ip link set eth1 address {self._mac} mtu 4500 up && "
            f"ip addr add {self.address}/24 dev eth1 && {self.add_device}"
        )

    def ask(self, request: dict[str, Any], data: bytes = b"") -> None:
        with self._connect() as connection:
            connection.sendall(json.dumps(request).encode() + b"\n" + data)
            connection.shutdown(socket.SHUT_WR)
            with connection.makefile() as answer:
                failed = json.loads(answer.readline())
        if failed is not None:
            raise AssertionError(f"{self.name}, {request['do']}: {failed}")

    def shell(self, script: str, timeout_s: float = PATIENCE_S) -> str:
        """What it prints. AssertionError if it fails."""
        program = self.shell_program(script)
        out, err = program.finish(timeout_s)
        assert program.returncode == 0, f"{script}: {program.returncode}, {out}{err}"
        return out

    def shell_program(self, script: str) -> Program:
        return self._run(["sh", "-c", script], exec=True)

    def start(
        self,
        module: str,
        *args: str,
        env: Mapping[str, str] = MappingProxyType({}),
        memlock: int | None = None,
    ) -> Program:
        """`python -m MODULE ARGS`, as a fork that has imported everything.

        With `memlock` it may lock so many bytes of memory, and is not root.
        """
        limits = {} if memlock is None else {"memlock": memlock}
        return self._run([module, *args], env=env, **limits)

    def engines(self, *args: str) -> Program:
        """The command `engines`."""
        return self.start("engine_cli", *args)

    def end_programs(self) -> None:
        for program in self._started:
            program.kill()
        self._started.clear()

    def _run(
        self, args: list[str], env: Mapping[str, str] = MappingProxyType({}), **more: Any
    ) -> Program:
        request = {"do": "run", "args": args, "env": {**self.env, **env}, **more}
        connection = self._connect()
        connection.sendall(json.dumps(request).encode() + b"\n")
        program = Program(self, " ".join(args), connection)
        if not more.get("exec"):
            self._started.append(program)
        return program

    def _connect(self) -> socket.socket:
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                return socket.create_connection(("127.0.0.1", self.emulator.port), PATIENCE_S)
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)


class Program:
    """A program in a guest. `out` and `err` are what it has printed so far."""

    def __init__(self, guest: Guest, name: str, connection: socket.socket) -> None:
        self.guest, self.name = guest, name
        self.out, self.err = "", ""
        self.returncode: int | None = None
        self._connection = connection
        self._connection.settimeout(None)
        self._pids: queue.Queue[int] = queue.Queue()
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, name=name, daemon=True)
        self._reader.start()
        self.pid = self._pids.get(timeout=PATIENCE_S)

    def _read(self) -> None:
        try:
            with self._connection, self._connection.makefile("rb") as stream:
                while self.returncode is None and (head := stream.read(5)):
                    kind, nbytes = head[:1], struct.unpack("!I", head[1:])[0]
                    self._take(kind, stream.read(nbytes).decode(errors="replace"))
        except OSError:  # the guest has ended
            pass
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _take(self, kind: bytes, data: str) -> None:
        if kind == b"p":
            self._pids.put(int(data))
            return
        with self._changed:
            if kind == b"o":
                self.out += data
            elif kind == b"e":
                self.err += data
            elif kind == b"x":
                self.returncode = int(data)
            self._changed.notify_all()

    def wait_for(self, text: str, timeout_s: float = PATIENCE_S, after: int = 0) -> str:
        """The first whole line with that text, after so many others, when it comes."""

        def found() -> list[str]:
            lines = self.out.splitlines(keepends=True)
            return [line for line in lines if text in line and line.endswith("\n")]

        self._until(lambda: len(found()) > after, f"{text!r} in the output", timeout_s)
        return found()[after]

    def finish(self, timeout_s: float = PATIENCE_S) -> tuple[str, str]:
        """Its output and errors when it has ended."""
        self._until(lambda: self.returncode is not None, "the end", timeout_s)
        return self.out, self.err

    def _until(self, holds: Callable[[], bool], what: str, timeout_s: float) -> None:
        with self._changed:
            came = self._changed.wait_for(lambda: holds() or self._ended, timeout_s)
            if not holds():
                why = f"not within {timeout_s} s" if not came else f"it ended, {self.returncode}"
                raise AssertionError(
                    f"{self.name} on {self.guest.name}: no {what}: {why}\n{self.out}{self.err}"
                )

    def say(self, line: str) -> None:
        """On its standard input."""
        self._connection.sendall(line.encode() + b"\n")

    def end_input(self) -> None:
        self._connection.shutdown(socket.SHUT_WR)

    def signal(self, number: signal.Signals) -> None:
        """Comes back when the signal has taken effect."""
        self.guest.shell(f"kill -{int(number)} {self.pid}")

    def kill(self) -> None:
        if self.returncode is None and not self._ended:
            # Its whole session, except keepers, which have sessions of their own.
            self.guest.shell(f"kill -KILL -{self.pid} 2>/dev/null; true")
        self._reader.join(PATIENCE_S)


def _project() -> bytes:
    """An archive of the packages and what tests need, with compiled files that are still true."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for folder in _SENT:
            for path in sorted((ROOT / folder).rglob("*")):
                if path.suffix in {".py", ".pyc", ".so"} and path.is_file():
                    tar.add(path, path.relative_to(ROOT))
        for name in _SENT_FILES:
            tar.add(ROOT / name, name)
    return archive.getvalue()


def etcd_from_guests(endpoint: str) -> str:
    """How a guest reaches a port of this machine."""
    return f"10.0.2.2:{endpoint.rpartition(':')[2]}"


def environment(endpoint: str, namespace: str) -> dict[str, str]:
    return {
        "ENGINES_ETCD": etcd_from_guests(endpoint),
        "TEST_NAMESPACE": namespace,
        "PYTHONPATH": ":".join(["/site-packages", *_PATH]),  # of what programs start
        "MC_LOG_LEVEL": os.environ.get("MC_LOG_LEVEL", "ERROR"),
    }
