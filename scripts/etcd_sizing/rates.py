"""Whether three members of etcd keep up with the renewals of many ranks, at the pace of life: each
rank every third of its TTL. Their CPU, and how long an answer takes.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import click

from benchmarks.figures import cpu_s, percentile
from engine_registry import Manifest
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local_cluster import LocalCluster
from engine_registry.registration.writes import claim
from engine_registry.schema import manifest_format as manifests
from scripts.etcd_sizing.ranks import a_record

CLIENTS = 16  # connections; each has a thread that renews for its share of the ranks
PERIOD_S = 10.0 / 3  # with a TTL of 10 s
PERIODS = 6
TTL_S = 3_600  # so that a client that is late loses nothing
TIMEOUT_S = 60.0


def rates(ranks: int, manifest: Manifest) -> None:
    ref, parts = manifests.encode(manifest)
    with LocalCluster() as cluster, ExitStack() as stack:
        config = EtcdConfig(parse_endpoints(cluster.endpoints), timeout_s=TIMEOUT_S)
        etcds = [stack.enter_context(closing(Etcd(config))) for _ in range(CLIENTS)]

        def register(number: int) -> list[int]:
            held = []
            for rank in range(number, ranks, CLIENTS):
                record, lease_id = a_record(rank, ranks, ref), etcds[number].grant(TTL_S)
                claim(etcds[number], record, parts, lease_id)
                held.append(lease_id)
            return held

        def renew(etcd: Etcd, held: list[int], start: float) -> list[float]:
            """How long each took, from when it was due."""
            took_s = []
            for number in range(PERIODS * len(held)):
                due = start + number * PERIOD_S / len(held)
                time.sleep(max(0.0, due - time.monotonic()))
                lease_id = held[number % len(held)]
                etcd.keep_alive(lease_id)
                took_s.append(time.monotonic() - due)
            return took_s

        with ThreadPoolExecutor(CLIENTS) as pool:
            shares = list(pool.map(register, range(CLIENTS)))
            before_s = sum(cpu_s(member.pid) for member in cluster.members)
            start = time.monotonic()
            answers = pool.map(renew, etcds, shares, [start] * CLIENTS)
            took_s = [each for some in answers for each in some]
            lasted_s = time.monotonic() - start
            cores = (sum(cpu_s(member.pid) for member in cluster.members) - before_s) / lasted_s
    click.echo(
        f"\n{ranks:,} ranks, {len(took_s) / lasted_s:,.0f} renewals a second over {CLIENTS} "
        f"connections to three members: {cores:.2f} cores of theirs, "
        f"{cores * lasted_s / len(took_s) * 1e3:.2f} ms each; answered within "
        f"{percentile(took_s, 50) * 1e3:.0f} ms at the median, "
        f"{percentile(took_s, 99) * 1e3:.0f} ms for 99 %"
    )
