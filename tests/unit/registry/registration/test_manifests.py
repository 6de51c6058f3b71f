"""Manifests as a reader gets them: with the addresses of the version that the record describes."""

from __future__ import annotations

import pytest

from engine_registry.errors import RecordDamaged
from engine_registry.registration.manifests import fetch_manifest
from engine_registry.schema import manifest_format
from engine_registry.schema.keys import manifest_part_key
from engine_registry.schema.keyvalue import Put
from engine_registry.schema.record import RankRecord
from tests.support.builders import a_manifest, a_record, an_entry
from tests.support.shelf import CountingEtcd

MANIFEST = a_manifest(an_entry(addr=4096))


def shelved(etcd: CountingEtcd, shift: int) -> RankRecord:
    ref, parts = manifest_format.encode(MANIFEST)
    record = a_record(manifest=ref, shift=shift)
    for number, part in enumerate(parts):
        key = manifest_part_key(record.instance, record.rank, record.incarnation, number)
        etcd.commit([], [Put(key, part, 0)])
    return record


@pytest.mark.parametrize("shift", [0, 512, -4096, (1 << 62)])
def test_a_version_that_lies_elsewhere_has_its_addresses_there(shift: int) -> None:
    etcd = CountingEtcd()
    assert fetch_manifest(etcd, shelved(etcd, shift)) == MANIFEST.shifted(shift)


@pytest.mark.parametrize("shift", [-4097, 1 - (1 << 63), (1 << 63) - 1])
def test_a_place_where_there_is_no_memory_is_damage(shift: int) -> None:
    etcd = CountingEtcd()
    with pytest.raises(RecordDamaged, match="from where the manifest says there is no memory"):
        fetch_manifest(etcd, shelved(etcd, shift))
