"""The rank's line to its keeper: sends it requests, receives its reports, and puts another in its
place when it dies or hangs.

Used by the handle only. Starts one thread, which listens to the keeper. Nothing here needs the GIL
in time: the keeper goes on without the rank, and marks it as unresponsive.

Longer than other modules: all of it changes the same fields under one lock, which is best seen in
one place.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace

from engine_registry.errors import KeeperFailed, RegistryError, from_wire
from engine_registry.etcd.backoff import Backoff
from engine_registry.etcd.config import EtcdConfig
from engine_registry.registration.descriptors import Descriptors, closed_on_error
from engine_registry.registration.hold import Hold
from engine_registry.registration.keeper.pending import Message, Pending
from engine_registry.registration.keeper.process import START_TIMEOUT_S, KeeperProcess
from engine_registry.registration.keeper.protocol import ANSWER_S, FORMER_KEPT, beat_s, encode_frame
from engine_registry.registration.writes import DIED
from engine_registry.schema.record import RankRecord
from engine_registry.schema.record_format import encode
from engine_registry.telemetry import metrics
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)

# The name of a state of the registration, why, the error where the registration is lost, and
# whether the record was put into etcd again, under another lease as a rule.
OnNews = Callable[[str, str, RegistryError | None, bool], None]


class KeeperLink:
    """All calls may come from any thread. `record` is what the rank wants to be in etcd."""

    def __init__(
        self,
        config: EtcdConfig,
        record: RankRecord,
        parts: Sequence[bytes],
        ttl_s: float,
        unresponsive_after_s: float,
        news: Callable[[], OnNews | None],
        descriptors: Descriptors | None = None,
        hold: Hold | None = None,
        replaces: str = "",
    ) -> None:
        """`news` is a weak reference: when its referent is gone, the registration ends.

        `descriptors` are those of the manifest, which the keeper hands out. They are closed when
        the registration is over, or another manifest takes the place of theirs. `hold` says what
        the keeper does with them when this process has ended. `replaces` is the incarnation of a
        rank that has ended, in whose place this one comes.
        """
        self.record = record
        self._config = config
        self._parts = tuple(parts)
        self._descriptors = descriptors
        self._hold = hold
        self._replaces = replaces
        # Earlier incarnations of the rank: the record in etcd may still have one of them.
        self._former: list[str] = []
        self._ttl_s = ttl_s
        self._unresponsive_after_s = unresponsive_after_s
        self._news = news
        self._lock = threading.Lock()
        self._pending = Pending()
        self._claims_again = 0  # that the keeper has reported
        self._opened = False  # registered at least once
        # for each request from then on; a keeper that ends then is not replaced
        self._over: RegistryError | None = None
        self._woken = threading.Event()  # it is over
        self._forgotten = False
        self._keeper: KeeperProcess | None = None  # None while the next one is not there yet
        self._listener = threading.Thread(
            target=self._listen, name=f"keeper of {record.key}", daemon=True
        )

    @property
    def pid(self) -> int | None:
        """Of the keeper process; None while there is none."""
        keeper = self._keeper
        return keeper.pid if keeper else None

    def open(self) -> None:
        """Starts the keeper and registers; raises what is wrong, and has then left nothing behind.

        Takes as long as etcd does, with the deadline that the configuration gives each call; a
        keeper that hangs is an error.
        """
        with self._lock:
            opening, reply = self._pending.add(self._opening(again=False))
        try:
            self._start(opening)
            try:
                self._listener.start()
            except RuntimeError as exc:
                raise KeeperFailed(f"cannot listen to a keeper: {exc}") from exc
            _raise_error(reply.result())
        except BaseException:
            self.abandon()
            raise

    def update(
        self,
        change: Callable[[RankRecord], RankRecord],
        parts: Sequence[bytes] = (),
        descriptors: Descriptors | None = None,
    ) -> None:
        """Returns when the changed record is in etcd, or as soon as it has to wait: for etcd, or
        for the next keeper.

        One change after another: each is made of the record that the one before has left. With
        `parts`, which are another manifest, the record has another incarnation, and the keeper
        hands out other descriptors, or none. Where it cannot, that is KeeperFailed, and the record
        stays as it was.
        """
        with self._lock:
            with closed_on_error(descriptors):
                record = change(self.record)
                value = encode(record)
                if parts:
                    self._hand_over(descriptors)
            if parts:
                self._former.append(self.record.incarnation)
                self._parts = tuple(parts)
            self.record = record
            if self._keeper is None and not self._over:
                return
            reply = self._ask(self._change(record), (value, *parts))
        try:
            _raise_error(reply.result(self._config.timeout_s + ANSWER_S))
        except FutureTimeout:
            log.warning(
                "%s: etcd is slow, the change waits in the keeper",
                record.key,
                extra=fields("update_waits", key=record.key),
            )

    def drop_descriptors(self) -> None:
        """The keeper hands out none any more."""
        with self._lock:
            self._hand_over(None)

    def _hand_over(self, descriptors: Descriptors | None) -> None:
        """In the place of those that there are. A keeper that is not there yet gets them later."""
        former, self._descriptors = self._descriptors, descriptors
        if former is None and descriptors is None:
            return
        try:
            if self._keeper is not None and not self._over:
                self._keeper.hand_over(descriptors)
        except KeeperFailed:
            self._descriptors = None
            raise
        finally:
            if former is not None:
                former.close()
            if self._over and descriptors is not None:
                descriptors.close()

    def end(self, reason: str) -> None:
        """Returns when the registration is out of etcd; an error says why it is not yet.

        The keeper goes on trying then.
        """
        with self._lock:
            reply = self._ask({"op": "end", "reason": reason})
        try:
            _raise_error(reply.result(self._config.timeout_s + ANSWER_S))
        except FutureTimeout:
            raise KeeperFailed("its keeper does not answer") from None
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Lets go of the keeper: it ends by itself, when it has nothing left to delete."""
        with self._lock:
            if not self._over:
                self._finish(self._closed())
            if self._keeper is not None:
                self._dismiss(self._keeper)
        if self._listener.is_alive() and threading.current_thread() is not self._listener:
            self._listener.join(timeout=1.0)

    def forget(self) -> None:
        """`abandon`, soon, by the listening thread.

        Takes no lock, and nothing can interrupt it half-way.
        """
        self._forgotten = True

    @property
    def _unwanted(self) -> bool:
        return self._forgotten or self._news() is None

    def _notify(
        self, state: str, why: str, lost: RegistryError | None, again: bool = False
    ) -> None:
        on_news = self._news()
        if on_news is not None:
            on_news(state, why, lost, again)

    def _opening(self, again: bool) -> Message:
        """`again`: it takes over from a dead keeper; the registration may be in etcd or not."""
        return {
            "etcd": self._config.to_wire(),
            "key": self.record.key,
            "ttl_s": self._ttl_s,
            "unresponsive_after_s": self._unresponsive_after_s,
            "again": again,
            "hold": self._hold.to_wire() if self._hold is not None else None,
            "replaces": self._replaces,
        }

    def _change(self, record: RankRecord) -> Message:
        return {
            "op": "update",
            "key": record.key,
            "incarnation": record.incarnation,
            "place": _place(self._descriptors),
        }

    def _start(self, opening: Message) -> None:
        """Needs no lock while the process starts: until the end nobody else knows of it."""
        with self._lock:
            record, parts, descriptors = self.record, self._parts, self._descriptors
            opening = {
                **opening,
                "former": list(self._former),
                "place": _place(descriptors),
            }
        frame = encode_frame(opening, (encode(record), *parts))
        keeper = KeeperProcess(record.key, self._config.password)
        try:
            if descriptors is not None:
                keeper.hand_over(descriptors, self._start_s)
            keeper.write(frame, self._start_s)
            with self._lock:
                if self._descriptors is not descriptors:
                    keeper.hand_over(self._descriptors)
                self._attach(keeper, record, parts)
        except KeeperFailed:
            keeper.reap()
            raise

    def _attach(self, keeper: KeeperProcess, record: RankRecord, parts: Sequence[bytes]) -> None:
        """The keeper that was started with these, and learns what has changed since."""
        self._keeper = keeper
        for message in self._pending.ends():
            keeper.write(encode_frame(message))
        if self.record is not record:
            moved = self._parts if self._parts is not parts else ()
            self._ask(self._change(self.record), (encode(self.record), *moved))
        if self._over:
            self._dismiss(keeper)

    @property
    def _start_s(self) -> float:
        """How long a keeper may take to start, and to claim: longer where the user lets calls take
        longer, as on a slow machine.
        """
        return START_TIMEOUT_S + 3 * self._config.timeout_s

    def _silence_s(self, keeper: KeeperProcess) -> float:
        """How long a keeper that lives may say nothing."""
        if not self._opened or not keeper.spoke:
            return self._start_s
        return ANSWER_S if self._pending else beat_s(self._ttl_s) + ANSWER_S

    def _dismiss(self, keeper: KeeperProcess) -> None:
        """As if the rank had ended. That is said, because a forked child may hold the pipe open."""
        keeper.write(encode_frame({"op": "end", "reason": DIED, "seq": 0}))
        keeper.close_input()

    def _ask(self, message: Message, payloads: Sequence[bytes] = ()) -> Future[Message]:
        waiting = bool(self._pending)
        message, reply = self._pending.add(message)
        if self._over:
            self._finish(self._over)
        elif self._keeper is not None:
            if not waiting:
                self._keeper.silent_s = 0.0  # it had nothing to say until now
            self._keeper.write(encode_frame(message, payloads))
        return reply

    def _closed(self) -> RegistryError:
        return RegistryError(f"the registration of {self.record.key} is closed")

    def _finish(self, error: RegistryError) -> None:
        self._over = error
        if self._descriptors is not None:
            self._descriptors.close()
        self._woken.set()
        self._pending.fail(error)

    # -- the listening thread
    # ----------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        backoff = Backoff(0.1, 5.0)
        while (keeper := self._keeper) is not None:
            self._attend(keeper, backoff)
            with self._lock:
                self._keeper = None
                error = keeper.reap()
                if not self._opened and not self._over:
                    self._finish(error)
                self._pending.settle_updates()
            if not self._over:
                log.warning(
                    "%s; starting another",
                    error,
                    extra=fields("keeper_lost", key=self.record.key, hung=keeper.hung),
                )
                # for longer, perhaps, than the lease lives; one that died is replaced before that
                if keeper.hung:
                    self._notify("SUSPENDED", str(error), None)
            while not self._over and self._keeper is None:
                self._woken.wait(backoff.next_s())
                if self._unwanted:
                    self.abandon()
                self._replace()

    def _attend(self, keeper: KeeperProcess, backoff: Backoff) -> None:
        """Receives from the keeper until it has ended, and ends one that hangs."""
        self._claims_again = 0
        while (frames := keeper.read()) is not None:
            for frame in frames:
                backoff.reset()
                self._receive(frame.message)
            if any("state" in frame.message for frame in frames):
                self._answer(keeper)
            if self._unwanted and not self._over:
                self.abandon()
            # requests to a keeper that was dismissed wait for its end, which may take an outage of
            # etcd
            with self._lock:
                hung = not self._over and keeper.silent_s >= self._silence_s(keeper)
            if hung:
                keeper.kill_hung()

    def _answer(self, keeper: KeeperProcess) -> None:
        """This process runs, and its threads get the GIL."""
        with self._lock:
            keeper.write(encode_frame({"op": "answer"}))

    def _replace(self) -> None:
        """Starts another keeper, unless there is no memory, process or file descriptor to be had
        now.
        """
        if self._over:
            return
        try:
            self._start({**self._opening(again=True), "seq": 0})
            metrics.KEEPER_RESTARTS.inc()
        except (KeeperFailed, MemoryError) as exc:
            self._notify("SUSPENDED", f"no keeper: {str(exc) or type(exc).__name__}", None)

    def _receive(self, message: Message) -> None:
        if message.get("order"):  # which the next keeper claims it with
            with self._lock:
                self.record = replace(self.record, order=message["order"])
        if "reply" in message:
            with self._lock:
                asked, reply = self._pending.take(message["reply"])
                self._opened = self._opened or not message.get("error")
                # it ends next, perhaps before the thread that asked it has gone on
                if asked.get("op") == "end":
                    self._finish(self._closed())
                if asked.get("op") == "update" and message.get("written"):
                    self._forget_before(asked["incarnation"])
            if reply is not None:
                reply.set_result(message)
        elif message.get("state") == "LOST":
            lost = from_wire(message["error"])
            with self._lock:
                self._finish(lost)
            self._notify("LOST", str(lost), lost)
        elif "state" in message:
            self._notify(message["state"], message["why"], None, again=self._count(message))

    def _forget_before(self, incarnation: str) -> None:
        """etcd has that one. Some are kept: it may be restored from a backup."""
        former = self._former
        at = former.index(incarnation) if incarnation in former else len(former)
        del former[: max(0, at - FORMER_KEPT)]

    def _count(self, message: Message) -> bool:
        """Whether the record was claimed again. Claims come as a sum, as a rank that is stopped
        does not get every message.
        """
        if message.get("renewed_in_s") is not None:
            metrics.KEEPALIVE.observe(message["renewed_in_s"])
        claims: int = message.get("claims_again", self._claims_again)
        new = claims - self._claims_again
        if new > 0:
            metrics.REREGISTRATIONS.inc(amount=new)
            self._claims_again = claims
        return new > 0


def _place(descriptors: Descriptors | None) -> str:
    """The name of the place where the keeper hands them out."""
    return descriptors.place.name.hex() if descriptors is not None else ""


def _raise_error(answer: Message) -> None:
    if answer.get("error"):
        raise from_wire(answer["error"])
