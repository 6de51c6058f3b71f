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


# By name, so that the command line need not import torch to know the loader's errors. A base class stands for those below it.
_CODES = {
    "registry.errors.RegistryError": Exit.FAILED,
    "registry.errors.InvalidField": Exit.USAGE,
    "registry.errors.EtcdError": Exit.ETCD,
    "registry.errors.InstanceNotFound": Exit.INSTANCE,
    "registry.errors.InstanceIncomplete": Exit.INSTANCE,
    "loader.errors.LoaderError": Exit.FAILED,
    "loader.errors.SourceLost": Exit.INSTANCE,
    "loader.errors.SourceUnreachable": Exit.INSTANCE,
    "loader.errors.VersionUnavailable": Exit.INSTANCE,
    "loader.errors.DigestMismatch": Exit.WEIGHTS,
    "loader.errors.DigestsMissing": Exit.WEIGHTS,
    "loader.errors.WeightsMismatch": Exit.WEIGHTS,
    "loader.errors.TornRead": Exit.WEIGHTS,
}


def code_of(exc: BaseException) -> Exit | None:
    """None for an error that is none of ours: a bug, or the machine's."""
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(exc).__mro__)
    return next((_CODES[name] for name in names if name in _CODES), None)
