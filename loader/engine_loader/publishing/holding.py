"""Memory that outlives its process: all that a publication with `hold_s` offers lies in memory that
descriptors stand for, and its keeper has these. Used by `offering` and `opening`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from engine_loader.engines.base import Engine
from engine_loader.errors import EngineFailed, TensorsUnusable, listed
from engine_loader.options import PublishOptions
from engine_loader.sharing import offers
from engine_loader.sharing.memory import SharedMemory
from engine_loader.tensors.cuda import uuid_of
from engine_loader.tensors.destination import Destination
from engine_registry import Region
from engine_registry.registration.descriptors import Descriptors
from engine_registry.registration.hold import HOST, Hold
from engine_registry.schema.manifest import Export

_MEMORY = SharedMemory()


def check_can_be_held(tensors: Mapping[str, torch.Tensor]) -> None:
    """TensorsUnusable names those whose memory would go with the process."""
    mortal = [name for name, tensor in tensors.items() if tensor.numel() and _is_mortal(tensor)]
    if mortal:
        raise TensorsUnusable(
            f"{len(mortal)} tensors lie in memory that goes with this process, so they cannot be "
            f"held: {listed(mortal)}",
            "move them into an arena (arena_of), or publish without `hold_s`",
            problems=mortal,
        )


def _is_mortal(tensor: torch.Tensor) -> bool:
    try:
        region = Region(tensor.data_ptr(), tensor.nbytes)
        return not offers.are_by_descriptors(_MEMORY, region)
    except EngineFailed:
        return True


def exports_of(
    engine: Engine, regions: Sequence[Region], held: Sequence[Region]
) -> Sequence[Export]:
    """Of what the engine's peers map, or else of what can be `held`; EngineFailed."""
    exports = engine.exports(regions)
    if exports or not held:
        return exports
    for region in held:
        offers.check_whole(_MEMORY, region)
    return offers.describe(_MEMORY, held)


def descriptors_of(engine: Engine, exports: Sequence[Export]) -> Descriptors | None:
    """Of these exports, for the keeper; EngineFailed."""
    given = engine.descriptors(exports)
    return offers.descriptors_of(_MEMORY, exports) if given is None else given


def hold_for(weights: Destination, options: PublishOptions) -> Hold | None:
    """What the keeper does at the end of this process."""
    if not options.hold_s:
        return None
    return Hold(options.hold_s, tuple(dict.fromkeys(map(name_of, weights.devices))))


def name_of(device: torch.device) -> str:
    """As other processes of the host know it: of a GPU as nvidia-smi prints it."""
    return uuid_of(device.index) if device.type == "cuda" else HOST
