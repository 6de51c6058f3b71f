"""How fast etcd ends leases: as they expire together, and as their owners revoke them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import click

from benchmarks.figures import cpu_s, seconds
from engine_registry import Manifest
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd
from engine_registry.registration.writes import claim
from engine_registry.schema import manifest_format as manifests
from engine_registry.schema.keys import ENGINES
from scripts.etcd_sizing.ranks import a_record

THREADS = 8
TTL_S = 90  # longer than it takes to register all
LOOK_S = 0.25
LONGEST_S = 300.0


def expiry(ranks: int, manifest: Manifest) -> None:
    """All ranks are lost while etcd restarts, which gives each lease its full time again. So all
    expire at the same moment. Then as many withdraw.
    """
    ref, parts = manifests.encode(manifest)
    with LocalEtcd() as server:
        config = EtcdConfig(parse_endpoints(server.endpoint), timeout_s=30.0)
        with closing(Etcd(config)) as etcd, ThreadPoolExecutor(THREADS) as pool:

            def register(rank: int) -> int:
                lease_id = etcd.grant(TTL_S)
                claim(etcd, a_record(rank, ranks, ref), parts, lease_id)
                return lease_id

            list(pool.map(register, range(ranks)))
            server.stop()
            server.start()
            first_s, last_s, used_s = _until_none_is_left(etcd, server, ranks)
            rate = ranks / max(last_s - first_s, LOOK_S)
            click.echo(
                f"\n{ranks:,} ranks with a TTL of {TTL_S} s expire together: the first after "
                f"{first_s:.1f} s, the last after {last_s:.1f} s, {rate:,.0f} a second; etcd's CPU "
                f"{used_s / ranks * 1e6:,.0f} µs each"
            )
            leases = list(pool.map(register, range(ranks)))
            before_s = cpu_s(server.pid)
            took_s = seconds(lambda: list(pool.map(etcd.revoke, leases)))
            used_s = cpu_s(server.pid) - before_s
            click.echo(
                f"{ranks:,} leases revoked by one client: {ranks / took_s:,.0f} a second; etcd's "
                f"CPU {used_s / ranks * 1e6:,.0f} µs each"
            )


def _until_none_is_left(etcd: Etcd, server: LocalEtcd, ranks: int) -> tuple[float, float, float]:
    """Seconds until the first has gone, and the last, and etcd's CPU in between."""
    start = time.monotonic()
    first_s, began_s = 0.0, cpu_s(server.pid)
    while (left := etcd.count(ENGINES)) and time.monotonic() < start + LONGEST_S:
        if left == ranks:
            first_s, began_s = time.monotonic() - start, cpu_s(server.pid)
        time.sleep(LOOK_S)
    return first_s, time.monotonic() - start, cpu_s(server.pid) - began_s
