"""Registrations without processes, one lease each: how fast they are written, read and watched."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

from benchmarks.figures import Results, median_s
from benchmarks.registry.ranks import THREADS, a_manifest, a_record
from engine_registry import InstanceReady, Registry, Watch
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.registration.writes import claim
from engine_registry.schema import manifest_format as manifests


def simulated(etcd: Etcd, ranks: int, results: Results) -> list[int]:
    """Registers `ranks` ranks as instances of at most 1,024, a lease each, from a few threads;
    returns the leases.
    """
    ref, parts = manifests.encode(a_manifest(100))
    places = [
        (f"i{rank // 1024:02}", rank % 1024, min(1024, ranks - rank // 1024 * 1024))
        for rank in range(ranks)
    ]

    def register(place: tuple[str, int, int]) -> int:
        lease_id = etcd.grant(3600)
        claim(etcd, a_record(*place, ref), parts, lease_id)
        return lease_id

    with ThreadPoolExecutor(THREADS) as pool:
        start = time.perf_counter()
        leases = list(pool.map(register, places))
        results[f"register_{ranks}_ranks_s"] = time.perf_counter() - start
        start = time.perf_counter()
        list(pool.map(etcd.keep_alive, leases))
        results[f"keep_alive_{ranks}_leases_s"] = time.perf_counter() - start
    return leases


def reads(registry: Registry, ranks: int, results: Results) -> None:
    if ranks <= 1024:
        results[f"resolve_{ranks}_ranks_s"] = median_s(lambda: registry.resolve("i00"), 9)
    results[f"list_{ranks}_ranks_s"] = median_s(registry.instances, 5)


def fan_out(endpoint: str, registry: Registry, watchers: int, ranks: int, results: Results) -> None:
    """`ranks` ranks join at once: until each of the watchers has seen them all."""
    with ExitStack() as stack:
        watches = [stack.enter_context(registry.watch("fan")) for _ in range(watchers)]
        etcd = stack.enter_context(closing(Etcd(EtcdConfig(parse_endpoints(endpoint)))))
        ready = threading.Barrier(watchers + 1)

        def see(watch: Watch) -> None:
            events = iter(watch)
            ready.wait()
            for event in events:
                if isinstance(event, InstanceReady):
                    return

        threads = [threading.Thread(target=see, args=(watch,)) for watch in watches]
        for thread in threads:
            thread.start()
        ref, parts = manifests.encode(a_manifest(1))
        lease_id = etcd.grant(60)
        ready.wait()
        start = time.perf_counter()
        with ThreadPoolExecutor(THREADS) as pool:
            list(
                pool.map(
                    lambda rank: claim(etcd, a_record("fan", rank, ranks, ref), parts, lease_id),
                    range(ranks),
                )
            )
        written = time.perf_counter()
        for thread in threads:
            thread.join()
        results[f"watch_{watchers}_watchers_{ranks}_ranks_behind_writer_s"] = (
            time.perf_counter() - written
        )
        results[f"watch_{watchers}_watchers_{ranks}_ranks_writing_s"] = written - start
        etcd.revoke(lease_id)
