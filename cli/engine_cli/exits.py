"""Exit codes, and which error has which."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    DONE = 0
    FAILED = 1
    USAGE = 2
    ETCD = 3
    INSTANCE = 4
    WEIGHTS = 5
    INTERRUPTED = 130


# By name, so that the command line need not import torch to know the loader's errors. A base class
# stands for those below it.
_CODES = {
    "engine_registry.errors.EngineRegistryError": Exit.FAILED,
    "engine_registry.errors.InvalidField": Exit.USAGE,
    "engine_registry.errors.EtcdError": Exit.ETCD,
    "engine_registry.errors.InstanceNotFound": Exit.INSTANCE,
    "engine_registry.errors.InstanceIncomplete": Exit.INSTANCE,
    "engine_registry.errors.ReleaseIncomplete": Exit.INSTANCE,
    "engine_loader.errors.SourceLost": Exit.INSTANCE,
    "engine_loader.errors.SourceUnreachable": Exit.INSTANCE,
    "engine_loader.errors.VersionUnavailable": Exit.INSTANCE,
    "engine_loader.errors.DeltaDamaged": Exit.WEIGHTS,
    "engine_loader.errors.DigestMismatch": Exit.WEIGHTS,
    "engine_loader.errors.DigestsMissing": Exit.WEIGHTS,
    "engine_loader.errors.WeightsMismatch": Exit.WEIGHTS,
    "engine_loader.errors.TornRead": Exit.WEIGHTS,
}


def code_of(exc: BaseException) -> Exit | None:
    """None for an error that is none of ours: a bug, or the machine's."""
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(exc).__mro__)
    return next((_CODES[name] for name in names if name in _CODES), None)
