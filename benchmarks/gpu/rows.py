"""What is reported: rows of times.

A time comes out of `Target.time` alone, which looks at every byte first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from benchmarks.gpu.sets import Tensors, flat_bytes
from engine_loader.errors import DigestMismatch, listed
from engine_loader.tensors.cuda import wait_for

T = TypeVar("T")
_POISON = 0xA5


@dataclass(frozen=True)
class Row:
    """`samples_s`: in the order in which they were taken; none where it was not run, and `note`
    says why.
    """

    group: str
    what: str
    nbytes: int = 0
    samples_s: tuple[float, ...] = ()
    note: str = ""

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples_s)

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / 1e9 / self.median_s

    def as_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "group": self.group,
            "what": self.what,
            "nbytes": self.nbytes,
            "note": self.note,
        }
        if self.samples_s:
            document |= {
                "median_s": round(self.median_s, 6),
                "min_s": round(min(self.samples_s), 6),
            }
            document |= {
                "max_s": round(max(self.samples_s), 6),
                "gb_per_s": round(self.gb_per_s, 3),
            }
            document["samples_s"] = [round(one, 6) for one in self.samples_s]
        return document

    def cells(self) -> list[str]:
        if not self.samples_s:
            return [self.group, self.what, "", "", "", "", "", self.note]
        times = [
            f"{1e3 * one:.2f}" for one in (self.median_s, min(self.samples_s), max(self.samples_s))
        ]
        speed = f"{self.gb_per_s:.1f}" if self.nbytes else ""
        return [self.group, self.what, *times, speed, str(len(self.samples_s)), self.note]


COLUMNS = ("SET", "WHAT", "MEDIAN ms", "MIN ms", "MAX ms", "GB/s", "RUNS", "NOTE")


class Target:
    """Tensors to be filled, and what they hold then, on the same device.

    `others`: devices that take part.
    """

    def __init__(self, tensors: Tensors, wanted: Tensors, others: Iterable[str] = ()) -> None:
        self.tensors = tensors
        self._flat = flat_bytes(tensors)
        self._wanted = flat_bytes(wanted)
        self._devices = [
            *{tensor.device for tensor in tensors.values()},
            *map(torch.device, others),
        ]

    @property
    def nbytes(self) -> int:
        return sum(flat.numel() for flat in self._wanted.values())

    def time(self, what: str, fill: Callable[[], T]) -> tuple[float, T]:
        """How long it takes until the bytes are there, for the device too, and what `fill` returns.
        Poisons them before.

        DigestMismatch if one byte is not as it should be.
        """
        for flat in self._flat.values():
            flat.fill_(_POISON)
        return self._timed(what, fill, lambda _: self._flat)

    def time_new(self, what: str, make: Callable[[], Mapping[str, torch.Tensor]]) -> float:
        """Of an action that makes its tensors."""
        return self._timed(what, make, flat_bytes)[0]

    def _timed(
        self, what: str, fill: Callable[[], T], found: Callable[[T], Tensors]
    ) -> tuple[float, T]:
        wait_for(self._devices)
        start = time.perf_counter()
        result = fill()
        wait_for(self._devices)
        took = time.perf_counter() - start
        self._check(what, found(result))
        return took, result

    def _check(self, what: str, found: Tensors) -> None:
        wrong = [
            name
            for name, wanted in self._wanted.items()
            if name not in found or not torch.equal(found[name], wanted)
        ]
        if wrong:
            raise DigestMismatch(
                f"{what}: {len(wrong)} of {len(self._wanted)} tensors are not what the "
                "source holds, so its time means nothing: "
                f"{listed(wrong)}",
                tensors=wrong,
            )


def in_turns(actions: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each once a round, in another order every round.

    One round before, which opens connections, does not count.
    """
    names = list(actions)
    took: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            seconds = actions[name]()
            if number:
                took[name].append(seconds)
    return took


@dataclass(frozen=True)
class Goal:
    what: str
    limit: float
    at_least: bool
    value: float | None  # None: what it is made of was not run

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not run"
        return (
            "met"
            if (self.value >= self.limit if self.at_least else self.value <= self.limit)
            else "missed"
        )

    def as_json(self) -> dict[str, Any]:
        value = None if self.value is None else round(self.value, 3)
        return {
            "what": self.what,
            "limit": self.limit,
            "at_least": self.at_least,
            "value": value,
            "verdict": self.verdict,
        }

    def cells(self) -> list[str]:
        value = "" if self.value is None else f"{self.value:.2f}"
        return [self.what, f"{'>=' if self.at_least else '<='} {self.limit:g}", value, self.verdict]


def goals(rows: Sequence[Row], group: str = "mixed") -> list[Goal]:
    """Of the mixed set."""
    took = {row.what: row.median_s for row in rows if row.group == group and row.samples_s}

    def ratio(over: str, under: str) -> float | None:
        return took[over] / took[under] if over in took and under in took else None

    digest = ratio(WITH_DIGESTS, TURN)
    return [
        Goal(
            "reads of load() to torch's copy, tensor by tensor",
            0.9,
            True,
            ratio(EACH_COPY, TURN_READS),
        ),
        Goal(
            "reads of load() to torch's copy of one block", 0.9, True, ratio(FLAT_COPY, TURN_READS)
        ),
        Goal("reads of load() to NCCL, tensor by tensor", 4, True, ratio(EACH_NCCL, READS)),
        Goal("load() to NCCL, tensor by tensor", 4, True, ratio(EACH_NCCL, WARM)),
        Goal("load(), cold to warm", 2, False, ratio(COLD, WARM)),
        Goal("load() to its reads", 1.5, False, ratio(WARM, READS)),
        Goal("load() into a Destination to its reads", 1.5, False, ratio(AGAIN, TURN_READS)),
        Goal("what digests add to load()", 0.15, False, None if digest is None else digest - 1),
    ]


COLD, COLD_READS = "load(), cold", "load(), cold: its reads"
WARM, READS = "load(), warm", "load(), warm: its reads"
TURN, TURN_READS, WITH_DIGESTS = (
    "load() in turns",
    "load() in turns: its reads",
    "load() in turns, digests",
)
AGAIN = "load() in turns, into a Destination"
EACH_COPY, FLAT_COPY = "torch copy, tensor by tensor", "torch copy, one block"
EACH_CALL, ALL_CALL = "mooncake, a call a tensor", "mooncake, a call for 512"
EACH_NCCL, ALL_NCCL = "NCCL, tensor by tensor", "NCCL, groups of 256"
PINNED, FILE = "from pinned host memory", "safetensors file"
