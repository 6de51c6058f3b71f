"""`ModelStart`: the weights of one model in one process of an engine, from what is held here, from
peers or by the engine's loader, and their life as a source for others.

The integrations call it from the thread that loads the model. Whatever fails of this library, the
engine goes on with its own loader, after one warning.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from engine_loader.integrations.arenas import Following, moved_into_arenas
from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.connecting import (
    Connect,
    Connection,
    StartEngine,
    connect_registry,
    start_engine_of,
)
from engine_loader.integrations.logs import reason
from engine_loader.integrations.outcome import Outcome
from engine_loader.integrations.reading import Reading
from engine_loader.integrations.room import give_memory
from engine_loader.integrations.seat import Seat
from engine_loader.integrations.serving import serve
from engine_loader.options import PublishOptions
from engine_loader.publishing.publication import Publication
from engine_loader.starting.load_or_seed import load_or_seed
from engine_loader.starting.seeded import Seeded
from engine_loader.tensors.deferred import Deferred
from engine_loader.tensors.shards import Shard
from engine_registry import ModelIdentity
from engine_registry.errors import EngineRegistryError
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
Tensors = Mapping[str, torch.Tensor]
Again = Callable[[nn.Module], Tensors | None]
T = TypeVar("T")


def _nothing(module: nn.Module) -> Tensors | None:
    return None


class ModelStart:
    """The weights of one model, filled and then served, until `close`."""

    def __init__(
        self,
        config: IntegrationConfig,
        model: ModelIdentity,
        seat: Seat,
        *,
        connect: Connect = connect_registry,
        start_engine: StartEngine = start_engine_of,
    ) -> None:
        """Neither connects nor starts anything.

        Args:
            config: The user's settings.
            model: The identity of what is filled.
            seat: Which rank this process is.
            connect: Makes the registry. For tests.
            start_engine: Makes the transfer engine. For tests.
        """
        self._config = config
        self._model = model
        self._seat = seat
        self._connection = Connection(config, connect, start_engine)
        self._seeded: Seeded | None = None
        self._given_up = False
        self._again: Again = _nothing
        self._shards: Mapping[str, Shard] | None = None
        self._module: Callable[[], nn.Module | None] = lambda: None
        self._extra_nbytes = 0
        self._hold_s = 0.0
        self.copied_version = 0  # of peers; the engine's loader reads version 0
        self.left = False  # to its keeper, as the process ends by an error
        self.discarded = False  # the engine has thrown the weights away while they are paused

    @property
    def seeded(self) -> Seeded | None:
        """What `load_or_seed` returned; None before, and where something of ours has failed."""
        return self._seeded

    @property
    def publication(self) -> Publication | None:
        """The rank as a source for peers, if it is one."""
        return self._seeded.publication if self._seeded is not None else None

    @property
    def serves(self) -> bool:
        """Whether peers find the weights here."""
        return self.publication is not None

    def fill(
        self,
        tensors: Tensors | Callable[[], Tensors],
        read: Callable[[], object],
        shards: Mapping[str, Shard] | None = None,
        *,
        module: nn.Module | None = None,
        deferred: Deferred | None = None,
    ) -> None:
        """Fills the weights from what is held here, from peers, or by the engine's loader.
        `publish` makes them a source.

        Args:
            tensors: The tensors to fill, or a function that makes them when there are peers, or
                something is held.
            read: The engine's loader, which fills the same model. It is called at most once.
            shards: Which part of the model each tensor is, by name, also of those that are
                published. Peers of any layout count then. None where it is not known.
            module: The model, if nothing knows the addresses of its tensors yet, as before it is
                post-processed. Then these may get memory that is held, and are moved into memory
                that can be held; others that share their memory come along.
            deferred: Parameters that get memory only if they do not get what is held.

        Raises:
            Exception: Whatever `read` raises. What this library raises, where it is required.
        """
        allocate: Callable[[], None] | None = None
        if deferred is not None:
            place = self._seat.place
            allocate = partial(give_memory, deferred, self._connection, self._model, place)
        reading, self._shards = Reading(read, allocate), shards
        self._seeded = self._try(
            lambda: self._load_or_seed(tensors, reading, module, allocate), reading
        )
        if self._seeded is not None:
            self.copied_version = self._seeded.version or 0
        config = self._config
        if config.hold_s and module is not None and not callable(tensors):
            rank, required = str(self._seat), config.required
            if self._try(lambda: moved_into_arenas(rank, tensors, module, required)):
                self._hold_s = config.hold_s
        if self._seeded is None and not reading.done:
            try:
                reading()
            finally:
                self.close()  # it may have connected, to free what is held

    def publish(
        self,
        module: nn.Module,
        tensors: Tensors,
        again: Again = _nothing,
        *,
        extra_nbytes: int = 0,
    ) -> None:
        """Serves the weights to peers until the module is collected, or until `close`.

        Args:
            module: The model that the tensors belong to.
            tensors: The tensors that peers get.
            again: The tensors of a module after its weights have changed; None where those cannot
                be served. It holds on to no module.
            extra_nbytes: Bytes of the tensors that the module does not use, and that are only kept
                for peers.

        Raises:
            Exception: What this library raises, where it is required.
        """
        seeded = self._seeded
        if seeded is not None:
            options = self._options(self._hold_s)
            self._try(lambda: seeded.publish(tensors, shards=self._shards, options=options))
        self._again, self._module, self._extra_nbytes = again, weakref.ref(module), extra_nbytes
        outcome = self.outcome()
        log.info("%s", outcome, extra=fields("model_started", **outcome.facts()))
        if self.serves:
            serve(module, self)
        else:
            self.close()

    def give_up(self, why: str, remedy: str) -> None:
        """Serves no peers, after one warning. Raises EngineRegistryError where it is required."""

        def refuse() -> None:
            raise EngineRegistryError(why, remedy)

        self._try(refuse)

    def pause(self) -> None:
        """The engine is about to change the weights: peers wait, or go elsewhere."""
        publication = self.publication
        if publication is not None and not publication.paused:
            self._try(publication.pause)

    def resume(self) -> None:
        """The weights are as they were when they were paused."""
        publication = self.publication
        if publication is not None and publication.paused:
            self._try(publication.resume)

    def replace(self, tensors: Tensors) -> None:
        """The weights are these now: peers get them as the next version."""
        publication = self.publication
        if publication is not None:
            self._try(lambda: publication.replace(tensors, self._shards))

    def republish(self) -> None:
        """The weights are others now: peers get them as the next version."""
        publication, module = self.publication, self._module()
        if publication is None or module is None:
            return
        tensors = self._again(module)
        if tensors is None:
            self.give_up(
                "the weights that it has kept for peers are not those that the engine uses now",
                "set `stage` to `processed`, so that it serves them also after an update",
            )
            return
        self.discarded = False
        self.replace(tensors)

    def outcome(self) -> Outcome:
        """What the start did."""
        return Outcome(str(self._seat), self._seeded, self._extra_nbytes)

    def close(self) -> None:
        """Withdraws the rank, and closes the engine and the registry. Any number of times."""
        for resource in (self._seeded, self._connection):
            if resource is not None:
                with suppress(EngineRegistryError):
                    resource.close()

    def _load_or_seed(
        self,
        tensors: Tensors | Callable[[], Tensors],
        reading: Reading,
        module: nn.Module | None,
        allocate: Callable[[], None] | None,
    ) -> Seeded:
        connection, place, config = self._connection, self._seat.place, self._config
        following = Following(str(self._seat), module) if module is not None else None
        seeded = load_or_seed(
            connection.registry,
            connection.engine,
            self._model,
            tensors,
            rank=place.rank,
            world_size=place.world_size or 1,
            instance=self._seat.instance,
            fallback=reading,
            shards=self._shards,
            topology=place.topology,
            timeout_s=config.timeout_s,
            without_etcd_s=config.without_etcd_s,
            required=config.required,
            publish_later=True,
            adopt=following.may_adopt if following is not None else False,
            allocate=allocate,
            load=config.load_options,
            publish=self._options(),
        )
        if seeded.adopted is not None and following is not None:
            following.follow()
        return seeded

    def _options(self, hold_s: float = 0.0) -> PublishOptions:
        seat, labels = self._seat, self._config.labels
        return PublishOptions(
            generation=seat.generation, digests=True, labels=labels, hold_s=hold_s
        )

    def _try(self, act: Callable[[], T], reading: Reading | None = None) -> T | None:
        """None where it fails: that ends the engine only if the engine's own loader has failed, or
        if this library is required.
        """
        if self._given_up:
            return None
        try:
            return act()
        except Exception as exc:
            if self._config.required or (reading is not None and reading.failed):
                self.close()
                raise
            self._fail(exc)
            return None

    def _fail(self, exc: Exception) -> None:
        self._given_up = True
        log.warning(
            "%s of %s serves no peers%s: %s",
            self._seat,
            self._model,
            "" if self._seeded is not None else ", and the engine's own loader fills it",
            reason(exc),
            extra=fields("integration_failed", rank=str(self._seat), error=exc),
        )
        self.close()
        self._seeded = None
