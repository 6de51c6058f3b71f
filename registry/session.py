"""The rank's handle on its registration: starts the keeper process, speaks with it, replaces it if it dies.

Starts one thread, which listens to the keeper and calls `on_state`. The keeper is started with subprocess, never by forking: the
rank may have CUDA and gRPC threads. Nothing here needs the GIL in time: the keeper goes on without the rank.
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
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from enum import Enum
from types import TracebackType
from typing import IO, Any

from registry.backoff import Backoff
from registry.config import EtcdConfig
from registry.errors import KeeperFailed, RegistryError, from_wire
from registry.frames import read_frame, write_frame
from registry.record import RankRecord, RankState, encode
from registry.registration import WITHDRAWN

log = logging.getLogger(__name__)

# The module search path comes through the pipe, so that the keeper finds what the rank found, and `ps` shows what it is for.
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.stdin.buffer.readline()); from registry.keeper import run; run()"
_START_TIMEOUT_S = 20.0  # a loaded machine may take long to start a process

OnState = Callable[["RegistrationState", str], None]


class RegistrationState(str, Enum):
    """What the rank has to do."""

    REGISTERED = "registered"  # nothing
    SUSPENDED = "suspended"  # nothing: etcd cannot be reached, reads of the weights still work, the keeper tries on
    LOST = "lost"  # stop advertising: the registration was evicted or superseded and does not come back
    CLOSED = "closed"  # nothing: withdrawn by the rank itself


class Registration:
    """A rank's place in the registry, held until `withdraw` (or the end of the `with` block), eviction, or the process's end."""

    def __init__(
        self,
        config: EtcdConfig,
        record: RankRecord,
        parts: Sequence[bytes],
        ttl_s: float,
        on_state: OnState | None = None,
    ) -> None:
        """Registers; raises RankConflict, InstanceMismatch, EtcdUnavailable, … and has then left nothing behind."""
        self._config = config
        self._record = record
        self._parts = tuple(parts)
        self._ttl_s = ttl_s
        self._on_state = on_state
        self._owner_pid = os.getpid()
        self._lock = threading.Lock()
        self._replies: dict[int, Future[dict[str, Any]]] = {}
        self._seq = 0
        self._state = RegistrationState.REGISTERED
        self._lost: RegistryError | None = None
        self._closing = False
        self._registered = False
        self._withdrawn = False
        self._keeper, opened = self._start_keeper(again=False)
        self._listener = threading.Thread(target=self._listen, name=f"registration {record.key}", daemon=True)
        self._listener.start()
        try:
            self._wait(opened, _START_TIMEOUT_S + config.timeout_s)
        except BaseException:
            self._closing = True
            self._state = RegistrationState.CLOSED
            self._end_keeper()
            raise

    @property
    def record(self) -> RankRecord:
        """As the rank wants it; etcd has it too unless the state is SUSPENDED."""
        return self._record

    @property
    def state(self) -> RegistrationState:
        return self._state

    @property
    def lost(self) -> RegistryError | None:
        """Why the registration has ended without the rank's doing, or None."""
        return self._lost

    @property
    def withdrawn(self) -> bool:
        """Whether etcd has confirmed that the rank is out; False too while its keeper still tries that after `withdraw`."""
        return self._withdrawn

    @property
    def keeper_pid(self) -> int:
        return self._keeper.pid

    def update(self, *, version: int | None = None, state: RankState | None = None) -> None:
        """Changes the record. While etcd is away the change waits in the keeper: no error. RegistrationLost if it is over."""
        with self._lock:
            self._check_open()
            self._record = replace(
                self._record,
                version=self._record.version if version is None else version,
                state=self._record.state if state is None else state,
            )
            reply = self._request({"op": "update", "key": self._record.key}, (encode(self._record),))
        self._wait(reply, self._config.timeout_s + 2)

    def withdraw(self) -> None:
        """Takes the rank out of the registry; any number of times. If etcd is away the keeper goes on trying by itself."""
        if os.getpid() != self._owner_pid:
            return  # a forked child's copy of the handle: the registration is the parent's
        with self._lock:
            if self._closing:
                return
            self._closing = True
            reply = None
            if self._state is not RegistrationState.LOST:
                reply = self._request({"op": "end", "reason": WITHDRAWN})
        try:
            if reply is not None:
                self._wait(reply, self._config.timeout_s + 2)
                self._withdrawn = True
        except RegistryError as exc:
            log.warning("%s is not out of etcd yet, its keeper goes on trying: %s", self._record.key, exc)
        finally:
            self._end_keeper()
            self._change_state(RegistrationState.CLOSED, "")

    close = withdraw

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.withdraw()

    def __del__(self) -> None:
        if getattr(self, "_listener", None) and not self._closing and os.getpid() == self._owner_pid:
            warnings.warn(f"registration of {self._record.key} was never withdrawn", ResourceWarning, source=self, stacklevel=2)

    # -- the keeper ----------------------------------------------------------------------------------------------------------

    def _start_keeper(self, again: bool) -> tuple[subprocess.Popen[bytes], Future[dict[str, Any]]]:
        value = encode(self._record)
        if not sys.executable:
            raise KeeperFailed("cannot start a keeper: sys.executable is empty, so there is no Python to run it with")
        with tempfile.TemporaryFile() as complaints:
            try:
                keeper = subprocess.Popen(
                    [sys.executable, "-c", _BOOT, "engine-registry-keeper", self._record.key],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints,
                    start_new_session=True, close_fds=True,
                )  # fmt: skip
            except OSError as exc:
                raise KeeperFailed(f"cannot start a keeper with {sys.executable}: {exc}") from exc
            self._complaints: IO[bytes] = os.fdopen(os.dup(complaints.fileno()), "rb")
        opening = {
            "rank_pid": os.getpid(),
            "etcd": self._config.to_wire(),
            "key": self._record.key,
            "ttl_s": self._ttl_s,
            "again": again,
        }
        self._keeper = keeper
        _pipe(keeper.stdin).write(json.dumps([os.path.abspath(path) for path in sys.path]).encode() + b"\n")
        return keeper, self._request(opening, (value, *self._parts))

    def _request(self, message: dict[str, Any], payloads: Sequence[bytes] = ()) -> Future[dict[str, Any]]:
        self._seq += 1
        reply: Future[dict[str, Any]] = Future()
        self._replies[self._seq] = reply
        with contextlib.suppress(OSError):  # it has died: the listener sees that too, and answers
            write_frame(_pipe(self._keeper.stdin), {**message, "seq": self._seq}, payloads)
        return reply

    def _wait(self, reply: Future[dict[str, Any]], timeout_s: float) -> None:
        try:
            answer = reply.result(timeout_s)
        except FutureTimeout:
            raise KeeperFailed(f"the keeper of {self._record.key} (pid {self._keeper.pid}) does not answer") from None
        if answer.get("error"):
            raise from_wire(answer["error"])

    def _listen(self) -> None:
        backoff = Backoff(0.1, 5.0)
        while True:
            keeper = self._keeper
            while (frame := read_frame(_pipe(keeper.stdout))) is not None:
                backoff.reset()
                self._hear(frame.message)
            code = keeper.wait()
            complaint = self._last_complaint()
            _close_quietly(keeper.stdin)
            _close_quietly(keeper.stdout)
            with self._lock:
                over = self._closing or self._state is RegistrationState.LOST or not self._registered
                failed = KeeperFailed(f"the keeper of {self._record.key} ended with code {code}: {complaint}")
                error = (self._lost or failed).to_wire()
                # What an update wanted is in the record that the next keeper is given.
                for reply in self._replies.values():
                    reply.set_result({"error": error} if over else {})
                self._replies.clear()
                if over:
                    return
            log.warning("the keeper of %s (pid %d) ended with code %d; starting another", self._record.key, keeper.pid, code)
            self._restart(backoff)

    def _restart(self, backoff: Backoff) -> None:
        threading.Event().wait(backoff.next_s())
        with self._lock:
            if self._closing:
                return
            self._start_keeper(again=True)

    def _hear(self, message: dict[str, Any]) -> None:
        if "reply" in message:
            with self._lock:
                reply = self._replies.pop(message["reply"], None)
                self._registered = self._registered or not message.get("error")
            if reply is not None:
                reply.set_result(message)
        elif message["state"] == "LOST":
            self._lost = from_wire(message["error"])
            self._change_state(RegistrationState.LOST, str(self._lost))
        else:
            self._change_state(RegistrationState[message["state"]], message["why"])

    def _change_state(self, state: RegistrationState, why: str) -> None:
        with self._lock:
            if self._state is state or self._state is RegistrationState.CLOSED:
                return
            self._state = state
        if state is RegistrationState.LOST:
            log.log(logging.INFO if self._on_state else logging.ERROR, "%s is lost: %s", self._record.key, why)
        elif state is not RegistrationState.CLOSED:
            log.warning("%s is %s%s", self._record.key, state.value, f": {why}" if why else " again")
        if self._on_state is not None:
            try:
                self._on_state(state, why)
            except Exception:
                log.exception("the on_state callback of %s failed", self._record.key)

    def _check_open(self) -> None:
        if self._lost is not None:
            raise self._lost
        if self._closing:
            raise RegistryError(f"the registration of {self._record.key} is closed")

    def _last_complaint(self) -> str:
        with self._complaints as complaints:
            complaints.seek(0)
            lines = complaints.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def _end_keeper(self) -> None:
        """Closes our side. The keeper ends by itself, also if it still has something to delete."""
        _close_quietly(self._keeper.stdin)
        if threading.current_thread() is not self._listener:
            self._listener.join(timeout=1.0)


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise KeeperFailed("the keeper was started without pipes")
    return pipe


def _close_quietly(pipe: IO[bytes] | None) -> None:
    with contextlib.suppress(OSError):
        _pipe(pipe).close()
