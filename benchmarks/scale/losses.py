"""How soon a watcher sees that the process of a rank has died. See `benchmarks.registry`."""

from __future__ import annotations

from benchmarks.figures import Results
from benchmarks.registry.faults import deaths
from benchmarks.scale.figures import Found, Say, Table
from benchmarks.scale.ranks import an_etcd
from benchmarks.scale.sizes import Sizes
from engine_registry import Registry


def losses(sizes: Sizes, say: Say) -> Found:
    say(f"{sizes.deaths} deaths")
    results: Results = {}
    with an_etcd() as server, Registry.connect(server.endpoint) as registry:
        deaths(server.endpoint, registry, sizes.deaths, results)
    columns = ("p50 ms", "p99 ms", "most ms", "MB of a keeper")
    names = [
        *(f"death_to_event_{which}_ms" for which in ("p50", "p99", "max")),
        "keeper_rss_mb",
    ]
    table = Table(
        f"The process of a rank dies, and a watcher has the event: {sizes.deaths} times",
        columns,
        [[results[name] for name in names]],
    )
    return Found([table], {"loss_p50_ms": results[names[0]], "loss_p99_ms": results[names[1]]})
