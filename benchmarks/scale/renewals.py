"""Renewals of leases, as the product's keepers make them: one for each rank every third of the TTL.
Each keeper watches its key meanwhile.

Each keeper has a connection, as each is a process in life; beside it, all keepers share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from benchmarks.figures import cpu_s
from benchmarks.scale.counts import counts_of
from benchmarks.scale.figures import Found, Say, Table
from benchmarks.scale.ranks import Fleet, a_keeper, an_etcd, connected
from benchmarks.scale.sizes import Sizes
from engine_registry.etcd.local import LocalEtcd
from engine_registry.etcd.local_cluster import LocalCluster
from engine_registry.registration.keeper.holder import Keeper

_THREADS = 4
_TTL_S = 3_600.0


def renewals(sizes: Sizes, say: Say) -> Found:
    rows = []
    with an_etcd() as server:
        say("renewals over a connection for each rank")
        own = _renew([server], server, sizes, connections=sizes.kept)
        rows.append(("one member", "each rank", *own))
        say("renewals over one connection")
        rows.append(("one member", "all ranks", *_renew([server], server, sizes, connections=1)))
    with LocalCluster() as cluster:
        say("renewals of three members")
        leader = cluster.leader()
        follower = next(member for member in cluster.members if member is not leader)
        for name, member in (("leader of three", leader), ("follower of three", follower)):
            cost = _renew(cluster.members, member, sizes, connections=sizes.kept)
            rows.append((name, "each rank", *cost))
    table = Table(
        f"A renewal of one rank ({sizes.kept} ranks, {sizes.beats} renewals each)",
        ("asked", "a connection for", "etcd CPU ms of all members", "messages to etcd"),
        rows,
        "With a TTL of 10 s, a rank renews every 3.3 s: 1 ms each is 3 cores for 10,000 ranks. "
        "Once a minute a keeper reads its key, too, which is not among these.",
    )
    return Found([table], {"renewal_etcd_ms": own[0]})


def _renew(
    members: Sequence[LocalEtcd], asked: LocalEtcd, sizes: Sizes, *, connections: int
) -> tuple[float, float]:
    """For one renewal: CPU of all members, in ms, and what clients have sent them."""
    with ExitStack() as stack:
        etcds = [stack.enter_context(connected(asked)) for _ in range(connections)]
        fleet = Fleet(etcds[0], "kept", sizes.kept)
        keepers = [
            a_keeper(etcds[number % connections], *fleet.record(number), _TTL_S)
            for number in range(sizes.kept)
        ]
        with ThreadPoolExecutor(_THREADS) as pool:
            for keeper in keepers:
                keeper.register()
            list(pool.map(Keeper.beat, keepers))  # opens the streams, and reads the keys
            before = sum(counts_of(member).messages.total() for member in members)
            before_s = sum(cpu_s(member.pid) for member in members)
            for _ in range(sizes.beats):
                list(pool.map(Keeper.beat, keepers))
            spent_s = sum(cpu_s(member.pid) for member in members) - before_s
            sent = sum(counts_of(member).messages.total() for member in members) - before
        for keeper in keepers:
            keeper.end("withdrawn")
    renewed = sizes.kept * sizes.beats
    return spent_s / renewed * 1e3, sent / renewed
