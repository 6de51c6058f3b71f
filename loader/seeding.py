"""Weights for a rank that starts: from running ranks of its model if there are any, else from files, which one of many reads.

Of all processes that start with the same rank of the same model one reads the disk at a time: who leads their election in etcd. It
is registered as loading meanwhile, and its registration's keeper holds the lead: it ends as soon as the process does. The others
follow etcd, and load from it as soon as it is complete, or lead next. Starts the threads of an election and a watch while it waits.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import torch

from loader import metrics
from loader.disk import DiskRead, Paths, files_of
from loader.engine import Engine
from loader.errors import (
    Cancelled,
    DigestMismatch,
    EngineFailed,
    EngineUnavailable,
    LoaderError,
    TensorsUnusable,
    WeightsMismatch,
)
from loader.load import Verify, load
from loader.pace import Pace
from loader.peers import Peers
from loader.publish import Publication, open_publication
from loader.regions import Shard, describe, local_parts
from loader.replica import Replica
from loader.report import LoadReport
from loader.transfer import OnProgress
from registry import Manifest, ModelIdentity, RankRecord, RankState, Registry
from registry.election import Election
from registry.errors import (
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
from registry.keys import check_instance, check_rank
from registry.logs import fields
from registry.session import OnState

log = logging.getLogger(__name__)
WITHOUT_ETCD_S = 30.0  # nobody knows then who reads: longer than a restart or a new leader of etcd takes
_LOOK_S = 0.05  # how soon one that waits notices that it leads, or was cancelled; etcd is not asked for it

# What the disk would not mend: the caller's own tensors, engine or wishes, and a rank that somebody else has.
_NOT_THE_PEERS = (
    Cancelled, TensorsUnusable, EngineFailed, EngineUnavailable, InvalidField, RankConflict, InstanceMismatch, KeeperFailed,
)  # fmt: skip


@dataclass(frozen=True)
class Seeded:
    """Where the weights have come from; a context manager that closes the publication.

    `report` is of the load from peers. `reason` says why the disk was read though there were peers, or without a turn; else it is
    empty. `publication` is None only where etcd could not be reached, or has refused it: `unpublished` says why.
    """

    source: Literal["peers", "disk"]
    publication: Publication | None
    report: LoadReport | None
    reason: str
    seconds: float
    unpublished: EtcdError | None = None

    def close(self) -> None:
        """Withdraws the rank; any number of times."""
        if self.publication is not None:
            self.publication.close()

    def __enter__(self) -> Seeded:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def load_or_seed(
    registry: Registry,
    engine: Engine,
    model: ModelIdentity,
    tensors: Mapping[str, torch.Tensor],
    *,
    rank: int,
    world_size: int,
    instance: str,
    fallback: Paths,
    shards: Mapping[str, Shard] | None = None,
    topology: Mapping[str, tuple[int, int]] | None = None,
    generation: str | None = None,
    version: int = 0,
    digests: bool = False,
    ttl_s: float = 10.0,
    on_state: OnState | None = None,
    timeout_s: float = 600.0,
    verify: Verify = "header",
    max_sources: int = 4,
    pace: Pace | None = None,
    progress: OnProgress | None = None,
    cancel: threading.Event | None = None,
) -> Seeded:
    """Fills `tensors` in place with those of this rank of the model, and publishes them as `rank` of `instance`.

    If a rank like it (of the same model, number, world size and topology) is ready somewhere, or, where all tensors say which part
    of the whole they are, any instance of the model, they come from there. Else one process reads them from `fallback`: files, or a
    folder, of safetensors with whole tensors or with this rank's parts, which may hold more. All others that start with this rank
    of the model load from that process when it is complete, and from each other meanwhile. `version` is that of the files: they may
    be older than what peers serve.

    Where peers cannot be loaded from, files are read instead, with a warning. Who waits reads on its own after `timeout_s`, or
    after 30 s without etcd: an engine that can start from its disk does.

    The caller closes what is returned. Raises WeightsFileInvalid and WeightsMismatch, of the files, where nobody has the weights;
    Cancelled; TensorsUnusable, EngineFailed, RankConflict and InstanceMismatch as `publish` does. Nothing stays published then.
    """
    check_instance(instance)
    check_rank(rank, world_size)
    if not timeout_s >= 0:
        raise InvalidField(f"timeout_s {timeout_s} is not valid: it is 0 seconds or more", field="timeout_s")
    parts, boxes = local_parts(tensors, shards)
    manifest = describe(parts, boxes)
    replica = Replica(instance, rank, world_size, dict(topology or {}), generation, digests, ttl_s, on_state)
    start = _Start(
        registry=registry,
        engine=engine,
        peers=Peers(registry, model, rank, world_size, topology or {}, not any(entry.opaque for entry in manifest.tensors)),
        model=model,
        rank=rank,
        tensors=parts,
        shards=boxes,
        manifest=manifest,
        replica=replica,
        fallback=fallback,
        version=version,
        options={"verify": verify, "max_sources": max_sources, "pace": pace},
        progress=progress,
        cancel=cancel or threading.Event(),
        began=time.monotonic(),
        timeout_s=timeout_s,
    )
    return start.run()


def lock_name(model: ModelIdentity, rank: int, world_size: int, topology: Mapping[str, tuple[int, int]]) -> str:
    """The election of all that start with this rank of the model."""
    told = [model.name, model.revision, model.dtype, model.quantization, dict(model.extra), rank, world_size, dict(topology)]
    return f"seed/{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]}"


@dataclass
class _Start:
    registry: Registry
    engine: Engine
    peers: Peers
    model: ModelIdentity
    rank: int
    tensors: Mapping[str, torch.Tensor]
    shards: Mapping[str, Shard]
    manifest: Manifest
    replica: Replica
    fallback: Paths
    version: int
    options: Mapping[str, object]  # of `load`
    progress: OnProgress | None
    cancel: threading.Event
    began: float
    timeout_s: float
    reason: str = ""  # why peers could not be loaded from
    unpublished: EtcdError | None = None

    def run(self) -> Seeded:
        name = lock_name(self.model, self.rank, self.replica.world_size or 0, self.replica.topology or {})
        while True:
            self._check()
            late = time.monotonic() >= self.began + self.timeout_s
            sources = [] if late else self.peers.now()
            if sources:
                seeded = self._from_peers(sources)
                if seeded is not None:
                    return seeded
                continue
            with self.registry.election(name) as election:
                alone = self._wait(election)
                if election.leading and not late and self.peers.now():  # complete just before the lead was free
                    continue
                if election.leading or alone:
                    return self._from_disk(election, alone)

    def _check(self) -> None:
        if self.cancel.is_set():
            raise Cancelled(f"the start of {self.replica.instance}/{self.rank} was cancelled: no tensor is usable")

    def _wait(self, election: Election) -> str:
        """Until there is somebody to load from, or we lead; or says why it is done without."""
        until = self.began + self.timeout_s
        log.info(
            "%s/%d waits for somebody who has its weights, or for its turn to read files",
            self.replica.instance,
            self.rank,
            extra=fields("seeding_waits", instance=self.replica.instance, rank=self.rank),
        )
        with self.registry.watch() as watch:
            while not election.leading:
                self._check()
                now, lost = time.monotonic(), election.unreachable_since
                if election.refusal is not None:
                    return f"etcd does not let it wait for its turn: {election.refusal}"
                if now >= until:
                    return f"nobody had the weights within {self.timeout_s:.3g} s"
                if lost is not None and now - lost >= WITHOUT_ETCD_S:
                    return f"etcd could not be reached for {now - lost:.3g} s"
                try:
                    event = watch.next(_LOOK_S)
                except EtcdError as exc:
                    return f"etcd does not tell who has the weights: {exc}"
                if event is not None and self.peers.tells(event):
                    return ""
        return ""

    def _from_peers(self, sources: Sequence[RankRecord]) -> Seeded | None:
        """None where that does not work, or not now."""
        try:
            report = load(
                self.registry,
                self.engine,
                self.model,
                rank=self.rank,
                tensors=self.tensors,
                shards=self.shards,
                timeout_s=0.0,  # they are there, or are not any more
                progress=self.progress,
                cancel=self.cancel,
                publish=self.replica,
                **self.options,  # type: ignore[arg-type]
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
                logging.ERROR if isinstance(exc, WeightsMismatch | DigestMismatch) else logging.WARNING,
                "%s/%d cannot be loaded from running ranks of %s, so its weights will come from others or from files: %s",
                self.replica.instance,
                self.rank,
                self.model,
                exc,
                extra=fields("peers_failed", instance=self.replica.instance, rank=self.rank, error=exc),
            )
            return None
        metrics.STARTS.inc("peers")
        return Seeded("peers", report.publication, report, "", time.monotonic() - self.began)

    def _from_disk(self, election: Election, alone: str) -> Seeded:
        if alone:
            log.warning(
                "%s/%d is read from files, whoever else does so: %s",
                self.replica.instance,
                self.rank,
                alone,
                extra=fields("seeding_alone", instance=self.replica.instance, rank=self.rank),
            )
        reading = DiskRead(files_of(self.fallback, self.rank), self.tensors, self.manifest)
        with ExitStack() as undo:
            publication = self._open(RankState.LOADING)
            if publication is not None:
                undo.callback(publication.close)
                self._hold(election, publication.record)
            reading.run(self.progress, self.cancel)
            if publication is not None:
                publication.complete()
            else:
                publication = self._open(RankState.READY)
            undo.pop_all()
        self._tell_disk(alone)
        reason = "; ".join(filter(None, [self.reason, alone]))
        seconds = time.monotonic() - self.began
        return Seeded("disk", publication, None, reason, seconds, None if publication is not None else self.unpublished)

    def _tell_disk(self, alone: str) -> None:
        metrics.STARTS.inc("disk_alone" if alone else "disk_after_peers" if self.reason else "disk")
        log.info(
            "%s/%d has its weights from files",
            self.replica.instance,
            self.rank,
            extra=fields("seeded", instance=self.replica.instance, rank=self.rank),
        )

    def _hold(self, election: Election, record: RankRecord) -> None:
        """The keeper's lease outlives a process that holds the GIL, and no other."""
        try:
            election.keep_with(record)
        except EtcdError as exc:
            log.info("the lead is kept by a lease of its own: %s", exc, extra=fields("lead_not_kept", error=exc))

    def _open(self, state: RankState) -> Publication | None:
        """None where etcd cannot be reached or refuses it: an engine can do its work all the same."""
        replica = self.replica
        try:
            return open_publication(
                self.registry,
                self.engine,
                self.tensors,
                self.manifest,
                instance=replica.instance,
                rank=self.rank,
                world_size=replica.world_size or 0,
                model=self.model,
                topology=replica.topology,
                generation=replica.generation,
                version=self.version,
                digests=replica.digests,
                ttl_s=replica.ttl_s,
                on_state=replica.on_state,
                state=state,
            )
        except EtcdError as exc:
            self.unpublished = exc
            log.warning(
                "%s/%d is not published%s: %s",
                replica.instance,
                self.rank,
                " yet" if state is RankState.LOADING else "",
                exc,
                extra=fields("seed_unpublished", instance=replica.instance, rank=self.rank, error=exc),
            )
            return None
