"""Where a keeper hands out what it has: file descriptors of its rank's memory, to processes that
want to read it, and the memory as a whole, once the rank has ended, to one that takes its place.

`keeper.passing` is how the rank brings them, `keeper.stock` what is answered. Starts one thread,
which never waits for one peer alone. It needs neither etcd nor the rank.
"""

from __future__ import annotations

import math
import os
import queue
import resource
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

from engine_registry.etcd.descriptors import explain
from engine_registry.registration.descriptors import (
    MOST_AT_ONCE,
    DescriptorPlace,
    peer_of,
    receive_fds,
    send_fds,
)
from engine_registry.registration.keeper.passing import BEGIN, WHY_NBYTES
from engine_registry.registration.keeper.stock import MOST_NBYTES, Caller, Stock
from engine_registry.schema.moment import utc

_MOST_READERS = 64  # others wait until they are connected; who takes or shares does not count
# After the end of a rank that is not held, whose keeper may try for minutes to reach an etcd that
# is away: the memory must be free when the rank is started anew.
_DEAD_S = 30.0
_READER_S = 5.0  # of one, with all that it asks for
_RETRY_S = 0.01  # of an answer that a reader, or the system, does not take yet
_ORDER_S = 10.0  # until an order is carried out, on a machine with too much to do


class Held(NamedTuple):
    """Until when the memory is held: on the clock of time.monotonic, and in UTC."""

    until: float
    held_until: str


