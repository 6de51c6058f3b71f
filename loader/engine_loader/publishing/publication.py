"""`Publication`: the weights of a rank while peers may read them.

Leaving goes the other way round than publishing: out of the registry first, then the header is
erased, then the memory is given back.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from engine_loader.digests.table import DigestCell
from engine_loader.engines.region_book import Regions
from engine_loader.errors import LoaderError
from engine_loader.planning.content import content_of
from engine_loader.publishing.header import Header, HeaderCell
from engine_loader.tensors.cuda import wait_for
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.uses import USES, Use
from engine_registry import RankRecord, RankState, Registration, RegistrationState, Registry
from engine_registry.errors import RegistryError
from engine_registry.lifetime import Closable
from engine_registry.registration.writes import WITHDRAWN
from engine_registry.schema.numbers import seconds
from engine_registry.schema.record import new_content
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


class Publication(Closable):
    """A rank's weights while peers may read them. A context manager that closes itself.

    It holds the tensors, so their memory stays as long as it is offered.
    """

    def __init__(
        self,
        registry: Registry,
        registration: Registration,
        header: HeaderCell,
        digests: DigestCell | None,
        weights: Destination,
        regions: Regions,
        use: Use,
        undo: ExitStack,
    ) -> None:
        """`regions`: those of its manifest."""
        self.regions = regions
        self._registry = registry
        self._registration = registration
        self._header = header
        self._digests = digests
        self._weights = weights
        self._use = use
        self._undo = undo
        self._updating = threading.Lock()
        self._closing = threading.Lock()
        self._leaving = False  # `close` has begun
        self._mark_open()

    @property
    def record(self) -> RankRecord:
        """The record as the rank wants it in etcd."""
        return self._registration.record

    @property
    def state(self) -> RegistrationState:
        """Whether the rank is registered, and what the caller must do."""
        return self._registration.state

    @property
    def registration(self) -> Registration:
        """The handle on the registration, with the reason of a loss."""
        return self._registration

    @property
    def version(self) -> int:
        """The version of the weights: that of `publish`, and one more after each `update`."""
        return self.record.version

    @property
    def content(self) -> str:
        """The content of the weights, as 32 hexadecimal digits.

        Publications and loads with equal contents have the same bytes.
        """
        return self.record.content

    def __repr__(self) -> str:
        state = self.record.state.value if self._is_open else "closed"
        return (
            f"<Publication {self.record.key}: {state}, version {self.version}, content "
            f"{self.content[:8]}…>"
        )

    @contextmanager
    def update(self) -> Iterator[None]:
        """Changes the weights in place, inside the block.

        Readers that overlap with the block notice, and read again. After the block the version is
        one more, and the content is new.

        If the block raises, the weights are in doubt. They stay marked as being changed, and no
        load reads them until another `update` has ended well. An etcd that is away does not disturb
        an update, because readers go by the header.

        Yields:
            Nothing.

        Raises:
            TensorsUnusable: A tensor was given other memory, as by `module.to(…)` or
                `weight.data = …`. The weights stay marked as being changed.
            MemoryInUse: Another publication serves the same memory, or a load still fills it at the
                end of the block.
            LoaderError: The publication is closed, or is being updated already.
        """
        if self._leaving:
            raise LoaderError(
                f"{self.record.key} is closed, so there is nothing to update", "publish it again"
            )
        if not self._updating.acquire(blocking=False):
            raise LoaderError(
                f"{self.record.key} is being updated already", "end that update first"
            )
        try:
            before = self.record
            USES.change(self._use)
            self._header.write(Header(before.incarnation, 2 * before.version + 1, before.content))
            self._write_record(state=RankState.UPDATING)
            yield
            self._check_in_place()
            wait_for(self._weights.devices)
            USES.keep(self._use)
            content = self._take_digests() or new_content()
            self._header.write(Header(before.incarnation, 2 * (before.version + 1), content))
            self._write_record(version=before.version + 1, content=content, state=RankState.READY)
        finally:
            self._updating.release()

    def mark(self, marks: bytes) -> None:
        """Lets readers have blocks of weights that are still being loaded.

        Args:
            marks: One byte for each block of the memory: 1 where the block is whole, else 0.
        """
        self._header.mark(marks)

    def complete(self, *, filled_by: Use, content: str | None = None) -> None:
        """Lets readers have all weights, which have been loaded by now.

        Args:
            filled_by: The load's use of the memory.
            content: The content of the weights, if their source has stated one. Else digests prove
                it, or it stays as it was registered.

        Raises:
            TensorsUnusable: A tensor was given other memory.
            MemoryInUse: Another load fills the memory.
        """
        before = self.record
        self._check_in_place()
        wait_for(self._weights.devices)
        proven = self._take_digests()
        content = content or proven or before.content
        USES.keep(self._use, filled_by)
        self._header.write(Header(before.incarnation, 2 * before.version, content))
        self._write_record(content=content, state=RankState.READY)

    def _take_digests(self) -> str:
        """Computes them anew; the content that they prove, or nothing where there are none."""
        if self._digests is None:
            return ""
        return content_of(
            self._weights.manifest,
            self._digests.write(self._weights.parts),
            self._digests.table.algorithm,
        )

    def _check_in_place(self) -> None:
        self._weights.check_in_place(
            f"tensors of {self.record.key} have other memory than the one that peers read, "
            "so the rank stays marked as being changed",
            "copy into them in place, or close the publication and publish again",
        )

    def _write_record(
        self, *, version: int | None = None, content: str | None = None, state: RankState
    ) -> None:
        """Readers go by the header, so the weights are safe whatever the record says."""
        try:
            self._registration.update(version=version, content=content, state=state)
        except RegistryError as exc:
            log.warning(
                "the record of %s could not be changed: %s",
                self.record.key,
                exc,
                extra=fields("record_not_changed", key=self.record.key, error=exc),
            )

    def drain(self, timeout_s: float) -> bool:
        """Closes when the running loads have finished; no new load begins.

        An etcd that is away does not hold up the closing.

        Args:
            timeout_s: How many seconds the running loads may take.

        Returns:
            False if some loads were still running after that. They lose their source.
        """
        pulls, timeout_s = 0, seconds("timeout_s", timeout_s)
        try:
            self._registration.update(state=RankState.DRAINING)
            if self.state is RegistrationState.REGISTERED:
                pulls = self._registry.wait_for_no_pulls(
                    self.record.instance, self.record.rank, timeout_s
                )
        except RegistryError as exc:
            log.warning(
                "%s closes without waiting for its readers: %s",
                self.record.key,
                exc,
                extra=fields("drain_skipped", key=self.record.key, error=exc),
            )
        if pulls:
            log.warning(
                "%s closes while %d loads still read from it",
                self.record.key,
                pulls,
                extra=fields("drain_cut_short", key=self.record.key, pulls=pulls),
            )
        self.close()
        return not pulls

    def close(self, reason: str = WITHDRAWN) -> None:
        """Withdraws the rank, then gives its memory back.

        It may be called any number of times, from any thread. If a call is interrupted, another one
        does the rest.

        Args:
            reason: Why the rank leaves, for watchers.
        """
        self._leaving = True
        with self._closing:
            # These are undone below as well. But an interrupt may fall between taking a step off
            # that list and doing it.
            self._registration.withdraw(reason)
            self._header.retire()
            USES.end(self._use)
            self._undo.close()
            self._mark_closed()

    def _label(self) -> str:
        return f"of {self.record.key}"
