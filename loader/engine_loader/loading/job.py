"""What a load is to do, the same in each of its attempts. Made by `load`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine_loader.engines.base import Engine
from engine_loader.options import Verify
from engine_loader.tensors.destination import Destination
from engine_loader.transfer.pace import Pace
from engine_loader.transfer.progress import OnProgress
from engine_registry import Registry
from engine_registry.watching.waiting import Wanted


@dataclass(frozen=True)
class Job:
    """`rank` is the one that is filled, if it is known. With `reuse`, what is there already is not
    read. `base` are contents that the tensors may have. Ranks of `also_from` bring blocks that they
    hold as well: with the sources, `max_sources` at most.
    """

    registry: Registry
    engine: Engine
    destination: Destination
    rank: int | None
    verify: Verify
    pace: Pace
    on_progress: OnProgress
    cancel: threading.Event
    reuse: bool = False
    base: Sequence[str] = ()
    also_from: Wanted | None = None
    max_sources: int = 1

    @property
    def device(self) -> torch.device:
        """Where headers, digests and staged bytes are read to."""
        return self.destination.devices[0]
