"""`python -m benchmarks.registry`: figures of the control plane, in one run on one machine.

Simulated ranks are registrations without processes (one lease each); the deaths are
real processes with real keepers that are really killed. Beside it, the way of SGLang's bootstrap
server: one process with a dict behind HTTP, one GET a rank.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import click

from benchmarks import figures
from benchmarks.figures import another_process, median_s, percentile, seconds
from engine_cli.main import main
from engine_registry import (
    InstanceReady,
    Manifest,
    ModelIdentity,
    RankJoined,
    RankLost,
    Region,
    Registration,
    RegistrationState,
    Registry,
    TensorEntry,
)
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd
from engine_registry.etcd.local_cluster import LocalCluster
from engine_registry.registration.handle import OnState
from engine_registry.registration.writes import claim
from engine_registry.schema import manifest_format as manifests
from engine_registry.schema.record import ManifestRef, RankRecord

MODEL = ModelIdentity("bench", "r1", "bfloat16")
THREADS = 8


def a_manifest(tensors: int) -> Manifest:
    entries = [
        TensorEntry(
            f"model.layers.{n // 9}.w{n % 9}",
            "bfloat16",
            (512, 64),
            4096 + n * 65536,
            65536,
            (512, 64),
            (0, 0),
        )
        for n in range(tensors)
    ]
    return Manifest(tuple(entries), (Region(4096, tensors * 65536),))


def a_record(instance: str, rank: int, world_size: int, ref: ManifestRef) -> RankRecord:
    return RankRecord(
        incarnation=f"{rank:032x}",
        instance=instance,
        rank=rank,
        world_size=world_size,
        model=MODEL,
        session_id=f"10.0.{rank // 250}.{rank % 250}:15000",
        protocol="rdma",
        manifest=ref,
        header_addr=4096,
        registered_at="2026-01-01T00:00:00.000+00:00",
        topology={"tp": (rank % 8, 8)},
        host=f"node-{rank // 8}",
        pid=4000,
    )


def simulated(etcd: Etcd, ranks: int, results: dict[str, float]) -> list[int]:
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


def reads(registry: Registry, ranks: int, results: dict[str, float]) -> None:
    if ranks <= 1024:
        results[f"resolve_{ranks}_ranks_s"] = median_s(lambda: registry.resolve("i00"), 9)
    results[f"list_{ranks}_ranks_s"] = median_s(registry.instances, 5)


def fan_out(
    endpoint: str, registry: Registry, watchers: int, ranks: int, results: dict[str, float]
) -> None:
    """`ranks` ranks join at once: until each of the watchers has seen them all."""
    with ExitStack() as stack:
        watches = [stack.enter_context(registry.watch("fan")) for _ in range(watchers)]
        etcd = stack.enter_context(closing(Etcd(EtcdConfig(parse_endpoints(endpoint)))))
        ready = threading.Barrier(watchers + 1)

        def see(watch: object) -> None:
            events = iter(watch)  # type: ignore[call-overload]
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


def hold(
    registry: Registry,
    instance: str,
    rank: int,
    world_size: int,
    ttl_s: float = 10.0,
    on_state: OnState | None = None,
) -> Registration:
    return registry.register(
        instance=instance,
        rank=rank,
        world_size=world_size,
        model=MODEL,
        manifest=a_manifest(100),
        session_id="h:1",
        protocol="tcp",
        header_addr=0,
        ttl_s=ttl_s,
        on_state=on_state,
    )


def a_rank(endpoint: str, rank: str) -> None:
    with (
        Registry.connect(endpoint) as registry,
        hold(registry, "mortal", int(rank), 1000) as registration,
    ):
        click.echo(registration.keeper_pid)
        sys.stdin.read()


def deaths(endpoint: str, registry: Registry, kills: int, results: dict[str, float]) -> None:
    """SIGKILL of a rank's process to `RankLost` at a watcher in another one, ranks one after
    another.
    """
    late: list[float] = []
    rss: list[int] = []
    with registry.watch("mortal") as watch:
        for rank in range(kills):
            with another_process("benchmarks.registry", "a_rank", endpoint, str(rank)) as (
                process,
                keeper,
            ):
                _until(watch, RankJoined)
                with open(f"/proc/{keeper}/status") as status:
                    rss.append(
                        next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
                    )
                start = time.perf_counter()
                os.kill(process.pid, signal.SIGKILL)
                _until(watch, RankLost)
                late.append((time.perf_counter() - start) * 1000)
    results["death_to_event_p50_ms"] = percentile(late, 50)
    results["death_to_event_p99_ms"] = percentile(late, 99)
    results["death_to_event_max_ms"] = max(late)
    results["keeper_rss_mb"] = statistics.median(rss) * 1024 / 1e6


def _until(watch: object, kind: type) -> None:
    for event in watch:  # type: ignore[attr-defined]
        if isinstance(event, kind):
            return


def outages(results: dict[str, float]) -> None:
    """Etcd killed for longer than the lease: how long after it answers again the rank is held; a
    watcher's CPU meanwhile.
    """
    took: list[float] = []
    with (
        LocalEtcd() as etcd,
        Registry.connect(etcd.endpoint, timeout_s=30) as registry,
        registry.watch() as watch,
    ):
        thread = threading.Thread(target=lambda: list(watch))
        thread.start()
        reached = {state: threading.Event() for state in RegistrationState}

        def on_state(state: RegistrationState, why: str) -> None:
            reached[state].set()

        with hold(registry, "o", 0, 1, 2.0, on_state) as registration:
            for number in range(5):
                for event in reached.values():
                    event.clear()
                etcd.kill()
                cpu, start = time.process_time(), time.perf_counter()
                reached[RegistrationState.SUSPENDED].wait()
                time.sleep(3)
                results["watcher_cpu_while_etcd_is_away"] = (time.process_time() - cpu) / (
                    time.perf_counter() - start
                )
                if number % 2:
                    etcd.wipe()
                etcd.start()
                took.append(seconds(reached[RegistrationState.REGISTERED].wait))
                registry.resolve("o", 5)
            del registration
        watch.stop()
        thread.join()
    results["back_after_outage_median_s"] = statistics.median(took)
    results["back_after_outage_max_s"] = max(took)


def lose_leaders(kills: int, results: dict[str, float]) -> None:
    """The leader of three members killed again and again: losses that a watcher sees, and how long
    nothing can be written.
    """
    took: list[float] = []
    losses = 0
    with (
        LocalCluster() as cluster,
        Registry.connect(cluster.endpoints, timeout_s=30) as registry,
        ExitStack() as stack,
    ):
        watch = stack.enter_context(registry.watch("k"))
        held = [stack.enter_context(hold(registry, "k", rank, 6, 5.0)) for rank in range(6)]
        _until(watch, InstanceReady)
        for number in range(kills):
            leader = cluster.leader()
            leader.kill()
            start = time.perf_counter()
            held[number % 6].update(version=number)
            while registry.ranks("k")[number % 6].version != number:
                time.sleep(0.01)
            took.append(time.perf_counter() - start)
            leader.start()
        while (event := watch.next(2.0)) is not None:
            losses += isinstance(event, RankLost)
    results[f"ranks_lost_in_{kills}_leader_kills"] = losses
    results["leader_kill_until_written_again_median_s"] = statistics.median(took)
    results["leader_kill_until_written_again_max_s"] = max(took)


def bootstrap_server(ranks: int, results: dict[str, float]) -> None:
    """SGLang's way, as the design page describes it: a loader asks one server for one rank after
    another, over HTTP.
    """
    weights = {f"model.layers.{n // 9}.w{n % 9}": [4096 + n * 65536, 32768, 2] for n in range(100)}
    infos = {rank: ["10.0.0.1:15000", weights] for rank in range(ranks)}

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            rank = int(self.path.rpartition("=")[2])
            body = json.dumps(
                {"rank": rank, "remote_instance_transfer_engine_info": infos[rank]}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with _serving(Server) as port:

        def ask_all() -> None:
            for rank in range(ranks):
                url = f"http://127.0.0.1:{port}/get_transfer_engine_info?rank={rank}"
                with urllib.request.urlopen(url) as answer:
                    json.load(answer)

        results[f"http_server_{ranks}_ranks_s"] = median_s(ask_all, 3)


@contextmanager
def _serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def resolve_with_manifests(registry: Registry, ranks: int, results: dict[str, float]) -> None:
    """What the HTTP server gives: every rank's record and manifest."""

    def all_of_them() -> None:
        for record in registry.resolve("i00"):
            registry.manifest(record)

    results[f"resolve_{ranks}_ranks_and_their_manifests_s"] = median_s(all_of_them, 3)


