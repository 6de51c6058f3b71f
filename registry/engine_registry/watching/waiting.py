"""Waits, watching, until an instance is ready, and says what is missing if none is in time.

Runs in the caller's thread. A wait that can be cancelled starts another one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from engine_registry.errors import (
    EtcdUnavailable,
    InstanceIncomplete,
    InstanceNotFound,
    InvalidField,
    RegistryError,
)
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.follow import Follower
from engine_registry.schema.keys import ENGINES, check_instance, instance_prefix, parse_record_key
from engine_registry.schema.keyvalue import Batch, Snapshot
from engine_registry.schema.place import Place
from engine_registry.schema.record import ModelIdentity, RankState
from engine_registry.schema.roster import Roster, instance_of
from engine_registry.schema.status import InstanceState, InstanceStatus

_LOOK_S = 0.05  # how soon a wait that is cancelled ends
# an instance, any of several, or any that serves the model
Wanted = str | Sequence[str] | ModelIdentity


def wait_until_ready(
    etcd: Etcd, wanted: Wanted, timeout_s: float, cancel: threading.Event | None = None
) -> tuple[InstanceStatus, ...]:
    """Those of the wanted that are ready as soon as one is, in the order of their names in
    `wanted`; by name for a model.

    Raises InstanceNotFound, InstanceIncomplete, or RecordDamaged where that is what keeps an
    instance from being ready. `cancel` ends the wait before its time.
    """

    def ready(rosters: Iterable[Roster]) -> list[Roster]:
        return [roster for roster in rosters if roster.state is InstanceState.READY]

    return _wait(etcd, wanted, timeout_s, ready, cancel)


def wait_for_rank(
    etcd: Etcd,
    model: ModelIdentity,
    place: Place,
    timeout_s: float,
    cancel: threading.Event | None = None,
) -> tuple[InstanceStatus, ...]:
    """The instances of the model that are ready, or whose rank at this place is there, ready or
    loading, whatever else is missing.

    Waits until the weights of that rank can be had somewhere; raises as `wait_until_ready`.
    """

    def holding(rosters: Iterable[Roster]) -> list[Roster]:
        some = [(roster, _readable(roster, model, place)) for roster in rosters]
        good = any(
            roster.state is InstanceState.READY or state is RankState.READY
            for roster, state in some
        )
        return (
            [
                roster
                for roster, state in some
                if roster.state is InstanceState.READY or state is not None
            ]
            if good
            else []
        )

    return _wait(etcd, model, timeout_s, holding, cancel)


def _readable(roster: Roster, model: ModelIdentity, place: Place) -> RankState | None:
    record = roster.records.get(place.rank)
    if record is None or record.model != model or not place.fits(Place.of(record)):
        return None
    return record.state if record.state in (RankState.READY, RankState.LOADING) else None


def _wait(
    etcd: Etcd,
    wanted: Wanted,
    timeout_s: float,
    good: Callable[[Iterable[Roster]], list[Roster]],
    cancel: threading.Event | None,
) -> tuple[InstanceStatus, ...]:
    names = [] if isinstance(wanted, ModelIdentity) else _names(wanted)
    start = time.monotonic()
    prefix = instance_prefix(names[0]) if len(names) == 1 else ENGINES
    rosters: dict[str, Roster] | None = None
    follower = Follower(etcd, prefix, start + timeout_s)
    with _stopped_by(cancel, follower):
        for update in _updates(etcd, names, follower if timeout_s > 0 else None):
            if rosters is None or isinstance(update, Snapshot):
                rosters = {name: Roster(name) for name in names}
            for change in update.items if isinstance(update, Snapshot) else update.changes:
                name = instance_of(change.key)
                if name not in rosters and not names:
                    rosters[name] = Roster(name)
                if name in rosters:
                    rosters[name].see(change)
            some = (
                rosters.values()
                if names
                else sorted(_serving(rosters, wanted), key=lambda roster: roster.instance)
            )
            if found := good(some):
                return tuple(roster.status() for roster in found)
    waited_s = min(timeout_s, time.monotonic() - start)  # less if it was cancelled
    if rosters is None:
        raise follower.last_error or EtcdUnavailable(f"etcd has not answered in {waited_s:.3g} s")
    raise _why_none_is(
        list(rosters.values()) if names else _serving(rosters, wanted), wanted, waited_s
    )


def _updates(
    etcd: Etcd, names: Sequence[str], follower: Follower | None
) -> Iterator[Snapshot | Batch]:
    """What there is of the named instances, or of all; then, with a follower, what it brings.

    As a rule one of several is ready at the first look. So they are read by themselves then, and
    the others, of which there may be thousands, only when it comes to waiting.
    """
    if follower is None or len(names) > 1:
        prefixes = [instance_prefix(name) for name in names] or [ENGINES]
        try:
            found = [etcd.snapshot(prefix) for prefix in prefixes]
        except EtcdUnavailable:
            if follower is None:
                raise
        else:
            yield Snapshot(found[0].revision, tuple(item for one in found for item in one.items))
    if follower is not None:
        yield from follower


@contextmanager
def _stopped_by(cancel: threading.Event | None, follower: Follower) -> Iterator[None]:
    """Stops the follower once the event is set, from a separate thread: an update of etcd is waited
    for in gRPC, which does not look at events.
    """
    if cancel is None:
        yield
        return
    over = threading.Event()

    def look() -> None:
        while not over.wait(_LOOK_S):
            if cancel.is_set():
                follower.stop()
                return

    thread = threading.Thread(target=look, name="ends a wait that is cancelled", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _names(wanted: str | Sequence[str]) -> list[str]:
    names = [check_instance(name) for name in ([wanted] if isinstance(wanted, str) else wanted)]
    if not names:
        raise InvalidField("no instance is named", field="instance")
    return list(dict.fromkeys(names))


def _serving(rosters: dict[str, Roster], wanted: Wanted) -> list[Roster]:
    return [
        roster
        for roster in rosters.values()
        if any(record.model == wanted for record in roster.records.values())
    ]


def _why_none_is(rosters: Sequence[Roster], wanted: Wanted, waited_s: float) -> RegistryError:
    for roster in rosters:
        for key, error in roster.damaged.items():
            if parse_record_key(key) is not None:
                return error
    waited = f" after {waited_s:.3g} s" if waited_s > 0 else ""
    names = [roster.instance for roster in rosters]
    found = [roster.status() for roster in rosters if roster.state is not InstanceState.GONE]
    if not found:
        who = (
            f"no instance of {wanted}"
            if isinstance(wanted, ModelIdentity)
            else f"instance {' or '.join(map(repr, names))}"
        )
        isnt = "is registered" if isinstance(wanted, ModelIdentity) else "is not registered"
        return InstanceNotFound(
            f"{who} {isnt}{waited}",
            "start its ranks, or see `Registry.instances()`",
            instances=names,
        )
    return InstanceIncomplete(
        "; ".join(
            f"instance {status.instance!r} is not ready{waited}: {status.summary}"
            for status in found
        ),
        instances=names,
        missing={status.instance: list(status.missing) for status in found},
        problems={status.instance: list(status.problems) for status in found},
    )
