"""Weights that a rank like the one that starts has left on this host, as its process ended.

Used by `starting.start`. Starts no thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine_loader import metrics
from engine_loader.adopting.adopt import adopt
from engine_loader.adopting.adopted import Adopted
from engine_loader.adopting.finding import find_held
from engine_loader.errors import HeldUnusable
from engine_loader.starting.peers import note_unknown
from engine_loader.starting.seed import Seed
from engine_loader.starting.seeded import Seeded
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.shards import Shard
from engine_registry.errors import EtcdError, EtcdUnavailable

log = logging.getLogger(__name__)
MayAdopt = bool | Callable[[Mapping[str, torch.Tensor]], bool]


@dataclass
class HeldHere:
    """What one start may adopt. It is tried once, and again where etcd was away."""

    seed: Seed
    tensors: Callable[[], Mapping[str, torch.Tensor]]  # it is called where something is held
    shards: Mapping[str, Shard] | None
    may_adopt: MayAdopt
    verify: bool
    publish_later: bool
    tried: bool = False

    def seeded(self, began: float) -> Seeded | None:
        """The start, which began then, with the memory that is held. None where none is, or it is
        of no use, or etcd cannot be asked.
        """
        adopted = self._adopt()
        if adopted is None:
            return None
        self.seed.replaces = adopted.record.incarnation
        publication = None if self.publish_later else self.seed.open_adopted(adopted)
        metrics.STARTS.inc("held")
        return Seeded(
            "held",
            publication,
            report=None,
            reason="",
            seconds=time.monotonic() - began,
            unpublished=self.seed.unpublished,
            adopted=adopted,
            _seed=self.seed,
        )

    def _adopt(self) -> Adopted | None:
        if self.tried or self.may_adopt is False:
            return None
        seed, self.tried = self.seed, True
        like: dict[str, Any] = {
            "rank": seed.rank,
            "world_size": seed.world_size,
            "topology": seed.replica.topology,
        }
        try:
            if find_held(seed.registry, seed.model, **like) is None:
                return None
            tensors = self.tensors()
            if isinstance(tensors, Destination):  # it knows where the tensors are
                return None
            if callable(self.may_adopt) and not self.may_adopt(tensors):
                return None
            return adopt(
                seed.registry,
                seed.model,
                tensors,
                **like,
                shards=self.shards,
                verify=self.verify,
            )
        except EtcdError as exc:
            self.tried = not isinstance(exc, EtcdUnavailable)
            note_unknown(seed.model, exc)
        except HeldUnusable as exc:
            log.warning(
                "%s does not adopt the weights that are held here, so they will come from peers, "
                "or be read: %s",
                seed.name,
                exc,
                extra=seed.fields("held_unusable", error=exc),
            )
        return None
