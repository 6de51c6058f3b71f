"""The transfer engine that SGLang has started, as an `Engine` that serves. It reads nothing: SGLang
reads with it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Any

from engine_loader.engines.base import Engine
from engine_loader.engines.region_book import Regions
from engine_loader.errors import EngineFailed
from engine_loader.planning.plan import ReadOp
from engine_registry import Location, Region
from engine_registry.schema.manifest import Export


class SeedEngine(Engine):
    """Serves what SGLang has registered with its engine already, and registers what is added."""

    def __init__(
        self,
        library: Any,
        session_id: str,
        protocol: str,
        weights: Iterable[Region],
        location: str = "",
    ) -> None:
        """`library` is Mooncake's engine, `weights` the memory that is registered with it, and
        `location` where this machine stands.
        """
        self._location = Location.parse(location)
        self._library = library
        self._session_id = session_id
        self._protocol = protocol
        self._weights = _joined(weights)
        self._starts = [one.addr for one in self._weights]
        self._ends = [one.end for one in self._weights]

    @property
    def session_id(self) -> str:
        return self._session_id

    @property
    def protocol(self) -> str:
        return self._protocol

    @property
    def fabric(self) -> str:
        return ""

    @property
    def location(self) -> Location:
        return self._location

    def register(self, region: Region) -> Regions:
        """The parts of the region that SGLang has registered. A region that has none of its own is
        registered here.
        """
        inside = tuple(
            Region(
                max(one.addr, region.addr), min(one.end, region.end) - max(one.addr, region.addr)
            )
            for one in self._weights_in(region)
        )
        if inside:
            return inside
        code = self._library.register_memory(region.addr, region.nbytes)
        if code != 0:
            raise EngineFailed(
                f"SGLang's transfer engine cannot register {region.nbytes} bytes at "
                f"{region.addr:#x} (code {code})",
                "check the limit on locked memory (ulimit -l)",
            )
        return (region,)

    def unregister(self, region: Region) -> None:
        """Takes back what was registered here."""
        if not self._weights_in(region):
            self._library.unregister_memory(region.addr)

    def lend(self, region: Region) -> Regions:
        raise self._reads_nothing()

    def take_back(self, region: Region) -> None:
        raise self._reads_nothing()

    def connect(self, peer: str, exports: Sequence[Export] = ()) -> None:
        raise self._reads_nothing()

    def start(self, peer: str, op: ReadOp) -> int:
        raise self._reads_nothing()

    def done(self, number: int) -> bool:
        raise self._reads_nothing()

    def abandon(self, peer: str) -> None:
        """There is nothing to give up."""

    def settled(self, peer: str) -> bool:
        return True

    def close(self) -> None:
        """SGLang's engine goes on."""

    def _weights_in(self, region: Region) -> tuple[Region, ...]:
        """Those that have a byte in the region."""
        first = bisect.bisect_right(self._ends, region.addr)
        return self._weights[first : bisect.bisect_left(self._starts, region.end)]

    def _reads_nothing(self) -> EngineFailed:
        return EngineFailed("SGLang's transfer engine serves here, and SGLang reads with it")


def _joined(regions: Iterable[Region]) -> tuple[Region, ...]:
    """By address; those that overlap are one, as parameters may share memory."""
    joined: list[Region] = []
    for region in sorted(regions, key=lambda one: one.addr):
        if not region.nbytes:
            continue
        if joined and region.addr < joined[-1].end:
            last = joined[-1]
            joined[-1] = Region(last.addr, max(last.end, region.end) - last.addr)
        else:
            joined.append(region)
    return tuple(joined)
