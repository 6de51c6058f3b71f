"""Finds the released version of an instance, or of a model, and waits for it.

Used by `client`. Runs in the caller's thread; a wait that can be cancelled starts another one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from engine_registry.errors import EtcdUnavailable, RecordDamaged
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.follow import Follower
from engine_registry.schema.holder import model_digest
from engine_registry.schema.keys import (
    RELEASES,
    check_instance,
    instance_prefix,
    parse_release_key,
    pulls_prefix,
    release_key,
)
from engine_registry.schema.keyvalue import Batch, KeyValue, Range, Snapshot, under
from engine_registry.schema.pull_ticket import decode as decode_ticket
from engine_registry.schema.record import ModelIdentity, RankRecord
from engine_registry.schema.release import Release, decode_release
from engine_registry.schema.roster import Roster
from engine_registry.telemetry.logs import fields
from engine_registry.watching.waiting import Wanted, stopped_by

log = logging.getLogger(__name__)


def find_release(
    etcd: Etcd, wanted: Wanted, timeout_s: float, cancel: threading.Event | None = None
) -> Release | None:
    """The released version of the instance; of several, or of a model, the newest that all ranks of
    its instance hold now, or else the newest. Waits for one; None where there is none in time.

    `cancel` ends the wait before its time.
    """
    model, names = "", list[str]()
    if isinstance(wanted, ModelIdentity):
        model = model_digest(wanted)
    else:
        names = [check_instance(one) for one in ([wanted] if isinstance(wanted, str) else wanted)]
    one = release_key(names[0]) if len(names) == 1 else ""
    follower = Follower(etcd, one or RELEASES, time.monotonic() + timeout_s, exact=bool(one))
    known: dict[str, Release] = {}
    seen = False
    with stopped_by(cancel, follower):
        for update in _updates(etcd, one, follower if timeout_s > 0 else None):
            seen = True
            if isinstance(update, Snapshot):
                known.clear()
            for change in update.items if isinstance(update, Snapshot) else update.changes:
                known.pop(change.key, None)
                release = _read(change) if isinstance(change, KeyValue) else None
                if release is not None and (release.model == model or release.instance in names):
                    known[change.key] = release
            if known:
                return _best(etcd, list(known.values()))
    if not seen:
        raise follower.last_error or EtcdUnavailable(f"etcd has not answered in {timeout_s:.3g} s")
    return None


def uses_of(etcd: Etcd, record: RankRecord) -> tuple[int | None, frozenset[str]]:
    """The version of the rank's instance that is released, if one is, and the contents that loads
    have tickets to read from the rank: at one moment.
    """
    tickets = under(pulls_prefix(record.instance, record.rank))
    _, (standing, pulls) = etcd.read([Range(release_key(record.instance)), tickets])
    release = next((found for item in standing.items if (found := _read(item)) is not None), None)
    some = [pull for item in pulls.items if (pull := decode_ticket(item)) is not None]
    version = release.version if release is not None else None
    return version, frozenset(pull.content for pull in some)


def wait_while_released(etcd: Etcd, instance: str, version: int, timeout_s: float) -> bool:
    """Waits until another version of the instance is released than this one, or none.

    False where it is still this one after that time. Raises what etcd refuses.
    """
    key = release_key(instance)
    follower = Follower(etcd, key, time.monotonic() + timeout_s, exact=True)
    for update in _updates(etcd, key, follower if timeout_s > 0 else None):
        changes = update.items if isinstance(update, Snapshot) else update.changes
        release = next((_read(one) for one in changes if isinstance(one, KeyValue)), None)
        if release is None or release.version != version:
            return True
    return False


def _updates(etcd: Etcd, key: str, follower: Follower | None) -> Iterator[Snapshot | Batch]:
    """What there is; then, with a follower, what it brings. Without a key, of all releases."""
    if follower is None:
        yield etcd.snapshot(key or RELEASES, exact=bool(key))
    else:
        yield from follower


def _read(item: KeyValue) -> Release | None:
    """None where it is no release's key, or with a logged warning holds none."""
    if parse_release_key(item.key) is None:
        return None
    try:
        return decode_release(item)
    except RecordDamaged as exc:
        log.warning("%s", exc, extra=fields("release_damaged", **exc.details))
        return None


def _best(etcd: Etcd, releases: Sequence[Release]) -> Release:
    newest_first = sorted(releases, key=lambda one: (one.version, one.released_at), reverse=True)
    if len(newest_first) == 1 and newest_first[0].contents:
        return newest_first[0]
    for release in newest_first:
        found = _as_held(etcd, release)
        if found is not None:
            return found
    return newest_first[0]


def _as_held(etcd: Etcd, release: Release) -> Release | None:
    """With its contents; None where the ranks of the instance do not hold it now."""
    roster = Roster(release.instance)
    for item in etcd.snapshot(instance_prefix(release.instance)).items:
        roster.see(item)
    contents = roster.status().as_of(release.version).contents
    return replace(release, contents=contents) if release.is_of(release.version, contents) else None
