"""What etcd is for: a lease with a key of our own from grant to revoke, how long each step takes,
and how much room is left.
"""

from __future__ import annotations

import http.client
import re
import ssl
import statistics
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine_cli.doctor.finding import Finding, duration, fail, ok, skipped, warn
from engine_cli.doctor.runner import Skip
from engine_cli.doctor.tls import load_pair
from engine_cli.render.tables import size
from engine_registry.schema.printable import count

if TYPE_CHECKING:
    from engine_registry.etcd.admin import Alarm, MemberStatus
    from engine_registry.etcd.client import Etcd
    from engine_registry.etcd.config import Endpoint, EtcdConfig
    from engine_registry.schema.status import InstanceStatus

# Where our key may go: nobody lists or watches these. The first that this user may write is taken.
_PLACES = ("/doctor/", "/pulls/doctor/0/", "/manifests/doctor/0/")
_TTL_S = 10.0  # if we are killed half-way, the key is gone after that
_SAMPLES = 10
_SAMPLING_S = 0.4  # of each kind
_SLOW_S, _TOO_SLOW_S = 0.1, 1.0  # a keeper gives a renewal 2 s
_DEFAULT_QUOTA = 2 << 30  # etcd's own, where it states none
_QUOTA_METRIC = re.compile(rb"^etcd_server_quota_backend_bytes (\S+)", re.MULTILINE)


@dataclass
class RoundTrip:
    """What came of it. `place` is empty where this user may write none."""

    place: str = ""
    kept: bool = False  # what was read is what was put, under that lease
    gone: bool = False  # revoking the lease has deleted the key
    put_s: list[float] = field(default_factory=list)
    get_s: list[float] = field(default_factory=list)
    watch_s: list[float] = field(default_factory=list)


def round_trip(etcd: Etcd) -> RoundTrip:
    """Leaves nothing, whatever happens: the lease is revoked, or ends by itself.

    No clock but etcd's is asked.
    """
    from engine_registry.errors import EtcdRefused

    trip = RoundTrip()
    with suppress(EtcdRefused):
        trip.get_s += _timed(lambda: etcd.get("/engines/-"))
    lease_id = etcd.grant(_TTL_S)
    key = ""
    try:
        for place in _PLACES:
            key = f"{place}{uuid.uuid4().hex}"
            if _may_put(etcd, key, lease_id):
                trip.place = place
                _use(etcd, key, lease_id, trip)
                break
    finally:
        etcd.revoke(lease_id)
    trip.gone = not trip.place or etcd.get(key) is None
    return trip


def _may_put(etcd: Etcd, key: str, lease_id: int) -> bool:
    from engine_registry.errors import EtcdRefused
    from engine_registry.schema.keyvalue import Put

    try:
        etcd.commit([], [Put(key, b"engines doctor", lease_id)])
    except EtcdRefused as exc:
        if exc.details.get("reason") == "denied":
            return False
        raise
    return True


def _use(etcd: Etcd, key: str, lease_id: int, trip: RoundTrip) -> None:
    from engine_registry.schema.keyvalue import Put

    found = etcd.get(key)
    trip.kept = (
        found is not None and found.value == b"engines doctor" and found.lease_id == lease_id
    )
    etcd.keep_alive(lease_id)
    trip.put_s += _timed(lambda: etcd.commit([], [Put(key, b"", lease_id)]))
    revision = etcd.commit([], [Put(key, b"", lease_id)])
    stream = etcd.watch(key, revision, timeout_s=etcd.config.timeout_s)
    try:
        batches = iter(stream)
        next(batches, None)  # what was put last: the watch stands

        def put_and_see() -> None:
            etcd.commit([], [Put(key, b"", lease_id)])
            while (batch := next(batches, None)) is not None and not batch.changes:
                pass

        trip.watch_s += _timed(put_and_see)
    finally:
        stream.cancel()


def _timed(call: Callable[[], object]) -> list[float]:
    seconds: list[float] = []
    while len(seconds) < _SAMPLES and sum(seconds) < _SAMPLING_S:
        began = time.monotonic()
        call()
        seconds.append(time.monotonic() - began)
    return seconds


def judge_lease(trip: RoundTrip) -> Finding:
    name = "etcd.lease"
    if not trip.place:
        return ok(
            name,
            "granted and revoked; no key was put, as this user may not write "
            f"{' or '.join(_PLACES)}",
        )
    if not trip.kept:
        return fail(
            name,
            "a key that was just put is not read back as it was put",
            "is there a proxy with a cache before etcd? Point --etcd at etcd itself",
        )
    if not trip.gone:
        return fail(
            name,
            "revoking a lease has not deleted its key",
            "look at etcd's log: dead ranks would stay listed",
        )
    return ok(
        name, f"grant, put, read, renew and revoke work (under {trip.place}; nothing is left)"
    )


