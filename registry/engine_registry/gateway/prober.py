"""Probes the seeds of ranks that registered through a gateway: while a seed listens, the lease of
its rank is renewed; then the rank ends.

Run by every gateway, for all such ranks, whichever gateway wrote them. A task a rank in the
gateway's event loop; one thread follows etcd, a few make calls to it. Gateways need not agree: any
of them ends a rank whose seed refuses connections, and one that merely cannot reach a seed leaves
its lease to the others.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from engine_registry.errors import EtcdError, LeaseNotFound, RecordDamaged
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.follow import Follower
from engine_registry.gateway.calls import Calls
from engine_registry.gateway.probe import Answer, Probe
from engine_registry.registration.writes import DIED, end
from engine_registry.schema.address import host_of, is_loopback
from engine_registry.schema.keyvalue import Change, KeyValue, Snapshot
from engine_registry.schema.record import GATEWAY, RankRecord
from engine_registry.schema.record_format import decode_item
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_AT_ONCE = 256  # probes
_THREADS = 4
_AGAIN_S = 0.2  # between two refusals: a port of a server that starts again is free for less
_RARELY = 5  # intervals between probes of a seed that cannot be reached from here
_JOIN_S = 2.0


@dataclass(frozen=True)
class _Seed:
    record: RankRecord
    item: KeyValue  # that it was read from

    @property
    def lease_id(self) -> int:
        return self.item.lease_id

    @property
    def identity(self) -> tuple[str, int]:
        return self.record.incarnation, self.lease_id


class Prober:
    """`run` it as a task until it is cancelled, then `close`."""

    def __init__(
        self, etcd: Etcd, follower: Follower, probe: Probe, interval_s: float, tolerance: int
    ) -> None:
        """`etcd` is for the prober and its follower alone, which closes it: so that no call is
        waited for.
        """
        self._etcd = etcd
        self._probe = probe
        self._interval_s = interval_s
        self._tolerance = tolerance
        self._calls = Calls(_THREADS, "gateway renewals")
        self._follower = follower
        self._thread: threading.Thread | None = None
        self._seeds: dict[str, _Seed] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Returns never; raises what etcd refuses for good."""
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[tuple[bool, dict[str, _Seed | None]] | EtcdError] = asyncio.Queue()
        places = asyncio.Semaphore(_AT_ONCE)

        def follow() -> None:
            try:
                for update in self._follower:
                    changes = update.items if isinstance(update, Snapshot) else update.changes
                    loop.call_soon_threadsafe(
                        inbox.put_nowait, (isinstance(update, Snapshot), _seeds(changes))
                    )
            except EtcdError as exc:
                loop.call_soon_threadsafe(inbox.put_nowait, exc)

        self._thread = threading.Thread(target=follow, name="gateway follower", daemon=True)
        self._thread.start()
        try:
            while True:
                news = await inbox.get()
                if isinstance(news, EtcdError):
                    raise news
                self._take_in(*news, places)
        finally:
            self._follower.stop()
            for key in list(self._tasks):
                self._forget(key)

    def close(self) -> None:
        """From any thread, after `run` has been cancelled."""
        self._follower.stop()
        self._etcd.close()
        self._calls.close()
        if self._thread is not None:
            self._thread.join(_JOIN_S)

    def _take_in(
        self, everything: bool, seeds: dict[str, _Seed | None], places: asyncio.Semaphore
    ) -> None:
        for key in list(self._seeds.keys() - seeds.keys()) if everything else []:
            self._forget(key)
        for key, seed in seeds.items():
            known = self._seeds.get(key)
            if seed is None or known is None or known.identity != seed.identity:
                self._forget(key)
            if seed is not None:
                self._seeds[key] = seed
                if key not in self._tasks:
                    self._tasks[key] = asyncio.create_task(self._keep(key, places))
                    self._tasks[key].add_done_callback(_report)

    def _forget(self, key: str) -> None:
        self._seeds.pop(key, None)
        task = self._tasks.pop(key, None)
        if task is not None:
            task.cancel()

    async def _keep(self, key: str, places: asyncio.Semaphore) -> None:
        """Until the registration is over, be it by us or another."""
        session_id = self._seeds[key].record.session_id
        misses = 0  # in a row
        renew_at = 0.0  # at once: it is not known here how old the lease is
        while True:
            async with places:
                answer = await self._probe(session_id)
                if answer is Answer.REFUSES:
                    await asyncio.sleep(_AGAIN_S)
                    answer = await self._probe(session_id)
            if answer is Answer.REFUSES and await self._calls(partial(self._end, self._seeds[key])):
                return
            misses = 0 if answer is Answer.LISTENS else misses + 1
            if misses == self._tolerance + 1:
                log.warning(
                    "%s: its seed at %s cannot be reached from here: its lease is left to "
                    "other gateways",
                    key,
                    session_id,
                    extra=fields("seed_unreachable", key=key, session_id=session_id),
                )
            given_up = answer is Answer.REFUSES or misses > self._tolerance
            if not given_up and time.monotonic() >= renew_at:
                renew_at = time.monotonic() + await self._renew(self._seeds[key])
            await asyncio.sleep(
                self._interval_s
                * (_RARELY if misses > self._tolerance else 1)
                * random.uniform(0.9, 1.1)  # noqa: S311
            )

    async def _renew(self, seed: _Seed) -> float:
        """In how many seconds it is to be done again."""
        try:
            return await self._calls(partial(self._etcd.keep_alive, seed.lease_id)) / 3
        except LeaseNotFound:
            log.info(
                "%s: its lease has expired",
                seed.record.key,
                extra=fields("seed_lease_expired", key=seed.record.key),
            )
        except EtcdError as exc:
            log.info(
                "%s: its lease is not renewed: %s",
                seed.record.key,
                exc,
                extra=fields("renewal_failed", key=seed.record.key, error=exc),
            )
        return 0.0

    def _end(self, seed: _Seed) -> bool:
        record = seed.record
        try:
            end(self._etcd, seed.item, DIED)
        except EtcdError as exc:
            log.info(
                "%s has not ended yet: %s",
                record.key,
                exc,
                extra=fields("seed_end_waits", key=record.key, error=exc),
            )
            return False
        log.info(
            "%s lost: nothing listens at %s any more",
            record.key,
            record.session_id,
            extra=fields("seed_lost", key=record.key),
        )
        return True


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error(
            "a rank is not kept any more: %r; restart the gateway, and please report it",
            error,
            extra=fields("prober_failed", error=error),
        )


def _seeds(changes: Sequence[Change]) -> dict[str, _Seed | None]:
    """By key, what stands there now, as far as it is for gateways to keep."""
    return {change.key: _seed(change) for change in changes}


def _seed(change: Change) -> _Seed | None:
    if not isinstance(change, KeyValue):
        return None
    try:
        record = decode_item(change)
    except RecordDamaged:
        return None
    if record.kept_by != GATEWAY or record.ended:
        return None
    if is_loopback(host_of(record.session_id)) and record.host != socket.gethostname():
        return None  # that address means another process here
    return _Seed(record, change)
