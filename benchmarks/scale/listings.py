"""`Registry.instances()`: a list of all ranks, and what it costs on either side."""

from __future__ import annotations

import time

from benchmarks.figures import seconds
from benchmarks.scale.counts import counting
from benchmarks.scale.figures import Found, Say, Table
from benchmarks.scale.ranks import HOST_RANKS, TIMEOUT_S, Fleet, an_etcd, connected
from benchmarks.scale.sizes import Sizes
from engine_registry import Registry

_ROUNDS = 5


def listings(sizes: Sizes, say: Say) -> Found:
    rows = []
    slowest_s = 0.0
    for world_size in (HOST_RANKS, min(1_000, sizes.listed)):
        say(f"a list of {sizes.listed:,} ranks, in instances of {world_size:,}")
        with (
            an_etcd() as server,
            connected(server) as etcd,
            Registry.connect(server.endpoint, timeout_s=TIMEOUT_S) as registry,
        ):
            Fleet(etcd, "listed", world_size).grow_to(sizes.listed)
            with counting(server) as counted:
                cpu_s = time.process_time()
                # the best: a machine that does other work, too, makes a list no quicker
                took_s = min(seconds(registry.instances) for _ in range(_ROUNDS))
                cpu_s = time.process_time() - cpu_s
            spent = counted.spent
            rows.append(
                (
                    world_size,
                    spent.requests / _ROUNDS,
                    spent.sent_nbytes / 1e6 / _ROUNDS,
                    spent.cpu_s / _ROUNDS * 1e3,
                    cpu_s / _ROUNDS * 1e3,
                    took_s,
                )
            )
            slowest_s = max(slowest_s, took_s)
    columns = (
        "ranks an instance",
        "requests",
        "MB",
        "etcd CPU ms",
        "client CPU ms",
        "seconds, at best",
    )
    table = Table(f"A list of {sizes.listed:,} ranks", columns, rows)
    return Found([table], {"list_s": slowest_s})
