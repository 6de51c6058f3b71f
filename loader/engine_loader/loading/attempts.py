"""The attempts of a load, one after another, until the tensors are filled. Made by `load`.

A torn read is tried again. Where sources are lost, others are found, and what has come stays.
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass

from engine_loader import metrics
from engine_loader.engines.base import with_regions
from engine_loader.errors import Cancelled, LoaderError, SourceLost, TornRead
from engine_loader.loading.attempt import Attempt, GoneOn, PlaceTaken
from engine_loader.loading.finder import Finder
from engine_loader.loading.job import Job
from engine_loader.loading.lost import LostSources
from engine_loader.loading.report import LoadReport, report_of
from engine_loader.planning.plan import Planner
from engine_loader.publishing.delta_shelf import keep_deltas
from engine_loader.publishing.replica import Republication
from engine_loader.sources.entrance import Entrance
from engine_loader.sources.selection import Choice
from engine_loader.transfer.received import Received
from engine_registry import failpoints
from engine_registry.errors import RegistryError
from engine_registry.etcd.backoff import Backoff
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
# of a read that is torn by an update of the source, with about a second of waiting between them in
# all
TRIES = 5
GONE_ON = 50  # times that a source has another version before it is read
PLACES = 5  # that other loads take before ours, until it takes one that is not free
_SPREAD_S = 0.02  # within which loads that have met look again
_NOTHING = Choice("", [])


@dataclass
class Attempts:
    """All attempts of a load. `received` is what has come of the content that is being loaded."""

    job: Job
    deadline: float
    finder: Finder
    entrance: Entrance
    lost: LostSources
    planner: Planner
    received: Received
    republication: Republication | None
    gone_on: int = 0  # how often a source had another version before it was read

    def until_filled(self) -> LoadReport:
        """A torn read is tried again, lost sources are done without, until there is none left."""
        start = time.monotonic()
        backoff = Backoff(0.03, 1.0)
        retries = taken = 0
        choice = self._find(self.deadline)
        while True:
            try:
                return self._attempt(choice, start, retries)
            except TornRead as exc:
                retries += 1
                if retries == TRIES:
                    raise
                log.info(
                    "%s; reading again",
                    exc,
                    extra=fields("torn_retry", retries=retries, **exc.details),
                )
                metrics.RETRIES.inc()
                if self.job.cancel.wait(backoff.next_s()):
                    raise Cancelled("the load was cancelled") from exc
                failpoints.reach("load.torn")
                choice = self._find(self.deadline)
                if not choice.sources:
                    raise
                self.lost.forget_torn()
            except PlaceTaken as exc:
                taken += 1
                self.finder.crowded = taken >= PLACES
                log.debug(
                    "%s has another reader since it was chosen", exc, extra=fields("place_taken")
                )
                self.finder.seen = exc.holders
                wait_s = 0.0 if exc.holders is not None else _SPREAD_S * random.random()  # noqa: S311
                if self.job.cancel.wait(wait_s):
                    raise Cancelled("the load was cancelled") from exc
                again = self._find(self.deadline)
                choice = again if again.sources else choice
                continue
            except GoneOn as exc:
                choice = self._choose_after(exc)
                continue
            except SourceLost as exc:
                choice = self._find_another()
                if not choice.sources:
                    raise
                log.warning(
                    "%s; going on with another source",
                    exc,
                    extra=fields("failover", sources=exc.details.get("sources")),
                )
            self.lost.count_failovers()

    def _choose_after(self, exc: GoneOn) -> Choice:
        log.debug("%s", exc, extra=fields("gone_on"))
        self.gone_on += 1
        choice = self._find(self.deadline) if self.gone_on < GONE_ON else _NOTHING
        if not choice.sources:
            raise TornRead(str(exc), "keep more snapshots, or make fewer") from exc
        return choice

    def _attempt(self, choice: Choice, start: float, retries: int) -> LoadReport:
        attempt = Attempt(
            self.job,
            choice,
            self.entrance,
            self.planner,
            self.received,
            self.lost,
            self.republication,
        )
        filled = attempt.fill()
        took_s = time.monotonic() - start
        keep_deltas(self.job.destination.runs, self.received.deltas)
        publication = self.republication.complete() if self.republication is not None else None
        return report_of(filled, self.received, self.job.rank, retries, took_s, publication)

    def _find(self, deadline: float) -> Choice:
        """Of the content that is being loaded if there are any sources of it. Without sources where
        all are to be avoided.
        """
        gone: SourceLost | None = None
        while True:
            own = self.republication.record if self.republication is not None else None
            try:
                choice = self.finder.choose(deadline, self.received, self.planner, own)
            except SourceLost as exc:  # it went while its manifest was fetched
                log.info("%s", exc, extra=fields("source_gone", error=exc))
                gone = exc
                continue
            if choice is None:
                if gone is not None:
                    raise gone
                return _NOTHING
            if choice.content == self.received.content and (
                self.republication is None or own is not None
            ):
                return choice
            self._begin(choice)
            if self.republication is None:
                return choice
            # Chosen anew: now we have a place among those that are loading.

    def _begin(self, choice: Choice) -> None:
        """What has come so far counts only if it is of this content.

        A replica begins anew in either case.
        """
        dst, republication = self.received.dst, self.republication
        if republication is not None:
            # A read must not cross what the marks of our own memory are about: both go by the same
            # regions.
            regions = republication.begin(choice.sources[0].record, choice.content)
            dst = with_regions(dst, regions)
        if choice.content != self.received.content or dst is not self.received.dst:
            self.planner = self.planner.into(dst)
            block_nbytes = self.job.pace.chunk_nbytes if republication is not None else None
            self.received = Received(choice.content, dst, block_nbytes)
        if republication is not None:
            republication.mark(self.received.arrivals)

    def _find_another(self) -> Choice:
        """Whatever is there now: a load that has lost its sources does not wait for new ones.

        But where one is being updated that is waited for, as it would have been at the beginning.
        """
        # Asked on both sides of the look: an update may end, or begin, between two of them.
        updated = self.finder.is_one_updated()
        choice = self._find_if_any(time.monotonic())
        if choice.sources:
            return choice
        if updated or self.finder.is_one_updated():
            return self._find_if_any(self.deadline)
        return self._find_if_any(time.monotonic())  # an update may have begun and ended meanwhile

    def _find_if_any(self, deadline: float) -> Choice:
        try:
            return self._find(deadline)
        except Cancelled:
            raise
        except (RegistryError, LoaderError) as exc:
            log.info("no other source: %s", exc, extra=fields("no_other_source", error=exc))
            return _NOTHING
