"""A claim of a rank, as its siblings grow in number."""

from __future__ import annotations

from benchmarks.scale.counts import Counts, counting, exponent
from benchmarks.scale.figures import Found, Say, Table
from benchmarks.scale.ranks import Fleet, a_keeper, an_etcd, connected
from benchmarks.scale.sizes import Sizes
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.local import LocalEtcd

_TTL_S = 3_600.0


def claims(sizes: Sizes, say: Say) -> Found:
    spent = []
    with an_etcd() as server, connected(server) as etcd:
        fleet = Fleet(etcd, "instance", max(sizes.siblings) + sizes.claims)
        for siblings in sizes.siblings:
            say(f"claims beside {siblings:,} siblings")
            fleet.grow_to(siblings)
            spent.append(_claims(server, etcd, fleet, sizes.claims))
    ms = [each.cpu_s / sizes.claims * 1e3 for each in spent]
    table = Table(
        "A claim in an instance of W ranks",
        ("W", "requests a claim", "kB a claim", "etcd CPU ms a claim"),
        [
            (siblings, each.requests / sizes.claims, each.sent_nbytes / 1e3 / sizes.claims, cost)
            for siblings, each, cost in zip(sizes.siblings, spent, ms, strict=True)
        ],
        f"exponent of CPU in W {exponent(sizes.siblings, ms):.2f}. "
        f"A claim here is a grant, the keeper's first write and its watch; {sizes.claims} each.",
    )
    return Found([table], {"claim_etcd_ms": ms[-1]})


def _claims(server: LocalEtcd, etcd: Etcd, fleet: Fleet, count: int) -> Counts:
    """The ranks are gone again afterwards."""
    first = len(fleet.written)
    keepers = [
        a_keeper(etcd, *fleet.record(number), _TTL_S) for number in range(first, first + count)
    ]
    with counting(server) as counted:
        for keeper in keepers:
            keeper.register()
    for keeper in keepers:
        keeper.end("withdrawn")
    return counted.spent
