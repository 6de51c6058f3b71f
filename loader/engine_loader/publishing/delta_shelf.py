"""Deltas that a rank passes on: those by which loads have brought the tensors that it serves from
one content to the next. Its readers find them where they find those that a trainer writes.

The bytes stay as they came, so they only fit tensors like the trainer's. `keep_deltas` is called by
a load that has proven what its tensors hold.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from engine_loader.deltas.encode import erase
from engine_loader.deltas.format import capacity_of
from engine_loader.deltas.kept import KeptDelta
from engine_loader.engines.base import Engine, offer
from engine_loader.options import PublishOptions
from engine_loader.publishing.slots import allocate
from engine_loader.tensors.cuda import to_register
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.uses import Runs
from engine_registry import Region
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


class DeltaShelf:
    """Buffers for the deltas of a publication. One caller at a time."""

    def __init__(self, owner: str, weights: Destination, buffers: Sequence[torch.Tensor]) -> None:
        """`owner` names the publication in messages."""
        self._owner = owner
        self._weights = weights
        self._buffers = deque(buffers)  # the oldest first
        self._warned = False

    @property
    def regions(self) -> tuple[Region, ...]:
        """Of all buffers, for the manifest."""
        return tuple(Region(one.data_ptr(), one.nbytes) for one in self._buffers)

    def serves(self, runs: Runs) -> bool:
        """Whether that is the memory of the tensors which are served."""
        return list(self._weights.runs) == list(runs)

    def keep(self, deltas: Sequence[KeptDelta]) -> None:
        """The last of these, in the places of the oldest ones. Without one that cannot be kept,
        those before it lead nowhere.
        """
        kept: list[KeptDelta] = []
        for delta in reversed(deltas):
            if len(kept) == len(self._buffers) or not self._can_be_kept(delta):
                break
            kept.append(delta)
        for delta in reversed(kept):
            delta.put(self._buffers[0])
            self._buffers.rotate(-1)

    def close(self) -> None:
        """Nobody finds a delta any more. Any number of times."""
        with _LOCK:
            _SHELVES.discard(self)
        for buffer in self._buffers:
            erase(buffer)

    def _can_be_kept(self, delta: KeptDelta) -> bool:
        nbytes = self._buffers[0].nbytes
        if not delta.is_of(self._weights.manifest.tensors):
            why = (
                "its tensors or their layout are not those of the source. To write deltas of its "
                "own, publish with Snapshots(deltas=…)"
            )
        elif delta.header.nbytes > nbytes:
            why = (
                f"a delta of {delta.header.nbytes} bytes does not fit into {nbytes}. "
                "PublishOptions(changed=…) gives deltas more memory"
            )
        else:
            return True
        log.log(
            logging.INFO if self._warned else logging.WARNING,
            "%s does not pass on the delta that it came by: %s",
            self._owner,
            why,
            extra=fields("delta_not_kept", key=self._owner, nbytes=delta.header.nbytes),
        )
        self._warned = True
        return False


_SHELVES: weakref.WeakSet[DeltaShelf] = weakref.WeakSet()  # of this process
_LOCK = threading.Lock()  # of the set


def offer_shelf(
    engine: Engine, weights: Destination, undo: ExitStack, owner: str, options: PublishOptions
) -> DeltaShelf | None:
    """Registers memory for the deltas of these weights until `undo` is closed. SnapshotsUnfit where
    there is none. None where no deltas are wanted.
    """
    if not options.deltas:
        return None
    device = weights.devices[0]
    nbytes = capacity_of(weights.manifest.tensors, options.changed)
    buffers = allocate(options.deltas, nbytes, device, weights, "deltas")
    shelf = DeltaShelf(owner, weights, buffers)
    undo.callback(shelf.close)
    for region in shelf.regions:
        offer(engine, undo, to_register(region, device.type))
    with _LOCK:
        _SHELVES.add(shelf)
    log.info(
        "the deltas that %s passes on take %d bytes, in %d buffers on %s",
        owner,
        options.deltas * nbytes,
        options.deltas,
        device,
        extra=fields("deltas_allocated", nbytes=options.deltas * nbytes, device=str(device)),
    )
    return shelf


def keep_deltas(runs: Runs, deltas: Sequence[KeptDelta]) -> None:
    """For the readers of the publication that serves this memory, if it keeps deltas. They have
    brought the memory to the content that it is proven to hold.
    """
    if not deltas:
        return
    with _LOCK:
        shelves = [shelf for shelf in _SHELVES if shelf.serves(runs)]
    for shelf in shelves:
        shelf.keep(deltas)
