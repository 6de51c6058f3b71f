"""Sockets of a host of eight ranks to etcd, and how they spread over three members.

The ranks are real processes with real keepers. They serve and have asked etcd nothing for a minute,
or they join and have not read a byte yet, or they wait while another process has the turn to read.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.figures import share_nbytes
from benchmarks.processes import ready, several_processes
from benchmarks.scale.counts import wait_until
from benchmarks.scale.figures import Found, Say, Table
from benchmarks.scale.herds import wait_for_turn
from benchmarks.scale.joiners import FLOATS, load_and_publish, manifest_of, weights
from benchmarks.scale.ranks import HOST_RANKS, MODEL, TIMEOUT_S, Fleet, connected
from benchmarks.scale.seams import Gate, held_by
from benchmarks.scale.sizes import Sizes
from benchmarks.scale.turns import turn_taken
from engine_loader import InProcessEngine, publish
from engine_loader.errors import LoaderError
from engine_registry import Registry
from engine_registry.etcd.local_cluster import LocalCluster

_ESTABLISHED = "01"  # in /proc/net/tcp
_SOCKET = re.compile(r"socket:\[(\d+)\]")
_WITHIN_S = 60.0
_STILL = 10  # looks in succession that find the same
_SERVES, _JOINS, _WAITS = "serves", "joins", "waits"


def sockets(sizes: Sizes, say: Say) -> Found:
    rows = []
    with LocalCluster() as cluster:
        for role in (_SERVES, _JOINS, _WAITS):
            say(f"sockets of {sizes.host_ranks} ranks, each of which {role}")
            after_s = sizes.served_s if role == _SERVES else 0.0
            rows.append((role, *_of_host(cluster, role, sizes.host_ranks, after_s)))
    table = Table(
        f"A host of {sizes.host_ranks} ranks",
        ("each rank", "sockets to etcd", "at each of three members", "keepers", "MB of keepers"),
        rows,
        "The members are in the order in which the ranks are given them. The memory of keepers is "
        "the sum of their shares (PSS).",
    )
    return Found([table], {"sockets_a_host": float(rows[0][1])})


def _of_host(
    cluster: LocalCluster, role: str, count: int, after_s: float
) -> tuple[int, str, int, float]:
    ports = [member.port for member in cluster.members]
    with ExitStack() as stack:
        if role == _JOINS:
            etcd = stack.enter_context(connected(cluster.members[0]))
            source = Fleet(
                etcd, "source", 1, model=MODEL, protocol="in_process", manifest=manifest_of()
            )
            source.grow_to(1)
        elif role == _WAITS:
            stack.enter_context(turn_taken(cluster.members[0].endpoint))
        with several_processes(
            __name__,
            "a_rank",
            [(cluster.endpoints, role, str(rank)) for rank in range(count)],
        ) as started:
            ranks = [process.pid for process, _ in started]
            time.sleep(after_s)
            found = _when_still(ranks, ports)
            keepers = [child for rank in ranks for child in _children(rank)]
            mb = sum(map(share_nbytes, keepers)) / 1e6
        # Their etcd stays until they have ended.
        wait_until(
            lambda: not any(Path(f"/proc/{keeper}").exists() for keeper in keepers), _WITHIN_S
        )
    at_each = " / ".join(str(found[port]) for port in ports)
    return found.total(), at_each, len(keepers), mb


def _when_still(ranks: Sequence[int], ports: Sequence[int]) -> Counter[int]:
    """Sockets of the ranks and their keepers by port, once their number stays."""
    seen: list[Counter[int]] = []

    def still() -> bool:
        pids = [*ranks, *(child for rank in ranks for child in _children(rank))]
        seen.append(_connected(pids, ports))
        return len(seen) >= _STILL and all(each == seen[-1] for each in seen[-_STILL:])

    wait_until(still, _WITHIN_S)
    return seen[-1]


def _connected(pids: Sequence[int], ports: Sequence[int]) -> Counter[int]:
    """The sockets of these processes that are connected to servers with these ports."""
    inodes = {
        inode[1]
        for pid in pids
        for file in Path(f"/proc/{pid}/fd").iterdir()
        if (inode := _SOCKET.fullmatch(os.readlink(file))) is not None
    }
    # gRPC reaches IPv4 through sockets of IPv6
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table.splitlines()[1:]]
    remote = [
        int(line[2].partition(":")[2], 16)
        for line in lines
        if line[3] == _ESTABLISHED and line[9] in inodes
    ]
    return Counter(port for port in remote if port in ports)


def _children(pid: int) -> list[int]:
    """Of a rank: its keepers."""
    return [
        int(child)
        for thread in Path(f"/proc/{pid}/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]


def a_rank(endpoints: str, role: str, rank: str) -> None:
    """Runs in a separate process, until standard input ends."""
    roles: dict[str, Callable[[Registry, str], None]] = {
        _SERVES: _serve,
        _JOINS: _join,
        _WAITS: _wait,
    }
    with Registry.connect(endpoints, timeout_s=TIMEOUT_S) as registry:
        roles[role](registry, rank)


def _serve(registry: Registry, rank: str) -> None:
    with publish(
        registry,
        InProcessEngine(),
        instance="host",
        rank=int(rank),
        world_size=HOST_RANKS,
        tensors=weights(),
        model=MODEL,
    ):
        ready("serves")


def _join(registry: Registry, rank: str) -> None:
    gate, cancel = Gate(1), threading.Event()

    def load() -> None:
        gate.begin()
        try:
            tensors = {"w": torch.zeros(FLOATS)}
            load_and_publish(registry, InProcessEngine(), f"joiner-{rank}", tensors, None, cancel)
        except LoaderError as exc:
            gate.fail(exc)

    thread = threading.Thread(target=load)
    with held_by(gate):
        thread.start()
        gate.wait_for_all(_WITHIN_S)
        ready("joins")
        cancel.set()
        gate.open()
        thread.join()


def _wait(registry: Registry, rank: str) -> None:
    cancel = threading.Event()
    thread = threading.Thread(target=wait_for_turn, args=(registry, f"waiter-{rank}", cancel))
    thread.start()
    ready("waits")
    cancel.set()
    thread.join()
