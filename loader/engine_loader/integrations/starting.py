"""`ModelStart`: the weights of one model in one process of an engine, from peers or by the engine's
loader, and their life as a source for others.

The integrations call it from the thread that loads the model. Whatever fails of this library, the
engine goes on with its own loader, after one warning.
"""

from __future__ import annotations

import _thread
import atexit
import logging
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import nn

from engine_loader.engines.base import Engine
from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.connecting import connect_registry, start_mooncake
from engine_loader.integrations.seat import Seat
from engine_loader.options import PublishOptions
from engine_loader.publishing.publication import Publication
from engine_loader.starting.load_or_seed import load_or_seed
from engine_loader.starting.peers import find_peers
from engine_loader.starting.seeded import Seeded
from engine_registry import ModelIdentity, Registry
from engine_registry.errors import EngineRegistryError
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
Tensors = Mapping[str, torch.Tensor]
Again = Callable[[nn.Module], Tensors | None]
T = TypeVar("T")
_STARTS: weakref.WeakKeyDictionary[nn.Module, ModelStart] = weakref.WeakKeyDictionary()


def _nothing(module: nn.Module) -> Tensors | None:
    return None


@atexit.register
def _close_all() -> None:
    for start in list(_STARTS.values()):
        start.close()


def _close_soon(start: ModelStart) -> None:
    """The collector may run at any line of any thread, so no lock is taken here."""
    _thread.start_new_thread(start.close, ())


def start_of(module: nn.Module) -> ModelStart | None:
    """The start that filled the model in this process, if one did, and still serves it."""
    start = _STARTS.get(module)
    return start if start is not None and start.serves else None


def open_starts() -> list[ModelStart]:
    """Those of this process that serve, or that have paused."""
    return [start for start in list(_STARTS.values()) if start.serves]


class ModelStart:
    """The weights of one model, filled and then served, until `close`."""

    def __init__(
        self,
        config: IntegrationConfig,
        model: ModelIdentity,
        seat: Seat,
        *,
        connect: Callable[[IntegrationConfig], Registry] = connect_registry,
        start_engine: Callable[[IntegrationConfig, Registry], Engine] = start_mooncake,
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
        self._make_registry = connect
        self._make_engine = start_engine
        self._registry: Registry | None = None
        self._engine: Engine | None = None
        self._seeded: Seeded | None = None
        self._given_up = False
        self._again: Again = _nothing
        self._module: Callable[[], nn.Module | None] = lambda: None
        self._extra_nbytes = 0
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

    def peers_now(self) -> bool:
        """Whether there are peers to load from now."""
        place = self._seat.place
        found = self._try(
            lambda: find_peers(
                self._connected(),
                self._model,
                rank=place.rank,
                world_size=place.world_size or 1,
                topology=place.topology,
            )
        )
        return bool(found)

    def fill(self, tensors: Tensors | Callable[[], Tensors], read: Callable[[], object]) -> None:
        """Fills the weights from peers, or by the engine's loader. `publish` makes them a source.

        Args:
            tensors: The tensors to fill, or a function that makes them when there are peers.
            read: The engine's loader, which fills the same model. It is called at most once.

        Raises:
            Exception: Whatever `read` raises. What this library raises, where it is required.
        """
        reading = _Reading(read)
        self._seeded = self._try(lambda: self._load_or_seed(tensors, reading), reading)
        if self._seeded is None and not reading.done:
            reading()

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
            self._try(lambda: seeded.publish(tensors))
        self._again, self._module, self._extra_nbytes = again, weakref.ref(module), extra_nbytes
        log.info("%s", self.summary(), extra=fields("model_started", **self.facts()))
        if self.serves:
            _STARTS[module] = self
            weakref.finalize(module, _close_soon, self).atexit = False  # `_close_all` does it
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
            self._try(lambda: publication.replace(tensors))

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

    def facts(self) -> dict[str, Any]:
        """What the start did, as data for a log."""
        seeded, publication = self._seeded, self.publication
        report = seeded.report if seeded is not None else None
        return {
            "rank": str(self._seat),
            "source": seeded.source if seeded is not None else "disk",
            "nbytes": report.nbytes if report is not None else 0,
            "sources": [one.name for one in report.shares if one.nbytes] if report else [],
            "seconds": round(seeded.seconds, 3) if seeded is not None else None,
            "version": publication.version if publication is not None else None,
            "content": publication.content if publication is not None else None,
            "serves": publication is not None,
            "extra_nbytes": self._extra_nbytes,
        }

    def summary(self) -> str:
        """The same as a sentence."""
        facts = self.facts()
        how = "has read its weights with the engine's loader"
        if facts["source"] == "peers":
            how = (
                f"has copied {facts['nbytes'] / 1e6:.1f} MB of weights from "
                f"{', '.join(facts['sources'])} in {facts['seconds']:.1f} s"
            )
        extra = self._extra_nbytes / 1e6
        keeps = f", for whom it keeps {extra:.1f} MB more than the engine uses" if extra else ""
        if not self.serves:
            return f"{facts['rank']} {how}, and serves no peers"
        return f"{facts['rank']} {how}, and serves them to peers{keeps}"

    def close(self) -> None:
        """Withdraws the rank, and closes the engine and the registry. Any number of times."""
        seeded, engine, registry = self._seeded, self._engine, self._registry
        self._engine = self._registry = None
        for resource in (seeded, engine, registry):
            if resource is not None:
                with suppress(EngineRegistryError):
                    resource.close()

    def _load_or_seed(self, tensors: Tensors | Callable[[], Tensors], reading: _Reading) -> Seeded:
        registry, place, config = self._connected(), self._seat.place, self._config
        if self._engine is None:
            self._engine = self._make_engine(config, registry)
        return load_or_seed(
            registry,
            self._engine,
            self._model,
            tensors,
            rank=place.rank,
            world_size=place.world_size or 1,
            instance=self._seat.instance,
            fallback=reading,
            topology=place.topology,
            timeout_s=config.timeout_s,
            without_etcd_s=config.without_etcd_s,
            required=config.required,
            publish_later=True,
            load=config.load_options,
            publish=PublishOptions(generation=self._seat.generation, digests=True),
        )

    def _connected(self) -> Registry:
        if self._registry is None:
            self._registry = self._make_registry(self._config)
        return self._registry

    def _try(self, act: Callable[[], T], reading: _Reading | None = None) -> T | None:
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
            exc if isinstance(exc, EngineRegistryError) else f"{type(exc).__name__}: {exc}",
            extra=fields("integration_failed", rank=str(self._seat), error=exc),
        )
        self.close()
        self._seeded = None


class _Reading:
    """The engine's loader, with what came of it."""

    def __init__(self, read: Callable[[], object]) -> None:
        self._read = read
        self.done = False
        self.failed = False

    def __call__(self) -> None:
        try:
            self._read()
        except BaseException:
            self.failed = True
            raise
        self.done = True
