"""What it costs a loader to choose among complete instances: its own CPU, in a whole join.

With boxes, all ranks of an instance together are a source, too.
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.scale.counts import exponent
from benchmarks.scale.figures import Found, Say, Table
from benchmarks.scale.joiners import FLOATS, Joins, join, manifest_of
from benchmarks.scale.ranks import MODEL, Fleet, an_etcd, connected
from benchmarks.scale.sizes import Sizes
from engine_loader import Shard

_WHOLE = {"w": Shard((FLOATS,), (0,))}


def choices(sizes: Sizes, say: Say) -> Found:
    rows = []
    plain, boxes = _joins(None, sizes, say), _joins(_WHOLE, sizes, say)
    for instances, by_rank, with_boxes in zip(sizes.choices, plain, boxes, strict=True):
        costs = (by_rank.cpu_s, with_boxes.cpu_s)
        rows.append((instances, *costs, by_rank.spent.requests, with_boxes.spent.requests))
    fits = [exponent(sizes.choices, [row[column] for row in rows]) for column in (1, 2)]
    table = Table(
        "A choice among I complete instances of the model: CPU of the loader for a whole join",
        ("I", "seconds by rank", "seconds with boxes", "requests by rank", "requests with boxes"),
        rows,
        f"exponents of CPU in I: by rank {fits[0]:.2f}, with boxes {fits[1]:.2f}",
    )
    return Found([table], {"choice_cpu_s": max(rows[-1][1:3])})


def _joins(shards: Mapping[str, Shard] | None, sizes: Sizes, say: Say) -> list[Joins]:
    joined = []
    manifest = manifest_of(shards)
    with an_etcd() as server, connected(server) as etcd:
        fleet = Fleet(etcd, "source", 1, model=MODEL, protocol="in_process", manifest=manifest)
        for instances in sizes.choices:
            say(f"a choice among {instances:,} instances {'with' if shards else 'without'} boxes")
            fleet.grow_to(instances)
            joined.append(join(server, 1, complete=False, shards=shards))
    return joined
