"""Every error that `engine_loader` raises on purpose, beside those of `engine_registry`.

LoaderError
├── EngineUnavailable    the transfer engine cannot be imported or started: says what to install
├── EngineFailed         the transfer engine refused a local request, such as registering memory
├── ReadFailed           a peer's memory could not be read
├── TensorsUnusable      tensors that cannot be registered or filled as they are
├── SnapshotsUnfit       there is no memory for snapshots of published tensors, or for deltas
├── NoFreeSnapshot       each snapshot holds a version that must stay, as the released one does
├── HeldUnusable         memory that a rank has left here cannot be adopted
├── MemoryInUse          their memory is published, or another load fills it
├── WeightsFileInvalid   a file cannot be read as safetensors, or not be written
├── ArtifactInvalid      a folder cannot be an artifact, or an artifact not be put into a folder
├── WeightsMismatch      source and destination differ; nothing was read
├── SourceUnreachable    this engine can read none of the sources: says why for each
├── VersionUnavailable   the version that was asked for is not served (any more)
├── SourceLost           every source went away before all was read and checked
│   ├── SourceEvicted    the source's registration was ended: what it gave is discarded
│   └── Stalled          the last source is there, but sends nothing
├── DigestMismatch       tensors are not what their source says they are
├── DigestsMissing       digests were asked for, but the source offers none
├── DeltaDamaged         the changes that a source offers cannot be applied
├── TornRead             the source's weights changed while they were read, in every try
└── Cancelled            the caller wanted it no longer
"""

from __future__ import annotations

from collections.abc import Sequence

from engine_registry.errors import EngineRegistryError

_LISTED = 10


class LoaderError(EngineRegistryError):
    """An error of `engine_loader`."""


class EngineUnavailable(LoaderError):
    """The transfer engine cannot be imported or started: says what to install."""


class EngineFailed(LoaderError):
    """The transfer engine refused a local request, such as registering memory."""


class ReadFailed(LoaderError):
    """A peer's memory could not be read."""


class TensorsUnusable(LoaderError):
    """Tensors that cannot be registered or filled as they are."""


class SnapshotsUnfit(LoaderError):
    """There is no memory for the snapshots of published tensors, or for deltas."""


class NoFreeSnapshot(LoaderError):
    """There is no place for a new snapshot: one has the present version, the other the released
    one.
    """


class MemoryInUse(LoaderError):
    """The memory is published, or another load fills it."""


class HeldUnusable(LoaderError):
    """Memory that a rank has left with its keeper, or shares, cannot be had or used.

    The tensors are as they were. `details["reason"]` is one of these:

    - `gone`: its keeper has ended, has let it go, or has given it to another process.
    - `tensors`: names, dtypes, shapes or devices differ. The memory stays held.
    - `torn`: the rank ended while it changed its weights, or they have changed while they were
      looked at. Held memory is let go.
    - `digests`: tensors are not what the rank has published. Held memory is let go.
    """


class WeightsFileInvalid(LoaderError):
    """A file cannot be read as safetensors, or not be written."""


class ArtifactInvalid(LoaderError):
    """A folder cannot be an artifact, or an artifact cannot be put into a folder."""


class WeightsMismatch(LoaderError):
    """Source and destination differ in names, shapes, dtypes or boxes; nothing was read."""


class SourceUnreachable(LoaderError):
    """There are sources, but none that this engine can read: says why for each."""


class VersionUnavailable(LoaderError):
    """The version that was asked for is not served (any more)."""


class SourceLost(LoaderError):
    """Every source went away before all was read and checked."""


class SourceEvicted(SourceLost):
    """The source was evicted: nothing that it brought counts."""


class Stalled(SourceLost):
    """The last one is there, but nothing has come from it for too long."""


class DigestMismatch(LoaderError):
    """Tensors are not what their source says they are."""


class DigestsMissing(LoaderError):
    """Digests were asked for, but the source offers none."""


class DeltaDamaged(LoaderError):
    """The changes that a source offers are damaged, or lead from other weights than ours."""


class TornRead(LoaderError):
    """The source's weights changed while they were read, in every try."""


class Cancelled(LoaderError):
    """The caller cancelled the load."""


def listed(problems: Sequence[str]) -> str:
    """Problems in one line, cut to what a person reads; `details["problems"]` has all."""
    more = f"; … and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
    return "; ".join(problems[:_LISTED]) + more
