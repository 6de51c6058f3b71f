"""Ranks that are killed, an etcd that is killed, and a leader of three that is killed."""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from contextlib import ExitStack

from benchmarks.figures import Results, memory_nbytes, percentile, seconds
from benchmarks.processes import another_process
from benchmarks.registry import ranks
from engine_registry import (
    Event,
    InstanceReady,
    RankJoined,
    RankLost,
    RegistrationState,
    Registry,
    Watch,
)
from engine_registry.etcd.local import LocalEtcd
from engine_registry.etcd.local_cluster import LocalCluster


def deaths(endpoint: str, registry: Registry, kills: int, results: Results) -> None:
    """SIGKILL of a rank's process to `RankLost` at a watcher in another one, ranks one after
    another.
    """
    late: list[float] = []
    rss: list[int] = []
    with registry.watch("mortal") as watch:
        for rank in range(kills):
            with another_process(ranks.__name__, "a_rank", endpoint, str(rank)) as (
                process,
                keeper,
            ):
                _until(watch, RankJoined)
                rss.append(memory_nbytes(int(keeper)))
                start = time.perf_counter()
                os.kill(process.pid, signal.SIGKILL)
                _until(watch, RankLost)
                late.append((time.perf_counter() - start) * 1000)
    results["death_to_event_p50_ms"] = percentile(late, 50)
    results["death_to_event_p99_ms"] = percentile(late, 99)
    results["death_to_event_max_ms"] = max(late)
    results["keeper_rss_mb"] = statistics.median(rss) / 1e6


def _until(watch: Watch, kind: type[Event]) -> None:
    for event in watch:
        if isinstance(event, kind):
            return


def outages(results: Results) -> None:
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

        with ranks.hold(registry, "o", 0, 1, 2.0, on_state) as registration:
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


def lose_leaders(kills: int, results: Results) -> None:
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
        held = [stack.enter_context(ranks.hold(registry, "k", rank, 6, 5.0)) for rank in range(6)]
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
