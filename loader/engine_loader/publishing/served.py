"""What a publication serves: its memory with the record that says so, and the changes of both, one
at a time.

Used by `Publication`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from engine_loader.engines.base import Engine
from engine_loader.errors import LoaderError
from engine_loader.options import PublishOptions
from engine_loader.publishing.header import Header, HeaderCell
from engine_loader.publishing.holding import descriptors_of
from engine_loader.publishing.make_snapshot import make_snapshot, next_version
from engine_loader.publishing.offering import Offering, Paused, meter_pulls, offer_weights
from engine_loader.publishing.releases import Releases
from engine_loader.publishing.snapshots import SnapshotRing
from engine_loader.tensors.cuda import wait_for
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.state_dict import encode_values
from engine_loader.tensors.uses import USES
from engine_registry import (
    RankRecord,
    RankState,
    Registration,
    RegistrationState,
    Registry,
    Release,
    failpoints,
)
from engine_registry.errors import RegistryError
from engine_registry.schema.record import new_content
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


class Served:
    """Changes are made inside `alone`. `close` may come at any time, from another thread."""

    def __init__(
        self,
        registry: Registry,
        engine: Engine,
        registration: Registration,
        offering: Offering,
        options: PublishOptions,
        ring: SnapshotRing | None = None,
    ) -> None:
        """With a ring, readers have snapshots of the weights."""
        self.ring = ring
        self.registry = registry
        self.engine = engine
        self.registration = registration
        self.releases = Releases(registry, registration)
        self._options = options
        self._held: Offering | Paused = offering
        self._pausing = False  # memory may have been given back already
        self._changing = threading.Lock()
        self._swapping = threading.Lock()  # of what is held, and what is closed
        self._leaving = False  # closing has begun

    @property
    def record(self) -> RankRecord:
        return self.registration.record

    @property
    def held(self) -> bool:
        """Whether the weights outlive this process."""
        return self._options.hold_s > 0

    @property
    def header(self) -> HeaderCell:
        return self._held.header

    @property
    def paused(self) -> Paused | None:
        return self._held if isinstance(self._held, Paused) else None

    def offering(self, verb: str) -> Offering:
        """LoaderError where it is paused, also half-way."""
        if isinstance(self._held, Offering) and not self._pausing:
            return self._held
        raise self._is_paused(verb)

    def _is_paused(self, verb: str) -> LoaderError:
        return LoaderError(
            f"{self.record.key} is paused, so there is nothing to {verb}",
            "say `resume`, or `replace` with the tensors that there are now",
        )

    # -- changes

    @contextmanager
    def alone(self, verb: str) -> Iterator[None]:
        """No other call changes what is served."""
        self._check_open(verb)
        if not self._changing.acquire(blocking=False):
            raise LoaderError(
                f"{self.record.key} is being updated already", "end that update first"
            )
        try:
            yield
        finally:
            self._changing.release()

    @contextmanager
    def changing(self, values: Mapping[str, Any] | None, version: int | None) -> Iterator[None]:
        """The weights change in place in the block, and are offered with the values after it."""
        self.check_in_place_served("update")
        offering = self.offering("update")
        version = next_version(self.record, version)
        self._options_with(values)
        USES.change(offering.use)
        self.mark_changing()
        yield
        offering.check_in_place(self.record.key)
        wait_for(offering.weights.devices)
        self._options = self._options_with(values)
        USES.keep(offering.use)
        if values is None:
            self.vouch(version, offering.compute_digests() or new_content())
        else:  # they are in the manifest, which an incarnation has only one of
            self.pause()
            self.offer(offering.weights, version)

    def _options_with(self, values: Mapping[str, Any] | None) -> PublishOptions:
        """TensorsUnusable names the values that cannot be encoded."""
        if values is None:
            return self._options
        options = replace(self._options, values={**(self._options.values or {}), **values})
        encode_values(options.values or {})
        return options

    def mark_changing(self) -> None:
        """Readers wait from now on."""
        before = self.record
        self.header.write(Header(before.incarnation, 2 * before.version + 1, before.content))
        self._write_record(state=RankState.UPDATING)

    def vouch(self, version: int, content: str) -> None:
        """Readers may read from now on."""
        self.header.write(Header(self.record.incarnation, 2 * version, content))
        self._write_record(version=version, content=content, state=RankState.READY)

    def pause(self) -> None:
        """Gives the weights' memory back. If it is interrupted, another call does the rest."""
        if not isinstance(self._held, Offering):
            raise self._is_paused("pause")
        self._pausing = True
        self.mark_changing()
        self.registration.keep_memory_back()
        with self._swapping:
            self._check_open("pause")
            self._held = self._held.pause(in_doubt=self._held.use.changing)
            self._pausing = False

    def offer(
        self,
        weights: Destination,
        version: int,
        content: str | None = None,
        expected: Mapping[str, bytes] | None = None,
    ) -> None:
        """Offers these in the place of what was paused. Memory first, then the record, as when a
        publication is opened.
        """
        self.check_registered()
        with ExitStack() as guard:
            undo = guard.enter_context(ExitStack())
            offering = offer_weights(
                self.engine,
                weights,
                undo,
                owner=f"{self.record.instance}/{self.record.rank}",
                options=self._options,
                version=version,
                content=content,
                expected=expected,
            )
            failpoints.reach("publication.before_offer")
            self.registration.offer(
                offering.manifest,
                incarnation=offering.incarnation,
                header_addr=offering.header.region.addr,
                version=version,
                content=offering.content,
                device=str(offering.device),
                descriptors=descriptors_of(self.engine, offering.manifest.exports),
            )
            meter_pulls(self.registry, self.record, undo)
            with self._swapping:
                self._check_open("offer")
                former, self._held = self._held, offering
            guard.pop_all()
        former.close()

    def snapshot(self, version: int | None, changed: Iterable[str] | None, wait: bool) -> int:
        """As `Publication.snapshot`."""
        ring = self.ring
        if ring is None:
            raise LoaderError(
                f"{self.record.key} publishes no snapshots",
                "say `update`, or publish with PublishOptions(snapshots=2)",
            )
        ring.finish()
        self.check_settled("snapshot")
        self.check_registered()
        manifest = self.offering("snapshot").manifest
        return make_snapshot(
            self.registry,
            self.registration,
            self.releases,
            ring,
            manifest,
            version,
            changed,
            wait,
        )

    def release(self, version: int | None, timeout_s: float, back: bool = False) -> Release:
        """As `Publication.release`. Other calls may change what is served while it waits."""
        if version is None:
            with self.alone("release"):
                if self.ring is not None:
                    self.ring.finish()
                version = self.record.version
        self._check_open("release")
        self.check_registered()
        return self.releases.release(version, timeout_s, back)

    def _write_record(
        self, *, version: int | None = None, content: str | None = None, state: RankState
    ) -> None:
        """Readers go by the header, so the weights are safe whatever the record says."""
        try:
            self.registration.update(version=version, content=content, state=state)
        except RegistryError as exc:
            log.warning(
                "the record of %s could not be changed: %s",
                self.record.key,
                exc,
                extra=fields("record_not_changed", key=self.record.key, error=exc),
            )

    def let_finish(self, timeout_s: float) -> int:
        """Invites no new readers, and says how many of the old ones still read after that time. An
        etcd that is away is not waited for.
        """
        try:
            self.registration.update(state=RankState.DRAINING)
            if self.registration.state is RegistrationState.REGISTERED:
                return self.registry.wait_for_no_pulls(
                    self.record.instance, self.record.rank, timeout_s
                )
        except RegistryError as exc:
            log.warning(
                "%s closes without waiting for its readers: %s",
                self.record.key,
                exc,
                extra=fields("drain_skipped", key=self.record.key, error=exc),
            )
        return 0

    # -- checks

    def check_settled(self, verb: str) -> None:
        """LoaderError for a rank that still loads, or is about to leave."""
        state = self.record.state
        if state in (RankState.LOADING, RankState.DRAINING):
            raise LoaderError(f"{self.record.key} is {state.value}, so there is nothing to {verb}")

    def check_in_place_served(self, verb: str) -> None:
        """LoaderError where readers have snapshots of the weights."""
        if self.ring is not None:
            raise LoaderError(
                f"{self.record.key} publishes snapshots, so there is nothing to {verb}",
                "change the tensors as you like, and say `snapshot`",
            )

    def check_registered(self) -> None:
        """RegistrationLost where it has ended."""
        if self.registration.lost is not None:
            raise self.registration.lost

    def _check_open(self, verb: str) -> None:
        if self._leaving:
            raise LoaderError(
                f"{self.record.key} is closed, so there is nothing to {verb}", "publish it again"
            )

    # -- the end

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Nothing else is offered from now on."""
        self._leaving = True
        with self._swapping:
            yield

    def close(self) -> None:
        """Any number of times."""
        self._held.close()
