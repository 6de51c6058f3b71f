"""What an etcd says of itself: requests, bytes and CPU, from its own /metrics."""

from __future__ import annotations

import math
import re
import statistics
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from benchmarks.figures import cpu_s
from engine_registry.etcd.local import LocalEtcd

_LINE = re.compile(r'grpc_server_msg_(received|sent)_total\{grpc_method="(\w+)".*\} (\S+)')
# A lease is looked at where the answer to its renewal is late.
_RENEWALS = ("LeaseKeepAlive", "LeaseTimeToLive")
_LOOK_S = 0.2  # between two looks at whether etcd is still asked something, and before the first


@dataclass(frozen=True)
class Counts:
    """Since the server has started, or between two looks.

    `messages` are those that it received, by method: of a unary call one is a request, of a watch
    the message that begins it. `watchers`, `sockets` and `memory_nbytes` are of now, or by how much
    they have grown.
    """

    messages: Counter[str]
    watch_answers: int  # messages sent to watches
    events: int  # of keys, in these messages
    sent_nbytes: int
    cpu_s: float
    watchers: int
    sockets: int
    memory_nbytes: int

    @property
    def requests(self) -> int:
        """All but renewals of leases, as their number grows with the time that a join takes."""
        return self.messages.total() - self.renewals

    @property
    def renewals(self) -> int:
        return sum(self.messages[name] for name in _RENEWALS)

    def since(self, before: Counts) -> Counts:
        return Counts(
            Counter(self.messages) - Counter(before.messages),
            self.watch_answers - before.watch_answers,
            self.events - before.events,
            self.sent_nbytes - before.sent_nbytes,
            self.cpu_s - before.cpu_s,
            self.watchers - before.watchers,
            self.sockets - before.sockets,
            self.memory_nbytes - before.memory_nbytes,
        )


def counts_of(server: LocalEtcd) -> Counts:
    with urllib.request.urlopen(f"http://{server.endpoint}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    messages: dict[str, Counter[str]] = {"received": Counter(), "sent": Counter()}
    numbers: dict[str, float] = {}
    for line in text.splitlines():
        if (found := _LINE.fullmatch(line)) is not None:
            messages[found[1]][found[2]] += int(float(found[3]))
        elif not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            numbers[name] = float(value)
    return Counts(
        +messages["received"],
        messages["sent"]["Watch"],
        int(numbers["etcd_debugging_mvcc_events_total"]),
        int(numbers["etcd_network_client_grpc_sent_bytes_total"]),
        numbers["process_cpu_seconds_total"],
        int(numbers["etcd_debugging_mvcc_watcher_total"]),
        int(numbers["process_open_fds"]),
        int(numbers["process_resident_memory_bytes"]),
    )


@dataclass
class Count:
    """What the block of `counting` has cost, once it has ended."""

    spent: Counts = field(init=False)


@contextmanager
def counting(server: LocalEtcd, quiet_within_s: float = 0.0) -> Iterator[Count]:
    """Counts until the block ends; with `quiet_within_s`, until nobody asks anything any more, for
    so long at most.
    """
    count, before = Count(), counts_of(server)
    began_s = cpu_s(server.pid)  # to answer /metrics takes etcd as much CPU as a join does
    yield count
    deadline = time.monotonic() + quiet_within_s
    if quiet_within_s:
        time.sleep(_LOOK_S)
    spent_s = cpu_s(server.pid) - began_s
    after = counts_of(server)
    while time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        last, after = after, counts_of(server)
        if (last.requests, last.watch_answers) == (after.requests, after.watch_answers):
            break
    count.spent = replace(after.since(before), cpu_s=spent_s)


def wait_until(holds: Callable[[], bool], within_s: float) -> None:
    """TimeoutError where it does not hold in time."""
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the benchmark has waited {within_s:.0f} s in vain")
        time.sleep(_LOOK_S)


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """p where y grows as x to the power of p: a line of least squares through the logarithms. NaN
    of less than two points.
    """
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True) if x > 0 and y > 0]
    if len({x for x, _ in points}) < 2:
        return math.nan
    return statistics.linear_regression(*zip(*points, strict=True)).slope
