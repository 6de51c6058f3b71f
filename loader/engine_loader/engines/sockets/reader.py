"""What is wanted of one peer, and the lanes that bring it.

A lane is a thread that takes some of the reads that wait, and brings them. There is one for each
peer, and more where much waits and the machine has the processors for it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial

from engine_loader.engines.base import session_of
from engine_loader.engines.dial import failed
from engine_loader.engines.sockets.contact import meet
from engine_loader.engines.sockets.credentials import SocketCredentials
from engine_loader.engines.sockets.neighbour import MOST_PIECES, Neighbour
from engine_loader.engines.sockets.reads import Batch, Read
from engine_loader.engines.sockets.stream import Stream
from engine_loader.engines.sockets.ways import Connected, Near, Way
from engine_loader.engines.sockets.wire import NotOurs
from engine_loader.errors import ReadFailed
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
MOST_LANES = min(4, os.cpu_count() or 1)
_BATCH_NBYTES = 4 << 20  # that a lane takes at once, unless one read is longer
_AT_ONCE_NBYTES = 64 << 10  # that the caller's thread reads of a neighbour by itself
_LEAVE_S = 5.0


class PeerReader:
    def __init__(
        self,
        peer: str,
        credentials: SocketCredentials,
        same_host: bool,
        came: Callable[[], None],
    ) -> None:
        """`came` is called, by a lane, when some reads are over."""
        self.peer = peer
        self.session_id = session_of(peer)
        self._credentials = credentials
        self._same_host = same_host
        self._came = came
        self._contact = threading.Lock()  # of whoever makes the first contact
        self._changed = threading.Condition()  # of all that follows
        self._met = False
        self._over = ""  # why nothing is read any more
        self._neighbour: Neighbour | None = None
        self._waiting: deque[Read] = deque()
        self._waiting_nbytes = 0
        self._most_lanes = MOST_LANES
        self._lanes = 0  # threads that may read
        self._idle = 0  # lanes that wait for a read
        self._open: set[Stream] = set()  # which are cut in the end

    @property
    def met(self) -> bool:
        """The first contact has been made."""
        return self._met

    @property
    def over(self) -> bool:
        """Nothing is read any more."""
        return bool(self._over)

    @property
    def near(self) -> bool:
        """Whether it is read without the network."""
        return self._neighbour is not None

    def connect(self) -> None:
        """Makes the first contact, or waits for the one that is being made; ReadFailed."""
        with self._contact:
            if self._met and not self._over:
                return
            try:
                way = self._way()
            except ReadFailed as exc:
                self._end(exc.what)
                raise
            with self._changed:
                self._lanes += 1
                self._met = True
            try:
                self._start_lane(way)
            except RuntimeError as exc:
                self._end(f"no thread is left for it ({exc})")
                raise failed(self.session_id, self._over) from exc

    def _way(self) -> Way:
        """One more. ReadFailed."""
        if self._neighbour is None:
            stream, place = meet(self.session_id, self._credentials, lambda: self.over, self._add)
            if self._same_host and place is not None:
                with suppress(OSError):  # it is on another host, or of another user
                    self._neighbour = Neighbour(place)
            if self._neighbour is None:
                stream.go_on()
                return Connected(stream)
            self._discard(stream)
        return Near(self._neighbour)

    def _add(self, stream: Stream) -> None:
        with self._changed:
            if self._over:
                raise failed(self.session_id, self._over)
            self._open.add(stream)

    def _discard(self, stream: Stream) -> None:
        with self._changed:
            self._open.discard(stream)
        stream.close()

    def start(self, read: Read) -> None:
        """ReadFailed where the peer is not connected."""
        lane: Callable[[], None] | None = None
        with self._changed:
            if self._over or not self._met:
                raise failed(self.session_id, self._over or "it is not connected")
            if self._neighbour is not None and read.nbytes <= _AT_ONCE_NBYTES:
                self._lanes += 1
                lane = partial(self._read_at_once, self._neighbour, read)
            else:
                self._waiting.append(read)
                self._waiting_nbytes += read.nbytes
                if self._idle:
                    self._changed.notify()
                elif self._lanes < self._most_lanes and self._waiting_nbytes > _BATCH_NBYTES:
                    self._lanes += 1
                    lane = self._start_another_lane
        if lane is not None:
            lane()

    def give_up(self) -> None:
        """Nothing is read any more. Returns when what was being read has been left, which takes no
        longer than a copy of some bytes.
        """
        self._end("it was given up")
        with self._changed:
            self._changed.wait_for(lambda: not self._lanes, _LEAVE_S)

    def _end(self, why: str) -> None:
        with self._changed:
            self._over = self._over or why
            waiting, self._waiting = self._waiting, deque()
            for one in self._open:
                one.cut()
            self._changed.notify_all()
        self._finish(waiting)

    # -- lanes

    def _start_lane(self, way: Way | None) -> None:
        """RuntimeError where no thread can be started."""
        thread = threading.Thread(
            target=self._lane, args=(way,), name=f"reads from {self.session_id}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            if isinstance(way, Connected):
                self._discard(way.stream)
            self._leave()
            raise

    def _start_another_lane(self) -> None:
        try:
            self._start_lane(None)
        except RuntimeError:  # those that are there go on
            self._most_lanes = 1

    def _lane(self, way: Way | None) -> None:
        """One that has no way yet finds one."""
        asked: deque[Batch] = deque()
        try:
            if way is None:
                way = self._way()
            self._run(way, asked)
        except ReadFailed:  # there is no other way, and those that are there go on
            self._most_lanes = 1
        except (OSError, NotOurs) as exc:
            self._end(f"its process has ended, or the connection is broken ({exc})")
        except Exception as exc:
            log.exception("reads from %s end", self.session_id, extra=fields("lane_failed"))
            self._end(f"this engine has failed ({type(exc).__name__}: {exc})")
        finally:
            if isinstance(way, Connected):
                self._discard(way.stream)
            self._leave()
            for batch in asked:
                self._finish(batch.reads)

    def _run(self, way: Way, asked: deque[Batch]) -> None:
        while not self._over:
            batch = self._next(wait=not asked)
            if batch is not None:
                asked.append(batch)
                way.ask(batch.remote)
            if asked and (batch is None or len(asked) == way.ahead):
                first = asked[0]
                self._finish(first.reads, first.came(way.take(first.local, first.remote)))
                asked.popleft()

    def _next(self, wait: bool) -> Batch | None:
        with self._changed:
            if wait:
                self._idle += 1
                self._changed.wait_for(lambda: self._waiting or self._over)
                self._idle -= 1
            reads: list[Read] = []
            nbytes = count = 0
            while self._waiting and nbytes < _BATCH_NBYTES:
                count += len(self._waiting[0].local)
                if reads and count > MOST_PIECES:
                    break
                reads.append(self._waiting.popleft())
                nbytes += reads[-1].nbytes
            self._waiting_nbytes -= nbytes
        return Batch.of(reads) if reads else None

    def _read_at_once(self, neighbour: Neighbour, read: Read) -> None:
        offered: Sequence[bool] = ()
        batch = Batch.of([read])
        try:
            offered = batch.came(neighbour.read(batch.local, batch.remote))
        except OSError as exc:
            self._end(f"its process has ended ({exc})")
        finally:
            self._leave()
            self._finish([read], offered)

    def _leave(self) -> None:
        with self._changed:
            self._lanes -= 1
            self._changed.notify_all()

    def _finish(self, reads: Collection[Read], offered: Sequence[bool] = ()) -> None:
        """Nothing has come of them unless it is said which are offered."""
        for read, came in zip(reads, offered or [False] * len(reads), strict=True):
            why = f"it does not offer {read.op.nbytes} bytes at {read.op.src_addr:#x}"
            read.end(None if came else failed(self.session_id, why if offered else self._over))
        self._came()