class Desk:
    """Its thread alone touches the stock and the sockets."""

    def __init__(self, rank: socket.socket, on_let_go: Callable[[], object] = lambda: None) -> None:
        """`rank` is the keeper's end of the pair. `on_let_go` is called in the desk's thread when
        what is held was let go.
        """
        self._rank = rank
        self._rank_ended_at: float | None = None  # on the clock of time.monotonic
        self._on_let_go = on_let_go
        self._stock = Stock()
        self._listener: socket.socket | None = None
        self._listening = False  # to the listener: not while there are too many readers
        self._callers: dict[socket.socket, Caller] = {}
        self._orders: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._woken, self._wake = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for each in (rank, self._woken):
            self._selector.register(each, selectors.EVENT_READ)

    def start(self) -> None:
        threading.Thread(target=self._run, name="descriptors", daemon=True).start()

    # -- orders, from any thread

    def let_go(self) -> None:
        """Hands out nothing any more, soon."""
        self._order(self._clear)

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Processes that look for keepers get these facts from now on, or soon."""

        def note() -> None:
            self._stock.facts = facts

        self._order(note)

    def hold(self, name: bytes, seconds: float) -> Held | None:
        """Holds what is handed out under this name, for so long from the end of the rank, which has
        ended. None where it has not all been handed over, or another has taken its place.
        """
        held: queue.SimpleQueue[Held | None] = queue.SimpleQueue()
        self._order(lambda: held.put(self._hold(name, seconds)))
        try:
            return held.get(timeout=_ORDER_S)
        except queue.Empty:
            return None

    def _order(self, order: Callable[[], object]) -> None:
        self._orders.put(order)
        self._wake.send(b"!")

    def _obey(self) -> None:
        self._woken.recv(64)
        while not self._orders.empty():
            self._orders.get()()

    # -- the thread

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select(self._pause_s()):
                if key.fileobj is self._rank:
                    if self._rank_ended_at is None:
                        self._hear_rank()
                elif key.fileobj is self._woken:
                    self._obey()
                elif key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._callers:
                    self._hear(key.fileobj)
            self._look_after_callers()
            if time.monotonic() >= self._stock.until:
                self._let_go() if self._stock.is_held else self._clear()

    def _pause_s(self) -> float | None:
        """Until somebody has to be looked after, or all is closed."""
        if any(caller.waits for caller in self._callers.values()):
            return _RETRY_S
        until = min([self._stock.until, *(caller.until for caller in self._callers.values())])
        return None if until == math.inf else max(0.0, until - time.monotonic())

    # -- the rank

    def _hear_rank(self) -> None:
        try:
            packet, fds = receive_fds(self._rank, MOST_AT_ONCE, BEGIN.size)
            if not packet:
                self._leave_rank()
                return
            self._stock.fds += fds
            if packet != b"+":
                self._begin(packet)
            if self._stock.is_complete and self._stock.place is not None:
                self._open(self._stock.place)
            answer = b"+"
        except OSError as exc:
            self._clear()
            answer = b"-" + explain(exc)[0].encode()[: WHY_NBYTES - 1]
        with suppress(OSError):
            self._rank.send(answer, socket.MSG_NOSIGNAL)

    def _leave_rank(self) -> None:
        """It has ended."""
        self._selector.unregister(self._rank)
        self._rank_ended_at = time.monotonic()
        self._stock.until = self._rank_ended_at + _DEAD_S

    def _hold(self, name: bytes, seconds: float) -> Held | None:
        poll = select.poll()
        poll.register(self._rank, select.POLLIN)
        while self._rank_ended_at is None and poll.poll(0):
            self._hear_rank()  # the last that it has said
        if self._rank_ended_at is None:  # a child holds its end open
            self._leave_rank()
        now, stock = time.monotonic(), self._stock
        until = (self._rank_ended_at or now) + seconds
        if not stock.is_complete or stock.place is None or stock.place.name != name or until <= now:
            return None
        stock.until = until
        stock.held_until = utc(datetime.now(timezone.utc) + timedelta(seconds=until - now))
        return Held(until, stock.held_until)

    def _begin(self, packet: bytes) -> None:
        _, place, count = BEGIN.unpack(packet)
        self._clear()
        self._stock.begin(DescriptorPlace.decode(place), count)
        _make_room()

    def _open(self, place: DescriptorPlace) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        self._listener.bind(place.address)
        self._listener.listen(1024)
        self._listen(True)

    def _clear(self) -> None:
        for connection in list(self._callers):
            self._leave(connection)
        self._listen(False)
        if self._listener is not None:
            self._listener.close()
        self._listener = None
        self._stock.clear()

    def _let_go(self) -> None:
        self._clear()
        self._on_let_go()

    def _listen(self, wanted: bool) -> None:
        if self._listener is None or wanted == self._listening:
            return
        self._listening = wanted
        if wanted:
            self._selector.register(self._listener, selectors.EVENT_READ)
        else:
            self._selector.unregister(self._listener)

    # -- those that ask

    def _accept(self) -> None:
        if self._listener is None:
            return
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptor is left: others may leave
            time.sleep(_RETRY_S)
            return
        pid, uid = peer_of(connection)
        if uid != os.geteuid():
            connection.close()
            return
        connection.setblocking(False)
        self._callers[connection] = Caller(time.monotonic() + _READER_S, pid)
        self._selector.register(connection, selectors.EVENT_READ)
        self._listen_while_few()

    def _listen_while_few(self) -> None:
        readers = sum(not caller.stays for caller in self._callers.values())
        self._listen(readers < _MOST_READERS)

    def _hear(self, connection: socket.socket) -> None:
        caller = self._callers[connection]
        try:
            packet = connection.recv(MOST_NBYTES + 1)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if caller.waits is not None:  # it must take one answer before it asks again
            self._leave(connection)
            return
        caller.waits = self._stock.asked(packet)
        if caller.waits is not None:
            self._hand_out(connection, caller)
        elif not self._answer(connection, caller, packet):
            self._leave(connection)

    def _answer(self, connection: socket.socket, caller: Caller, packet: bytes) -> bool:
        """False where that is no request."""
        was_held = self._stock.is_held
        answer = self._stock.answer(packet, caller, time.monotonic())
        with suppress(OSError):  # one that takes no answer is sent away in time
            if answer is not None:
                connection.send(answer, socket.MSG_NOSIGNAL)
        if was_held and not self._stock.is_held:
            self._let_go()
            return True
        self._listen_while_few()
        return answer is not None

    def _hand_out(self, connection: socket.socket, caller: Caller) -> None:
        if caller.waits is None:
            return
        first, count = caller.waits
        # one that takes no answer, or as many as may be on their way, are, is tried again
        with suppress(OSError):
            send_fds(connection, self._stock.fds[first : first + count])
            caller.waits = None

    def _look_after_callers(self) -> None:
        now = time.monotonic()
        for connection, caller in list(self._callers.items()):
            self._hand_out(connection, caller)
            if now >= caller.until:
                self._leave(connection)

    def _leave(self, connection: socket.socket) -> None:
        self._stock.forget(self._callers.pop(connection))
        self._selector.unregister(connection)
        connection.close()
        self._listen_while_few()


def _make_room() -> None:
    """As many descriptors as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
