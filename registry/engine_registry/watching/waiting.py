"""Waits, watching, until an instance that is named is ready, and says what is missing if none is in
time. `holders.waiting` waits for instances of a model.

Runs in the caller's thread. A wait that can be cancelled starts another one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
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
from engine_registry.schema.record import ModelIdentity
from engine_registry.schema.roster import Roster, instance_of
from engine_registry.schema.status import InstanceState, InstanceStatus

_LOOK_S = 0.05  # how soon a wait that is cancelled ends
# an instance, any of several, or any that serves the model
Wanted = str | Sequence[str] | ModelIdentity


def wait_until_ready(
    etcd: Etcd,
    wanted: str | Sequence[str],
    timeout_s: float,
    cancel: threading.Event | None = None,
) -> tuple[InstanceStatus, ...]:
    """Those of the wanted that are ready as soon as one is, in the order of their names in
    `wanted`.

    Raises InstanceNotFound, InstanceIncomplete, or RecordDamaged where that is what keeps an
    instance from being ready. `cancel` ends the wait before its time.
    """
    names = _names(wanted)
    start = time.monotonic()
    prefix = instance_prefix(names[0]) if len(names) == 1 else ENGINES
    rosters: dict[str, Roster] | None = None
    follower = Follower(etcd, prefix, start + timeout_s)
    with stopped_by(cancel, follower):
        for update in _updates(etcd, names, follower if timeout_s > 0 else None):
            if rosters is None or isinstance(update, Snapshot):
                rosters = {name: Roster(name) for name in names}
            for change in update.items if isinstance(update, Snapshot) else update.changes:
                name = instance_of(change.key)
                if name in rosters:
                    rosters[name].see(change)
            if found := [each for each in rosters.values() if each.state is InstanceState.READY]:
                return tuple(roster.status() for roster in found)
    waited_s = min(timeout_s, time.monotonic() - start)  # less if it was cancelled
    if rosters is None:
        raise follower.last_error or EtcdUnavailable(f"etcd has not answered in {waited_s:.3g} s")
    for roster in rosters.values():
        for key, error in roster.damaged.items():
            if parse_record_key(key) is not None:
                raise error
    raise why_none_is([roster.status() for roster in rosters.values()], wanted, waited_s)


def _updates(
    etcd: Etcd, names: Sequence[str], follower: Follower | None
) -> Iterator[Snapshot | Batch]:
    """What there is of the named instances; then, with a follower, what it brings.

    As a rule one of several is ready at the first look. So they are read by themselves then, and
    the others, of which there may be thousands, only when it comes to waiting.
    """
    if follower is None or len(names) > 1:
        try:
            found = [etcd.snapshot(instance_prefix(name)) for name in names]
        except EtcdUnavailable:
            if follower is None:
                raise
        else:
            yield Snapshot(found[0].revision, tuple(item for one in found for item in one.items))
    if follower is not None:
        yield from follower


@contextmanager
def stopped_by(cancel: threading.Event | None, follower: Follower) -> Iterator[None]:
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


def why_none_is(
    statuses: Sequence[InstanceStatus], wanted: Wanted, waited_s: float
) -> RegistryError:
    """What is missing of instances none of which is ready."""
    waited = f" after {waited_s:.3g} s" if waited_s > 0 else ""
    names = [status.instance for status in statuses]
    found = [status for status in statuses if status.state is not InstanceState.GONE]
    if not found:
        who = (
            f"no instance of {wanted}"
            if isinstance(wanted, ModelIdentity)
            else f"instance {' or '.join(map(repr, names))}"
        )
        isnt = "is registered" if isinstance(wanted, ModelIdentity) else "is not registered"
        held = "; ".join(
            f"of {each.instance!r} {each.held_summary}" for each in statuses if each.held
        )
        return InstanceNotFound(
            f"{who} {isnt}{waited}{f': {held}' if held else ''}",
            "start its ranks, or see `Registry.instances()`",
            instances=names,
        )
    return InstanceIncomplete(
        "; ".join(
            f"instance {status.instance!r} is not ready{waited}: {status.why}" for status in found
        ),
        instances=names,
        missing={status.instance: list(status.missing) for status in found},
        problems={status.instance: list(status.problems) for status in found},
    )
