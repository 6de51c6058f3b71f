"""Processes that wait for a model, while ranks of another model come.

Waiters are threads, each with a registry. Some wait in `load`, others in `load_or_seed`, where we
have the turn to read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import NoReturn

import torch

from benchmarks.scale.counts import Counts, counting, counts_of, exponent, wait_until
from benchmarks.scale.figures import Found, Say, Table
from benchmarks.scale.joiners import FLOATS
from benchmarks.scale.ranks import HOST_RANKS, MODEL, TIMEOUT_S, Fleet, an_etcd, connected
from benchmarks.scale.seams import many_threads
from benchmarks.scale.sizes import Sizes
from benchmarks.scale.turns import turn_taken
from engine_loader import InProcessEngine, LoadOptions, load, load_or_seed
from engine_loader.errors import Cancelled
from engine_registry import Registry
from engine_registry.etcd.local import LocalEtcd

_LONG_S = 3_600.0
_STARTED_WITHIN_S = 120.0
_QUIET_WITHIN_S = 30.0
_STANDING = 256  # ranks of the other model before anybody waits


@dataclass(frozen=True)
class _Waited:
    waiters: int
    began: Counts  # until all waited
    spent: Counts  # by the changes


def herds(sizes: Sizes, say: Say) -> Found:
    found = Found()
    for name, wait, watches in (
        ("load", wait_for_model, 1),
        ("load_or_seed", wait_for_turn, 2),
    ):
        waited = []
        for waiters in sizes.waiters:
            say(f"{waiters:,} waiters in {name}")
            waited.append(_herd(waiters, sizes.changes, wait, watches))
        found.add(_found(name, sizes.changes, waited))
    return found


# A registry, a name for the instance of the waiter, and what ends its wait.
_Wait = Callable[[Registry, str, threading.Event], None]


def _herd(waiters: int, changes: int, wait: _Wait, watches: int) -> _Waited:
    with an_etcd() as server, connected(server) as etcd, turn_taken(server.endpoint):
        fleet = Fleet(etcd, "other", HOST_RANKS)
        fleet.grow_to(_STANDING)
        watchers = counts_of(server).watchers
        with many_threads(), ExitStack() as stack:
            with counting(server, _QUIET_WITHIN_S) as began:
                _start(stack, server, waiters, wait)
                wait_until(
                    lambda: counts_of(server).watchers >= watchers + watches * waiters,
                    _STARTED_WITHIN_S,
                )
            with counting(server, _QUIET_WITHIN_S) as changed:
                fleet.grow_to(_STANDING + changes)
        return _Waited(waiters, began.spent, changed.spent)


def _start(stack: ExitStack, server: LocalEtcd, waiters: int, wait: _Wait) -> None:
    """They end with the stack."""
    cancel = threading.Event()
    registries = [
        stack.enter_context(Registry.connect(server.endpoint, timeout_s=TIMEOUT_S))
        for _ in range(waiters)
    ]
    threads = [
        threading.Thread(target=wait, args=(registry, f"waiter-{number}", cancel))
        for number, registry in enumerate(registries)
    ]
    for thread in threads:
        stack.callback(thread.join)
        thread.start()
    stack.callback(cancel.set)


def wait_for_model(registry: Registry, instance: str, cancel: threading.Event) -> None:
    with suppress(Cancelled):
        load(
            registry,
            InProcessEngine(),
            MODEL,
            rank=0,
            tensors={"w": torch.zeros(FLOATS)},
            timeout_s=_LONG_S,
            publish=instance,
            options=LoadOptions(cancel=cancel),
        )


def wait_for_turn(registry: Registry, instance: str, cancel: threading.Event) -> None:
    with suppress(Cancelled):
        load_or_seed(
            registry,
            InProcessEngine(),
            MODEL,
            {"w": torch.zeros(FLOATS)},
            rank=0,
            world_size=1,
            instance=instance,
            fallback=_never,
            timeout_s=_LONG_S,
            without_etcd_s=_LONG_S,
            load=LoadOptions(cancel=cancel),
        )


def _never() -> NoReturn:
    raise RuntimeError("a waiter has read its weights, although it was not its turn")


def _found(name: str, changes: int, waited: Sequence[_Waited]) -> Found:
    sizes = [each.waiters for each in waited]
    events = [float(each.spent.events) for each in waited]
    nbytes = [float(each.spent.sent_nbytes) for each in waited]
    table = Table(
        f"H waiters in `{name}`, and {changes} ranks of another model that come",
        (
            "H",
            "requests to begin",
            "kB to begin",
            "sockets a waiter",
            "events delivered",
            "of them a waiter and rank",
            "kB a rank",
            "etcd CPU ms a rank",
        ),
        [
            (
                each.waiters,
                each.began.requests / each.waiters,
                each.began.sent_nbytes / 1e3 / each.waiters,
                each.began.sockets / each.waiters,
                each.spent.events,
                each.spent.events / each.waiters / changes,
                each.spent.sent_nbytes / 1e3 / changes,
                each.spent.cpu_s / changes * 1e3,
            )
            for each in waited
        ],
        f"exponents in H: events {exponent(sizes, events):.2f}, "
        f"bytes {exponent(sizes, nbytes):.2f}. The claims of the ranks are counted, too.",
    )
    most = events[-1] / sizes[-1] / changes
    return Found([table], {f"herd_events_a_waiter_and_rank_in_{name}": most})
