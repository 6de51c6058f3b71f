"""What a connection costs etcd, and a stream of renewals and a watch over it: memory for each.

A client with both takes four threads of this process. Two thousand of them wait so long for one
interpreter that answers come too late, so there is a limit. What each costs does not depend on the
number.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import click

from benchmarks.figures import memory_nbytes
from benchmarks.scale.counts import counts_of, wait_until
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd
from engine_registry.etcd.watch import WatchStream

MOST = 500
THREADS = 8
TIMEOUT_S = 300.0  # hundreds of threads share one interpreter
TTL_S = 3_600  # nothing here renews in the background
WARM_UP = 5_000  # requests, so that etcd has taken what it takes for itself


def connections(number: int) -> None:
    """Opened one kind after another, each `number` times; all stay open."""
    if number > MOST:
        raise SystemExit(f"one process stands for {MOST} clients at most")
    with LocalEtcd() as server, ExitStack() as stack:
        config = EtcdConfig(parse_endpoints(server.endpoint), timeout_s=TIMEOUT_S)
        etcds = [stack.enter_context(closing(Etcd(config))) for _ in range(number)]
        lease_id = etcds[0].grant(TTL_S)
        for _ in range(WARM_UP):
            etcds[0].get("/engines/x/0")

        def watch(etcd: Etcd) -> WatchStream:
            stream = etcd.watch("/engines/x/0", 1, exact=True)
            stack.callback(stream.cancel)
            return stream

        kinds: dict[str, Callable[[Etcd], object]] = {
            "connection": lambda etcd: etcd.get("/engines/x/0"),
            "stream of renewals": lambda etcd: etcd.keep_alive(lease_id),
            "watch": watch,
        }
        click.echo(f"\n{number:,} clients: etcd's memory for each")
        for kind, open_one in kinds.items():
            before = memory_nbytes(server.pid)
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(open_one, etcds))
            if kind == "watch":
                wait_until(lambda: counts_of(server).watchers >= number, TIMEOUT_S)
            each = (memory_nbytes(server.pid) - before) / number
            click.echo(f"  {kind}: {each / 1e3:,.0f} kB")
