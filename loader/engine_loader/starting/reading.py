"""How a rank reads its weights when no peer has them: from files, or by a function of its engine.

Used by `starting.start`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from engine_loader.errors import Cancelled
from engine_loader.files.disk import DiskRead
from engine_loader.files.folder import Paths, files_of
from engine_loader.files.stored import Files
from engine_loader.tensors.destination import Destination
from engine_loader.transfer.progress import OnProgress
from engine_registry.errors import InvalidField

Fallback = Paths | Callable[[], object]


class Reading(Protocol):
    """Fills the tensors that it was made for; one use.

    It is made before the rank is registered, and refuses then what it cannot read.
    """

    def read(self, progress: OnProgress | None, cancel: threading.Event | None) -> object:
        """Raises Cancelled, and what the files or the function raise."""


class Call:
    """A read by a function of the caller, of which nothing is known until it returns."""

    def __init__(self, function: Callable[[], object], destination: Destination) -> None:
        self._function = function
        self._destination = destination

    def read(self, progress: OnProgress | None, cancel: threading.Event | None) -> None:
        """As `Reading`. TensorsUnusable names each tensor that has other memory now."""
        self._function()
        if cancel is not None and cancel.is_set():
            raise Cancelled("the start was cancelled while the function in `fallback` ran")
        self._destination.check_in_place(
            "the function in `fallback` gave tensors other memory, which peers would not read",
            "fill the tensors in place, as `tensor.copy_(…)` does",
        )


def reading_of(fallback: Fallback, destination: Destination, rank: int) -> Reading:
    """WeightsFileInvalid or WeightsMismatch where files do not have the tensors."""
    if callable(fallback):
        return Call(fallback, destination)
    return DiskRead(Files(files_of(fallback, rank)), destination.parts, destination.manifest)


def check_fallback(fallback: object) -> None:
    """InvalidField where it is neither a function nor a path."""
    if not (callable(fallback) or isinstance(fallback, str | Path | Sequence)):
        raise InvalidField(
            f"`fallback` {fallback!r} is not valid",
            "give the path of files, or a function that fills the tensors",
            field="fallback",
        )
