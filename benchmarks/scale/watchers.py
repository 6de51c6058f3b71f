"""What a watcher of one large instance pays when one rank of it is replaced by another process."""

from __future__ import annotations

import sys
import threading

import click

from benchmarks.figures import cpu_s
from benchmarks.processes import another_process, answer
from benchmarks.scale.counts import counting, exponent
from benchmarks.scale.figures import Found, Say, Table
from benchmarks.scale.ranks import TIMEOUT_S, Fleet, an_etcd, connected
from benchmarks.scale.sizes import Sizes
from engine_registry import RankJoined, RankLost, Registry
from engine_registry.registration.writes import DIED, remove


def watchers(sizes: Sizes, say: Say) -> Found:
    rows = []
    for ranks in sizes.watched:
        say(f"a watcher of {ranks:,} ranks")
        rows.append((ranks, *_replace(ranks, sizes.replaced)))
    costs = [row[1] for row in rows]
    table = Table(
        f"A watcher of W ranks of one instance; {sizes.replaced} of them replaced, one by one",
        ("W", "watcher CPU ms", "etcd CPU ms", "events", "kB sent by etcd"),
        rows,
        f"each for one replacement; exponent of the watcher's CPU in W "
        f"{exponent(sizes.watched, costs):.2f}",
    )
    return Found([table], {"watcher_ms": costs[-1]})


def _replace(ranks: int, count: int) -> tuple[float, float, float, float]:
    """Each for one replacement."""
    with an_etcd() as server, connected(server) as etcd:
        fleet = Fleet(etcd, "watched", ranks)
        fleet.grow_to(ranks)
        with another_process(__name__, "watch", server.endpoint, str(ranks)) as (watcher, _):
            with counting(server) as counted:
                before_s = cpu_s(watcher.pid)
                for number in range(count):
                    # one after another, so that the instance is degraded in between
                    remove(etcd, fleet.written[number % ranks][0], DIED)
                    answer(watcher, "the watcher")
                    fleet.write(number % ranks)
                    answer(watcher, "the watcher")
                spent_s = cpu_s(watcher.pid) - before_s
        spent = counted.spent
        return (
            spent_s / count * 1e3,
            spent.cpu_s / count * 1e3,
            spent.events / count,
            spent.sent_nbytes / count / 1e3,
        )


def watch(endpoint: str, ranks: str) -> None:
    """Runs in a separate process, until standard input ends: prints a line when it has seen all
    ranks, and one for each that is lost or joins later.
    """
    with Registry.connect(endpoint, timeout_s=TIMEOUT_S) as registry, registry.watch() as events:

        def stop() -> None:
            sys.stdin.read()
            events.stop()

        threading.Thread(target=stop, daemon=True).start()
        joined = 0
        for event in events:
            joined += isinstance(event, RankJoined)
            if isinstance(event, RankJoined | RankLost) and joined >= int(ranks):
                click.echo(type(event).__name__)
