"""The reads of one attempt, from the sources that it has: what is to come of the plan, digests of
it, and the transfer. Made by `attempt`, in whose thread it runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from engine_loader.engines.base import lend
from engine_loader.errors import DigestsMissing, LoaderError
from engine_loader.loading.job import Job
from engine_loader.loading.others import Others
from engine_loader.planning.plan import Planner
from engine_loader.planning.reads import Span
from engine_loader.publishing.replica import Republication
from engine_loader.sources.digest_check import DigestCheck
from engine_loader.sources.entrance import Entered, Entrance
from engine_loader.sources.source import SourceRank
from engine_loader.tensors.cuda import to_register
from engine_loader.transfer.pace import Pace
from engine_loader.transfer.progress import Progress
from engine_loader.transfer.received import Received
from engine_loader.transfer.scheduler import Transfer
from engine_loader.transfer.shares import Share
from engine_loader.transfer.staging import Staging

_SUMMED_UP_S = 0.05  # between two looks whether there is something to sum up
_STAGING_NBYTES = 48 << 20  # for what is not read straight to its place


class Reading:
    """`begin`; `start`, if reads may begin early; `run`, once the sources have been entered.

    Attributes:
        sources: Those that it reads from.
        others: Ranks with other contents, which bring blocks as well.
        plan: All that is wanted of them.
        place: How the sources were entered, once they have been.
        check: Their digests; None where none are compared.
        shares: What each of the sources and the others has brought.
        seconds: How long it took from `begin` to the end of `run`.
    """

    def __init__(
        self,
        job: Job,
        sources: Sequence[SourceRank],
        others: Others,
        planner: Planner,
        received: Received,
        republication: Republication | None,
        undo: ExitStack,
    ) -> None:
        """What it takes lasts until `undo` is closed, which is for this alone. DigestsMissing where
        the load wants digests, and a source has none.
        """
        self.sources = sources
        self.others = others
        self.plan = planner.plan([source.origin for source in sources])
        self.place: Entered | None = None
        self.shares: list[Share] = []
        self.seconds = 0.0
        self._job = job
        self._received = received
        self._republication = republication
        self._transfer: Transfer | None = None
        self._has_run = False  # then the transfer has settled its reads itself
        self._began_at = 0.0
        self._undo = undo
        self.check = self._digest_check()

    @property
    def all(self) -> Sequence[SourceRank]:
        """The sources, and the others behind them: in the order of the shares."""
        return [*self.sources, *self.others.ranks]

    def begin(self, spans: Sequence[Span], entrance: Entrance) -> None:
        """Those of the spans that have not come before, and the digests: makes what it takes to
        read them. The others are entered. Raises Cancelled.
        """
        check, received = self.check, self._received
        missing = received.arrivals.missing(spans)
        if check is not None and check.tallied:
            # What is short has the most digests for its bytes: they are made while the rest comes.
            missing = sorted(missing, key=lambda span: span.nbytes)
        ahead_nbytes = sum(span.read_nbytes for span in spans) - sum(
            span.read_nbytes for span in missing
        )

        def on_progress(progress: Progress) -> None:
            self.report(progress, ahead_nbytes)

        reader = self._republication.record if self._republication is not None else None
        shared = self.others.enter(missing, entrance, reader, self._count, on_progress, self._undo)
        self._transfer = Transfer(
            self._job.engine,
            [*shared, *(check.spans if check is not None else ())],
            [source.for_transfer() for source in self.all],
            self._pace(),
            on_progress,
            self._job.cancel,
            self._staging(missing),
            self._receive,
            check.look if check is not None else lambda: None,
        )
        self.shares = self._transfer.shares
        self._undo.push(self._settle)
        self._began_at = time.monotonic()

    def start(self) -> None:
        """Starts the first reads, as many as may be in flight. They count for nothing before
        `run`.
        """
        self._begun.start()

    def run(self) -> None:
        """Brings all that was begun. Raises what `Transfer.run` raises."""
        self._has_run = True
        self.others.run(self._begun)
        self.seconds = time.monotonic() - self._began_at

    @property
    def _begun(self) -> Transfer:
        if self._transfer is None:
            raise RuntimeError("the reads have not begun")
        return self._transfer

    def close(self) -> None:
        """Ends what was started, any number of times. Then others may read into the memory."""
        self._undo.close()

    def _settle(self, kind: type[BaseException] | None, *_: object) -> None:
        """Where it was not run, reads that were started end before their memory is taken back.

        The transfer and its buffers are let go: it refers to this, and would wait for the collector
        of garbage.
        """
        transfer, self._transfer = self._transfer, None
        self.others.forget()
        if transfer is not None and not self._has_run:
            transfer.settle(kind is not None and not issubclass(kind, LoaderError))

    def _pace(self) -> Pace:
        """The sooner bytes are checked, the sooner they can be summed up."""
        pace = self._job.pace
        if self.check is None or self.check.tallied:
            return pace
        return replace(pace, check_s=min(pace.check_s, _SUMMED_UP_S))

    def _staging(self, spans: Sequence[Span]) -> Staging | None:
        """Buffers, if any of the reads needs one."""
        staged = [span.nbytes for span in spans if span.staged]
        if not staged:
            return None
        nbytes = max(staged)
        count = min(len(staged), max(2, _STAGING_NBYTES // nbytes))
        device = self._job.device
        staging = Staging(self._job.destination.parts.values(), device, count, nbytes)
        region = to_register(staging.region, device.type)
        lend(self._job.engine, self._undo, region, owner=staging)
        return staging

    def _receive(self, number: int, checked: Sequence[Span]) -> None:
        """Spans have come that the header of the rank with that number has proven."""
        check = self.check
        spans = [span for span in checked if check is None or not check.wants(span)]
        self.others.receive(number, spans)

    def _count(self, spans: Sequence[Span]) -> None:
        """They have come, and are proven."""
        if self.check is not None:
            self.check.receive(spans)
        if self._republication is not None:
            self._republication.mark(self._received.arrivals)

    def report(self, progress: Progress, ahead_nbytes: int) -> None:
        """To the caller, and to the sources; so many bytes had come before."""
        of_all = replace(
            progress,
            nbytes=ahead_nbytes + progress.nbytes,
            total_nbytes=ahead_nbytes + progress.total_nbytes,
        )
        if self.place is not None:
            taken = [*self.place.taken, *self.others.taken]
            replace(self.place, taken=taken).report(of_all)
        self._job.on_progress(of_all)

    def _digest_check(self) -> DigestCheck | None:
        job = self._job
        verify, engine = job.verify, job.engine
        if verify == "header" or (verify == "auto" and not engine.tallies):
            return None
        parts = job.destination.parts
        try:
            if verify == "auto":
                algorithms = {source.algorithm for source in self.sources}
                if algorithms != {engine.tallies}:
                    return None
            check = DigestCheck(self.sources, self._received.dst, parts, job.device)
        except DigestsMissing:
            if verify == "auto":
                return None
            raise
        check.lend(engine, self._undo)
        return check