def measure(
    sizes: Sequence[int], kills: int, leader_kills: int, say: Callable[[str], None]
) -> dict[str, float]:
    results: dict[str, float] = {}
    for ranks in sizes:
        say(f"{ranks} simulated ranks")
        with (
            LocalEtcd() as local,
            Registry.connect(local.endpoint, timeout_s=30) as registry,
            closing(Etcd(EtcdConfig(parse_endpoints(local.endpoint), timeout_s=30))) as etcd,
        ):
            simulated(etcd, ranks, results)
            reads(registry, ranks, results)
            if ranks == 1024:
                resolve_with_manifests(registry, ranks, results)
                bootstrap_server(ranks, results)
    with LocalEtcd() as local, Registry.connect(local.endpoint) as registry:
        say("a fan-out to 16 watchers")
        fan_out(local.endpoint, registry, 16, 256, results)
        say(f"{kills} deaths")
        deaths(local.endpoint, registry, kills, results)
    say("outages")
    outages(results)
    say(f"{leader_kills} leader kills")
    lose_leaders(leader_kills, results)
    return results


@figures.program
@click.option(
    "--ranks",
    default="64,1024,10000",
    show_default=True,
    metavar="N[,N…]",
    help="How many simulated ranks.",
)
@click.option(
    "--kills",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Of processes of ranks.",
)
@click.option(
    "--leader-kills",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Of the leader of three etcds.",
)
def command(ranks: str, kills: int, leader_kills: int, as_json: bool) -> None:
    """The control plane: register, resolve, list, watch, deaths, outages. Takes minutes."""
    figures.report(
        measure(figures.numbers("--ranks", ranks), kills, leader_kills, figures.say), as_json
    )


if __name__ == "__main__":
    main(command, "benchmarks.registry")
