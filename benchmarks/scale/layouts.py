"""Loads of another layout: how many manifests a loader reads, as the ranks of its source grow.

The source is records without memory, so loads end before their first byte.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.scale.counts import Counts, counting, exponent
from benchmarks.scale.figures import Found, Say, Table
from benchmarks.scale.joiners import FLOATS, manifest_of
from benchmarks.scale.ranks import MODEL, TIMEOUT_S, a_record, an_etcd, connected
from benchmarks.scale.seams import Gate, held_by
from benchmarks.scale.sizes import Sizes
from engine_loader import Engine, InProcessEngine, LoadOptions, Shard, limit_caches, load, load_full
from engine_loader.errors import LoaderError
from engine_registry import Registry
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.local import LocalEtcd
from engine_registry.registration.writes import claim
from engine_registry.schema import manifest_format as manifests

_WITHIN_S = 120.0
_TTL_S = 3_600.0
_SOURCE = "source-000000"


def layouts(sizes: Sizes, say: Say) -> Found:
    rows = []
    for ranks in sizes.layout_ranks:
        say(f"loads of another layout than {ranks} ranks")
        with an_etcd() as server, connected(server) as etcd:
            _register(etcd, ranks)
            halved = _spent(server, partial(_load_half, ranks))
            whole = _spent(server, _load_full)
        rows.append(
            (
                ranks,
                halved.requests,
                halved.sent_nbytes / 1e3,
                halved.requests * ranks // 2,
                whole.requests,
                whole.sent_nbytes / 1e3,
            )
        )
    fits = [exponent(sizes.layout_ranks, [row[column] for row in rows]) for column in (1, 3, 4)]
    table = Table(
        "Loads from W ranks: into one of W/2, and of everything (`load_full`)",
        (
            "W",
            "requests of one of W/2",
            "its kB",
            "requests of all W/2",
            "requests of load_full",
            "its kB",
        ),
        rows,
        "exponents in W of requests: one of W/2 {:.2f}, all of them {:.2f}, load_full {:.2f}. "
        "A request brings 32 parts of manifests; each has one here.".format(*fits),
    )
    return Found([table], {"reshard_requests": float(rows[-1][1])})


def _register(etcd: Etcd, ranks: int) -> None:
    """Each has an equal part of the one tensor."""
    lease_id = etcd.grant(_TTL_S)
    for rank in range(ranks):
        floats = FLOATS // ranks
        ref, parts = manifests.encode(
            manifest_of({"w": Shard((FLOATS,), (rank * floats,))}, floats)
        )
        record = a_record(
            ref, rank, prefix="source", world_size=ranks, model=MODEL, protocol="in_process"
        )
        claim(etcd, record, parts, lease_id)


Load = Callable[[Registry, Engine, LoadOptions], object]


def _spent(server: LocalEtcd, run: Load) -> Counts:
    """Until the first byte would move, in a process that has loaded nothing before."""
    limit_caches(manifest_tensors=0)
    limit_caches()
    gate, cancel = Gate(1), threading.Event()

    def held() -> None:
        gate.begin()
        try:
            run(registry, InProcessEngine(), LoadOptions(cancel=cancel))
        except LoaderError as exc:
            gate.fail(exc)

    with held_by(gate), Registry.connect(server.endpoint, timeout_s=TIMEOUT_S) as registry:
        thread = threading.Thread(target=held)
        with counting(server, _WITHIN_S) as counted:
            thread.start()
            gate.wait_for_all(_WITHIN_S)
        cancel.set()
        gate.open()
        thread.join()
    return counted.spent


def _load_half(ranks: int, registry: Registry, engine: Engine, options: LoadOptions) -> None:
    """The first of half as many ranks."""
    tensors = {"w": torch.zeros(FLOATS // (ranks // 2))}
    shards = {"w": Shard((FLOATS,), (0,))}
    load(registry, engine, _SOURCE, tensors=tensors, shards=shards, options=options)


def _load_full(registry: Registry, engine: Engine, options: LoadOptions) -> None:
    load_full(registry, engine, _SOURCE, options=options)
