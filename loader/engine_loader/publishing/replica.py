"""A rank that loads becomes a source itself: from its first chunks on, and for good once it is
complete.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine_loader.engines.base import Engine
from engine_loader.engines.region_book import Tiles
from engine_loader.planning.arrivals import Arrivals
from engine_loader.publishing.publish import Publication, open_publication
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.uses import Use
from engine_registry import ModelIdentity, RankRecord, Registry
from engine_registry.errors import InvalidField
from engine_registry.registration.handle import OnState
from engine_registry.registration.writes import WITHDRAWN
from engine_registry.watching.waiting import Wanted


@dataclass(frozen=True)
class Replica:
    """As whom a rank that loads publishes itself. What is not said is as with its source."""

    instance: str
    rank: int | None = None  # the one that is loaded
    world_size: int | None = None
    topology: Mapping[str, tuple[int, int]] | None = None
    generation: str | None = None
    digests: bool = False
    ttl_s: float = 10.0
    on_state: OnState | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What `publish` takes of it as it is, whatever the source."""
        names = ("instance", "generation", "digests", "ttl_s", "on_state")
        return {name: getattr(self, name) for name in names}


def as_replica(publish: bool | str | Replica, source: Wanted) -> Replica | None:
    """`publish` may be the name of an instance; or True, for one whose name is that of the source
    with something added.
    """
    if isinstance(publish, str):
        return Replica(publish)
    if isinstance(publish, bool):
        name = (
            source.name
            if isinstance(source, ModelIdentity)
            else source
            if isinstance(source, str)
            else source[0]
        )
        return (
            Replica(f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)[:100]}.{uuid.uuid4().hex[:8]}")
            if publish
            else None
        )
    return publish


class Republication:
    """The tensors of a load as a source, beginning anew with each content that is loaded."""

    def __init__(
        self,
        registry: Registry,
        engine: Engine,
        replica: Replica,
        rank: int | None,
        weights: Destination,
        block_nbytes: int,
        filling: Use,
    ) -> None:
        """`filling` is the load's use of the memory."""
        own = replica.rank if replica.rank is not None else rank
        if own is None:
            raise InvalidField(
                "which rank to publish as is not known: say it in the Replica", field="rank"
            )
        self._registry = registry
        self._engine = engine
        self._replica = replica
        self._rank = own
        self._weights = weights
        self._block_nbytes = block_nbytes
        self._filling = filling
        self._content = ""  # that is being loaded
        self._marked = 0
        self.publication: Publication | None = None

    def begin(self, like: RankRecord, content: str, reason: str = WITHDRAWN) -> Tiles:
        """Registers as loading the content, in the version of that rank. Marks are of blocks of the
        regions that are returned.

        `reason` is why a registration before this one ends. Raises what `publish` does.
        """
        self.close(reason)
        replica = self._replica
        of_same_rank = like.rank == self._rank
        if replica.world_size is None and not of_same_rank:
            raise InvalidField(
                f"of how many ranks rank {self._rank} is one is not known, as {like.key} is "
                "another: say world_size in the Replica",
                field="world_size",
            )
        self._content = content
        self.publication = open_publication(
            self._registry,
            self._engine,
            self._weights,
            rank=self._rank,
            world_size=replica.world_size or like.world_size,
            model=like.model,
            topology=like.topology
            if replica.topology is None and of_same_rank
            else replica.topology,
            version=like.version,
            content=content,
            block_nbytes=self._block_nbytes,
            filled_by=self._filling,
            **replica.options,
        )
        self._marked = 0
        return self.publication.regions

    @property
    def record(self) -> RankRecord | None:
        return self.publication.record if self.publication is not None else None

    def mark(self, arrivals: Arrivals) -> None:
        count = arrivals.blocks.count(1)
        if self.publication is not None and count != self._marked:
            self.publication.mark(bytes(arrivals.blocks))
            self._marked = count

    def complete(self) -> Publication | None:
        if self.publication is not None:
            self.publication.complete(filled_by=self._filling, content=self._content)
        return self.publication

    def close(self, reason: str = WITHDRAWN) -> None:
        if self.publication is not None:
            self.publication.close(reason)
            self.publication = None
