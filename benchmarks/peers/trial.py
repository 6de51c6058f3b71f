"""A candidate that runs: its service, its source and its reader, and what a load takes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from benchmarks.peers.candidates import CANDIDATES
from benchmarks.peers.sets import TensorSet
from benchmarks.peers.side import READER, SERVICE, SOURCE
from benchmarks.peers.sides import Side, SideFailed, send
from benchmarks.peers.work import Facts

START_S = 120.0
LOAD_S = 120.0
_LOOK_S = 0.02


@dataclass(frozen=True)
class Spot:
    """Where a side runs. `within`: the `command` of a Host."""

    address: str = "127.0.0.1"
    within: Callable[..., list[str]] | None = None


@dataclass(frozen=True)
class Place:
    """Where the three sides run."""

    service: Spot = Spot()
    source: Spot = Spot()
    reader: Spot = Spot()


@dataclass(frozen=True)
class Sample:
    """One load: seconds, and the CPU seconds that each side took meanwhile. The service's are
    the source's.
    """

    seconds: float
    source_cpu_s: float
    reader_cpu_s: float


@dataclass(frozen=True)
class Trial:
    """`started_s`: from the start of the processes until the reader could load."""

    sides: dict[str, Side]
    started_s: float

    @property
    def reader(self) -> Side:
        return self.sides[READER]

    def load(self) -> Sample:
        """SideFailed if it fails or brings one wrong byte."""
        self._prepare()
        before = self.cpu_s()
        seconds = self._load()
        took = {role: after_s - before[role] for role, after_s in self.cpu_s().items()}
        self._check()
        return Sample(seconds, took[SOURCE] + took.get(SERVICE, 0.0), took[READER])

    def memory_of_load(self) -> dict[str, int]:
        """Bytes that each side has at most during a load, which is not timed. The service's are
        the source's.
        """
        self._prepare()
        sources = [one for role, one in self.sides.items() if role != READER]
        most = {SOURCE: 0, READER: 0}
        done = threading.Event()

        def look() -> None:
            while True:
                most[SOURCE] = max(most[SOURCE], sum(one.memory_nbytes() for one in sources))
                most[READER] = max(most[READER], self.reader.memory_nbytes())
                if done.wait(_LOOK_S):
                    return

        thread = threading.Thread(target=look)
        thread.start()
        try:
            self._load()
        finally:
            done.set()
            thread.join()
        self._check()
        return most

    def killed_after(self, seconds: float, limit_s: float) -> tuple[float, SideFailed | None]:
        """Kills the source so long after a load has begun. Seconds from then to the reader's error,
        and the error: none if the load has ended before it.
        """
        self._prepare()
        victims = self.sides[SOURCE].pids()
        self.reader.order(load=True)
        time.sleep(seconds)
        killed = time.monotonic()
        send(victims, signal.SIGKILL)
        try:
            self.reader.answer(limit_s)
        except SideFailed as exc:
            return time.monotonic() - killed, exc
        return time.monotonic() - killed, None

    def cpu_s(self) -> dict[str, float]:
        """Of each side until now."""
        return {role: one.cpu_s() for role, one in self.sides.items()}

    def pause(self) -> None:
        for one in reversed(self.sides.values()):
            one.pause()

    def go_on(self) -> None:
        for one in self.sides.values():
            one.go_on()

    def _prepare(self) -> None:
        self.reader.order(prepare=True)
        self.reader.answer(LOAD_S)

    def _load(self) -> float:
        self.reader.order(load=True)
        return float(self.reader.answer(LOAD_S)["seconds"])

    def _check(self) -> None:
        self.reader.order(check=True)
        wrong = self.reader.answer(LOAD_S)["wrong"]
        if wrong:
            raise SideFailed("wrong bytes", f"in {wrong} tensors")


@contextmanager
def running(name: str, tensor_set: TensorSet, place: Place) -> Iterator[Trial]:
    """SideFailed if a side of it cannot start."""
    candidate = CANDIDATES[name]
    spots = {SOURCE: place.source, READER: place.reader}
    if candidate.service:
        spots = {SERVICE: place.service, **spots}
    began, facts = time.monotonic(), Facts()
    with ExitStack() as stack:
        # All of them import at the same time.
        sides = {
            role: stack.enter_context(Side(candidate, role, spot.within))
            for role, spot in spots.items()
        }
        for role, one in sides.items():
            one.answer(START_S)
            one.order(
                variant=candidate.variant,
                host=spots[role].address,
                folder=one.folder,
                facts=facts,
                sizes=list(tensor_set.sizes),
                joined=tensor_set.joined,
            )
            facts |= one.answer(START_S).get("facts", {})
        yield Trial(sides, time.monotonic() - began)
