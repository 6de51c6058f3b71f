"""The process beside a rank that owns its lease: started by `registry.session`, one a registration.

A process of its own keeps the lease while the rank holds the GIL for minutes, and outlives the rank by the milliseconds that it
takes to delete the rank's keys. Its threads: one that reads the rank's messages (the pipe's end means that the rank has died),
one that waits on the rank's process (a forked child may hold the pipe open), and the main one, which alone talks to etcd.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import IO, Any

from registry.backoff import Backoff
from registry.config import EtcdConfig
from registry.errors import (
    EtcdError,
    EtcdUnavailable,
    Evicted,
    LeaseNotFound,
    RecordDamaged,
    RegistrationLost,
    RegistryError,
    Superseded,
)
from registry.etcd import Etcd
from registry.frames import Frame, read_frame, write_frame
from registry.keys import evicted_key
from registry.record import RankRecord, decode
from registry.registration import DIED, amend, claim, end, remove

log = logging.getLogger(__name__)

# A call that etcd does not answer must not keep the keeper from noticing its rank's death for long.
_CALL_TIMEOUT_S = 2.0

Tell = Callable[[dict[str, Any]], None]


class Keeper:
    """One registration's lease and keys, as the rank wants them. Not thread-safe: one thread drives it."""

    def __init__(self, etcd: Etcd, record: RankRecord, parts: Sequence[bytes], ttl_s: float, tell: Tell) -> None:
        self._etcd = etcd
        self._record = record
        self._parts = parts
        self._ttl_s = ttl_s
        self._tell = tell
        self._backoff = Backoff(0.1, 0.5)
        self._lease_id = 0  # none
        self._revision = 0  # of the record as we wrote it last
        self._stale = False  # the rank wants another record than the one in etcd
        self._suspended = False

    def register(self) -> None:
        """The first claim: raises what is wrong, and then leaves nothing in etcd."""
        lease_id = self._etcd.grant(self._ttl_s)
        try:
            self._revision = claim(self._etcd, self._record, self._parts, lease_id)
        except RegistryError:
            self._give_up(lease_id)
            raise
        self._lease_id, self._stale = lease_id, False

    def beat(self) -> float:
        """Renews the lease and mends what is amiss; returns the seconds until the next beat. Raises RegistrationLost only."""
        try:
            if self._lease_id:
                self._renew()
            if not self._lease_id:
                self._register_again()
            if self._stale:
                self._amend()
        except EtcdError as exc:
            self._set_suspended(str(exc))
            return self._backoff.next_s()
        self._set_suspended(None)
        self._backoff.reset()
        return self._ttl_s / 3

    @property
    def suspended(self) -> bool:
        """etcd could not be reached at the last try."""
        return self._suspended

    def change(self, record: RankRecord) -> None:
        """The record that the next beat writes."""
        self._record, self._stale = record, True

    def end(self, reason: str) -> None:
        """Deletes the registration; EtcdError if that must be tried again."""
        if self._lease_id:
            with contextlib.suppress(LeaseNotFound):
                end(self._etcd, self._record, self._revision, self._lease_id, reason)
        else:  # a keeper before this one, or a write whose answer was lost, may have left it
            remove(self._etcd, self._record, reason)
        self._lease_id = 0

    def _renew(self) -> None:
        # The key is read before the lease is renewed: a lease that lives afterwards lived then, in the same store, so a key that
        # was missing has not expired with it, nor with a store that was wiped in between: somebody deleted it.
        found = self._etcd.get(self._record.key)
        try:
            self._etcd.keep_alive(self._lease_id)
        except LeaseNotFound:
            self._lease_id = 0
            return
        if found is None:
            self._lose(self._evicted())
        elif found.mod_revision != self._revision:
            self._adopt_or_lose(found.value, found.mod_revision)

    def _evicted(self) -> Evicted:
        key = self._record.key
        mark = evicted_key(self._record.instance, self._record.rank, self._record.incarnation)
        how = "evicted" if self._etcd.get(mark) is not None else "deleted from etcd by somebody"
        return Evicted(f"{key} was {how}: the registration has ended; register again if that was not meant", key=key)

    def _adopt_or_lose(self, value: bytes, mod_revision: int) -> None:
        """The key holds something else than we wrote, as far as we know."""
        key = self._record.key
        try:
            found = decode(key, value, mod_revision)
        except RecordDamaged as exc:
            self._lose(Superseded(f"{exc}; the registration has ended", key=key))
        else:
            if found.incarnation != self._record.incarnation:
                self._lose(Superseded(f"{key} now belongs to another process ({found.holder})", key=key))
            if found.ended:
                self._lose(self._evicted())
            self._revision = mod_revision  # a write of ours whose answer was lost

    def _register_again(self) -> None:
        try:
            self.register()
        except EtcdError:
            raise
        except Evicted as exc:
            self._lose(exc)
        except RegistryError as exc:
            self._lose(Superseded(f"{self._record.key} cannot be registered again: {exc}", key=self._record.key))

    def _amend(self) -> None:
        revision = amend(self._etcd, self._record, self._revision, self._lease_id)
        if not revision:
            self._renew()  # raises if another process was faster; else the answer to a write of ours was lost
            revision = amend(self._etcd, self._record, self._revision, self._lease_id) if self._lease_id else 0
        if not revision:
            raise EtcdError(f"{self._record.key} changed while it was being updated")
        self._revision, self._stale = revision, False

    def _lose(self, error: RegistrationLost) -> None:
        self._give_up(self._lease_id)
        self._lease_id = 0
        raise error

    def _give_up(self, lease_id: int) -> None:
        try:
            if lease_id:
                self._etcd.revoke(lease_id)
        except EtcdError as exc:
            log.info("lease %x is left to expire: %s", lease_id, exc)

    def _set_suspended(self, why: str | None) -> None:
        if (why is not None) != self._suspended:
            self._suspended = why is not None
            self._tell({"state": "SUSPENDED", "why": why} if self._suspended else {"state": "REGISTERED", "why": ""})