def judge_latency(trip: RoundTrip) -> Finding:
    name = "etcd.latency"
    kinds = (("get", trip.get_s), ("put", trip.put_s), ("watch", trip.watch_s))
    medians = {kind: statistics.median(seconds) for kind, seconds in kinds if seconds}
    if not medians:
        return skipped(name, "this user may neither read nor write, so nothing was measured")
    what = ", ".join(f"{kind} {duration(seconds)}" for kind, seconds in medians.items())
    what += f" (medians of up to {_SAMPLES}" + (
        f"; slowest put {duration(max(trip.put_s))})" if trip.put_s else "; no key was put)"
    )
    slow = max(medians.values())
    why = (
        "etcd is far away"
        if medians["get"] > _SLOW_S / 2
        else "its disk is slow to sync, or it is busy"
    )
    mend = (
        f"{why}: look at etcd_disk_wal_fsync_duration_seconds and the network between here and "
        "there"
    )
    if slow > _TOO_SLOW_S:
        return fail(name, f"{what}: leases will expire, as renewals come too late", mend)
    return warn(name, what, mend) if slow > _SLOW_S else ok(name, what)


def quota_of(config: EtcdConfig, endpoint: Endpoint, limit_s: float) -> int | None:
    """From the metrics, as releases before 3.6 state it nowhere else; None where there are none."""
    connection = http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=limit_s)
    if config.cacert or endpoint.tls:
        context = ssl.create_default_context(cafile=config.cacert)
        load_pair(context, config.cert, config.key)
        connection = http.client.HTTPSConnection(
            endpoint.host, endpoint.port, timeout=limit_s, context=context
        )
    with closing(connection):
        try:
            connection.request("GET", "/metrics")
            found = _QUOTA_METRIC.search(connection.getresponse().read(4 << 20))
            return int(float(found[1])) if found else None
        except (OSError, http.client.HTTPException, ValueError):
            return None


def judge_database(statuses: Sequence[MemberStatus], quota_nbytes: int | None) -> Finding:
    """Of the member with the largest file."""
    name = "etcd.database"
    largest = max(statuses, key=lambda status: status.db_nbytes)
    quota = quota_nbytes or _DEFAULT_QUOTA
    share = largest.db_nbytes / quota
    what = f"{size(largest.db_nbytes)} of {size(quota)}, {share:.0%}"
    if not quota_nbytes:
        what += " if etcd has its default quota, which it does not state"
    if largest.used_nbytes is not None:
        what += f"; {size(largest.used_nbytes)} in use"
    mend = (
        "etcdctl compact REVISION, then etcdctl defrag --cluster; or a larger "
        "--quota-backend-bytes; --auto-compaction-retention"
    )
    if share >= 0.95:
        return fail(name, what, mend)
    return warn(name, what, mend) if share >= 0.8 else ok(name, what)


def judge_alarms(alarms: Sequence[Alarm]) -> list[Finding]:
    name = "etcd.alarms"
    if not alarms:
        return [ok(name, "none")]
    return [
        _judge_alarm(name, kind, [f"{each.member_id:x}" for each in alarms if each.kind == kind])
        for kind in sorted({a.kind for a in alarms})
    ]


def _judge_alarm(name: str, kind: str, members: list[str]) -> Finding:
    where = f"{kind} at member {', '.join(members)}"
    if kind == "NOSPACE":
        return fail(
            name,
            f"{where}: etcd takes no writes, so no rank can register",
            "etcdctl compact REVISION (from etcdctl endpoint status -w json), etcdctl defrag "
            "--cluster, etcdctl alarm disarm",
        )
    if kind == "CORRUPT":
        return fail(
            name,
            f"{where}: its data differ from the others'",
            "etcdctl member remove it, delete its data folder, and add it again as a new "
            "member; or restore a snapshot",
        )
    return fail(name, where, "see etcd's documents on alarms")


def check_namespace(etcd: Etcd) -> Iterator[Finding]:
    from engine_registry.errors import EtcdRefused
    from engine_registry.schema.keys import ENGINES
    from engine_registry.schema.roster import assess_all

    try:
        statuses = assess_all(etcd.snapshot(ENGINES).items)
    except EtcdRefused as exc:
        raise Skip(f"this user may not read all of {etcd.config.namespace}{ENGINES}") from exc
    keys: tuple[str, ...] = ()
    if not statuses:
        with suppress(EtcdRefused):  # only root may read all
            keys = etcd.first_keys(1_000)
    yield judge_namespace(etcd.config.namespace, statuses, keys)


def judge_namespace(
    namespace: str, statuses: Sequence[InstanceStatus], keys: Sequence[str]
) -> Finding:
    """`keys` are the first of the whole store, where nothing lies in the namespace."""
    name, where = "etcd.namespace", f"{namespace}/engines/"
    if statuses:
        ready = sum(status.state.value == "ready" for status in statuses)
        return ok(name, f"{count(len(statuses), 'instance')} under {where}, {ready} ready")
    others = sorted(
        {key.partition("/engines/")[0] for key in keys if "/engines/" in key} - {namespace}
    )
    if others:
        return warn(
            name,
            f"no instance under {where}, but there are some under "
            f"{', '.join(f'{other}/engines/' for other in others[:3])}",
            f"give --namespace {others[0]!r}, if that is the one"
            if others[0]
            else "leave out --namespace, if that is the one",
        )
    return ok(name, f"no instance under {where}")
