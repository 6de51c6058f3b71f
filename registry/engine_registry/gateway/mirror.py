"""Registers ranks of a seed that have registered at SGLang's own server. Run by a gateway on
request, in its event loop.

The ranks of a seed register at their node 0, where SGLang runs its own server at that port:
they do not reach a gateway by themselves. Only ranks that are not registered are asked about. A
mirrored rank's incarnation follows from what the seed has said: so gateways that mirror one server
do not replace each other's registrations, and what was evicted stays so.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import urllib.error
import urllib.request
from dataclasses import replace
from functools import partial
from http.client import HTTPException

from engine_registry.errors import EtcdError, Evicted, InvalidField, RecordDamaged, RegistryError
from engine_registry.etcd.client import Etcd
from engine_registry.gateway.calls import Calls
from engine_registry.gateway.claims import Seeds, Served, seed_record
from engine_registry.gateway.probe import Answer, Probe
from engine_registry.gateway.sglang import parse_registration
from engine_registry.schema.keys import instance_prefix
from engine_registry.schema.record import RankRecord
from engine_registry.schema.record_format import decode_item
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_TIMEOUT_S = 3.0
_MAX_NBYTES = 64 << 20
# of its bootstrap and its inference server
_PATHS = (
    "/get_transfer_engine_info",
    "/get_remote_instance_transfer_engine_info",
)
# A proxy of the environment is for the web; the seed is in the cluster.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def check_url(url: str) -> None:
    if not url.startswith(("http://", "https://")) or not url.isprintable() or " " in url:
        raise InvalidField(
            f"seed URL {url!r} is not valid: it is http://HOST:PORT of a server of SGLang's",
            field="seed_url",
        )


class Mirror:
    """`run` it as a task until it is cancelled, then `close`.

    `etcd` and `probe` are as for the prober.
    """

    def __init__(
        self, etcd: Etcd, seeds: Seeds, probe: Probe, url: str, served: Served, interval_s: float
    ) -> None:
        self._etcd = etcd
        self._seeds = seeds
        self._probe = probe
        self._url = url.rstrip("/")
        self._instance = served.instance
        self._served = served
        self._interval_s = interval_s
        self._calls = Calls(1, "gateway mirror")
        self._evicted: set[str] = set()  # incarnations
        self._complaints: dict[int, str] = {}  # by rank, the last one that was logged

    async def run(self) -> None:
        """Returns never, and raises nothing of ours: what does not go now is tried again."""
        while True:
            try:
                for rank in await self._calls(self._missing):
                    await self._mirror(rank)
            except EtcdError as exc:
                log.info(
                    "%s is not mirrored now: %s",
                    self._instance,
                    exc,
                    extra=fields("mirror_waits", error=exc),
                )
            await asyncio.sleep(self._interval_s)

    def close(self) -> None:
        self._calls.close(wait=False)  # a server may take its time

    def _missing(self) -> list[int]:
        held = set()
        for item in self._etcd.snapshot(instance_prefix(self._instance)).items:
            try:
                record = decode_item(item)
            except RecordDamaged:
                continue
            if not record.ended:
                held.add(record.rank)
        return [rank for rank in range(self._served.world_size) if rank not in held]

    async def _mirror(self, rank: int) -> None:
        try:
            body = await self._calls(partial(_ask, self._url, rank))
            if body is None:
                return
            record, parts = await self._calls(partial(self._record, rank, body))
            known = record.incarnation in self._evicted
            if (
                not known and await self._probe(record.session_id) is Answer.LISTENS
            ):  # its server remembers the dead as well
                await self._seeds.register(record, parts, may_replace=False)
                self._complaints.pop(rank, None)
        except Evicted:
            self._evicted.add(record.incarnation)
            log.info(
                "%s is not mirrored any more: it was evicted",
                record.key,
                extra=fields("mirror_evicted", key=record.key),
            )
        except EtcdError as exc:
            log.info(
                "%s/%d is not mirrored now: %s",
                self._instance,
                rank,
                exc,
                extra=fields("mirror_waits", rank=rank, error=exc),
            )
        except RegistryError as exc:
            if self._complaints.get(rank) != str(exc):
                self._complaints[rank] = str(exc)
                log.warning(
                    "%s/%d is not mirrored from %s: %s",
                    self._instance,
                    rank,
                    self._url,
                    exc,
                    extra=fields(
                        "seed_not_mirrored",
                        instance=self._instance,
                        rank=rank,
                        url=self._url,
                        error=exc,
                    ),
                )

    def _record(self, rank: int, body: bytes) -> tuple[RankRecord, list[bytes]]:
        info = parse_registration(body)
        if info.rank != rank:
            raise InvalidField(
                f"asked for rank {rank}, it answers with rank {info.rank}", field="rank"
            )
        record, parts = seed_record(
            self._instance, info, self._served.world_size, self._served.model
        )
        said = f"{record.key} {record.world_size} {record.session_id} {record.manifest.digest}"
        return replace(
            record, incarnation=hashlib.blake2b(said.encode(), digest_size=16).hexdigest()
        ), parts


def _ask(url: str, rank: int) -> bytes | None:
    """What the server says of the rank; None where it says nothing, or is not there."""
    for path in _PATHS:
        try:
            with _opener.open(f"{url}{path}?rank={rank}", timeout=_TIMEOUT_S) as answer:
                body: bytes = answer.read(_MAX_NBYTES)
                return body
        except urllib.error.HTTPError as exc:
            exc.close()
        except (OSError, HTTPException) as exc:
            log.info("%s: %s", url, exc, extra=fields("seed_server_away", url=url, error=exc))
            return None
    return None
