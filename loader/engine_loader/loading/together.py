"""Several loads that have to bring one content together: all of them are made again where the
source changes or goes in between.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from engine_loader.errors import SourceLost, SourceUnreachable, TornRead, VersionUnavailable
from engine_loader.loading.attempts import TRIES
from engine_loader.options import RELEASED, Version
from engine_registry.errors import InstanceIncomplete, InstanceNotFound
from engine_registry.schema.numbers import seconds
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
T = TypeVar("T")


def load_together(
    loads: Callable[[float], T], timeout_s: float, what: str, version: Version | None = None
) -> tuple[T, int]:
    """What `loads` returns, which makes all of them, and how often they were made in vain.

    `loads` takes how many seconds to wait for a source, and pins the contents that it finds. `what`
    says in between which of them the source may change. Raises TornRead where it changes in every
    try, or VersionUnavailable if `version` is the released one; SourceLost where it goes and no
    other is there.
    """
    timeout_s = seconds("timeout_s", timeout_s)
    lost: SourceLost | None = None
    for tries in range(TRIES):
        try:
            return loads(timeout_s if lost is None else 0.0), tries
        except VersionUnavailable as exc:
            if (
                exc.details.get("version") == RELEASED
            ):  # there is no release, and one was waited for
                raise
            if tries + 1 == TRIES:
                if version == RELEASED:
                    raise
                raise TornRead(
                    f"the weights changed between {what}, in {TRIES} tries: {exc.what}",
                    exc.remedy,
                    complete=[],
                ) from exc
            log.info(
                "%s; loading all again",
                exc,
                extra=fields("together_retry", tries=tries + 1, error=exc),
            )
            lost = None
        except SourceLost as exc:
            if tries + 1 == TRIES:
                raise
            log.info(
                "%s; loading all again from another source, if one is there",
                exc,
                extra=fields("together_failover", error=exc),
            )
            lost = exc
        except (InstanceNotFound, InstanceIncomplete, SourceUnreachable):
            if lost is None:
                raise
            raise lost from None
    raise AssertionError("unreachable: the last try returns or raises")
