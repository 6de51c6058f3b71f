"""`Following`: loads a trainer's next version into a mirror while the engine serves. Made by
`integrations.mirroring`.

Starts one thread, which watches the trainer until `close`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from math import inf

from engine_loader.errors import Cancelled
from engine_loader.loading.mirror import Mirror
from engine_loader.loading.whole_source import WholeSource
from engine_registry.errors import EngineRegistryError
from engine_registry.telemetry.logs import fields
from engine_registry.watching.watch import Watch

log = logging.getLogger(__name__)
_AGAIN_S = 5.0  # after a load that has failed, where the trainer gives no reason to look before
_IDLE_S = 0.5  # how soon an engine that asks for another version is heard
_WAIT_S = 10.0  # in a load, for a source that has gone on since it was found


class Following:
    """The thread that follows. The engine holds it while it takes tensors from the mirror."""

    def __init__(
        self, mirror: Mirror, find: Callable[[], WholeSource], watch: Callable[[], Watch]
    ) -> None:
        """Starts the thread.

        Args:
            mirror: What is loaded.
            find: Finds the version that is to be loaded, without waiting.
            watch: Watches the trainer.
        """
        self._mirror = mirror
        self._find = find
        self._watch = watch
        self._turn = threading.Condition()  # guards what follows
        self._held = True
        self._closed = False
        self._loading: Sequence[str] | None = None  # the contents that the thread loads now
        self._cancel = threading.Event()  # of that load
        self._watching: Watch | None = None
        self._look_at = 0.0  # by the monotonic clock, if there is no event before
        self._said = ""
        self._thread = threading.Thread(target=self._follow, name="weight mirror", daemon=True)
        self._thread.start()

    def hold(self, contents: Sequence[str], *, wait: bool = True) -> bool:
        """Makes the mirror the caller's until `resume`.

        Args:
            contents: What the caller wants it to hold. A load that runs is waited for if it brings
                these, and ended if it brings others.
            wait: Whether to do so. If not, a load that runs goes on.

        Returns:
            Whether the mirror is the caller's; False only if it does not wait.
        """
        with self._turn:
            if self._loading is not None and not wait:
                return False
            self._held = True
            if self._loading is not None and self._loading != contents:
                self._cancel.set()
            self._turn.wait_for(lambda: self._loading is None)
        return True

    def resume(self) -> None:
        """The mirror follows the trainer again, and looks for it now. Any number of times."""
        with self._turn:
            self._held = False
            self._look_at = 0.0
            self._turn.notify_all()

    def close(self) -> None:
        """Ends the thread, and a load that it makes. Any number of times."""
        with self._turn:
            self._closed = True
            self._cancel.set()
            watching = self._watching
            self._turn.notify_all()
        if watching is not None:
            watching.stop()
        self._thread.join()

    def _follow(self) -> None:
        while not self._closed:
            try:
                with self._watch() as watch:
                    with self._turn:
                        self._watching = watch
                    self._look_at = 0.0
                    while not self._closed:
                        event = watch.next(_IDLE_S)
                        if event is not None or time.monotonic() >= self._look_at:
                            self._look()
            except Exception as exc:  # noqa: BLE001  the engine's updates do without it meanwhile
                self._say(exc)
                with self._turn:
                    self._turn.wait_for(lambda: self._closed, _AGAIN_S)

    def _look(self) -> None:
        """Loads what there is, and says when to look again."""
        with self._turn:
            self._turn.wait_for(lambda: self._closed or not self._held)
            self._look_at = inf
        try:
            found = self._find()
            with self._turn:
                if self._held or self._closed:
                    return  # `resume` says to look again
                if found.contents == self._mirror.contents or not self._mirror.fits(found):
                    return
                self._loading, self._cancel = found.contents, threading.Event()
            try:
                load(self._mirror, found, _WAIT_S, self._cancel)
            finally:
                with self._turn:
                    self._loading = None
                    self._turn.notify_all()
        except Cancelled:
            return
        except EngineRegistryError as exc:
            self._say(exc)
            with self._turn:
                self._look_at = min(self._look_at, time.monotonic() + _AGAIN_S)

    def _say(self, exc: Exception) -> None:
        """Once for each reason in a row."""
        if str(exc) != self._said:
            self._said = str(exc)
            log.info(
                "the mirror has no other weights yet: %s",
                exc,
                extra=fields("mirror_waits", error=exc),
            )


def load(
    mirror: Mirror, found: WholeSource, timeout_s: float, cancel: threading.Event | None = None
) -> None:
    """Loads what was found into the mirror, and logs it. Raises what `Mirror.load` does."""
    report = mirror.load(found, timeout_s, cancel)
    log.info(
        "the mirror has version %d of %s: %.1f of %.1f MB were read, and %.1f MB of deltas, in "
        "%.2f s",
        report.version,
        report.instance,
        report.read_nbytes / 1e6,
        report.nbytes / 1e6,
        report.delta_nbytes / 1e6,
        mirror.load_s,
        extra=fields(
            "weights_mirrored",
            source=report.instance,
            version=report.version,
            nbytes=report.nbytes,
            read_nbytes=report.read_nbytes,
            delta_nbytes=report.delta_nbytes,
            load_s=round(mirror.load_s, 3),
        ),
    )
