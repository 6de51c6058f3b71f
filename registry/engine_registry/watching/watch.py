"""`Watch`: events about ranks and instances, for a loop or a callback.

An `Inbox` reads etcd in a thread; the `Tracker` makes events of that in the caller's thread. With
`call` a second thread runs the callback.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from engine_registry.errors import EtcdError, EtcdUnavailable
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.follow import Follower
from engine_registry.etcd.followed import Followed
from engine_registry.lifetime import Closable
from engine_registry.schema.keys import ENGINES, RELEASES, instance_prefix, release_key
from engine_registry.schema.keyvalue import Batch, Snapshot
from engine_registry.schema.labels import EVERYTHING, Selector
from engine_registry.schema.record import RankRecord
from engine_registry.telemetry.logs import fields
from engine_registry.watching.events import Event, RankEvent
from engine_registry.watching.inbox import Inbox
from engine_registry.watching.selection import Selection
from engine_registry.watching.tracker import BLIP_S, Tracker

log = logging.getLogger(__name__)

_JOIN_S = 2.0  # for a callback that is still running; nothing else takes long


class Watch(Closable):
    """Iterate over events for ever, or until `stop` (from any thread) or the end of the `with`
    block; or use `call`.
    """

    def __init__(
        self,
        etcd: Etcd,
        instance: str | None = None,
        rank: int | None = None,
        blip_s: float = BLIP_S,
        selector: Selector = EVERYTHING,
        follower: Follower | None = None,
    ) -> None:
        """`etcd` is for this watch alone, which closes it when it stops: so that it need not wait
        for a call to end. `follower` follows the records of some ranks over it: then the watch is
        of these.
        """
        self._etcd = etcd
        prefix = instance_prefix(instance) if instance else ENGINES
        self._of_ranks = rank is not None or follower is not None
        self._selection = Selection(selector)
        self._follower = follower or Follower(
            etcd,
            prefix if rank is None else f"{prefix}{rank}",
            exact=rank is not None,
            others=[] if rank is not None else [_releases_of(instance)],
        )
        self._tracker = Tracker(blip_s)
        self._inbox = Inbox(self._follower)
        self._events: deque[Event] = deque()
        self._stopped = threading.Event()
        self._caller: threading.Thread | None = None
        self._mark_open()

    def next(self, timeout_s: float | None = None) -> Event | None:
        """The next event; None if there is none in time, or when the watch has stopped.

        Raises what etcd refuses for good.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._events and not self._stopped.is_set():
            waits_s = [] if deadline is None else [deadline - time.monotonic()]
            if self._tracker.due is not None:
                waits_s.append(self._tracker.due - self._inbox.now())
            try:
                came_at, item = self._inbox.get(max(0.0, min(waits_s)) if waits_s else None)
            except queue.Empty:
                self._add(self._tracker.expire(self._inbox.now()))
                if not self._events and deadline is not None and time.monotonic() >= deadline:
                    return None
                continue
            if self._stopped.is_set():
                break
            if isinstance(item, EtcdError):
                self.stop()
                raise item
            # By when it came, not by when it is taken: a reader that lags must not take a blip for
            # a loss.
            if isinstance(item, Snapshot):
                self._add(self._tracker.snapshot(item, came_at))
            elif isinstance(item, Batch):
                self._add(self._tracker.changes(item.changes, came_at))
        return self._events.popleft() if self._events and not self._stopped.is_set() else None

    def _add(self, events: Sequence[Event]) -> None:
        """Where some ranks are watched, no event about an instance: it is not seen as a whole."""
        self._events.extend(
            event
            for event in events
            if self._selection.takes(event) and (not self._of_ranks or isinstance(event, RankEvent))
        )

    def __iter__(self) -> Iterator[Event]:
        while (event := self.next()) is not None:
            yield event

    def call(self, on_event: Callable[[Event], object]) -> Watch:
        """Instead of iterating: calls `on_event` for every event, from a separate thread, until
        the watch is stopped.

        A callback that raises is logged, and the next event follows. What etcd refuses for good is
        logged and ends the calls.
        """
        self._caller = threading.Thread(
            target=self._deliver, args=(on_event,), name="registry events", daemon=True
        )
        self._caller.start()
        return self

    def _deliver(self, on_event: Callable[[Event], object]) -> None:
        try:
            for event in self:
                try:
                    on_event(event)
                except Exception:
                    log.exception(
                        "the callback for %s failed",
                        type(event).__name__,
                        extra=fields("event_callback_failed"),
                    )
        except EtcdError as exc:
            log.error("no more events: %s", exc, extra=fields("watch_ended", error=exc))

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called, by anybody."""
        return self._stopped.is_set()

    @property
    def away(self) -> EtcdUnavailable | None:
        """Why there is no news: etcd cannot be reached. None while it can."""
        return self._follower.away

    @property
    def held(self) -> tuple[RankRecord, ...]:
        """The last records of the ranks that are held now: no event says when they are not any
        more. For the thread that iterates.
        """
        return self._tracker.held

    def stop(self) -> None:
        """Ends the iteration, a `next` that waits, and the callbacks. Waits for none of them.

        May be called from any thread, and again.
        """
        self._mark_closed()
        self._stopped.set()
        self._inbox.stop()
        self._etcd.close()

    def close(self) -> None:
        """`stop`, and waits for a callback that is still running, for up to 2 s.

        May be called from any thread, and again.
        """
        self.stop()
        deadline = time.monotonic() + _JOIN_S
        self._inbox.join(_JOIN_S)
        if self._caller is not None and self._caller is not threading.current_thread():
            self._caller.join(timeout=max(0.0, deadline - time.monotonic()))

    def _label(self) -> str:
        return f"of {self._follower.name}"


def _releases_of(instance: str | None) -> Followed:
    """Users of etcd from before there were releases may not read them: they watch without."""
    if instance is None:
        return Followed(RELEASES, optional=True)
    return Followed(release_key(instance), exact=True, optional=True)
