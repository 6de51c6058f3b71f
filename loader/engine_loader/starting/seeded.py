"""What `load_or_seed` returns."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

import torch

from engine_loader.adopting.adopted import Adopted
from engine_loader.errors import LoaderError
from engine_loader.loading.report import LoadReport
from engine_loader.options import PublishOptions
from engine_loader.publishing.publication import Publication
from engine_loader.starting.seed import Seed
from engine_loader.starting.turn import Turn
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.shards import Shard
from engine_registry.errors import EtcdError


@dataclass
class Seeded:
    """Where the weights of a rank came from. A context manager that closes the publication.

    Attributes:
        source: `"held"`, `"peers"`, or `"disk"` for the fallback.
        publication: The rank as a source. None before `publish`, with `publish_later`; else None
            only where etcd could not be reached, or refused.
        report: What the load from peers did. Else None.
        reason: Why it was read although there were peers, or without a turn. Else empty.
        seconds: How many seconds the start took.
        unpublished: The error of etcd for which there is no publication. Else None.
        adopted: What was held on this host, in which the tensors lie now. Else None.
    """

    source: Literal["held", "peers", "disk"]
    publication: Publication | None
    report: LoadReport | None
    reason: str
    seconds: float
    unpublished: EtcdError | None = None
    adopted: Adopted | None = None
    _seed: Seed | None = field(default=None, repr=False, compare=False)
    _turn: Turn | None = field(default=None, repr=False, compare=False)

    @property
    def version(self) -> int | None:
        """The version of the weights, as they were adopted or as peers had them. Else None."""
        if self.adopted is not None:
            return self.adopted.version
        return self.report.version if self.report is not None else None

    def publish(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        shards: Mapping[str, Shard] | None = None,
        options: PublishOptions | None = None,
    ) -> Publication | None:
        """Publishes the rank, after `load_or_seed` with `publish_later`, or where etcd was away.

        The tensors may be others than the ones that were loaded. Peers fill tensors of the same
        names and shapes from them. The content is a new one, as the engine may have changed the
        weights, or that which digests prove. The turn to read ends: also if the call raises, unless
        the tensors are refused. It may be called again until there is a publication.

        Args:
            tensors: The tensors to publish, by name.
            shards: Which part of the whole a tensor is, by name.
            options: How to publish; see PublishOptions. By default those of `load_or_seed`. Without
                `version`, the version is that of what was adopted or of the peers that were loaded
                from, or else that of the fallback.

        Returns:
            The publication, which `close` closes too. None where etcd cannot be reached or refuses
            it; `unpublished` has the error then, unless etcd is required.

        Raises:
            LoaderError: The rank is published already. TensorsUnusable, EngineFailed or
                MemoryInUse, as `publish` raises them.
            EtcdError: Etcd is required, and is away or refuses.
            RegistryError: InvalidField, RankConflict, InstanceMismatch or KeeperFailed, as
                `publish` raises them.
        """
        if self.publication is not None or self._seed is None:
            raise LoaderError(
                "the rank is published already", "use its `update`, or close it and `publish` anew"
            )
        weights = Destination.of(tensors, shards)
        seed = self._seed.later(options, self.version)
        with ExitStack() as stack:
            if self._turn is not None:
                stack.enter_context(self._turn.publishing())
            self.publication = seed.open(weights)
        self.unpublished = seed.unpublished
        return self.publication

    def close(self) -> None:
        """Withdraws the rank, and gives up a turn to read. It may be called any number of times."""
        if self._turn is not None:
            self._turn.close()
        if self.publication is not None:
            self.publication.close()

    def __enter__(self) -> Seeded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
