"""A rank that starts as a source for others: how it is published, or only registered meanwhile.

Used by `starting.start` and, for a publication that comes later, by `Seeded`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from engine_loader.adopting.adopted import Adopted
from engine_loader.engines.base import Engine
from engine_loader.options import PublishOptions
from engine_loader.publishing.opening import open_publication
from engine_loader.publishing.publication import Publication
from engine_loader.publishing.replica import Replica
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.uses import Use
from engine_registry import Manifest, ModelIdentity, RankState, Registration, Registry
from engine_registry.errors import EtcdError
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
T = TypeVar("T")
_NOTHING = Manifest((), ())


@dataclass
class Seed:
    registry: Registry
    engine: Engine
    model: ModelIdentity
    rank: int
    world_size: int
    replica: Replica
    version: int
    required: bool  # etcd is
    unpublished: EtcdError | None = None  # why there is no publication, or was none before
    replaces: str = ""  # the incarnation of the rank whose memory was adopted

    @property
    def name(self) -> str:
        return f"{self.replica.instance}/{self.rank}"

    def fields(self, event: str, **facts: object) -> dict[str, Any]:
        """For a line of the log about this rank."""
        return fields(event, instance=self.replica.instance, rank=self.rank, **facts)

    def later(self, options: PublishOptions | None, version: int | None) -> Seed:
        """For a publication that comes later. `version` is that of what was adopted, or of peers
        that were loaded from.
        """
        if version is None:
            version = self.version
        if options is None:
            return replace(self, version=version)
        if options.version is not None:
            version = options.version
        replica = replace(self.replica, options=replace(options, version=None))
        return replace(self, replica=replica, version=version)

    def open(self, weights: Destination, filled_by: Use | None = None) -> Publication | None:
        """Publishes the weights. As loading, if something still fills them.

        None where etcd cannot be reached or refuses it: an engine can do its work all the same.
        Raises the error where etcd is required.
        """
        return self._unless_etcd_fails(
            lambda: open_publication(
                self.registry,
                self.engine,
                weights,
                instance=self.replica.instance,
                rank=self.rank,
                world_size=self.world_size,
                model=self.model,
                topology=self.replica.topology,
                options=replace(self.replica.options, version=self.version),
                filled_by=filled_by,
                replaces=self.replaces,
            ),
            is_early=filled_by is not None,
        )

    def open_adopted(self, adopted: Adopted) -> Publication | None:
        """Publishes what was adopted, with its content and version. None as for `open`."""
        return self._unless_etcd_fails(
            lambda: adopted.publish(
                self.registry,
                self.engine,
                instance=self.replica.instance,
                options=self.replica.options,
            ),
            is_early=False,
        )

    def claim(self) -> Registration | None:
        """Registers the rank as loading, without a tensor: those that it publishes are not known.
        None as for `open`.
        """
        options = self.replica.options
        return self._unless_etcd_fails(
            lambda: self.registry.register(
                instance=self.replica.instance,
                rank=self.rank,
                world_size=self.world_size,
                model=self.model,
                manifest=_NOTHING,
                session_id=self.engine.session_id,
                protocol=self.engine.protocol,
                fabric=self.engine.fabric,
                rails=self.engine.rails,
                location=self.engine.location,
                header_addr=0,  # it has none
                generation=options.generation,
                topology=self.replica.topology,
                version=self.version,
                state=RankState.LOADING,
                labels=options.labels,
                ttl_s=options.ttl_s,
                unresponsive_after_s=options.unresponsive_after_s,
            ),
            is_early=True,
        )

    def _unless_etcd_fails(self, register: Callable[[], T], *, is_early: bool) -> T | None:
        """`is_early`: it will be tried again."""
        try:
            registered = register()
        except EtcdError as exc:
            if self.required:
                raise
            is_known = type(exc) is type(self.unpublished)  # there is a warning of it already
            self.unpublished = exc
            log.log(
                logging.INFO if is_known else logging.WARNING,
                "%s is not published%s: %s",
                self.name,
                " yet" if is_early else "",
                exc,
                extra=self.fields("seed_unpublished", error=exc),
            )
            return None
        self.unpublished = None
        return registered
