"""Sources that are not read from any more, until nothing of them writes to the caller's memory.

Used by `Transfer`, in its thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine_loader import metrics
from engine_loader.engines.base import Engine, session_of
from engine_loader.errors import EngineFailed, ReadFailed
from engine_loader.transfer.clock import Clock
from engine_loader.transfer.pace import Pace
from engine_loader.transfer.pipe import Pipe

# how long reads that nobody wants any more may take before their peer is dropped, which takes a
# second
_SETTLE_S = 0.25
_ASK_AGAIN_S = 0.05  # between two tries to end reads that the engine cannot end at once
DRAIN_S = 60.0  # how long such reads may keep a load waiting for the memory that they write to
_HAND_BACK_S = 5.0  # and how long they may keep the caller waiting once the load is over


class Leaving:
    """True while there is such a source."""

    def __init__(
        self, engine: Engine, clock: Clock, pace: Pace, again: Callable[[Pipe, int], None]
    ) -> None:
        """`again` gets a pipe and the number of a read that is over, and was to bring something
        that has to be read anew.
        """
        self._engine = engine
        self._clock = clock
        self._pace = pace
        self._again = again
        self._pipes: list[Pipe] = []

    def __bool__(self) -> bool:
        return bool(self._pipes)

    def add(self, pipe: Pipe, settle_s: float = _SETTLE_S) -> None:
        """Its reads may end by themselves for so long."""
        self._pipes.append(pipe)
        pipe.leave_by = self._clock.now() + settle_s
        pipe.drained_by = pipe.leave_by + DRAIN_S

    def see_off(self) -> None:
        """What a dropped source has in flight ends by itself as a rule; what does not is ended.

        Then others may read it. EngineFailed where it does not end.
        """
        for pipe in list(self._pipes):
            if self._has_left(pipe):
                self._pipes.remove(pipe)
            elif self._clock.now() > pipe.drained_by:
                raise _not_ended([pipe])

    def end_reads(self, pipe: Pipe) -> bool:
        """Whether they have all ended.

        Those that the engine cannot end go on, and nobody else may write where they do.
        """
        self._engine.abandon(pipe.source.peer)
        if not self._engine.settled(pipe.source.peer):
            return False
        metrics.ABANDONED_READS.inc(amount=len(pipe.in_flight))
        for number in list(pipe.in_flight):
            self._is_over(number)  # it is: this is how the engine may forget the number
            self._again(pipe, number)
        return True

    def settle(self, pipes: Sequence[Pipe], interrupted: bool) -> None:
        """As `Transfer.settle`, for all pipes of the transfer."""
        self._pipes = []
        for pipe in pipes:
            # nobody has checked it, nor will
            pipe.share.nbytes -= sum(chunk.read_nbytes for chunk in pipe.unchecked + pipe.in_check)
            pipe.unchecked, pipe.in_check = [], []
            pipe.unsure = interrupted  # an interrupt may have kept from us that a read has begun
            if interrupted or pipe.in_flight or pipe.check is not None:
                self.add(pipe, 0.0 if interrupted else _SETTLE_S)
        give_up = self._clock.now() + _SETTLE_S + _HAND_BACK_S
        raised: BaseException | None = None
        while self._pipes and self._clock.now() <= give_up:
            try:
                for pipe in list(self._pipes):
                    if self._has_left(pipe):
                        self._pipes.remove(pipe)
                if self._pipes:
                    self._clock.sleep(self._pace.nap_s[1], self._engine.wait)
            except BaseException as exc:  # noqa: BLE001  raised below
                if raised is None or not isinstance(exc, Exception):
                    raised = exc
        if self._pipes:
            raise _not_ended(self._pipes) from raised
        if raised is not None:
            raise raised

    def _has_left(self, pipe: Pipe) -> bool:
        """Nothing of it writes to our memory any more."""
        for number in list(pipe.in_flight):
            if self._is_over(number):
                self._again(pipe, number)
        hangs = pipe.check is not None and not pipe.check.done()
        if not (pipe.in_flight or hangs or pipe.unsure):
            return True
        if self._clock.now() <= pipe.leave_by:
            return False
        pipe.leave_by = self._clock.now() + _ASK_AGAIN_S
        return self.end_reads(pipe)

    def _is_over(self, number: int) -> bool:
        try:
            return self._engine.done(number)
        except (ReadFailed, KeyError):  # an interrupt may have kept from us that it was over before
            return True


def _not_ended(pipes: Sequence[Pipe]) -> EngineFailed:
    return EngineFailed(
        f"reads from {' and '.join(session_of(pipe.source.peer) for pipe in pipes)} have not ended",
        "the memory that they write to must not be used again before this process ends",
        unsettled=[pipe.source.name for pipe in pipes],
    )
