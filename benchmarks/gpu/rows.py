"""What is reported: rows of times.

A time comes out of `Target.time` alone, which looks at every byte first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from benchmarks.gpu.sets import Tensors, flat_bytes
from engine_loader.errors import DigestMismatch, listed
from engine_loader.tensors.cuda import wait_for

K = TypeVar("K")
T = TypeVar("T")
_POISON = 0xA5
_AT_ONCE_NBYTES = 256 << 20


@dataclass(frozen=True)
class Row:
    """`samples_s`: in the order in which they were taken; none where it was not run, and `note`
    says why. `protocol`: empty where none of ours is used.
    """

    group: str
    what: str
    nbytes: int = 0
    samples_s: tuple[float, ...] = ()
    note: str = ""
    protocol: str = ""

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
            "protocol": self.protocol,
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
        names = [self.group, self.what, self.protocol]
        if not self.samples_s:
            return [*names, "", "", "", "", "", self.note]
        times = [
            f"{1e3 * one:.2f}" for one in (self.median_s, min(self.samples_s), max(self.samples_s))
        ]
        speed = f"{self.gb_per_s:.1f}" if self.nbytes else ""
        return [*names, *times, speed, str(len(self.samples_s)), self.note]


COLUMNS = ("SET", "WHAT", "PROTOCOL", "MEDIAN ms", "MIN ms", "MAX ms", "GB/s", "RUNS", "NOTE")


class Target:
    """Tensors to be filled, and what they hold then, on the same device.

    `others`: devices that take part.
    """

    def __init__(self, tensors: Tensors, wanted: Tensors, others: Iterable[str] = ()) -> None:
        self.tensors = tensors
        self.flat = flat_bytes(tensors)
        self._wanted = flat_bytes(wanted)
        self._groups = _groups(self._wanted)
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
        self.poison()
        return self._timed(what, fill, lambda _: self.flat)

    def poison(self) -> None:
        for flat in self.flat.values():
            flat.fill_(_POISON)

    def wrong(self) -> list[str]:
        """The tensors that are not as they should be now."""
        return self._wrong(self.flat)

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

    def _wrong(self, found: Tensors) -> list[str]:
        wrong: list[str] = []
        for names in self._groups:
            here = [name for name in names if name in found]
            if here != names or not torch.equal(
                _joined(found, names), _joined(self._wanted, names)
            ):
                wrong += [
                    name
                    for name in names
                    if name not in found or not torch.equal(found[name], self._wanted[name])
                ]
        return wrong

    def _check(self, what: str, found: Tensors) -> None:
        wrong = self._wrong(found)
        if wrong:
            raise DigestMismatch(
                f"{what}: {len(wrong)} of {len(self._wanted)} tensors are not what the "
                "source holds, so its time means nothing: "
                f"{listed(wrong)}",
                tensors=wrong,
            )


def _groups(tensors: Tensors) -> list[list[str]]:
    """Of names: a comparison of many small tensors takes longer for each than for all at once."""
    groups: list[list[str]] = []
    room = 0
    for name, flat in tensors.items():
        if flat.numel() > room:
            groups.append([])
            room = _AT_ONCE_NBYTES
        groups[-1].append(name)
        room -= flat.numel()
    return groups


def _joined(tensors: Tensors, names: list[str]) -> torch.Tensor:
    return torch.cat([tensors[name] for name in names])


def in_turns(actions: Mapping[K, Callable[[], float]], rounds: int) -> dict[K, list[float]]:
    """Each once a round, in another order every round.

    One round before, which opens connections, does not count.
    """
    names = list(actions)
    took: dict[K, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            seconds = actions[name]()
            if number:
                took[name].append(seconds)
    return took


Add = Callable[[list[Row], Mapping[str, int]], None]  # what was measured, and what was counted


def reads_of(load: str) -> str:
    """What the reads of such a load are called."""
    return f"{load}: its reads"


COLD, WARM = "load(), cold", "load(), warm"
TURN, TURN_DIGESTS = "load() in turns", "load() in turns, digests"
AGAIN = "load() in turns, into a Destination"
AGAIN_DIGESTS = "load() in turns, into a Destination, digests"
EACH_COPY, FLAT_COPY = "torch copy, tensor by tensor", "torch copy, one block"
EACH_CALL, ALL_CALL = "mooncake, a call a tensor", "mooncake, a call for 512"
EACH_NCCL, ALL_NCCL = "NCCL, tensor by tensor", "NCCL, groups of 256"
FLAT_PINNED, PINNED = "pinned memory, one block", "pinned memory, tensor by tensor"
BATCH, FILE = "cudaMemcpyBatchAsync", "safetensors file"
