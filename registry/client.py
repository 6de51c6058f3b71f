"""`Registry`: the front door. Safe to share between threads; not to be carried over a fork."""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from types import TracebackType

from registry import manifest as manifests
from registry import registration
from registry.cleanup import CleaningWatch
from registry.config import EtcdConfig, parse_endpoints
from registry.election import Election
from registry.errors import EtcdUnavailable, InstanceIncomplete, InstanceNotFound, InvalidField, RecordDamaged
from registry.etcd import Etcd
from registry.follow import Follower
from registry.keys import ENGINES, check_instance, instance_prefix, manifest_prefix, parse_record_key
from registry.kv import Snapshot
from registry.manifest import Manifest
from registry.pulls import PullTicket, take_ticket, wait_for_no_pulls
from registry.record import ModelIdentity, RankRecord, RankState
from registry.resolver import InstanceState, InstanceStatus
from registry.roster import Roster, assess_all, instance_of
from registry.session import OnState, Registration
from registry.watcher import Watch

log = logging.getLogger(__name__)
MIN_TTL_S = 2.0  # etcd grants no shorter lease


class Registry:
    """Register ranks, find the ranks of others, watch them come and go."""

    def __init__(self, config: EtcdConfig) -> None:
        self._config = config
        self._etcd = Etcd(config)

    @classmethod
    def connect(
        cls,
        endpoints: str | Sequence[str] = "127.0.0.1:2379",
        *,
        namespace: str = "",
        timeout_s: float = 5.0,
        cacert: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        user: str | None = None,
        password: str | None = None,
    ) -> Registry:
        """A registry over the etcd at `endpoints` (`HOST:PORT[,HOST:PORT…]`).

        Asks etcd for its version, so that EtcdUnavailable or EtcdRefused come here and not at the first use.
        """
        config = EtcdConfig(parse_endpoints(endpoints), namespace, timeout_s, cacert, cert, key, user, password)
        registry = cls(config)
        try:
            registry._etcd.status()
        except BaseException:
            registry.close()
            raise
        return registry

    def close(self) -> None:
        """Ends the connection. Registrations live on: each has a keeper with a connection of its own."""
        self._etcd.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def local_address(self) -> str:
        """The address of this machine on the way to etcd: as a rule the one that other machines reach it by too."""
        return self._etcd.local_address()

    def register(
        self,
        *,
        instance: str,
        rank: int,
        world_size: int,
        model: ModelIdentity,
        manifest: Manifest,
        session_id: str,
        protocol: str,
        header_addr: int,
        incarnation: str | None = None,
        generation: str | None = None,
        topology: Mapping[str, tuple[int, int]] | None = None,
        version: int = 0,
        state: RankState = RankState.READY,
        fabric: str = "",
        device: str = "cpu",
        ttl_s: float = 10.0,
        on_state: OnState | None = None,
    ) -> Registration:
        """Claims the rank for this process and holds it.

        Raises InvalidField, RankConflict (another process has the rank), InstanceMismatch (it disagrees with its siblings) or an
        EtcdError; nothing is left in etcd then. `on_state` is called from another thread whenever the state changes.
        """
        if not ttl_s >= MIN_TTL_S:
            raise InvalidField(f"ttl_s {ttl_s} is not valid: etcd's shortest lease is {MIN_TTL_S:g} s", field="ttl_s")
        ref, parts = manifests.encode(manifest)
        if len(parts) > manifests.MAX_PARTS:
            raise InvalidField(
                f"the manifest of {len(manifest.tensors)} tensors takes {len(parts)} MiB, more than {manifests.MAX_PARTS}",
                field="manifest",
            )
        record = RankRecord(
            incarnation=incarnation or new_incarnation(),
            instance=instance,
            rank=rank,
            world_size=world_size,
            model=model,
            session_id=session_id,
            protocol=protocol,
            manifest=ref,
            header_addr=header_addr,
            registered_at=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            generation=generation or "",
            topology=dict(topology or {}),
            version=version,
            state=state,
            fabric=fabric,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=device,
            writer=_version(),
        )
        return Registration(self._config, record, parts, ttl_s, on_state)

    def instances(self) -> tuple[InstanceStatus, ...]:
        """All instances by name. What cannot be read is among their problems, never an error."""
        return assess_all(self._etcd.snapshot(ENGINES).items)

    def instance(self, name: str) -> InstanceStatus:
        """One instance as it is now; state GONE where nothing is registered."""
        items = self._etcd.snapshot(instance_prefix(check_instance(name))).items
        return next(iter(assess_all(items)), InstanceStatus(name, InstanceState.GONE))

    def ranks(self, instance: str) -> tuple[RankRecord, ...]:
        """The instance's ranks that are registered now, by rank. A damaged record is left out, with a logged warning."""
        roster = Roster(check_instance(instance))
        for item in self._etcd.snapshot(instance_prefix(instance)).items:
            roster.see(item)
        for problem in roster.damaged.values():
            log.warning("%s: %s", instance, problem)
        return roster.status().records

    def resolve(self, instance: str | Sequence[str], timeout_s: float = 0.0) -> tuple[RankRecord, ...]:
        """All ranks of an instance that is complete and consistent; of several, of the first in the list that is.

        Waits for that, watching, for up to `timeout_s`. Raises InstanceNotFound, InstanceIncomplete (with what is missing), or
        RecordDamaged.
        """
        names = [check_instance(name) for name in ([instance] if isinstance(instance, str) else instance)]
        if not names:
            raise InvalidField("no instance is named", field="instance")
        deadline = time.monotonic() + timeout_s
        prefix = instance_prefix(names[0]) if len(names) == 1 else ENGINES
        rosters: dict[str, Roster] = {}
        follower = Follower(self._etcd, prefix, deadline)
        for update in follower if timeout_s > 0 else [self._etcd.snapshot(prefix)]:
            if isinstance(update, Snapshot):
                rosters = {name: Roster(name) for name in names}
            for change in update.items if isinstance(update, Snapshot) else update.changes:
                if (roster := rosters.get(instance_of(change.key))) is not None:
                    roster.see(change)
            for roster in rosters.values():
                if roster.state is InstanceState.READY:
                    return roster.status().records
        if not rosters:
            raise follower.last_error or EtcdUnavailable(f"etcd at {self._config} has not answered in {timeout_s:.3g} s")
        return _fail(list(rosters.values()), timeout_s)

    def manifest(self, record: RankRecord) -> Manifest:
        """The manifest that belongs to the record; RecordDamaged where it is gone or not the one that the record means."""
        prefix = manifest_prefix(record.instance, record.rank, record.incarnation)
        found = {item.key: item.value for item in self._etcd.snapshot(prefix).items}
        if record.manifest.parts > manifests.MAX_PARTS:
            raise RecordDamaged(f"the record at {record.key} claims a manifest of {record.manifest.parts} parts", key=record.key)
        keys = [f"{prefix}{number}" for number in range(record.manifest.parts)]
        if any(key not in found for key in keys):
            raise RecordDamaged(
                f"the manifest of {record.key} is not there (any more): the rank has gone or registered again",
                key=record.key,
            )
        return manifests.decode(record.key, record.manifest, [found[key] for key in keys])

    def pull(self, record: RankRecord) -> PullTicket | None:
        """A ticket that says that we are reading from this rank; None where its record has changed since it was read."""
        return take_ticket(self._etcd, record)

    def wait_for_no_pulls(self, instance: str, rank: int, timeout_s: float) -> int:
        """Blocks until nobody holds a ticket to read from the rank, or the time is over: how many still do."""
        return wait_for_no_pulls(self._etcd, instance, rank, timeout_s)

    def watch(self, instance: str | None = None) -> Watch:
        """Events about one instance or all, beginning with what is there now."""
        return Watch(self._etcd.sibling(), check_instance(instance) if instance is not None else None)

    def cleaning_watch(self, instance: str | None = None, *, grace_s: float, dry_run: bool = False) -> CleaningWatch:
        """A watch that evicts what is left of an instance that lost a rank and is still degraded after `grace_s` seconds.

        Of all that run over the same instances, one evicts. With `dry_run` each only tells what it would do.
        """
        if not grace_s >= 0:
            raise InvalidField(f"grace_s {grace_s} is not valid: it is 0 seconds or more", field="grace_s")
        etcd = self._etcd.sibling()
        watch = Watch(etcd, check_instance(instance) if instance is not None else None)
        election = Election(self._etcd.sibling(), f"cleanup/{instance}" if instance else "cleanup-all")
        return CleaningWatch(etcd, watch, election, grace_s, dry_run)

    def evict(self, record: RankRecord) -> bool:
        """Ends the registration that `record` was read from; False if it has changed or gone since (read it again)."""
        return registration.evict(self._etcd, record)


def new_incarnation() -> str:
    """32 hexadecimal digits, never the same twice."""
    return uuid.uuid4().hex


def _fail(rosters: Sequence[Roster], timeout_s: float) -> tuple[RankRecord, ...]:
    """Raises why none of the instances can be used."""
    for roster in rosters:
        for key, error in roster.damaged.items():
            if parse_record_key(key) is not None:
                raise error
    waited = f" after {timeout_s:.3g} s" if timeout_s > 0 else ""
    names = [roster.instance for roster in rosters]
    found = [roster.status() for roster in rosters if roster.state is not InstanceState.GONE]
    if not found:
        listed = " or ".join(repr(name) for name in names)
        raise InstanceNotFound(
            f"instance {listed} is not registered{waited}: start its ranks, or see `engines list`", instances=names
        )
    raise InstanceIncomplete(
        "; ".join(f"instance {status.instance!r} is not ready{waited}: {status.summary}" for status in found),
        instances=names,
        missing={status.instance: list(status.missing) for status in found},
        problems={status.instance: list(status.problems) for status in found},
    )


def _version() -> str:
    from importlib import metadata  # costs each keeper process memory that it never needs

    try:
        return metadata.version("engine-registry")
    except metadata.PackageNotFoundError:
        return ""
