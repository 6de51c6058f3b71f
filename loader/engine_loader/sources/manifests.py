"""Fetches the manifests of ranks that are to be read from, several in one request."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from engine_loader.errors import SourceLost
from engine_registry import Manifest, RankRecord, Registry
from engine_registry.errors import RecordDamaged
from engine_registry.schema.record import ManifestRef

KEPT_TENSORS = 200_000  # 100 MB or so
_Key = tuple[ManifestRef, int]


def _key(record: RankRecord) -> _Key:
    return record.manifest, record.shift


class _Kept:
    """The manifests that were fetched last, by the reference in their records, which has their
    digest, and by the shift: equal ones are equal.
    """

    def __init__(self, limit: int = KEPT_TENSORS) -> None:
        self._lock = threading.Lock()
        self._limit = limit
        # The one that was asked for last is the last.
        self._manifests: dict[_Key, Manifest] = {}

    def get(self, record: RankRecord) -> Manifest | None:
        with self._lock:
            manifest = self._manifests.pop(_key(record), None)
            if manifest is not None:
                self._manifests[_key(record)] = manifest
            return manifest

    def put(self, record: RankRecord, manifest: Manifest) -> None:
        with self._lock:
            self._manifests[_key(record)] = manifest
            self._shrink()

    def resize(self, limit: int) -> None:
        with self._lock:
            self._limit = limit
            self._shrink()

    def _shrink(self) -> None:
        while self._manifests and sum(ref.tensors for ref, _ in self._manifests) > self._limit:
            del self._manifests[next(iter(self._manifests))]
        if self._limit == 0:
            self._manifests.clear()  # those without tensors, too


_KEPT = _Kept()


def keep_manifests(tensors: int) -> None:
    """Keep manifests of that many tensors in all from now on: those that were asked for last."""
    _KEPT.resize(tensors)


def fetch_manifests(registry: Registry, records: Sequence[RankRecord]) -> list[Manifest]:
    """Raises the first of what `find_manifests` says instead of a manifest."""
    manifests = []
    for found in find_manifests(registry, records):
        if not isinstance(found, Manifest):
            raise found
        manifests.append(found)
    return manifests


def find_manifests(
    registry: Registry, records: Sequence[RankRecord]
) -> list[Manifest | SourceLost | RecordDamaged]:
    """The manifests of the ranks, in their order. Instead of one that cannot be had, SourceLost if
    its rank is gone, as far as it is asked; else RecordDamaged.
    """
    kept = {_key(record): _KEPT.get(record) for record in records}
    missing = [record for record in records if kept[_key(record)] is None]
    fetched = iter(registry.manifests(missing) if missing else ())
    found: list[Manifest | SourceLost | RecordDamaged] = []
    for record in records:
        manifest = kept[_key(record)] or _told(registry, record, next(fetched))
        if isinstance(manifest, Manifest):
            _KEPT.put(record, manifest)
        found.append(manifest)
    return found


def _told(
    registry: Registry, record: RankRecord, found: Manifest | RecordDamaged
) -> Manifest | SourceLost | RecordDamaged:
    """Why there is no manifest, where there is none."""
    if isinstance(found, Manifest) or registry.current(record) is not None:
        return found
    lost = SourceLost(f"{record.key} is not registered any more", "load again", key=record.key)
    lost.__cause__ = found
    return lost
