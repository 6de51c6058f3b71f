"""A source while it is being read from: what it is to bring, what of that it has, and what is on
its way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from engine_loader.engines.nearness import Nearness
from engine_loader.errors import LoaderError, ReadFailed
from engine_loader.planning.reads import Span
from engine_loader.transfer.progress import Silence
from engine_loader.transfer.shares import Share

SILENT_S = 1.0  # without a byte for so long, a source is reported as silent
_SLOW_AFTER_S, _SLOW_FACTOR, _SLOW_GAIN = 2.0, 3.0, 0.2  # see `Pipe.is_slow`
# how often one that is loading itself is asked what it has, while it has nothing for us
_POLL_S = (
    5e-3,
    50e-3,
)


@dataclass(frozen=True)
class Stock:
    """What a source has that is loading itself, as of the last check: whether those bytes, and how
    much of all, from 0 to 1.
    """

    has: Callable[[int, int], bool]  # address there, bytes
    amount: Callable[[], float]


@dataclass
class Source:
    """A rank that can be read from; `peer` is its name for the engine.

    `check` raises if it is not, or not any more, what it was resolved to be: SourceLost, TornRead,
    ReadFailed. `lost` has, without waiting, news to the same effect from elsewhere. Without a stock
    it has everything. Once it is `ready` neither reads nor checks wait for its process, so it is
    read from while the first check goes on.
    """

    name: str
    peer: str
    check: Callable[[], None]
    lost: Callable[[], LoaderError | None] = lambda: None
    stock: Stock | None = None
    ready: Callable[[], bool] = lambda: False
    near: Nearness = Nearness.UNKNOWN
    # holds some of it and has another content: the others leave that to it, as far as it is quick
    lends: bool = False

    def share(self) -> Share:
        """What it has contributed before it is read from."""
        return Share(self.name, near=self.near)


@dataclass
class Flight:
    """A read that is going on, `staged` into that buffer."""

    chunk: Span
    since: float
    staged: int | None


@dataclass
class Pipe:
    """One source while it is being read from."""

    number: int
    source: Source
    share: Share
    window: int  # chunks that may be in flight
    queues: list[deque[Span]]  # of what it holds: what the fewest others hold comes first
    open: bool = False  # a check has succeeded, and no read has failed since
    failure: ReadFailed | None = None  # of a read; seen to once nothing is in flight any more
    failures: int = 0  # since the last chunk that came
    in_flight: dict[int, Flight] = field(default_factory=dict)  # by number of the read
    moved_at: float = 0.0  # when something last came, or began when nothing was in flight
    silent_since: float | None = None  # the beginning of the stalls since the last chunk that came
    # have come, but the weights may have changed before
    unchecked: list[Span] = field(default_factory=list)
    check: Future[None] | None = None
    check_began: float = 0.0
    # had come when the check began: as good as the check
    in_check: list[Span] = field(default_factory=list)
    amount: float = 0.0  # of its stock, at the last look
    at_first: tuple[float, float, float] | None = (
        None  # when it was first looked at: the time, its amount, and ours
    )
    disordered: bool = False  # something that it has may have come behind something that it has not
    poll_s: float = _POLL_S[0]
    fed_at: float | None = None  # when there was last something to read, or something new
    leave_by: float = 0.0  # once it is dropped: when what is still in flight is ended
    drained_by: float = 0.0  # and when it must have ended
    unsure: bool = False  # reads may be in flight that are not listed above

    def src_addr(self, chunk: Span) -> int:
        return next(addr for number, addr in chunk.srcs if number == self.number)

    def has(self, chunk: Span) -> bool:
        return self.source.stock is None or self.source.stock.has(
            self.src_addr(chunk), chunk.nbytes
        )

    def has_next(self) -> bool:
        """There is a chunk that it can bring, and it is the first of its queue."""
        if any(queue and self.has(queue[0]) for queue in self.queues):
            return True
        if not self.disordered:
            return False
        self.disordered = False
        for queue in self.queues:
            # which keeps their order otherwise
            chunks = sorted(queue, key=lambda chunk: not self.has(chunk))
            queue.clear()
            queue.extend(chunks)
        return self.has_next()

    def waits(self) -> bool:
        """There are chunks for it to bring that it does not have, and none that it has."""
        return self.source.stock is not None and any(self.queues) and not self.has_next()

    @property
    def may_begin(self) -> bool:
        """It is checked for the first time, and what it brings meanwhile may be good."""
        return self.check is not None and not self.failures and self.source.ready()

    def silent_s(self, now: float) -> float:
        """For how long nothing has come, although something was asked for."""
        if self.silent_since is not None:
            return now - self.silent_since
        return now - self.moved_at if self.in_flight else 0.0

    def take_stock(self, now: float) -> None:
        """After a check: whether it has got something meanwhile."""
        if self.source.stock is None:
            return
        amount = self.source.stock.amount()
        if amount == self.amount:
            self.poll_s = min(2 * self.poll_s, _POLL_S[1])
        else:
            self.amount, self.poll_s, self.fed_at, self.disordered = amount, _POLL_S[0], now, True

    def is_slow(self, now: float, ours: float) -> bool:
        """It gets far more than it brings: `ours` is how much of all we have, from 0 to 1."""
        if self.source.stock is None:
            return False
        if self.at_first is None:
            self.at_first = now, self.amount, ours
        since, theirs_then, ours_then = self.at_first
        gained = self.amount - theirs_then
        return (
            now - since > _SLOW_AFTER_S and gained > _SLOW_FACTOR * (ours - ours_then) + _SLOW_GAIN
        )

    def starved_s(self, now: float) -> float:
        """For how long it has had nothing for us, and got nothing new."""
        if self.fed_at is None or self.in_flight or not self.waits():
            self.fed_at = now
        return now - self.fed_at


def silences(pipes: Iterable[Pipe], now: float) -> tuple[Silence, ...]:
    """Of the sources that have been silent for long enough to be reported, the longest first."""
    some = [Silence(pipe.source.name, pipe.silent_s(now)) for pipe in pipes]
    silent = [one for one in some if one.seconds >= SILENT_S]
    return tuple(sorted(silent, key=lambda one: -one.seconds))
