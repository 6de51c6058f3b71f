"""What hosts of eight ranks cost, with a process for each keeper and with one process for all: the
figures of "One keeper for each rank" in docs/explanation/scale.md.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from pathlib import Path

import click

from benchmarks.figures import memory_nbytes, share_nbytes
from benchmarks.processes import ready, several_processes
from benchmarks.scale.ranks import HOST_RANKS, Fleet, a_keeper, an_etcd, connected
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.registration.keeper.holder import Keeper

TTL_S = 3_600.0
WARM_UP = 4_000  # requests, so that etcd has taken what it takes for itself
BEAT_S = 10 / 3  # with the usual TTL
WATCHED_S = 20.0


def hosts(number: int) -> None:
    """Memory of etcd for so many hosts; then memory and CPU of the keepers of one.

    All keepers of the first part share this process, which bears some hundreds.
    """
    click.echo(f"\n{number} hosts of {HOST_RANKS} ranks: etcd's memory for each host")
    for name, connections in (
        ("keys alone", 0),
        ("and a connection for each keeper", HOST_RANKS),
        ("and one connection for all keepers", 1),
    ):
        click.echo(f"  {name}: {_etcd_nbytes(number, connections) / number / 1e3:,.0f} kB")
    click.echo(f"\nThe keepers of a host of {HOST_RANKS} ranks")
    for name, keepers in (("in a process each", 1), ("in one process", HOST_RANKS)):
        nbytes, start_s, cpu = _processes(HOST_RANKS // keepers, keepers)
        click.echo(
            f"  {name}: {nbytes / 1e6:,.0f} MB (PSS), {start_s:.2f} s of CPU to start, "
            f"{cpu:.1%} of a core afterwards"
        )


def _etcd_nbytes(number: int, connections: int) -> int:
    """By how much etcd has grown; a host without connections has keys and leases alone."""
    with an_etcd() as server, ExitStack() as stack:
        first = stack.enter_context(connected(server))
        fleet = Fleet(first, "host", HOST_RANKS)
        for _ in range(WARM_UP):
            first.get("/engines/x/0")
        before = memory_nbytes(server.pid)
        for host in range(number):
            etcds = [stack.enter_context(connected(server)) for _ in range(connections)]
            ranks = range(host * HOST_RANKS, (host + 1) * HOST_RANKS)
            if etcds:
                _keep(fleet, ranks, etcds)
            else:
                for _ in ranks:
                    first.grant(TTL_S)
                fleet.grow_to(ranks.stop)
        return memory_nbytes(server.pid) - before


def _keep(fleet: Fleet, ranks: range, etcds: list[Etcd]) -> list[Keeper]:
    """Registers the ranks, and renews their leases once."""
    keepers = [a_keeper(etcds[rank % len(etcds)], *fleet.record(rank), TTL_S) for rank in ranks]
    for keeper in keepers:
        keeper.register()
        keeper.beat()
    return keepers


def _processes(number: int, keepers: int) -> tuple[int, float, float]:
    """Memory of so many processes with so many keepers each, the CPU that they took to start, and
    how much of a core they take while all is well.
    """
    with an_etcd() as server:
        given = [(server.endpoint, f"host-{each}", str(keepers)) for each in range(number)]
        with several_processes(__name__, "keep", given) as started:
            pids = [process.pid for process, _ in started]
            start_s = _cpu_s(pids)
            time.sleep(WATCHED_S)
            cpu = (_cpu_s(pids) - start_s) / WATCHED_S
            return sum(map(share_nbytes, pids)), start_s, cpu


def keep(endpoint: str, prefix: str, keepers: str) -> None:
    """Runs in a separate process, until standard input ends."""
    etcd = Etcd(EtcdConfig(parse_endpoints(endpoint)))
    fleet = Fleet(etcd, prefix, HOST_RANKS)
    threading.Thread(
        target=_beat, args=(_keep(fleet, range(int(keepers)), [etcd]),), daemon=True
    ).start()
    ready("keeps")


def _beat(keepers: list[Keeper]) -> None:
    while True:
        time.sleep(BEAT_S)
        for keeper in keepers:
            keeper.beat()


def _cpu_s(pids: list[int]) -> float:
    """Of all threads, more exactly than in ticks."""
    tasks = [task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
