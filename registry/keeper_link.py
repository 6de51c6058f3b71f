"""The rank's end of the pipe to its keeper process: starts it, asks it, and starts another when it dies.

Used by `registry.session` only. Starts one thread, which listens to the keeper. The keeper is started with subprocess, never by
forking: the rank may have CUDA and gRPC threads. Nothing here needs the GIL in time: the keeper goes on without the rank.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import IO, Any

from registry.backoff import Backoff
from registry.config import EtcdConfig
from registry.errors import KeeperFailed, RegistryError, from_wire
from registry.frames import read_frame, write_frame
from registry.record import RankRecord, encode

log = logging.getLogger(__name__)

# The module search path comes through the pipe, so that the keeper finds what the rank found, and `ps` shows what it is for.
# Until then -I keeps the working directory off it: a file of the user's named json.py would be run.
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.stdin.buffer.readline()); from registry.keeper import run; run()"
_START_TIMEOUT_S = 20.0  # a loaded machine may take long to start a process

# What the keeper tells without being asked: a state's name, why, and the error where the registration is lost.
OnNews = Callable[[str, str, RegistryError | None], None]


class KeeperLink:
    """All calls may come from any thread. `record` is what the rank wants to be in etcd."""

    def __init__(self, config: EtcdConfig, record: RankRecord, parts: Sequence[bytes], ttl_s: float, on_news: OnNews) -> None:
        self.record = record
        self._config = config
        self._parts = tuple(parts)
        self._ttl_s = ttl_s
        self._on_news = on_news
        self._lock = threading.Lock()
        self._pending: dict[int, tuple[dict[str, Any], Future[dict[str, Any]]]] = {}  # by sequence number
        self._seq = 0
        self._opened = False  # registered at least once
        self._over = False  # a keeper that ends from now on is not replaced
        self._keeper: subprocess.Popen[bytes] | None = None  # None while the next one is not there yet
        self._listener = threading.Thread(target=self._listen, name=f"keeper of {record.key}", daemon=True)

    @property
    def pid(self) -> int:
        """Of the keeper process; 0 while there is none."""
        keeper = self._keeper
        return keeper.pid if keeper else 0

    def open(self) -> None:
        """Starts the keeper and registers; raises what is wrong, and has then left nothing behind."""
        with self._lock:
            reply = self._start(again=False)
        self._listener.start()
        try:
            self._wait(reply, _START_TIMEOUT_S + self._config.timeout_s)
        except BaseException:
            self.abandon()
            raise

    def update(self, record: RankRecord) -> None:
        """Returns when the record is in etcd, or at once where it has to wait: for etcd, or for the next keeper."""
        value = encode(record)
        with self._lock:
            self.record = record
            if self._keeper is None:
                return
            reply = self._ask({"op": "update", "key": record.key}, (value,))
        self._wait(reply, self._config.timeout_s + 2)

    def end(self, reason: str) -> None:
        """Returns when the registration is out of etcd; an error says why it is not yet. The keeper goes on trying then."""
        with self._lock:
            reply = self._ask({"op": "end", "reason": reason})
        try:
            self._wait(reply, self._config.timeout_s + 2)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Lets go of the keeper: it ends by itself, also if it still has something to delete."""
        with self._lock:
            self._over = True
            if self._keeper is not None:
                _close(self._keeper.stdin)
        if self._listener.is_alive() and threading.current_thread() is not self._listener:
            self._listener.join(timeout=1.0)

    def _start(self, again: bool) -> Future[dict[str, Any]]:
        """`again`: it takes over from a keeper that has died, and finds the registration in etcd or not."""
        value = encode(self.record)
        if not sys.executable:
            raise KeeperFailed("cannot start a keeper: sys.executable is empty, so there is no Python to run it with")
        with tempfile.TemporaryFile() as complaints:
            try:
                keeper = subprocess.Popen(
                    [sys.executable, "-I", "-c", _BOOT, "engine-registry-keeper", self.record.key],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints,
                    start_new_session=True, close_fds=True,
                )  # fmt: skip
            except OSError as exc:
                raise KeeperFailed(f"cannot start a keeper with {sys.executable}: {exc}") from exc
            self._complaints: IO[bytes] = os.fdopen(os.dup(complaints.fileno()), "rb")
        self._keeper = keeper
        with contextlib.suppress(OSError):  # it has died at once: the listener sees that
            _pipe(keeper.stdin).write(json.dumps([os.path.abspath(path) for path in sys.path]).encode() + b"\n")
        opening = {
            "rank_pid": os.getpid(),
            "etcd": self._config.to_wire(),
            "key": self.record.key,
            "ttl_s": self._ttl_s,
            "again": again,
        }
        return self._ask(opening, (value, *self._parts))

    def _ask(self, message: dict[str, Any], payloads: Sequence[bytes] = ()) -> Future[dict[str, Any]]:
        self._seq += 1
        message = {**message, "seq": self._seq}
        reply: Future[dict[str, Any]] = Future()
        self._pending[self._seq] = message, reply
        self._write(message, payloads)
        return reply

    def _write(self, message: dict[str, Any], payloads: Sequence[bytes] = ()) -> None:
        if self._keeper is not None:
            with contextlib.suppress(OSError, ValueError):  # it has died: the listener sees that too, and acts on it
                write_frame(_pipe(self._keeper.stdin), message, payloads)

    def _wait(self, reply: Future[dict[str, Any]], timeout_s: float) -> None:
        try:
            answer = reply.result(timeout_s)
        except FutureTimeout:
            raise KeeperFailed(f"the keeper of {self.record.key} does not answer; its lease is the bound") from None
        if answer.get("error"):
            raise from_wire(answer["error"])

    # -- the listening thread ------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        backoff = Backoff(0.1, 5.0)
        while (keeper := self._keeper) is not None:
            while (frame := read_frame(_pipe(keeper.stdout))) is not None:
                backoff.reset()
                self._hear(frame.message)
            code, complaint = keeper.wait(), self._last_complaint()
            _close(keeper.stdin)
            _close(keeper.stdout)
            error = KeeperFailed(f"the keeper of {self.record.key} ended with code {code}: {complaint}")
            with self._lock:
                self._keeper = None
                self._over = self._over or not self._opened
                self._settle(error)
                if self._over:
                    return
            log.warning("the keeper of %s (pid %d) ended with code %d; starting another", self.record.key, keeper.pid, code)
            threading.Event().wait(backoff.next_s())
            self._replace(error)

    def _settle(self, error: RegistryError) -> None:
        """Answers what the dead keeper was asked. What an update wanted is given to the next one anyway; an end is asked again."""
        for seq, (message, reply) in list(self._pending.items()):
            if self._over or message.get("op") != "end":
                del self._pending[seq]
                reply.set_result({"error": error.to_wire()} if self._over else {})

    def _replace(self, error: RegistryError) -> None:
        with self._lock:
            if self._over:
                self._settle(error)
                return
            ends = [message for message, _ in self._pending.values()]
            try:
                self._start(again=True)
            except KeeperFailed as exc:
                log.error("%s is kept by nobody: %s", self.record.key, exc)
                self._over = True
                self._settle(exc)
            for message in ends:
                self._write(message)

    def _hear(self, message: dict[str, Any]) -> None:
        if "reply" in message:
            with self._lock:
                _, reply = self._pending.pop(message["reply"], (None, None))
                self._opened = self._opened or not message.get("error")
            if reply is not None:
                reply.set_result(message)
        elif message["state"] == "LOST":
            lost = from_wire(message["error"])
            with self._lock:
                self._over = True
                for _, reply in self._pending.values():
                    reply.set_result(message)
                self._pending.clear()
            self._on_news("LOST", str(lost), lost)
        else:
            self._on_news(message["state"], message["why"], None)

    def _last_complaint(self) -> str:
        with self._complaints as complaints:
            complaints.seek(0)
            lines = complaints.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise KeeperFailed("the keeper was started without pipes")
    return pipe


def _close(pipe: IO[bytes] | None) -> None:
    with contextlib.suppress(OSError):
        _pipe(pipe).close()
