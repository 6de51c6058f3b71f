"""What keepers of this host hold, as a metric. It belongs to the host: each process that counts
shows the same. Imported by `client`, and so by every process that has a registry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from engine_registry.registration.held import keepers_here
from engine_registry.telemetry.info import Measured


def _held_nbytes() -> Mapping[str, float]:
    """By device. The weights of one rank may lie on several: then these have one name."""
    nbytes = Counter[str]()
    for kept in keepers_here():
        if kept.held:
            nbytes[",".join(kept.devices)] += kept.nbytes
    return nbytes


HELD_BYTES = Measured(
    "engines_registry_held_bytes",
    "Bytes of weights that keepers of this host hold for ranks whose process has ended.",
    "device",
    _held_nbytes,
)
