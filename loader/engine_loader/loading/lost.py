"""Sources that a load goes on without, and why. Kept by a load for all of its attempts."""

from __future__ import annotations

from collections.abc import Iterable

from engine_loader import metrics
from engine_loader.transfer.shares import Share
from engine_registry import RankRecord


class LostSources:
    """`incarnations` are not read from again.

    A source whose weights have changed is none of them: it is asked again.
    """

    def __init__(self) -> None:
        self.incarnations: set[str] = set()
        self._reasons: list[str] = []  # since the load last went on without some

    def add(self, records: Iterable[RankRecord]) -> None:
        """These ranks are gone."""
        self.incarnations.update(record.incarnation for record in records)

    def add_reasons(self, shares: Iterable[Share]) -> None:
        """Why a transfer dropped sources, as its shares say."""
        self._reasons += [
            metrics.reason_of(share.error) for share in shares if share.error is not None
        ]

    def forget_torn(self) -> None:
        """Sources whose weights changed are asked again, so nothing has failed over."""
        self._reasons = [reason for reason in self._reasons if reason != "torn"]

    def count_failovers(self) -> None:
        """The load goes on, or has ended well."""
        for reason in self._reasons:
            metrics.FAILOVERS.inc(reason)
        self._reasons.clear()
