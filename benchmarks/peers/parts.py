"""The parts of the benchmark. Each takes turns: in a round, each candidate runs once, alone, in
another order every round.

Alone means that no process of another candidate lives, but for the reference: the plain socket,
whose two processes sleep until they are asked. While the reference loads, the processes of the
candidate are stopped, as one that polls would slow it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

from benchmarks.hosts import Network
from benchmarks.peers.candidates import CANDIDATES, REFERENCE
from benchmarks.peers.results import Found, PartResults, Turn
from benchmarks.peers.sets import TensorSet
from benchmarks.peers.sides import SideFailed
from benchmarks.peers.trial import Place, Spot, Trial, running
from benchmarks.peers.weights import SETS, for_links

Say = Callable[[str], None]
LOOPBACK, KILLED_SET, IDLE_SET, LINK_SET = "loopback", "blocks", "checkpoint", "links"
_ERROR_WITHIN_S = 60.0
_KILL_AT = (0.5, 0.25, 0.1)  # of the time of a load, one after the other if it has ended before
_SETTLE_S, _IDLE_S = 1.0, 5.0


class ReferenceFailed(Exception):
    """The plain socket has failed, so nothing can be compared with it."""


@dataclass(frozen=True)
class Link:
    """Between the hosts: Mbit/s each way, and ms from one host to the other and back."""

    mbit: float
    delay_ms: float = 0.0


LINKS = {
    "1 Gbit/s": Link(1_000),
    "10 Gbit/s": Link(10_000),
    "1 Gbit/s and 20 ms": Link(1_000, 20.0),
    "10 Gbit/s and 20 ms": Link(10_000, 20.0),
}


@dataclass(frozen=True)
class Extent:
    """How much is measured. `pairs`: of a load and one of the reference, in each turn."""

    candidates: Sequence[str]
    sets: Sequence[str]
    links: Sequence[str]
    rounds: int
    pairs: int = 3
    scale: float = 1.0

    def has(self, turn: Turn) -> bool:
        chosen = turn.tensor_set in self.sets or turn.place in self.links
        return chosen and turn.candidate in self.candidates


def loopback(extent: Extent, results: PartResults, say: Say) -> None:
    for name in extent.sets:
        tensor_set = SETS[name](extent.scale)
        _Series(extent, results, say, LOOPBACK, name, tensor_set).against_reference(Place())


def hosts(extent: Extent, results: PartResults, say: Say) -> None:
    """HostsUnavailable where none can be made."""
    tensor_set = for_links(extent.scale)
    names = [name for name in extent.candidates if not CANDIDATES[name].within_host]
    extent = replace(extent, candidates=names)
    for name in extent.links:
        series = _Series(extent, results, say, name, LINK_SET, tensor_set)
        if series.pending():
            with _linked(LINKS[name]) as place:
                series.against_reference(place)


def kills(extent: Extent, results: PartResults, say: Say) -> None:
    tensor_set = SETS[KILLED_SET](extent.scale)

    def kill(name: str) -> Found:
        for at in _KILL_AT:
            with running(name, tensor_set, Place()) as trial:
                trial.load()
                seconds, error = trial.killed_after(at * trial.load().seconds, _ERROR_WITHIN_S)
            if error is not None:
                return {"seconds": seconds, "type": error.kind, "message": error.message}
        return {"finished": True}

    _Series(extent, results, say, LOOPBACK, KILLED_SET, tensor_set).each(kill)


def idle(extent: Extent, results: PartResults, say: Say) -> None:
    tensor_set = SETS[IDLE_SET](extent.scale)

    def rest(name: str) -> Found:
        with running(name, tensor_set, Place()) as trial:
            trial.load()
            time.sleep(_SETTLE_S)
            before, began = trial.cpu_s(), time.monotonic()
            time.sleep(_IDLE_S)
            after, seconds = trial.cpu_s(), time.monotonic() - began
        return {"shares": {role: (after[role] - before[role]) / seconds for role in after}}

    _Series(extent, results, say, LOOPBACK, IDLE_SET, tensor_set).each(rest)


PARTS: dict[str, Callable[[Extent, PartResults, Say], None]] = {
    "loopback": loopback,
    "hosts": hosts,
    "kills": kills,
    "idle": idle,
}
ROUNDS = {"loopback": 7, "hosts": 3, "kills": 5, "idle": 3}


@dataclass(frozen=True)
class _Series:
    """The turns of one set at one place."""

    extent: Extent
    results: PartResults
    say: Say
    place: str
    tensor_set: str
    tensors: TensorSet

    def pending(self) -> list[tuple[int, str]]:
        """Rounds and candidates that have had no turn yet, in order."""
        names = list(self.extent.candidates)
        turns = [
            (number, name)
            for number in range(self.extent.rounds)
            for name in rotated(names, number)
        ]
        return [
            (number, name)
            for number, name in turns
            if not self.results.has((self.place, self.tensor_set, number, name))
        ]

    def each(self, action: Callable[[str], Found]) -> None:
        for number, name in self.pending():
            found, error = Found(), {}
            try:
                found = action(name)
            except SideFailed as exc:
                error = {"type": exc.kind, "message": exc.message}
            count, nbytes = len(self.tensors.sizes), self.tensors.nbytes
            self.results.add(
                Turn(self.place, self.tensor_set, number, name, count, nbytes, found, error)
            )
            self.say(f"{self.place}, {self.tensor_set}, round {number + 1}: {name} {error or ''}")

    def against_reference(self, place: Place) -> None:
        if not self.pending():
            return
        with running(REFERENCE, self.tensors, place) as reference:
            reference.load()

            def compare(name: str) -> Found:
                with running(name, self.tensors, place) as trial:
                    return _compared(trial, reference, self.extent.pairs)

            self.each(compare)


def _compared(trial: Trial, reference: Trial, pairs: int) -> Found:
    first = trial.load()
    loads = []
    for _ in range(pairs):
        trial.pause()
        reference_s = _reference_s(reference)
        trial.go_on()
        loads.append({"reference_s": reference_s, **asdict(trial.load())})
    return {
        "started_s": trial.started_s,
        "first_s": first.seconds,
        "loads": loads,
        "memory": trial.memory_of_load(),
    }


def _reference_s(reference: Trial) -> float:
    try:
        return reference.load().seconds
    except SideFailed as exc:
        raise ReferenceFailed(f"the plain socket has failed ({exc}): run it again") from exc


def rotated(names: Sequence[str], number: int) -> list[str]:
    at = number % len(names)
    return [*names[at:], *names[:at]]


@contextmanager
def _linked(link: Link) -> Iterator[Place]:
    with Network() as network:
        made = [
            network.host("control"),
            network.host("source", link.mbit, link.delay_ms),
            network.host("reader", link.mbit),
        ]
        yield Place(*(Spot(host.address, host.command) for host in made))
