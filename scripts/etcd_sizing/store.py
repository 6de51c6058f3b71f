"""Many ranks in one etcd: the time to write them, its database and memory, renewals, updates."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from subprocess import run

import click

from benchmarks.figures import cpu_s, memory_nbytes
from engine_registry import Manifest, RankState, Registry
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd
from engine_registry.registration.writes import amend, claim
from engine_registry.schema import manifest_format as manifests
from engine_registry.schema.keyvalue import KeyValue
from engine_registry.schema.record import RankRecord
from scripts.etcd_sizing.ranks import a_record
from scripts.etcd_sizing.wire import counted_watch

THREADS = 8
QUOTA_NBYTES = 8 << 30
RENEWALS = 5_000
TTL_S = 3_600  # nothing here renews in the background


def store(ranks: int, manifest: Manifest) -> None:
    ref, parts = manifests.encode(manifest)
    with LocalEtcd(
        extra_args=[f"--quota-backend-bytes={QUOTA_NBYTES}", "--snapshot-count=10000"]
    ) as server:
        with (
            closing(Etcd(EtcdConfig(parse_endpoints(server.endpoint), timeout_s=30.0))) as etcd,
            counted_watch(server) as wire,
        ):
            start = time.perf_counter()
            with ThreadPoolExecutor(THREADS) as pool:
                written = list(
                    pool.map(
                        lambda rank: register(etcd, a_record(rank, ranks, ref), parts), range(ranks)
                    )
                )
            took_s = time.perf_counter() - start
            wire.wait_until_quiet(ranks)
            click.echo(
                f"\n{ranks:,} ranks of {ref.tensors:,} tensors: registered in {took_s:.1f} "
                f"s, {database(server)}"
            )
            click.echo(
                f"  a watcher received {wire.nbytes:,} B for {ranks:,} joins: "
                f"{wire.nbytes / ranks:,.0f} B each"
            )
            renewals(etcd, server, [held.lease_id for _, held in written])
            updates(etcd, server, written)
            reading(server)
            click.echo(f"  etcd's memory: {memory_nbytes(server.pid) / 1e6:,.0f} MB")


def register(etcd: Etcd, record: RankRecord, parts: Sequence[bytes]) -> tuple[RankRecord, KeyValue]:
    return record, claim(etcd, record, parts, etcd.grant(TTL_S))


def renewals(etcd: Etcd, server: LocalEtcd, leases: Sequence[int]) -> None:
    """As a keeper renews: the lease, and a look at the key."""
    chosen = [leases[number % len(leases)] for number in range(RENEWALS)]

    def renew(lease_id: int) -> None:
        etcd.keep_alive(lease_id)
        etcd.get("/engines/llama-3-70b-prod-000/0")

    before, start = cpu_s(server.pid), time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(renew, chosen))
    took_s = time.perf_counter() - start
    each_s = (cpu_s(server.pid) - before) / RENEWALS
    click.echo(
        f"  renewals: {RENEWALS / took_s:,.0f} a second from one client; etcd's CPU "
        f"{each_s * 1e6:,.0f} µs each"
    )


def updates(etcd: Etcd, server: LocalEtcd, written: Sequence[tuple[RankRecord, KeyValue]]) -> None:
    """Each rank changes its state once, as for one update of the weights: what history is left
    until compaction.
    """

    def change(record: RankRecord, held: KeyValue) -> None:
        amend(etcd, replace(record, state=RankState.UPDATING), held)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(change, *zip(*written, strict=True)))
    click.echo(f"  after one more write of every record: {database(server)}")


def reading(server: LocalEtcd) -> None:
    with Registry.connect(server.endpoint, timeout_s=60.0) as registry:
        start = time.perf_counter()
        found = registry.instances()
        click.echo(f"  list: {len(found)} instances in {time.perf_counter() - start:.2f} s")


def database(server: LocalEtcd) -> str:
    etcdctl = str(Path(server.binary).with_name("etcdctl"))
    command = [etcdctl, f"--endpoints={server.endpoint}", "endpoint", "status", "--write-out=json"]
    answer = run(command, capture_output=True, check=True, env={"ETCDCTL_API": "3"}).stdout
    (status,) = json.loads(answer)
    found = status["Status"]
    return (
        f"database {found['dbSize'] / 1e6:,.1f} MB, of which in use "
        f"{found['dbSizeInUse'] / 1e6:,.1f} MB"
    )
