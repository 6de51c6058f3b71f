"""One start of a rank: its weights are held here, come from peers, or are read when it is its turn,
or alone. Used by `load_or_seed`.

Starts the threads of an election and a watch while it waits, and those of `files.disk` while it
reads files.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TypeVar

from engine_loader import metrics
from engine_loader.errors import (
    Cancelled,
    DigestMismatch,
    EngineFailed,
    EngineUnavailable,
    LoaderError,
    MemoryInUse,
    TensorsUnusable,
    WeightsMismatch,
)
from engine_loader.loading.load import load
from engine_loader.options import LoadOptions
from engine_loader.publishing.publication import Publication
from engine_loader.starting.held import HeldHere
from engine_loader.starting.lock import lock_name
from engine_loader.starting.peers import Peers, note_unknown
from engine_loader.starting.reading import Fallback, reading_of
from engine_loader.starting.seed import Seed
from engine_loader.starting.seeded import Seeded
from engine_loader.starting.turn import Turn, keep_lead_with
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.uses import USES, Use
from engine_registry import RankRecord, Registration
from engine_registry.errors import (
    EtcdError,
    EtcdUnavailable,
    InstanceIncomplete,
    InstanceMismatch,
    InstanceNotFound,
    InvalidField,
    KeeperFailed,
    RankConflict,
    RegistryError,
)
from engine_registry.holders.waiting import HolderWatch
from engine_registry.telemetry.logs import fields
from engine_registry.watching.election import Election

log = logging.getLogger(__name__)
Registered = TypeVar("Registered", Publication, Registration)
# how soon a rank that waits notices that it leads, or was cancelled; etcd is not asked for it
_LOOK_S = 0.05

# Errors that a read would not mend: of the tensors, engine or arguments, and of a rank that
# another process has.
_NOT_THE_PEERS = (
    Cancelled,
    TensorsUnusable,
    MemoryInUse,
    EngineFailed,
    EngineUnavailable,
    InvalidField,
    RankConflict,
    InstanceMismatch,
    KeeperFailed,
)


@dataclass
class Start:
    peers: Peers
    seed: Seed
    held: HeldHere
    for_peers: Callable[[], Destination]  # makes it when it is first needed
    for_fallback: Callable[[], Destination]  # as a rule the same
    fallback: Fallback
    options: LoadOptions  # with an event in `cancel`
    began: float
    timeout_s: float
    without_etcd_s: float
    publish_later: bool
    reason: str = ""  # why peers could not be loaded from
    away: EtcdUnavailable | None = None  # why the last look had no answer
    away_since: float | None = None  # when etcd was lost, as far as is known

    def fill(self) -> Seeded:
        seed = self.seed
        lock = lock_name(seed.model, seed.rank, seed.world_size, seed.replica.topology or {})
        late = False  # peers that are there at the beginning are always asked
        while True:
            self._check()
            if (seeded := self.held.seeded(self.began)) is not None:
                return seeded
            sources = [] if late else self._look()
            if sources:
                if (seeded := self._from_peers(sources)) is not None:
                    return seeded
                late = self._is_late()
                continue
            with ExitStack() as turn:
                election = turn.enter_context(self.seed.registry.election(lock))
                alone = self._wait(election)
                late = self._is_late()
                if election.leading and not late and self._look():
                    continue  # they were complete just before the lead was free
                if election.leading and (seeded := self.held.seeded(self.began)) is not None:
                    return seeded  # etcd was away before
                if election.leading or alone:
                    return self._from_disk(election, alone, turn)

    def _is_late(self) -> bool:
        return time.monotonic() >= self.began + self.timeout_s

    def _check(self) -> None:
        if self.options.cancel is not None and self.options.cancel.is_set():
            raise Cancelled(f"the start of {self.seed.name} was cancelled: no tensor is usable")

    def _look(self) -> list[RankRecord]:
        """Peers to load from now. None where etcd cannot be asked: waiting goes on then."""
        asked_at = time.monotonic()
        try:
            return self.peers.now()
        except EtcdError as exc:
            if isinstance(exc, EtcdUnavailable):
                self.away, self.away_since = exc, self.away_since or asked_at
            note_unknown(self.seed.model, exc)
            return []

    def _away_too_long(self, election: Election, watch: HolderWatch) -> EtcdUnavailable | None:
        """Why not to wait for etcd any longer, if so. The look before the election counts too."""
        if (lost := election.unreachable_since) is None:
            self.away = self.away_since = None
            return None
        self.away_since = min(lost, self.away_since or lost)
        away, away_s = watch.away or self.away, time.monotonic() - self.away_since
        if away is None or away_s < self.without_etcd_s:
            return None
        what = f"etcd at {self.seed.registry.config} could not be reached for {away_s:.3g} s"
        return EtcdUnavailable(what, away.remedy)

    def _wait(self, election: Election) -> str:
        """Until there is a peer to load from, or we lead. Else says why to read without a turn."""
        log.info(
            "%s waits for a peer that has its weights, or for its turn to read them",
            self.seed.name,
            extra=self.seed.fields("seeding_waits"),
        )
        with self.peers.watch() as watch:
            while not election.leading:
                self._check()
                if election.refusal is not None:
                    return self._without_etcd(election.refusal)
                if self._is_late():
                    return f"no peer had the weights within {self.timeout_s:.3g} s"
                if (away := self._away_too_long(election, watch)) is not None:
                    return self._without_etcd(away)
                try:
                    came = watch.next(_LOOK_S)
                except EtcdError as exc:
                    return self._without_etcd(exc)
                if came and self._look():
                    return ""
        return ""

    def _without_etcd(self, error: EtcdError) -> str:
        """Why to read without a turn. Raises the error where etcd is required and away.

        One that refuses a turn may register the rank all the same.
        """
        if self.seed.required and isinstance(error, EtcdUnavailable):
            raise error
        self.seed.unpublished = error  # unless a publication succeeds all the same
        return str(error)

    def _from_peers(self, sources: Sequence[RankRecord]) -> Seeded | None:
        """None where that does not work, or not now."""
        destination = self.for_peers()
        try:
            report = load(
                self.seed.registry,
                self.seed.engine,
                self.seed.model,
                rank=self.seed.rank,
                world_size=self.seed.world_size,
                topology=self.seed.replica.topology,
                tensors=destination,
                timeout_s=0.0,  # they are there, or are not any more
                publish=not self.publish_later and self.seed.replica,
                options=self.options,
            )
        except _NOT_THE_PEERS:
            raise
        except (InstanceNotFound, InstanceIncomplete, EtcdUnavailable) as exc:
            log.info("not loaded from peers: %s", exc, extra=fields("peers_gone", error=exc))
            if not isinstance(exc, EtcdUnavailable):
                self.peers.pass_by(sources)
            return None
        except (LoaderError, RegistryError) as exc:
            self.peers.give_up(sources)
            self.reason = f"{type(exc).__name__}: {exc}"
            log.log(
                logging.ERROR
                if isinstance(exc, WeightsMismatch | DigestMismatch)
                else logging.WARNING,
                "%s cannot be loaded from running ranks of %s, so its weights will come from "
                "others, or be read: %s",
                self.seed.name,
                self.seed.model,
                exc,
                extra=self.seed.fields("peers_failed", error=exc),
            )
            return None
        metrics.STARTS.inc("peers")
        seconds = time.monotonic() - self.began
        return Seeded("peers", report.publication, report, "", seconds, _seed=self.seed)

    def _from_disk(self, election: Election, alone: str, turn: ExitStack) -> Seeded:
        """`turn` ends the turn, which may outlive this call."""
        if alone:
            log.warning(
                "%s reads its weights, although others may read them too%s: %s",
                self.seed.name,
                ", and serves no peers unless etcd takes it by then"
                if self.seed.unpublished
                else "",
                alone,
                extra=self.seed.fields("seeding_alone"),
            )
        publication, held = None, None
        if self.publish_later:
            held = self._read_for_later(election, turn)
        else:
            publication = self._read_and_publish(election)
        metrics.STARTS.inc("disk_alone" if alone else "disk_after_peers" if self.reason else "disk")
        log.info("%s has read its weights", self.seed.name, extra=self.seed.fields("seeded"))
        return Seeded(
            "disk",
            publication,
            report=None,
            reason="; ".join(filter(None, [self.reason, alone])),
            seconds=time.monotonic() - self.began,
            unpublished=self.seed.unpublished,
            _seed=self.seed,
            _turn=held,
        )

    def _read_and_publish(self, election: Election) -> Publication | None:
        """None where etcd lets neither happen: registering before the read, and after it."""
        destination = self.for_fallback()
        reading = reading_of(self.fallback, destination, self.seed.rank)
        with self._filling(destination) as filling, ExitStack() as undo:
            publication = self._register(
                lambda: self.seed.open(destination, filling), election, undo
            )
            reading.read(self.options.progress, self.options.cancel)
            if publication is not None:
                publication.complete(filled_by=filling)
            undo.pop_all()
        return publication if publication is not None else self.seed.open(destination)

    def _read_for_later(self, election: Election, turn: ExitStack) -> Turn:
        """`turn` is closed where that fails."""
        destination = self.for_fallback()
        reading = reading_of(self.fallback, destination, self.seed.rank)
        with self._filling(destination):
            claim = self._register(self.seed.claim, election, turn)
            reading.read(self.options.progress, self.options.cancel)
        return Turn(self.seed.name, election, claim, turn.pop_all(), self.timeout_s)

    def _filling(self, destination: Destination) -> AbstractContextManager[Use]:
        return USES.fill(f"a read of weights for {self.seed.name}", destination.runs)

    def _register(
        self, register: Callable[[], Registered | None], election: Election, undo: ExitStack
    ) -> Registered | None:
        """As loading, before the read, so that the keeper keeps the lead; until `undo` is closed.

        An etcd that has been away too long is not asked again.
        """
        if isinstance(self.seed.unpublished, EtcdUnavailable):
            return None
        registered = register()
        if registered is not None:
            undo.callback(registered.close)
            keep_lead_with(registered.record, election)
        return registered
