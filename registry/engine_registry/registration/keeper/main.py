"""The process beside a rank that owns its lease: started by `registration.keeper.process`, one a
registration.

A separate process keeps the lease while the rank holds the GIL for minutes, and outlives the rank
by the milliseconds that it takes to delete the rank's keys. Its threads: one that reads the rank's
messages (the pipe's end means that the rank has died), one that waits on the rank's process (a
forked child may hold the pipe open), one that hears of changes of the key, one that hands out
descriptors of the rank's memory, and the main one, which alone asks etcd.

Where the rank wanted that its memory is held, the keeper stays until that is over.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from typing import IO, Any, TypeVar

from engine_registry.errors import EtcdError, EtcdUnavailable, RegistrationLost, RegistryError
from engine_registry.etcd.backoff import Backoff
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig
from engine_registry.registration.hold import Hold
from engine_registry.registration.keeper.desk import Desk
from engine_registry.registration.keeper.holder import Keeper, Report
from engine_registry.registration.keeper.holding import LET_GO, Memory
from engine_registry.registration.keeper.key_watch import KeyWatch
from engine_registry.registration.keeper.protocol import (
    CALL_TIMEOUT_S,
    SETTLE_S,
    Frame,
    encode_frame,
    read_frame,
)
from engine_registry.registration.keeper.silence import Silence
from engine_registry.registration.writes import DIED
from engine_registry.schema.moment import utc
from engine_registry.schema.record import RankRecord
from engine_registry.schema.record_format import decode

T = TypeVar("T")

# A restarted etcd gives every lease its full time again, so a rank that died during an outage would
# stand for as long. After a longer outage than this that lease is the bound: keepers whose etcd is
# gone for good must end some time.
_END_FOR_S = 300.0
# Of the rank's last messages, after its end: a child that holds the pipe open keeps it from ending.
_DRAIN_S = 1.0


class _ReportingEtcd(Etcd):
    """Reports before every call that the keeper lives: the time of one call is bounded, that of
    many in sequence is not.
    """

    def __init__(self, config: EtcdConfig, report: Report) -> None:
        super().__init__(config)
        self._report = report

    def _call(self, operation: Callable[[Any, float], T], stop: Any = None) -> T:
        self._report({"alive": True})
        return super()._call(operation, stop)


def serve(
    keeper: Keeper,
    inbox: queue.Queue[Frame | None],
    report: Report,
    unresponsive_after_s: float,
    memory: Memory | None = None,
) -> None:
    """Obeys the rank until it withdraws, dies (None in the inbox) or loses the registration.

    Each beat asks the rank for an answer, as it reports the state. A rank that gives none for
    `unresponsive_after_s` is marked in its record, until it says something. The `memory` of one
    that has died may be held for a while.
    """
    due = time.monotonic() + keeper.due_s
    silence = Silence(unresponsive_after_s)
    while True:
        frame = _next(inbox, silence, max(0.0, due - time.monotonic()))
        op = frame.message["op"] if frame else "died"
        try:
            if op == "changed":
                if not keeper.is_quiet():
                    due = min(due, time.monotonic() + SETTLE_S)
            elif op == "answer":
                if keeper.mark(""):
                    due = time.monotonic()
            elif op == "beat":
                if silence.is_too_long:
                    since = time.time() - silence.seconds
                    keeper.mark(utc(datetime.fromtimestamp(since, timezone.utc)))
                due = time.monotonic() + keeper.beat()
                silence.ask()
            elif op == "update" and frame:
                _change(keeper, frame, memory)
                if (
                    not keeper.suspended
                ):  # else the rank need not wait: the beat that finds etcd back writes it
                    due = time.monotonic() + keeper.beat()
                report({"reply": frame.message["seq"], "written": not keeper.suspended})
            else:
                _leave(keeper, frame, inbox, report, memory)
                return
        except RegistrationLost as exc:
            report({"state": "LOST", "error": exc.to_wire()})
            return


def _next(inbox: queue.Queue[Frame | None], silence: Silence, beat_in_s: float) -> Frame | None:
    """What the rank says next, or that the key has changed; a beat where neither comes in time."""
    wait_s = min(beat_in_s, silence.left_s)
    try:
        frame = inbox.get(timeout=wait_s)
    except queue.Empty:
        silence.wait(wait_s)
        return Frame({"op": "beat"})
    if frame is None or frame.message["op"] != "changed":  # which etcd has said
        silence.end()
    return frame


def _change(keeper: Keeper, frame: Frame, memory: Memory | None) -> None:
    record = record_from_wire(frame)
    keeper.change(record, frame.payloads[1:])
    if memory is not None:
        memory.describe(record, frame.message["place"])


def _leave(
    keeper: Keeper,
    frame: Frame | None,
    inbox: queue.Queue[Frame | None],
    report: Report,
    memory: Memory | None,
) -> None:
    """The rank does, by this message, or has died."""
    if memory is not None:
        memory.let_go() if frame else memory.hold(keeper, inbox)
    _end(keeper, frame, report)


def _end(keeper: Keeper, frame: Frame | None, report: Report) -> None:
    """Tries until it is known that the keys are gone."""
    reason = frame.message["reason"] if frame else DIED
    give_up = time.monotonic() + _END_FOR_S
    backoff = Backoff(0.05, 1.0)
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
            report({"reply": frame.message["seq"], "error": problem.to_wire() if problem else None})
        if problem is None or time.monotonic() > give_up:
            return
        first = False
        time.sleep(backoff.next_s())


def record_from_wire(frame: Frame) -> RankRecord:
    value = frame.payloads[0]
    return decode(frame.message["key"], value)


def main(rank: int | None, descriptors: int) -> None:
    """Speaks frames over standard input and output.

    The first frame says what to register and how to reach etcd. `rank` is a descriptor that shows
    when the rank's process has ended, `descriptors` one of a socket by which it passes others on.
    """
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # the rank decides when it ends; its end is what ends the keeper
        signal.signal(ignored, signal.SIG_IGN)
    inbox: queue.Queue[Frame | None] = queue.Queue()
    desk = Desk(socket.socket(fileno=descriptors), lambda: inbox.put(LET_GO))
    desk.start()
    pipe, report = sys.stdin.buffer, reporter(sys.stdout.fileno())
    opening = read_frame(pipe)
    if opening is None:
        return
    message, record = opening.message, record_from_wire(opening)
    memory = Memory(desk, Hold.from_wire(message["hold"]), record, message["place"])
    reader = threading.Thread(target=_read, args=(pipe, inbox), daemon=True)
    reader.start()
    if rank is not None:  # else the pipe alone has to show it
        threading.Thread(target=_await_death, args=(rank, inbox, reader), daemon=True).start()
    config = EtcdConfig.from_wire(message["etcd"])
    etcd = _ReportingEtcd(config, report)
    keeper = Keeper(
        etcd,
        record,
        opening.payloads[1:],
        message["ttl_s"],
        report,
        KeyWatch(etcd, message["key"], lambda: inbox.put(Frame({"op": "changed"}))),
        message["former"],
        message["replaces"],
    )
    try:
        if not message[
            "again"
        ]:  # a keeper that takes over from a dead one registers with its first beat instead
            keeper.register()
        report({"reply": message["seq"], "order": keeper.order})
    except RegistryError as exc:
        report({"reply": message["seq"], "error": exc.to_wire()})
        return
    # The rank waited for its first claim for as long as it wants calls to take. From now on its
    # death must be noticed soon.
    etcd.config = replace(config, timeout_s=min(config.timeout_s, CALL_TIMEOUT_S))
    serve(keeper, inbox, report, message["unresponsive_after_s"], memory)


def reporter(pipe: int) -> Report:
    """Writes to the rank without ever waiting for it: one that is stopped reads nothing, and keeps
    its lease all the same.

    A message that does not fit is dropped. States are reported again, and replies are not waited
    for without end. Only a loss has to arrive, and then there is nothing left to renew.
    """
    writable = select.poll()
    writable.register(pipe, select.POLLOUT)

    def report(message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the rank is gone; the reader notices
            if message.get("state") == "LOST" or writable.poll(0):
                os.write(pipe, encode_frame(message))

    return report


def run(rank: int | None, descriptors: int) -> None:
    """`main` as a process: ends at once, without waiting for the thread that still reads standard
    input.
    """
    code = 1
    try:
        main(rank, descriptors)
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


def _await_death(rank: int, inbox: queue.Queue[Frame | None], reader: threading.Thread) -> None:
    """What the rank has said before its end comes first."""
    poll = select.poll()
    poll.register(rank, select.POLLIN)
    poll.poll()
    reader.join(_DRAIN_S)
    inbox.put(None)
