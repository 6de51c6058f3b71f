"""One look at who holds the weights of a model, through the index of holders.

Ranks that are not in the index, as those of the release before, are found by reading all records:
where the index has nobody, and there are more records than entries. That goes in the next release.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from engine_registry import failpoints
from engine_registry.errors import EtcdRefused
from engine_registry.etcd.client import Etcd
from engine_registry.holders import index
from engine_registry.holders.ahead import loading_before
from engine_registry.holders.query import HolderQuery, Holders, everything
from engine_registry.holders.sampling import Sample, sample, sample_retained
from engine_registry.schema.holder import Entry, holders_prefix
from engine_registry.schema.keys import ENGINES, instance_prefix
from engine_registry.schema.keyvalue import under
from engine_registry.schema.location import UNKNOWN, Location
from engine_registry.schema.place import Place
from engine_registry.schema.record import ModelIdentity, RankRecord, RankState
from engine_registry.schema.roster import Roster, assess_all, instance_of
from engine_registry.schema.status import InstanceState, InstanceStatus
from engine_registry.telemetry import metrics
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
MAX_INSTANCES = 4  # whose ranks are all read, where more are ready

Usable = Callable[[InstanceStatus], bool]
T = TypeVar("T")


def look(etcd: Etcd, query: HolderQuery) -> Holders:
    """Ranks as the query wants them."""
    found = _by_index(
        etcd, lambda: _look(etcd, query), lambda some: any(map(query.usable, some.ready))
    )
    return _scan(etcd, query) if found is None else found


def look_anywhere(etcd: Etcd, query: HolderQuery) -> Holders:
    """Ranks as the query wants them; where none is ready, instances of the model that are."""
    found = look(etcd, query)
    if found.ready:
        return found
    failpoints.reach("holders.before_instances")
    instances = look_for_instances(etcd, query.model, everything, query.version, query.near)
    if any(_fitting(status.records, query, RankState.READY) for status in instances):
        found = look(etcd, query)  # the rank may have come between the two looks
    return found if found.ready else replace(found, instances=instances)


def look_for_instances(
    etcd: Etcd,
    model: ModelIdentity,
    usable: Usable,
    version: int | None = None,
    near: Location = UNKNOWN,
) -> tuple[InstanceStatus, ...]:
    """A few instances of the model that are ready, usable ones if there are any, of the newest
    version first; such whose rank 0 is in the zone of `near`, if there are any.
    """
    ready = _by_index(
        etcd,
        lambda: tuple(_ready_instances(etcd, model, usable, version, near)),
        lambda some: any(map(usable, some)),
    )
    return _scan_for_instances(etcd, model) if ready is None else ready


def instances_of(etcd: Etcd, model: ModelIdentity) -> tuple[InstanceStatus, ...]:
    """Some instances that have a rank of the model in whatever state: to say what is missing."""
    names = _by_index(etcd, lambda: _names(etcd, model), bool)
    if names is None:
        return tuple(status for status in _all_instances(etcd) if _has(status, model))
    return tuple(read_roster(etcd, name).status() for name in names[:MAX_INSTANCES])


def find_updating(etcd: Etcd, model: ModelIdentity, rank: int) -> tuple[RankRecord, ...]:
    """Some ranks of the model with this number whose weights are being changed now."""
    state = RankState.UPDATING
    some = _by_index(
        etcd,
        lambda: index.read(etcd, sample(etcd, model, rank, state, None).entries).records,
        bool,
    )
    if some is None:
        return tuple(
            record
            for record in index.read_all(etcd)
            if (record.model, record.rank, record.state) == (model, rank, state)
        )
    return tuple(record for record in some if record.state is state)


def read_roster(etcd: Etcd, instance: str) -> Roster:
    """What is known of one instance now."""
    roster = Roster(instance)
    for item in etcd.snapshot(instance_prefix(instance)).items:
        roster.see(item)
    return roster


def _by_index(etcd: Etcd, find: Callable[[], T], is_enough: Callable[[T], object]) -> T | None:
    """What is found by the index. None where that may lack somebody: it is not enough, and there
    are ranks without an entry, or we may not read the index.
    """
    try:
        found = find()
        return found if is_enough(found) or index.is_complete(etcd) else None
    except EtcdRefused as exc:
        if exc.details.get("reason") != "denied":
            raise
        return None


def _names(etcd: Etcd, model: ModelIdentity) -> list[str]:
    """Of some instances that have a rank of the model."""
    _, (found,) = etcd.read([under(holders_prefix(model), 8 * index.SAMPLE)])
    return sorted({instance_of(entry.record_key) for entry in index.entries_of(found.items)})


def _look(etcd: Etcd, query: HolderQuery) -> Holders:
    model, rank, version = query.model, query.place.rank, query.version
    some_ready = _sample_ready(etcd, model, rank, version, query.near)
    if not some_ready.entries and version is not None:  # to say what there is instead
        return _look(etcd, replace(query, version=None))
    loading, ahead = loading_before(etcd, query) if query.loading else ([], 0)
    found = index.read(etcd, [*some_ready.entries, *loading])
    ready = _fitting(found.records, query, RankState.READY)
    if not any(map(query.usable, ready)) and some_ready.area:
        some_ready = sample(etcd, model, rank, RankState.READY, version)
        found = index.read(etcd, [*some_ready.entries, *loading])
        ready = _fitting(found.records, query, RankState.READY)
    if not any(map(query.usable, ready)) and not some_ready.are_all:
        for page in index.pages(etcd, model, rank, RankState.READY, version):
            of_page = index.read(etcd, [*page, *loading])
            some = _fitting(of_page.records, query, RankState.READY)
            if any(map(query.usable, some)) or not ready:
                found, ready = of_page, some
            if any(map(query.usable, ready)):
                break
    loading_ones = [
        record
        for record in _fitting(found.records, query, RankState.LOADING)
        if query.usable(record)
    ]
    usable = [record for record in ready if query.usable(record)]
    return Holders(
        tuple(usable or ready),
        some_ready.all_of_version,
        tuple(loading_ones),
        ahead,
        found.readers,
        found.revision,
    )


def _sample_ready(
    etcd: Etcd, model: ModelIdentity, rank: int, version: int | None, near: Location
) -> Sample:
    """Where no rank has the version as its present one, those that have retained it."""
    some = sample(etcd, model, rank, RankState.READY, version, near)
    if some.entries or version is None:
        return some
    return sample_retained(etcd, model, rank, version)


def _fitting(
    records: Sequence[RankRecord], query: HolderQuery, state: RankState
) -> list[RankRecord]:
    return [
        record
        for record in records
        if record.state is state
        and record.model == query.model
        and query.place.fits(Place.of(record))
    ]


def _ready_instances(
    etcd: Etcd, model: ModelIdentity, usable: Usable, version: int | None, near: Location
) -> list[InstanceStatus]:
    """Each instance that is ready has a rank 0 that is."""
    some = _sample_ready(etcd, model, 0, version, near)
    if not some.entries and version is not None:  # to say what there is instead
        return _ready_instances(etcd, model, usable, None, near)
    ready = _of_entries(etcd, model, some.entries, usable)
    if any(map(usable, ready)) or some.are_all:
        return ready
    if some.area:
        return _ready_instances(etcd, model, usable, version, UNKNOWN)
    for page in index.pages(etcd, model, 0, RankState.READY, version):
        of_page = _of_entries(etcd, model, page, usable)
        if any(map(usable, of_page)):
            return of_page
        ready = ready or of_page
    return ready


def _of_entries(
    etcd: Etcd, model: ModelIdentity, entries: Sequence[Entry], usable: Usable
) -> list[InstanceStatus]:
    """The usable ones that are ready, until there are enough; some that are ready where none is."""
    good: list[InstanceStatus] = []
    others: list[InstanceStatus] = []
    for entry in entries:
        status = read_roster(etcd, instance_of(entry.record_key)).status()
        if status.state is InstanceState.READY and status.model == model:
            (good if usable(status) else others).append(status)
        if len(good) == MAX_INSTANCES:
            break
    return good or others[:MAX_INSTANCES]


# -- ranks that are not in the index
# --------------------------------------------------------------------------------------------------


def _scan(etcd: Etcd, query: HolderQuery) -> Holders:
    _note_scan(query.model)
    records = [
        record
        for record in index.read_all(etcd)
        if record.model == query.model and record.rank == query.place.rank
    ]
    ready = _fitting(records, query, RankState.READY)
    usable = [record for record in ready if query.usable(record)]
    before = [
        record
        for record in _fitting(records, query, RankState.LOADING)
        if query.loading
        and query.usable(record)
        and (query.me is None or record.began < query.me.began)
    ]
    before.sort(key=lambda record: record.began, reverse=True)
    some = [*(usable or ready), *before[: index.SAMPLE]]
    counted = index.read(etcd, [_entry(record) for record in some])
    return Holders(
        tuple(usable or ready),
        True,
        tuple(before[: index.SAMPLE]),
        len(before),
        counted.readers,
        counted.revision,
        scanned=True,
    )


def _scan_for_instances(etcd: Etcd, model: ModelIdentity) -> tuple[InstanceStatus, ...]:
    return tuple(
        status
        for status in _all_instances(etcd)
        if status.state is InstanceState.READY and status.model == model
    )


def _all_instances(etcd: Etcd) -> tuple[InstanceStatus, ...]:
    return assess_all(etcd.snapshot(ENGINES).items)


def _has(status: InstanceStatus, model: ModelIdentity) -> bool:
    return any(record.model == model for record in status.records)


def _entry(record: RankRecord) -> Entry:
    return Entry(
        record.key, record.rank, record.state, record.version, record.order, record.incarnation
    )


def _note_scan(model: ModelIdentity) -> None:
    metrics.HOLDER_SCANS.inc()
    log.info(
        "the index of holders does not have every rank, so all records were read for %s",
        model,
        extra=fields("holders_scanned", model=str(model)),
    )
