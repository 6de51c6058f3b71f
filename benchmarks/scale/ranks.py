"""Ranks without a process each: written by the product's own `claim`, under one lease."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

from engine_registry import Manifest, ModelIdentity, RankState, Region, TensorEntry
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd
from engine_registry.registration.keeper.holder import Keeper
from engine_registry.registration.keeper.key_watch import KeyWatch
from engine_registry.registration.writes import claim
from engine_registry.schema import manifest_format as manifests
from engine_registry.schema.keyvalue import KeyValue
from engine_registry.schema.location import UNKNOWN, Location
from engine_registry.schema.record import ManifestRef, RankRecord

MODEL = ModelIdentity("scale/model-that-is-joined", "r1", "bfloat16")
OTHER = ModelIdentity("scale/model-of-somebody-else", "r1", "bfloat16")
CONTENT = "0" * 31 + "1"
HOST_RANKS = 8
TIMEOUT_S = 300.0  # a thousand threads share one GIL
_THREADS = 8
_TTL_S = 86_400.0
_APART_NBYTES = 1 << 20
_QUOTA_NBYTES = 8 << 30


def an_etcd() -> LocalEtcd:
    """One member, with the quota that the pages advise."""
    return LocalEtcd(extra_args=[f"--quota-backend-bytes={_QUOTA_NBYTES}"])


def connected(server: LocalEtcd) -> closing[Etcd]:
    """A connection for a `with` block."""
    return closing(Etcd(config_of(server)))


def config_of(server: LocalEtcd) -> EtcdConfig:
    return EtcdConfig(parse_endpoints(server.endpoint), timeout_s=TIMEOUT_S)


def small_manifest() -> Manifest:
    entry = TensorEntry("w", "bfloat16", (512, 64), 4096, 65536, (512, 64), (0, 0))
    return Manifest((entry,), (Region(4096, 65536),))


def a_record(
    ref: ManifestRef,
    number: int,
    *,
    prefix: str,
    world_size: int,
    model: ModelIdentity = OTHER,
    protocol: str = "rdma",
    state: RankState = RankState.READY,
    location: Location = UNKNOWN,
) -> RankRecord:
    """The record of rank `number`, counted over all instances of one prefix."""
    return RankRecord(
        incarnation=f"{random.getrandbits(128):032x}",
        instance=f"{prefix}-{number // world_size:06}",
        rank=number % world_size,
        world_size=world_size,
        model=model,
        session_id=f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}:15000",
        protocol=protocol,
        manifest=ref,
        header_addr=0x7F3A_4000_0000,
        registered_at="2026-01-01T00:00:00.000+00:00",
        generation="a1b2c3d4e5f64718",
        content=CONTENT,
        topology={"tp": (number % world_size, world_size)},
        device=f"cuda:{number % HOST_RANKS}",
        writer="0.1.0",
        host=f"gpu-node-{number // HOST_RANKS:05}",
        pid=41_000 + number % HOST_RANKS,
        state=state,
        location=location,
    )


class Fleet:
    """Ranks of one kind in one etcd, which only grow in number."""

    def __init__(
        self,
        etcd: Etcd,
        prefix: str,
        world_size: int,
        *,
        model: ModelIdentity = OTHER,
        protocol: str = "rdma",
        manifest: Manifest | None = None,
        locations: Sequence[Location] = (UNKNOWN,),
    ) -> None:
        """They stand at the locations in turn."""
        self._etcd = etcd
        self._prefix = prefix
        self._world_size = world_size
        self._model = model
        self._protocol = protocol
        self._manifest = manifest or small_manifest()
        self._locations = locations
        self._lease_id = etcd.grant(_TTL_S)
        self.written: list[tuple[RankRecord, KeyValue]] = []

    def grow_to(self, ranks: int) -> Sequence[tuple[RankRecord, KeyValue]]:
        """Registers those that are missing, from a few threads; returns them."""
        new = range(len(self.written), ranks)
        with ThreadPoolExecutor(_THREADS) as pool:
            self.written += pool.map(self._register, new)
        return self.written[new.start :]

    def write(self, number: int) -> None:
        """Registers a rank of this number again, as another process."""
        self.written[number] = self._register(number)

    def record(self, number: int) -> tuple[RankRecord, Sequence[bytes]]:
        """And the parts of its manifest."""
        ref, parts = manifests.encode(_moved(self._manifest, number * _APART_NBYTES))
        record = a_record(
            ref,
            number,
            prefix=self._prefix,
            world_size=self._world_size,
            model=self._model,
            protocol=self._protocol,
            location=self._locations[number % len(self._locations)],
        )
        return record, parts

    def _register(self, number: int) -> tuple[RankRecord, KeyValue]:
        record, parts = self.record(number)
        return record, claim(self._etcd, record, parts, self._lease_id)


def a_keeper(etcd: Etcd, record: RankRecord, parts: Sequence[bytes], ttl_s: float) -> Keeper:
    """The product's, which somebody has to drive, and whose rank reads nothing."""
    watch = KeyWatch(etcd, record.key, lambda: None)
    return Keeper(etcd, record, parts, ttl_s, lambda report: None, watch)


def _moved(manifest: Manifest, nbytes: int) -> Manifest:
    """Tensors at other addresses: no two ranks have equal manifests, and a loader reads each."""
    return replace(
        manifest,
        tensors=tuple(replace(each, addr=each.addr + nbytes) for each in manifest.tensors),
        regions=tuple(each._replace(addr=each.addr + nbytes) for each in manifest.regions),
    )
