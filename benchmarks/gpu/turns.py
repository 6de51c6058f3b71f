"""The rounds of this process, in which the loads of a set over each protocol take turns with what
else moves the same bytes. Time is taken by `Target` alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from benchmarks.gpu import rivals
from benchmarks.gpu.loads import Place, use
from benchmarks.gpu.phases import functions_of, phases
from benchmarks.gpu.rows import (
    AGAIN,
    AGAIN_DIGESTS,
    FLAT_COPY,
    TURN,
    TURN_DIGESTS,
    Row,
    Target,
    in_turns,
    reads_of,
)
from benchmarks.gpu.sets import allocate, filled
from benchmarks.serving import HOST
from engine_loader import Destination, Engine, LoadOptions, LoadReport, load, open_engine
from engine_loader.options import Verify
from engine_registry import Registry

_PROFILED = 3
# How each is verified, and whether it goes into a Destination.
_WAYS: dict[str, tuple[Verify, bool]] = {
    TURN: ("header", False),
    TURN_DIGESTS: ("digest", False),
    AGAIN: ("header", True),
    AGAIN_DIGESTS: ("digest", True),
}


@dataclass(frozen=True)
class Turns:
    """Rows; the seconds of each step of a load, by protocol and way; and, where that was wanted,
    which functions took the time, by protocol.
    """

    rows: list[Row]
    steps: dict[str, dict[str, float]]
    functions: dict[str, list[str]]


class _Loads:
    """Those over one protocol, in all ways."""

    def __init__(self, registry: Registry, engine: Engine, instance: str, target: Target) -> None:
        self._registry = registry
        self._engine = engine
        self._instance = instance
        self._target = target
        self._destination = Destination(target.tensors)
        self._reports: defaultdict[str, list[LoadReport]] = defaultdict(list)

    def once(self, way: str) -> LoadReport:
        verify, again = _WAYS[way]
        return load(
            self._registry,
            self._engine,
            self._instance,
            rank=0,
            tensors=self._destination if again else self._target.tensors,
            options=LoadOptions(verify=verify),
        )

    def timed(self, way: str) -> float:
        took, report = self._target.time(way, partial(self.once, way))
        self._reports[way].append(report)
        return took

    def reads(self, group: str, way: str, rounds: int) -> Row:
        reports = self._reports[way][-rounds:]
        took = tuple(report.transfer_s for report in reports)
        note = f"{reports[-1].reads} reads"
        return Row(group, reads_of(way), self._target.nbytes, took, note, self._engine.protocol)

    def steps(self, way: str) -> dict[str, float]:
        with phases() as found:
            for _ in range(_PROFILED):
                self._target.time(f"{way}, in steps", lambda: found.call(partial(self.once, way)))
        return found.medians()


def in_this_process(
    registry: Registry,
    src: Place,
    destinations: Sequence[Place],
    naive: str | None,
    rounds: int,
    profiled: bool,
) -> Turns:
    """Of one set.

    Args:
        registry: Where the sources are, one for each destination.
        src: Where torch's copies come from.
        destinations: The same place over several protocols.
        naive: The protocol of the naive calls; None leaves them out.
        rounds: How often each has its turn.
        profiled: Whether the functions are wanted.
    """
    dst = destinations[0]
    use(dst.device)
    target = Target(allocate(dst.layout, dst.device), filled(dst.layout, dst.device), [src.device])
    with ExitStack() as stack:
        loads = {
            one.protocol: _Loads(
                registry,
                stack.enter_context(open_engine(HOST, one.protocol)),
                one.instance,
                target,
            )
            for one in destinations
        }
        actions: dict[tuple[str, str], Callable[[], float]] = {
            (way, protocol): partial(some.timed, way)
            for way in _WAYS
            for protocol, some in loads.items()
        }
        for what, action in stack.enter_context(rivals.copies(src, target)).items():
            actions[what, ""] = action
        for one in destinations:
            if one.protocol == naive:
                calls = stack.enter_context(
                    rivals.naive(registry, one.instance, one.protocol, target)
                )
                actions |= {(what, one.protocol): action for what, action in calls.items()}
        took = in_turns(actions, rounds)
        steps = {
            f"{protocol}, {way}": some.steps(way)
            for protocol, some in loads.items()
            for way in _WAYS
        }
        functions = {
            protocol: functions_of([partial(some.once, TURN)] * _PROFILED, 25)
            for protocol, some in loads.items()
            if profiled
        }
    rows: list[Row] = []
    for (what, protocol), samples in took.items():
        nbytes = min(target.nbytes, rivals.BLOCK_NBYTES) if what == FLAT_COPY else target.nbytes
        rows.append(Row(dst.tensor_set, what, nbytes, tuple(samples), "", protocol))
        if what in _WAYS:
            rows.append(loads[protocol].reads(dst.tensor_set, what, rounds))
    return Turns(rows, steps, functions)
