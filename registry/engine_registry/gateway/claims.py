"""Ranks that register through a gateway: their records, and the claim of a rank for a seed. Runs in
the gateway's event loop.

Such a record is like any other, but `kept_by` says that no process of ours stands beside the rank:
gateways keep up its lease.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from engine_registry.errors import (
    EtcdError,
    InvalidField,
    RankConflict,
    RecordDamaged,
    RegistryError,
)
from engine_registry.etcd.client import Etcd
from engine_registry.gateway.calls import Calls
from engine_registry.gateway.probe import Answer, Probe
from engine_registry.gateway.sglang import SeedInfo
from engine_registry.registration.writes import claim
from engine_registry.schema.address import is_loopback, parse_session
from engine_registry.schema.keys import check_instance
from engine_registry.schema.keyvalue import KeyValue
from engine_registry.schema.manifest_format import MAX_PARTS, encode
from engine_registry.schema.moment import utc
from engine_registry.schema.record import GATEWAY, ModelIdentity, RankRecord, new_incarnation
from engine_registry.schema.record_format import decode_item
from engine_registry.telemetry.logs import fields
from engine_registry.version import package_version

log = logging.getLogger(__name__)
_TRIES = 3  # while others change the rank


@dataclass(frozen=True)
class Served:
    """The instance that the paths without a name serve."""

    instance: str
    model: str
    world_size: int


def seed_record(
    instance: str, info: SeedInfo, world_size: int, model: str
) -> tuple[RankRecord, list[bytes]]:
    """The record and the manifest's parts for what a seed has said; InvalidField."""
    if info.rank >= world_size:
        raise InvalidField(
            f"rank {info.rank} is not below the world size {world_size} of {instance!r}",
            "say how many ranks it has: ?world_size=N, world_size in the body, or "
            "`world_size` of the gateway for its own instance",
            field="world_size",
        )
    ref, parts = encode(info.manifest)
    if len(parts) > MAX_PARTS:
        raise InvalidField(
            f"the manifest takes {len(parts)} MiB, more than {MAX_PARTS}", field="weights_info_dict"
        )
    host, _ = parse_session(info.session_id)
    record = RankRecord(
        incarnation=new_incarnation(),
        instance=check_instance(instance),
        rank=info.rank,
        world_size=world_size,
        model=ModelIdentity(model),
        session_id=info.session_id,
        protocol="unknown",
        manifest=ref,
        header_addr=0,  # it has none
        registered_at=utc(),
        host=socket.gethostname() if is_loopback(host) else host,
        writer=package_version(),
        kept_by=GATEWAY,
    )
    return record, parts


class Seeds:
    """Claims ranks for seeds. `ttl_s` is for how long such a rank stays while no gateway runs."""

    def __init__(self, etcd: Etcd, calls: Calls, ttl_s: float, probe: Probe) -> None:
        self._etcd = etcd
        self._calls = calls
        self._ttl_s = ttl_s
        self._probe = probe

    async def register(
        self, record: RankRecord, parts: Sequence[bytes], may_replace: bool = True
    ) -> None:
        """Puts the record in place of a seed's before it, unless that one lives at another address
        or may not be replaced.

        Raises RankConflict, InstanceMismatch or an EtcdError.
        """
        for tries in range(1, _TRIES + 1):
            lease_id, holder = await self._calls(lambda: self._holder(record.key))
            if holder is not None and not may_replace:
                return
            if holder is not None and holder.session_id != record.session_id:
                await self._check_gone(holder)
            replaces = holder.incarnation if holder else ""
            try:
                await self._calls(lambda: self._claim(record, parts, replaces))  # noqa: B023  it has run when the next try begins
            except RankConflict as exc:
                if tries == _TRIES or exc.details.get("incarnation") == replaces:
                    raise
                continue  # another registration came in between: look at that one
            if holder is not None:
                await self._calls(lambda: self._revoke(lease_id))  # noqa: B023  as above
            log.info(
                "%s registered: %d tensors at %s",
                record.key,
                record.manifest.tensors,
                record.session_id,
                extra=fields("seed_registered", key=record.key, session_id=record.session_id),
            )
            return

    def _holder(self, key: str) -> tuple[int, RankRecord | None]:
        """The seed that has the rank, and its lease.

        Who else has it is for the claim to find out.
        """
        found: KeyValue | None = self._etcd.get(key)
        if found is not None:
            with suppress(RecordDamaged):
                record = decode_item(found)
                if record.kept_by == GATEWAY and not record.ended:
                    return found.lease_id, record
        return 0, None

    async def _check_gone(self, holder: RankRecord) -> None:
        if await self._probe(holder.session_id) is Answer.LISTENS:
            raise RankConflict(
                f"rank {holder.rank} of {holder.instance!r} is already registered (a seed at "
                f"{holder.session_id} that answers, "
                f"since {holder.registered_at})",
                "stop it, choose another rank, or end its registration with `Registry.evict`",
                instance=holder.instance,
                rank=holder.rank,
                key=holder.key,
                incarnation=holder.incarnation,
            )

    def _claim(self, record: RankRecord, parts: Sequence[bytes], replaces: str) -> None:
        lease_id = self._etcd.grant(self._ttl_s)
        try:
            claim(self._etcd, record, parts, lease_id, replaces)
        except RegistryError:
            self._revoke(lease_id)
            raise

    def _revoke(self, lease_id: int) -> None:
        """Takes along what still hangs on the lease: parts of a manifest."""
        try:
            self._etcd.revoke(lease_id)
        except EtcdError as exc:
            log.info(
                "lease %x is left to expire: %s",
                lease_id,
                exc,
                extra=fields("lease_left", error=exc),
            )
