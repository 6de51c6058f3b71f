"""A rank that loads becomes a source itself: from its first chunks on, and for good once it is
complete.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace

from engine_loader.engines.base import Engine
from engine_loader.engines.region_book import Regions
from engine_loader.options import PublishOptions, refuse
from engine_loader.planning.arrivals import Arrivals
from engine_loader.publishing.opening import open_publication
from engine_loader.publishing.publication import Publication
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.uses import Use
from engine_registry import ModelIdentity, RankRecord, Registry
from engine_registry.errors import InvalidField
from engine_registry.registration.writes import WITHDRAWN
from engine_registry.schema.keys import check_instance, check_rank
from engine_registry.schema.numbers import whole_or_none
from engine_registry.schema.topology import check_topology
from engine_registry.watching.waiting import Wanted


@dataclass(frozen=True)
class Replica:
    """The rank as which a load publishes the weights that it fills.

    Attributes:
        instance: The name of the instance.
        rank: The rank in it. None: the rank that is loaded.
        world_size: How many ranks the instance has. None: as many as the source.
        topology: The place of the rank along each parallel axis: (index, size) by axis. None: that
            of the source, if it has the same rank.
        options: How to publish; see PublishOptions. Without `version`, which is the source's.

    Raises:
        InvalidField: A field is not valid; `details["field"]` names it.

    Example:
        `Replica("qwen-c", options=PublishOptions(digests=True))`
    """

    instance: str
    rank: int | None = None
    world_size: int | None = None
    topology: Mapping[str, tuple[int, int]] | None = None
    options: PublishOptions = PublishOptions()

    def __post_init__(self) -> None:
        """Raises InvalidField."""
        check_instance(self.instance)
        rank, world_size = whole_or_none("rank", self.rank), self.world_size
        world_size = whole_or_none("world_size", world_size, 1)
        if rank is not None and world_size is not None:
            check_rank(rank, world_size)
        object.__setattr__(self, "rank", rank)
        object.__setattr__(self, "world_size", world_size)
        if self.topology is not None:
            object.__setattr__(self, "topology", check_topology(self.topology))
        refuse(
            self.options,
            "Replica",
            {
                "version": "leave it out: a replica has that of its source",
                "snapshots": "leave it out: a replica offers the memory that it fills",
            },
        )


def as_replica(publish: bool | str | Replica, source: Wanted) -> Replica | None:
    """`publish` may be the name of an instance; or True, for one whose name is that of the source
    with something added.
    """
    if isinstance(publish, Replica):
        return publish
    if isinstance(publish, str):
        return Replica(publish)
    if not isinstance(publish, bool):
        raise InvalidField(
            f"`publish` {publish!r} is not valid",
            "give the name of an instance, a Replica, or True",
            field="publish",
        )
    if not publish:
        return None
    name = (
        source.name
        if isinstance(source, ModelIdentity)
        else source
        if isinstance(source, str)
        else source[0]
    )
    return Replica(f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)[:100]}.{uuid.uuid4().hex[:8]}")


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
                "which rank to publish as is not known", "say `rank` in the Replica", field="rank"
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

    def begin(self, like: RankRecord, content: str, reason: str = WITHDRAWN) -> Regions:
        """Registers as loading the content, in the version of that rank. Marks are of blocks of the
        regions that are returned.

        `reason` is why a registration before this one ends. Raises what `publish` does.
        """
        self.close(reason)
        replica = self._replica
        of_same_rank = like.rank == self._rank
        if replica.world_size is None and not of_same_rank:
            raise InvalidField(
                f"how many ranks the instance of rank {self._rank} has is not known, as "
                f"{like.key} is another rank",
                "say `world_size` in the Replica",
                field="world_size",
            )
        self._content = content
        self.publication = open_publication(
            self._registry,
            self._engine,
            self._weights,
            instance=replica.instance,
            rank=self._rank,
            world_size=replica.world_size or like.world_size,
            model=like.model,
            topology=like.topology
            if replica.topology is None and of_same_rank
            else replica.topology,
            options=replace(replica.options, version=like.version),
            content=content,
            block_nbytes=self._block_nbytes,
            filled_by=self._filling,
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
