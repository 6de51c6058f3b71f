"""Fills tensors with the weights of a running rank: resolve, compare, plan, check, read, check again, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import torch

from loader.engine import Engine
from loader.errors import ReadFailed, SourceLost, TornRead
from loader.plan import ReadOp, complete_tensors, plan
from loader.regions import Shard, describe
from loader.transfer import OnProgress, Progress, transfer
from loader.verify import HeaderCell, fetch_header
from registry import Manifest, RankRecord, Registry
from registry.backoff import Backoff
from registry.errors import EtcdError, InvalidField, RecordDamaged

log = logging.getLogger(__name__)
_TRIES = 5  # of a read that is torn by an update of the source, with about a second of waiting between them in all


@dataclass(frozen=True)
class LoadReport:
    """What a load did. `seconds` is all of it, `transfer_s` the bulk reads alone."""

    instance: str
    rank: int
    version: int
    protocol: str
    tensors: int
    nbytes: int
    reads: int
    retries: int
    seconds: float
    transfer_s: float

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / 1e9 / self.seconds if self.seconds else 0.0


def load(
    registry: Registry,
    engine: Engine,
    source: str | Sequence[str],
    *,
    rank: int,
    tensors: Mapping[str, torch.Tensor],
    shards: Mapping[str, Shard] | None = None,
    timeout_s: float = 60.0,
    progress: OnProgress | None = None,
) -> LoadReport:
    """Fills `tensors` in place with those of `rank` of the instance `source`, or of the first of several that can be read.

    Waits up to `timeout_s` for every rank of the instance to be there. Raises WeightsMismatch before a byte has moved;
    SourceLost or TornRead when the tensors may hold a part (`details["complete"]` names the tensors that are whole); what
    `Registry.resolve` raises; TensorsUnusable.
    """
    dst = describe(tensors, shards)
    instances = [source] if isinstance(source, str) else list(source)
    if not instances:
        raise InvalidField("no instance to load from", field="source")
    deadline = time.monotonic() + timeout_s
    device = next((tensor.device for tensor in tensors.values() if tensor.numel()), torch.device("cpu"))
    with ExitStack() as undo:
        cell = HeaderCell(device)
        for region in (*dst.regions, cell.region):
            engine.register(region)
            undo.callback(engine.unregister, region)
        task = _Load(registry, engine, rank, dst, cell, deadline, progress or _ignore)
        while True:
            try:
                return task.run(instances)
            except SourceLost as exc:
                instances.remove(exc.details["instance"])
                if not instances:
                    raise
                log.warning("%s; trying another instance", exc)


@dataclass
class _Load:
    registry: Registry
    engine: Engine
    rank: int
    dst: Manifest
    cell: HeaderCell
    deadline: float
    on_progress: OnProgress

    def run(self, instances: Sequence[str]) -> LoadReport:
        start = time.monotonic()
        backoff = Backoff(0.03, 1.0)
        for retries in range(_TRIES - 1):
            try:
                return self._once(instances, start, retries)
            except TornRead as exc:
                log.info("%s; reading again", exc)
                time.sleep(backoff.next_s())
        return self._once(instances, start, _TRIES - 1)

    def _once(self, instances: Sequence[str], start: float, retries: int) -> LoadReport:
        records = self.registry.resolve(instances, max(0.0, self.deadline - time.monotonic()))
        instance = records[0].instance
        if not 0 <= self.rank < len(records):
            raise InvalidField(
                f"rank {self.rank} is not one of {instance!r}, which has the ranks 0 to {len(records) - 1}",
                field="rank",
            )
        record = records[self.rank]
        ops: tuple[ReadOp, ...] = ()
        done: list[ReadOp] = []
        try:
            ops = plan(f"{instance}/{self.rank}", self._manifest_of(record), self.dst)
            with self._ticket(record):
                self._check_header(record)
                transfer_start = time.monotonic()
                transfer(self.engine, record.session_id, ops, done, self.on_progress)
                transfer_s = time.monotonic() - transfer_start
                self._check_header(record)
                self._check_record(record)
        except (ReadFailed, SourceLost) as exc:
            raise self._lost(record, ops, done, exc) from exc
        return LoadReport(
            instance=instance,
            rank=self.rank,
            version=record.version,
            protocol=record.protocol,
            tensors=len(self.dst.tensors),
            nbytes=sum(op.nbytes for op in ops),
            reads=len(ops),
            retries=retries,
            seconds=time.monotonic() - start,
            transfer_s=transfer_s,
        )

    def _lost(self, record: RankRecord, ops: Sequence[ReadOp], done: Sequence[ReadOp], why: Exception) -> SourceLost:
        complete: list[str] = []
        held = "nothing was read"
        if done:
            complete = complete_tensors(done, self.dst.tensors)
            arrived, wanted = (sum(op.nbytes for op in some) for some in (done, ops))
            held = f"{arrived} of {wanted} bytes have arrived, {len(complete)} of {len(self.dst.tensors)} tensors are whole"
        return SourceLost(
            f"the source {record.key} at {record.session_id} was lost ({why}); {held}: load again or from another instance",
            key=record.key,
            instance=record.instance,
            complete=complete,
        )

    def _manifest_of(self, record: RankRecord) -> Manifest:
        try:
            return self.registry.manifest(record)
        except RecordDamaged as exc:
            if self._now(record) is None:
                raise SourceLost(f"{record.key} is not registered any more", key=record.key) from exc
            raise

    def _ticket(self, record: RankRecord) -> AbstractContextManager[object]:
        """Says in etcd that we are reading, so that a source that wants to leave waits for us."""
        try:
            ticket = self.registry.pull(record)
        except EtcdError as exc:
            log.warning("reading from %s without a ticket, so it may leave meanwhile: %s", record.key, exc)
            return nullcontext()
        if ticket is None:
            raise TornRead(f"the record of {record.key} changed before it was read: load again", key=record.key)
        return ticket

    def _check_header(self, record: RankRecord) -> None:
        header = fetch_header(self.engine, record, self.cell)
        if header.updating or header.version != record.version:
            raise TornRead(
                f"the weights of {record.key} changed while they were being read (version {record.version}, "
                f"now {header.version}{', being changed' if header.updating else ''}): the destination is not usable, load again",
                key=record.key,
                version=record.version,
                now=header.version,
            )

    def _check_record(self, record: RankRecord) -> None:
        """The registry's view after the read: an evicted source does not count, whatever its memory says."""
        try:
            now = self._now(record)
        except EtcdError as exc:
            log.warning("not checked whether %s is still registered; its header says that it is the same: %s", record.key, exc)
            return
        if now is None:
            raise SourceLost(f"{record.key} was withdrawn or evicted meanwhile", key=record.key)

    def _now(self, record: RankRecord) -> RankRecord | None:
        """The registration that `record` is of, as it is now."""
        return next((now for now in self.registry.ranks(record.instance) if now.incarnation == record.incarnation), None)


def _ignore(_: Progress) -> None:
    pass
