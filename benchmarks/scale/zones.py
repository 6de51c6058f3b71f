"""Joins in several zones: how many of those that begin together read across, and what it costs to
find a near one of many complete ranks.
"""

from __future__ import annotations

from benchmarks.scale.figures import Found, Say, Table
from benchmarks.scale.joiners import a_source, join, manifest_of
from benchmarks.scale.ranks import MODEL, Fleet, an_etcd, connected
from benchmarks.scale.sizes import Sizes
from engine_registry import Location

_ZONES = ("a", "b")
_HERE = "b/r1/n1"
# 4 zones, 40 racks and 400 nodes
_EVERYWHERE = [Location("abcd"[at % 4], f"r{at % 40}", f"n{at}") for at in range(400)]


def at_once(sizes: Sizes, say: Say) -> Found:
    """Half of the joiners are in the zone of the source."""
    joined = []
    for joiners in sizes.joiners:
        say(f"{joiners:,} joins at once in {len(_ZONES)} zones")
        with an_etcd() as server, a_source(server, _ZONES[0]):
            joined.append(join(server, joiners, complete=joiners <= sizes.complete, zones=_ZONES))
    table = Table(
        "Joins at once, half of them in a zone without a source",
        ("N", "read across", "requests a join", "kB a join"),
        [(each.joiners, each.crossings, each.requests_each, each.kb_each) for each in joined],
        "Read across: joiners whose source is in the other zone. One at least is needed.",
    )
    return Found([table], {"zone_crossings": float(max(each.crossings for each in joined))})


def among_instances(sizes: Sizes, say: Say) -> Found:
    """One joiner, which ends before its first byte, in a zone, a rack and on a node with some."""
    rows = []
    with an_etcd() as server, connected(server) as etcd:
        fleet = Fleet(
            *(etcd, "source", 1),
            model=MODEL,
            protocol="in_process",
            manifest=manifest_of(),
            locations=_EVERYWHERE,
        )
        for instances in sizes.instances:
            say(f"a join among {instances:,} complete instances in four zones")
            fleet.grow_to(instances)
            joined = join(server, 1, complete=False, zones=(_HERE,))
            rows.append((instances, joined.crossings, joined.requests_each, joined.kb_each))
    table = Table(
        "A join among I complete instances in 4 zones, 40 racks and 400 nodes",
        ("I", "read across", "requests a join", "kB a join"),
        rows,
        "The first instance is in another zone.",
    )
    return Found([table], {"join_kb_in_zones": max(float(row[3]) for row in rows)})
