"""Sources that were evicted while a load read from them: nothing that they brought counts, whatever
their memory said. Used by attempts.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine_loader.errors import SourceEvicted
from engine_loader.sources.source import SourceRank
from engine_loader.transfer.received import Received
from engine_loader.transfer.shares import Share
from engine_registry import Registry


def check_registered(
    registry: Registry, received: Received, sources: Sequence[SourceRank], shares: Sequence[Share]
) -> None:
    """Asks etcd, when all bytes have come, for every rank that has brought some, or has said of
    some that they were there.

    A rank that was withdrawn, or whose process has ended, after it had been read and checked is as
    good as any. `shares` are those of the sources in this attempt. SourceEvicted.
    """
    used = [
        (source, share)
        for source, share in zip(sources, shares, strict=True)
        if share.nbytes or received.counts_on(source.record)
    ]
    for source, share in used:
        if not source.is_registered() and source.was_evicted():
            share.error = SourceEvicted(
                f"{source.record.key} was evicted meanwhile", key=source.record.key
            )
    received.find_evicted(registry, {source.record.incarnation for source in sources})
    if gone := [share.error for _, share in used if isinstance(share.error, SourceEvicted)]:
        raise gone[0]
    if received.evicted:
        key = received.evicted[0].key
        raise SourceEvicted(f"what {key} has brought does not count any more", key=key)


def discard_evicted(
    received: Received, sources: Sequence[SourceRank], shares: Sequence[Share]
) -> bool:
    """Forgets all that evicted ranks have brought, in this attempt and before, so that it is read
    again; whether that was anything.
    """
    evicted = [*received.evicted]
    for source, share in zip(sources, shares, strict=True):
        if isinstance(share.error, SourceEvicted):
            evicted.append(source.record)
            share.nbytes = 0
    return received.discard(evicted)
