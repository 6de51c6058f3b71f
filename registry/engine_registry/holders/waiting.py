"""Waits, watching the index of holders, until the weights of a model can be had.

Runs in the caller's thread, and one that reads etcd.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from engine_registry.errors import EtcdError, EtcdUnavailable
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.follow import Follower
from engine_registry.holders import look
from engine_registry.holders.query import HolderQuery, Holders
from engine_registry.lifetime import Closable
from engine_registry.schema.holder import holders_prefix, parse_entry
from engine_registry.schema.keyvalue import Batch, KeyValue
from engine_registry.schema.location import UNKNOWN, Location
from engine_registry.schema.record import ModelIdentity, RankState
from engine_registry.schema.status import InstanceStatus
from engine_registry.watching.inbox import Inbox
from engine_registry.watching.waiting import why_none_is

T = TypeVar("T")
_CANCEL_S = 0.05  # how soon a wait that is cancelled ends
_UNLISTED_S = 10.0  # from one look for ranks that are not in the index to the next
_JOIN_S = 2.0


class HolderWatch(Closable):
    """Says when it is time to look again for ranks that hold the weights of a model.

    Starts one thread, which goes on through outages of etcd.
    """

    def __init__(self, etcd: Etcd, model: ModelIdentity, rank: int | None = None) -> None:
        """Of one rank, or of all. `etcd` is for this alone, which closes it at the end."""
        self._etcd = etcd
        self._model = model
        prefix = (
            holders_prefix(model) if rank is None else holders_prefix(model, rank, RankState.READY)
        )
        self._follower = Follower(etcd, prefix)
        self._inbox = Inbox(self._follower)
        self._due = time.monotonic() + _UNLISTED_S
        self._refused: EtcdError | None = None
        self._mark_open()

    def next(self, timeout_s: float) -> bool:
        """Whether a rank is ready that was not before, or may be. Waits for up to `timeout_s`.

        Raises what etcd refuses, but for the permission to read the index: then it says so now and
        then, as for ranks that are not in the index.
        """
        deadline = time.monotonic() + timeout_s
        while (wait_s := min(deadline, self._due) - time.monotonic()) > 0:
            if self._refused is not None:
                time.sleep(wait_s)
                break
            try:
                _, update = self._inbox.get(wait_s)
            except queue.Empty:
                break
            if isinstance(update, EtcdError):
                if update.details.get("reason") != "denied":
                    raise update
                self._refused = update
            elif not isinstance(update, Batch) or _brings_one(update):
                return True  # after a snapshot all may be different
        if time.monotonic() < self._due:
            return False
        self._due = time.monotonic() + _UNLISTED_S
        return True

    @property
    def away(self) -> EtcdUnavailable | None:
        """Why news may be late: etcd cannot be reached. None while it can."""
        return self._follower.away

    def close(self) -> None:
        """Any number of times."""
        self._mark_closed()
        self._inbox.stop()
        self._etcd.close()
        self._inbox.join(_JOIN_S)

    def _label(self) -> str:
        return f"of {self._model}"


def _brings_one(batch: Batch) -> bool:
    entries = [parse_entry(change) for change in batch.changes if isinstance(change, KeyValue)]
    return any(entry is not None and entry.state is RankState.READY for entry in entries)


def wait_for_holders(
    etcd: Etcd,
    query: HolderQuery,
    boxes: bool,
    timeout_s: float,
    cancel: threading.Event | None = None,
) -> Holders:
    """What the query finds, as soon as the weights can be had somewhere.

    With `boxes`, an instance that is ready will do whatever its layout; without, it only shows
    which ranks there are. Raises InstanceNotFound, InstanceIncomplete or RecordDamaged, and what
    etcd refuses. `cancel` ends the wait before its time.
    """
    rank = None if boxes else query.place.rank
    return _wait(
        etcd, query.model, rank, lambda: look.look_anywhere(etcd, query) or None, timeout_s, cancel
    )


def wait_for_instances(
    etcd: Etcd,
    model: ModelIdentity,
    usable: Callable[[InstanceStatus], bool],
    version: int | None,
    timeout_s: float,
    cancel: threading.Event | None = None,
    near: Location = UNKNOWN,
) -> tuple[InstanceStatus, ...]:
    """Some instances of the model that are ready, as soon as one is. Raises as
    `wait_for_holders`.
    """
    return _wait(
        etcd,
        model,
        None,
        lambda: look.look_for_instances(etcd, model, usable, version, near) or None,
        timeout_s,
        cancel,
    )


def _wait(
    etcd: Etcd,
    model: ModelIdentity,
    rank: int | None,
    look_once: Callable[[], T | None],
    timeout_s: float,
    cancel: threading.Event | None,
) -> T:
    start = time.monotonic()
    deadline = start + timeout_s
    away: EtcdUnavailable | None = None

    def find() -> T | None:
        nonlocal away
        try:
            found, away = look_once(), None
        except EtcdUnavailable as exc:
            if timeout_s <= 0:
                raise
            found, away = None, exc
        return found

    found = find()
    if found is None and timeout_s > 0:
        with HolderWatch(etcd.sibling(), model, rank) as watch:
            while found is None and not (cancel is not None and cancel.is_set()):
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    break
                if watch.next(left_s if cancel is None else min(left_s, _CANCEL_S)):
                    found = find()
    if found is not None:
        return found
    if away is not None:
        raise away
    waited_s = min(timeout_s, time.monotonic() - start)  # less if it was cancelled
    raise why_none_is(look.instances_of(etcd, model), model, waited_s)
