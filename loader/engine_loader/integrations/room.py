"""Room on a device for an engine's model, where keepers hold memory there.

The model may adopt some of it, and needs no other then. Starts no thread.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import torch

from engine_loader.adopting.finding import find_each
from engine_loader.errors import EngineFailed
from engine_loader.integrations.connecting import Connection
from engine_loader.publishing.holding import name_of
from engine_loader.tensors.available import available_nbytes
from engine_loader.tensors.deferred import Deferred, deferred_parameters
from engine_registry import ModelIdentity, Place, Registry
from engine_registry.errors import EngineRegistryError
from engine_registry.registration.held import Kept, keepers_here, let_go
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


def numbered(device: torch.device) -> torch.device:
    """The GPU that the engine has chosen, where it says only that it is one."""
    number: int | None = device.index  # torch says that it is always there
    if device.type == "cuda" and number is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def held_on(device: torch.device) -> list[Kept]:
    """What keepers of this user hold there, for any rank."""
    device = numbered(device)
    return [kept for kept in keepers_here() if kept.held and name_of(device) in kept.devices]


@contextmanager
def built_beside_held(device: torch.device) -> Iterator[Deferred | None]:
    """Where something is held on the device that leaves no room for as much, a model that is built
    in the block has no memory for its large parameters. Else None.
    """
    device = numbered(device)
    held, available = sum(kept.nbytes for kept in held_on(device)), available_nbytes(device)
    crowded = available is not None and held > available
    try:
        with deferred_parameters(device) if crowded else nullcontext() as deferred:
            yield deferred
    except torch.OutOfMemoryError:
        if held:
            what, remedy = _no_room(device, "to make the model")
            log.error("%s: %s", what, remedy, extra=fields("no_room_beside_held", held_nbytes=held))
        raise
    if deferred is not None:
        log.info(
            "%.2f GB of %s are held, and %.2f GB are free: the model is made without memory for "
            "%.2f GB of its weights",
            held / 1e9,
            device,
            (available or 0) / 1e9,
            deferred.nbytes / 1e9,
            extra=fields("parameters_deferred", nbytes=deferred.nbytes, held_nbytes=held),
        )


def give_memory(
    deferred: Deferred, connection: Connection, model: ModelIdentity, place: Place
) -> None:
    """To parameters that were not adopted. What the rank could have adopted is let go, with a
    warning, if there is no room beside it. EngineFailed where there is no room at all.
    """
    if not deferred.nbytes:
        return
    available = available_nbytes(deferred.device)
    if available is not None and available < deferred.nbytes:
        with suppress(EngineRegistryError):
            _let_go(deferred, connection.registry, model, place)
    try:
        deferred.give_memory()
    except torch.OutOfMemoryError as exc:
        what = f"for {deferred.nbytes / 1e9:.2f} GB of weights"
        raise EngineFailed(*_no_room(deferred.device, what)) from exc


def _no_room(device: torch.device, what: str) -> tuple[str, str]:
    """What is wrong, and how to mend it."""
    held = held_on(device)
    held_for = "".join(f"; {kept.nbytes / 1e9:.2f} GB are held for {kept.key}" for kept in held)
    remedy = "free what is held, then start the engine again" if held else "free some of it"
    return f"there is no room on {device} {what}{held_for}", remedy


def _let_go(deferred: Deferred, registry: Registry, model: ModelIdentity, place: Place) -> None:
    rank, world_size = place.rank, place.world_size or 1
    for found in find_each(registry, model, rank, world_size, place.topology, shared=False):
        if name_of(deferred.device) not in found.kept.devices:
            continue
        log.warning(
            "the weights that %s has left on this host were not adopted, and are let go: they "
            "leave no room for %.2f GB",
            found.record.key,
            deferred.nbytes / 1e9,
            extra=fields("held_let_go", key=found.record.key, nbytes=found.kept.nbytes),
        )
        let_go(found.kept)
