"""Fetches the manifests of ranks that are to be read from, several at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from loader.errors import SourceLost
from registry import Manifest, RankRecord, Registry
from registry.errors import RecordDamaged

_AT_ONCE = 8
T = TypeVar("T")


def fetch_manifest(registry: Registry, record: RankRecord) -> Manifest:
    """SourceLost if the rank is gone; RecordDamaged."""
    try:
        return registry.manifest(record)
    except RecordDamaged as exc:
        if registry.current(record) is None:
            raise SourceLost(f"{record.key} is not registered any more: load again", key=record.key) from exc
        raise


def fetch_manifests(registry: Registry, records: Sequence[RankRecord]) -> list[Manifest]:
    return for_each(records, lambda record: fetch_manifest(registry, record))


def for_each(records: Sequence[RankRecord], fetch: Callable[[RankRecord], T]) -> list[T]:
    with ThreadPoolExecutor(min(_AT_ONCE, len(records))) as pool:
        return list(pool.map(fetch, records))
