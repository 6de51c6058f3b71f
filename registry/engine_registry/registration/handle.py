"""The rank's handle on its registration: what state it is in, how to change it, how to leave.

The work is done by a keeper process (`keeper.holder`) at the other end of a `KeeperLink`. What the
rank asks of it from the main thread is done in another, so that Ctrl-C interrupts the wait and
leaves nothing half done.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

from engine_registry import failpoints
from engine_registry.errors import RegistryError
from engine_registry.etcd.config import EtcdConfig
from engine_registry.lifetime import Closable
from engine_registry.registration.callback import Callback
from engine_registry.registration.descriptors import Descriptors, closed_on_error
from engine_registry.registration.hold import Hold
from engine_registry.registration.keeper.link import KeeperLink
from engine_registry.registration.manifests import encode_manifest
from engine_registry.registration.writes import WITHDRAWN
from engine_registry.schema.manifest import Manifest
from engine_registry.schema.record import RankRecord, RankState, Retained
from engine_registry.telemetry import metrics
from engine_registry.telemetry.logs import fields
from engine_registry.telemetry.meters import Held
from engine_registry.uninterrupted import uninterrupted

log = logging.getLogger(__name__)

OnState = Callable[["RegistrationState", str], None]


class RegistrationState(str, Enum):
    """What the rank has to do."""

    REGISTERED = "registered"  # nothing
    # nothing: etcd cannot be reached or there is no keeper, reads still work, and it is tried on
    SUSPENDED = "suspended"
    # stop advertising: the registration was evicted or superseded and does not come back
    LOST = "lost"
    CLOSED = "closed"  # nothing: withdrawn by the rank itself


class Registration(Closable):
    """A rank's place in the registry, held until `withdraw` (or the end of the `with` block),
    eviction, or the process's end.
    """

    _held: Held | None = None  # among the registrations that are counted
    _when_claimed_again: Callback[None] | None = None

    def __init__(
        self,
        config: EtcdConfig,
        record: RankRecord,
        parts: Sequence[bytes],
        ttl_s: float,
        unresponsive_after_s: float,
        on_state: OnState | None = None,
        descriptors: Descriptors | None = None,
        hold: Hold | None = None,
        replaces: str = "",
    ) -> None:
        """Registers; raises RankConflict, InstanceMismatch, EtcdUnavailable, … and has then left
        nothing behind. `descriptors` are its own from then on.

        If it is interrupted, the link's thread takes the rank out again.
        """
        self._on_state = (
            Callback[tuple[RegistrationState, str]](
                lambda change: on_state(*change), f"the on_state callback of {record.key}"
            )
            if on_state
            else None
        )
        self._owner_pid = os.getpid()
        self._lock = threading.Lock()
        self._state = RegistrationState.REGISTERED
        self._lost: RegistryError | None = None
        self._leaving = threading.Lock()  # held by the thread that withdraws
        self._closing = False  # `withdraw` has begun
        self._withdrawn = False
        # The link must not keep a forgotten handle alive: it would hold the rank for ever.
        news = weakref.WeakMethod(self._receive)
        self._link = KeeperLink(
            config, record, parts, ttl_s, unresponsive_after_s, news, descriptors, hold, replaces
        )
        try:
            uninterrupted(self._open, f"registers {record.key}")
            self._mark_open()
        except BaseException:
            self._link.forget()
            raise

    def _open(self) -> None:
        self._link.open()
        with self._lock:  # the keeper may have reported another state by now
            self._held = metrics.REGISTRATIONS.hold(self._state.value)
        metrics.REGISTRATION_CHANGES.inc(RegistrationState.REGISTERED.value)
        log.info(
            "%s is registered, its keeper is process %s",
            self.record.key,
            self.keeper_pid,
            extra=self._fields("registered"),
        )

    def when_claimed_again(self, action: Callable[[], object]) -> None:
        """Calls it from another thread each time that the record is in etcd again after its lease
        was lost, or its keeper. What it refers to must not refer to the registration.
        """
        name = f"what goes with {self.record.key}"
        self._when_claimed_again = Callback[None](lambda _: action(), name)

    @property
    def record(self) -> RankRecord:
        """As the rank wants it; etcd has it too unless the state is SUSPENDED."""
        return self._link.record

    @property
    def state(self) -> RegistrationState:
        """What the rank must do now; see the members."""
        return self._state

    @property
    def lost(self) -> RegistryError | None:
        """Why the registration has ended without the rank's doing, or None."""
        return self._lost

    @property
    def withdrawn(self) -> bool:
        """Whether etcd has confirmed that the rank is out; False too while its keeper still tries
        that after `withdraw`.
        """
        return self._withdrawn

    @property
    def keeper_pid(self) -> int | None:
        """None while a keeper that has died is being replaced."""
        return self._link.pid

    def update(
        self,
        *,
        version: int | None = None,
        content: str | None = None,
        state: RankState | None = None,
        retained: Sequence[Retained] | None = None,
    ) -> None:
        """Changes the fields that are given, and no other; from any thread. RegistrationLost if the
        registration is over.

        While etcd is away the change waits in the keeper: no error. A rank that drains stays so
        until it is gone, whatever state is given, so that an update of the weights that ends
        meanwhile invites no new readers.
        """
        wanted = {
            "version": version,
            "content": content,
            "state": state,
            "retained": None if retained is None else tuple(retained),
        }
        self._change({name: value for name, value in wanted.items() if value is not None})

    def switch(self, to: Retained, retained: Sequence[Retained]) -> None:
        """Says that the present version is this one, which lies elsewhere in the memory that the
        manifest describes, and which versions before it can still be read; from any thread.

        While etcd is away the change waits in the keeper. Raises what `update` does.
        """
        self._change(
            {
                "version": to.version,
                "content": to.content,
                "header_addr": to.header_addr,
                "shift": to.shift,
                "retained": tuple(retained),
            }
        )

    def offer(
        self,
        manifest: Manifest,
        *,
        incarnation: str,
        header_addr: int,
        version: int,
        content: str,
        device: str,
        descriptors: Descriptors | None = None,
    ) -> None:
        """Puts other memory in the place of the one that the rank has offered, and says that it is
        ready; from any thread.

        It takes another incarnation, as a peer keeps what it has learnt of a process's memory for
        as long as that has one incarnation. Record and manifest change together. While etcd is away
        both wait in the keeper.

        `descriptors` belong to the manifest, as those of `Registry.register`. Raises what `update`
        does, and KeeperFailed where the keeper cannot hold as many.
        """
        with closed_on_error(descriptors):
            self._check_changeable()
            ref, parts = encode_manifest(manifest)
        given = {
            "incarnation": incarnation,
            "manifest": ref,
            "header_addr": header_addr,
            "version": version,
            "content": content,
            "device": device,
            "state": RankState.READY,
        }
        self._write(given, parts, descriptors)

    def keep_memory_back(self) -> None:
        """Closes the descriptors: the keeper hands out none any more, until `offer` brings others.
        From any thread; raises nothing.
        """
        if os.getpid() == self._owner_pid:
            self._link.drop_descriptors()

    def withdraw(self, reason: str = WITHDRAWN) -> None:
        """Takes the rank out of the registry; any number of times. If etcd is away the keeper goes
        on trying by itself.

        `reason` is what watchers are given. If the call is interrupted, the withdrawal goes on, and
        calling it again waits for that.
        """
        if os.getpid() != self._owner_pid:
            return  # a forked child's copy of the handle: the registration is the parent's
        if self._state is not RegistrationState.CLOSED:
            uninterrupted(lambda: self._leave(reason), f"withdraws {self.record.key}")

    def _check_changeable(self) -> None:
        if os.getpid() != self._owner_pid:
            raise RegistryError(
                f"{self.record.key} is registered by process {self._owner_pid}, and this is "
                "a fork of it",
                "update it there",
            )
        if self._lost is not None:
            raise self._lost
        if self._closing:
            raise RegistryError(f"the registration of {self.record.key} is closed")

    def _change(self, given: Mapping[str, Any]) -> None:
        self._check_changeable()
        self._write(given)

    def _write(
        self,
        given: Mapping[str, Any],
        parts: Sequence[bytes] = (),
        descriptors: Descriptors | None = None,
    ) -> None:
        uninterrupted(
            lambda: self._link.update(lambda record: _changed(record, given), parts, descriptors),
            f"changes {self.record.key}",
        )

    def close(self) -> None:
        """`withdraw`, for a `with` block."""
        self.withdraw()

    def _leave(self, reason: str) -> None:
        with self._leaving:
            if self._state is RegistrationState.CLOSED:
                return
            self._closing = True
            try:
                if self._lost is None:
                    self._link.end(reason)
                    self._withdrawn = True
            except RegistryError as exc:
                log.warning(
                    "%s is not out of etcd yet; its keeper tries on, and its lease is the "
                    "bound: %s",
                    self.record.key,
                    exc,
                    extra=self._fields("withdrawal_delayed", error=exc),
                )
            failpoints.reach("session.before_abandon")
            self._link.abandon()
            self._mark_closed()
            self._change_state(RegistrationState.CLOSED, "")

    def _label(self) -> str:
        return f"of {self.record.key}"

    def _forgotten(self) -> None:
        """The link notices that the handle is gone, and takes the rank out."""

    def __del__(self) -> None:
        held = self._held  # also where registering was interrupted
        if held is not None and self._pid() == self._owner_pid:
            held.release()
        super().__del__()

    def _receive(
        self, state: str, why: str, lost: RegistryError | None, again: bool = False
    ) -> None:
        if lost is not None:
            self._lost = lost
        self._change_state(RegistrationState[state], why)
        if again and self._when_claimed_again is not None:
            self._when_claimed_again.put(None)

    def _change_state(self, state: RegistrationState, why: str) -> None:
        with self._lock:
            if self._state is state or self._state is RegistrationState.CLOSED:
                return
            self._state = state
            metrics.REGISTRATION_CHANGES.inc(state.value)
            if self._held is not None:
                self._held.release() if state is RegistrationState.CLOSED else self._held.move(
                    state.value
                )
            if self._on_state is not None:  # in here, so that they are reported in order
                self._on_state.put((state, why))
        if state is RegistrationState.LOST:
            level = logging.INFO if self._on_state else logging.ERROR
            log.log(
                level,
                "%s is lost: %s",
                self.record.key,
                why,
                extra=self._fields("registration_lost", error=self._lost),
            )
        elif state is RegistrationState.SUSPENDED:
            log.warning(
                "%s is suspended: %s",
                self.record.key,
                why,
                extra=self._fields("registration_suspended"),
            )
        elif state is RegistrationState.REGISTERED:
            log.warning(
                "%s is registered again",
                self.record.key,
                extra=self._fields("registration_resumed"),
            )
        elif self._withdrawn:
            log.info("%s is withdrawn", self.record.key, extra=self._fields("withdrawn"))

    def _fields(self, event: str, **facts: object) -> dict[str, Any]:
        record = self.record
        return fields(event, instance=record.instance, rank=record.rank, **facts)


def _changed(record: RankRecord, fields: Mapping[str, Any]) -> RankRecord:
    state = (
        RankState.DRAINING
        if record.state is RankState.DRAINING
        else fields.get("state", record.state)
    )
    return replace(record, **{**fields, "state": state})
