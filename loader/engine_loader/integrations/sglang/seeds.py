"""A seed of SGLang's own transfer, registered in etcd in place of SGLang's node 0.

SGLang has registered the parameters with its transfer engine by then. The seed adds a header, so
that readers see a change of the weights.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from engine_loader.engines.mooncake.devices import usable_devices
from engine_loader.integrations.seat import Seat
from engine_loader.integrations.sglang.seed_engine import SeedEngine
from engine_loader.options import PublishOptions
from engine_loader.publishing.publication import Publication
from engine_loader.publishing.publish import publish
from engine_registry import ModelIdentity, Region, Registry
from engine_registry.errors import EngineRegistryError
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
OwnMemory = Callable[[], AbstractContextManager[None]]


class Seed:
    """The published parameters of a model. What fails later only ends the publication."""

    def __init__(self, publication: Publication, own_memory: OwnMemory) -> None:
        self._publication = publication
        self._own_memory = own_memory
        atexit.register(self.close)

    def pause(self) -> None:
        """Before the parameters change."""
        self._try(self._publication.pause, needed=not self._publication.paused)

    def resume(self) -> None:
        """They are as they were."""
        with self._own_memory():
            self._try(self._publication.resume, needed=self._publication.paused)

    def replace(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """They are others now."""
        with self._own_memory():
            self._try(lambda: self._publication.replace(tensors))

    def close(self) -> None:
        """Withdraws the seed. Any number of times."""
        atexit.unregister(self.close)
        self._publication.close()

    def _try(self, act: Callable[[], object], needed: bool = True) -> None:
        if not needed:
            return
        try:
            act()
        except EngineRegistryError as exc:
            log.warning(
                "%s is no seed any more: %s",
                self._publication.record.key,
                exc,
                extra=fields("seed_ended", key=self._publication.record.key, error=exc),
            )
            self.close()


def publish_seed(
    registry: Registry,
    transporter: Any,
    tensors: Mapping[str, torch.Tensor],
    model: ModelIdentity,
    seat: Seat,
    protocol: str,
    labels: Mapping[str, str] | None = None,
    location: str = "",
) -> Seed:
    """Registers the rank.

    Args:
        registry: Where it is registered.
        transporter: SGLang's holder of its transfer engine and of what it has registered.
        tensors: The parameters.
        model: The identity of the weights.
        seat: Which rank it is.
        protocol: What SGLang was asked to use.
        labels: Names and values by which people find the instance.
        location: Where this machine stands: `ZONE[/RACK[/NODE]]`.

    Raises:
        LoaderError, RegistryError: As `publish`.
    """
    weights = [
        Region(addr, numel * itemsize) for addr, numel, itemsize in transporter.weight_info.values()
    ]
    engine = SeedEngine(
        transporter.engine,
        transporter.session_id,
        protocol_in_use(protocol),
        weights,
        location,
    )
    own_memory = apart_from(tensors)
    with own_memory():
        publication = publish(
            registry,
            engine,
            instance=seat.instance,
            rank=seat.place.rank,
            world_size=seat.place.world_size or 1,
            tensors=tensors,
            model=model,
            topology=seat.place.topology,
            options=PublishOptions(generation=seat.generation, labels=labels),
        )
    return Seed(publication, own_memory)


def apart_from(tensors: Mapping[str, torch.Tensor]) -> OwnMemory:
    """Where to allocate a header: not in a segment of torch's allocator that holds parameters. What
    lies beside them in one is not registered, as SGLang has registered the parameters alone.
    """
    device = next(iter(tensors.values())).device
    if device.type != "cuda":
        return nullcontext
    pool = torch.cuda.MemPool()
    return lambda: torch.cuda.use_mem_pool(pool, device)


def protocol_in_use(wanted: str) -> str:
    """Mooncake takes tcp where it is forced to, or where there is no RDMA device that works."""
    if wanted == "rdma" and (os.environ.get("MC_FORCE_TCP") or not usable_devices()):
        return "tcp"
    return wanted
