"""A load of the released version: again where that went before it was read, as another was
released.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from engine_loader.errors import VersionUnavailable
from engine_loader.loading.attempts import TRIES
from engine_loader.options import LoadOptions
from engine_loader.sources.released import pinned
from engine_registry import Registry
from engine_registry.telemetry.logs import fields
from engine_registry.watching.waiting import Wanted

log = logging.getLogger(__name__)
T = TypeVar("T")


def load_released(
    registry: Registry,
    source: Wanted,
    options: LoadOptions,
    timeout_s: float,
    load_once: Callable[[LoadOptions, float], T],
) -> T:
    """What `load_once` returns, which takes options with the release's contents, and how many
    seconds to wait. Raises what it raises, and what `pinned` does.

    One release is tried five times. A newer one is another matter as long as there is time.
    """
    deadline = time.monotonic() + timeout_s
    before: Sequence[str] | None = None
    tries = 0
    while True:
        some = pinned(registry, source, options, max(0.0, deadline - time.monotonic()))
        is_newer = some.contents != before and time.monotonic() < deadline
        tries = 1 if is_newer else tries + 1
        before = some.contents
        try:
            return load_once(some, max(0.0, deadline - time.monotonic()))
        except VersionUnavailable as exc:
            if tries >= TRIES:
                raise
            log.info(
                "%s; loading what is released now",
                exc,
                extra=fields("release_gone", tries=tries, error=exc),
            )
