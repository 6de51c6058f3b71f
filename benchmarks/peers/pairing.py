"""What turns say together: medians of pairs, and sums. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.peers.results import Turn


@dataclass(frozen=True)
class Loads:
    """Of one candidate in one place and set, over all rounds that did not fail.

    Attributes:
        seconds: Median of all loads.
        to_reference: Median of the pairs: its time, divided by that of the reference's load just
            before.
        to_ours: The same, divided by ours of the same round; median of the rounds. None where no
            round has both.
        first_s: Median of the first loads, which open connections.
        source_cpu_s, reader_cpu_s: For each GB, over all loads but the first.
        source_nbytes, reader_nbytes: Of memory, at most.
        wanted_nbytes: What is loaded.
    """

    seconds: float
    to_reference: float
    to_ours: float | None
    first_s: float
    source_cpu_s: float
    reader_cpu_s: float
    source_nbytes: int
    reader_nbytes: int
    wanted_nbytes: int

    @property
    def gb_per_s(self) -> float:
        return self.wanted_nbytes / 1e9 / self.seconds


def loads_of(turns: Iterable[Turn], ours: str) -> dict[str, Loads]:
    """By candidate, of the turns of one place and set; those that only failed are missing."""
    by_candidate: dict[str, list[Turn]] = {}
    for turn in turns:
        if turn.found:
            by_candidate.setdefault(turn.candidate, []).append(turn)
    base = _ratios(by_candidate.get(ours, []))
    return {name: _loads(some, base) for name, some in by_candidate.items()}


def _loads(turns: Sequence[Turn], base: Mapping[int, float]) -> Loads:
    loads = [load for turn in turns for load in turn.found["loads"]]
    gigabytes = turns[0].nbytes * len(loads) / 1e9
    ratios = _ratios(turns)
    to_ours = [ratio / base[number] for number, ratio in ratios.items() if number in base]
    return Loads(
        seconds=statistics.median(load["seconds"] for load in loads),
        to_reference=statistics.median(load["seconds"] / load["reference_s"] for load in loads),
        to_ours=statistics.median(to_ours) if to_ours else None,
        first_s=statistics.median(turn.found["first_s"] for turn in turns),
        source_cpu_s=sum(load["source_cpu_s"] for load in loads) / gigabytes,
        reader_cpu_s=sum(load["reader_cpu_s"] for load in loads) / gigabytes,
        source_nbytes=max(turn.found["memory"]["source"] for turn in turns),
        reader_nbytes=max(turn.found["memory"]["reader"] for turn in turns),
        wanted_nbytes=turns[0].nbytes,
    )


def _ratios(turns: Iterable[Turn]) -> dict[int, float]:
    """By round: the median of its pairs."""
    return {
        turn.number: statistics.median(
            load["seconds"] / load["reference_s"] for load in turn.found["loads"]
        )
        for turn in turns
    }
