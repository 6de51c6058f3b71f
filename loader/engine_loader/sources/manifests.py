"""Fetches the manifests of ranks that are to be read from, several at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from engine_loader.errors import SourceLost
from engine_registry import Manifest, RankRecord, Registry
from engine_registry.errors import RecordDamaged
from engine_registry.schema.record import ManifestRef

_AT_ONCE = 8
KEPT_TENSORS = 200_000  # 100 MB or so
T = TypeVar("T")


class _Kept:
    """The manifests that were fetched last, by the reference in their records, which has their
    digest: equal ones are equal.
    """

    def __init__(self, limit: int = KEPT_TENSORS) -> None:
        self._lock = threading.Lock()
        self._limit = limit
        # The one that was asked for last is the last.
        self._manifests: dict[ManifestRef, Manifest] = {}

    def get(self, ref: ManifestRef) -> Manifest | None:
        with self._lock:
            manifest = self._manifests.pop(ref, None)
            if manifest is not None:
                self._manifests[ref] = manifest
            return manifest

    def put(self, ref: ManifestRef, manifest: Manifest) -> None:
        with self._lock:
            self._manifests[ref] = manifest
            self._shrink()

    def resize(self, limit: int) -> None:
        with self._lock:
            self._limit = limit
            self._shrink()

    def _shrink(self) -> None:
        while self._manifests and sum(one.tensors for one in self._manifests) > self._limit:
            del self._manifests[next(iter(self._manifests))]
        if self._limit == 0:
            self._manifests.clear()  # those without tensors, too


_KEPT = _Kept()


def keep_manifests(tensors: int) -> None:
    """Keep manifests of that many tensors in all from now on: those that were asked for last."""
    _KEPT.resize(tensors)


def fetch_manifest(registry: Registry, record: RankRecord) -> Manifest:
    """SourceLost if the rank is gone, as far as it is asked; RecordDamaged."""
    manifest = _KEPT.get(record.manifest)
    if manifest is None:
        manifest = _fetch(registry, record)
        _KEPT.put(record.manifest, manifest)
    return manifest


def _fetch(registry: Registry, record: RankRecord) -> Manifest:
    try:
        return registry.manifest(record)
    except RecordDamaged as exc:
        if registry.current(record) is None:
            raise SourceLost(
                f"{record.key} is not registered any more", "load again", key=record.key
            ) from exc
        raise


def fetch_manifests(registry: Registry, records: Sequence[RankRecord]) -> list[Manifest]:
    return for_each(records, lambda record: fetch_manifest(registry, record))


def for_each(records: Sequence[RankRecord], fetch: Callable[[RankRecord], T]) -> list[T]:
    if len(records) == 1:
        return [fetch(records[0])]
    with ThreadPoolExecutor(min(_AT_ONCE, len(records))) as pool:
        return list(pool.map(fetch, records))