def serve(keeper: Keeper, inbox: queue.Queue[Frame | None], tell: Tell, ttl_s: float) -> None:
    """Obeys the rank until it withdraws, dies (None in the inbox) or loses the registration."""
    due = time.monotonic()
    while True:
        try:
            frame = inbox.get(timeout=max(0.0, due - time.monotonic()))
        except queue.Empty:
            frame = Frame({"op": "beat"})
        op = frame.message["op"] if frame else "died"
        try:
            if op == "beat":
                due = time.monotonic() + keeper.beat()
            elif op == "update" and frame:
                keeper.change(record_from_wire(frame))
                if not keeper.suspended:  # else the rank need not wait: the beat that finds etcd back writes it
                    due = time.monotonic() + keeper.beat()
                tell({"reply": frame.message["seq"]})
            else:
                _end(keeper, frame, tell, ttl_s)
                return
        except RegistrationLost as exc:
            tell({"state": "LOST", "error": exc.to_wire()})
            return


def _end(keeper: Keeper, frame: Frame | None, tell: Tell, ttl_s: float) -> None:
    """Tries until the keys are gone, for as long as the lease has: then it expires by itself once etcd is back."""
    reason = frame.message["reason"] if frame else DIED
    give_up = time.monotonic() + ttl_s
    backoff = Backoff(0.05, 0.5)
    first = True
    while True:
        problem: EtcdError | None = None
        if first and frame and keeper.suspended:
            problem = EtcdUnavailable("etcd cannot be reached now")
        else:
            try:
                keeper.end(reason)
            except EtcdError as exc:
                problem = exc
        if first and frame:  # the rank need not wait for an etcd that is away
            tell({"reply": frame.message["seq"], "error": problem.to_wire() if problem else None})
        if problem is None or time.monotonic() > give_up:
            return
        first = False
        time.sleep(backoff.next_s())


def record_from_wire(frame: Frame) -> RankRecord:
    value = frame.payloads[0]
    return decode(frame.message["key"], value)


def main() -> None:
    """Speaks frames over standard input and output. The first frame says what to register and how to reach etcd."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # the rank decides when it ends; its end is what ends the keeper
    pipe, out = sys.stdin.buffer, sys.stdout.buffer

    def tell(message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the rank is gone; the reader notices
            write_frame(out, message)

    opening = read_frame(pipe)
    if opening is None:
        return
    message = opening.message
    inbox: queue.Queue[Frame | None] = queue.Queue()
    threading.Thread(target=_read, args=(pipe, inbox), daemon=True).start()
    threading.Thread(target=_await_death, args=(message["rank_pid"], inbox), daemon=True).start()
    config = EtcdConfig.from_wire(message["etcd"])
    etcd = Etcd(replace(config, timeout_s=min(config.timeout_s, _CALL_TIMEOUT_S)))
    keeper = Keeper(etcd, record_from_wire(opening), opening.payloads[1:], message["ttl_s"], tell)
    try:
        if not message["again"]:  # a keeper that takes over from a dead one registers with its first beat instead
            keeper.register()
        tell({"reply": message["seq"]})
    except RegistryError as exc:
        tell({"reply": message["seq"], "error": exc.to_wire()})
        return
    serve(keeper, inbox, tell, message["ttl_s"])


def run() -> None:
    """`main` as a process: ends at once, without waiting for the thread that still reads standard input."""
    code = 1
    try:
        main()
        code = 0
    except Exception:  # noqa: BLE001  the last stop of the process: the rank reads the end of what is printed
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _read(pipe: IO[bytes], inbox: queue.Queue[Frame | None]) -> None:
    try:
        while (frame := read_frame(pipe)) is not None:
            inbox.put(frame)
    finally:
        inbox.put(None)


def _await_death(pid: int, inbox: queue.Queue[Frame | None]) -> None:
    if not hasattr(os, "pidfd_open"):
        return  # the pipe alone has to tell
    try:
        process = os.pidfd_open(pid)
    except OSError:
        if os.getppid() != pid:
            inbox.put(None)
        return
    if os.getppid() == pid:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        poll.poll()
    inbox.put(None)
