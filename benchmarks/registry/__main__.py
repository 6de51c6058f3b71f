"""`python -m benchmarks.registry`: figures of the control plane, in one run on one machine.

Simulated ranks are registrations without processes (one lease each); the deaths are
real processes with real keepers that are really killed. Beside it, the way of SGLang's bootstrap
server: one process with a dict behind HTTP, one GET a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

import click

from benchmarks import figures, options
from benchmarks.figures import Results
from benchmarks.registry.faults import deaths, lose_leaders, outages
from benchmarks.registry.manifests import bootstrap, resolve_with_manifests
from benchmarks.registry.simulated import fan_out, reads, simulated
from engine_cli.main import main
from engine_registry import Registry
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd


def measure(
    sizes: Sequence[int], kills: int, leader_kills: int, say: Callable[[str], None]
) -> Results:
    results: Results = {}
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
                bootstrap(ranks, results)
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


@options.program
@options.numbers("--ranks", default="64,1024,10000", help="How many simulated ranks.")
@options.option("--kills", type=click.IntRange(1), default=100, help="Of processes of ranks.")
@options.option(
    "--leader-kills", type=click.IntRange(1), default=20, help="Of the leader of three etcds."
)
def command(ranks: str, kills: int, leader_kills: int, as_json: bool) -> None:
    """The control plane: register, resolve, list, watch, deaths, outages. Takes minutes."""
    sizes = options.list_of("--ranks", ranks)
    figures.report(measure(sizes, kills, leader_kills, figures.say), as_json)


if __name__ == "__main__":
    main(command, "benchmarks.registry")
