"""The rounds of one place and one share, and the many updates under several readers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.hosts import Host, Network, etcd_on
from benchmarks.updates.candidates import DELTA, TITLES, ours
from benchmarks.updates.sides import Side, follow, read, side, train
from benchmarks.updates.weights import nbytes_of, weights
from engine_registry import Registry
from engine_registry.etcd.local import LocalEtcd

HERE = "loopback"
_LOOPBACK = "127.0.0.1"
_MEMORY = "/dev/shm"  # noqa: S108  in a folder for one run


class WrongBytes(Exception):
    """A reader does not have what the trainer has sent."""


@dataclass(frozen=True)
class Place:
    """Where it runs. The hosts are None on this machine itself."""

    name: str
    endpoint: str
    trainer: Host | None = None
    reader: Host | None = None


@dataclass(frozen=True)
class Sample:
    """One candidate after one step.

    Attributes:
        seconds: From the call at the trainer until the reader has the weights.
        send_s: How long the call took the trainer.
        memcpy_s: How long it took there to copy one block as large as the weights,
            just before.
        sent_nbytes: Over the link, with the headers of all layers; 0 without a link.
        peak_nbytes: What the trainer's memory grew by meanwhile, at most.
        load: The mean number of processes that wanted a core.
        reader: What the reader says.
    """

    place: str
    share: float
    number: int
    candidate: str
    weights_nbytes: int
    seconds: float
    send_s: float
    memcpy_s: float
    sent_nbytes: int
    peak_nbytes: int
    load: float
    reader: dict[str, Any] = field(default_factory=dict)


@contextmanager
def here() -> Iterator[Place]:
    with LocalEtcd() as etcd:
        yield Place(HERE, etcd.endpoint)


@contextmanager
def linked(mbit: float) -> Iterator[Place]:
    """HostsUnavailable where none can be made."""
    with Network() as network, etcd_on(network.host("control")) as endpoint:
        made = [network.host(name, mbit) for name in ("trainer", "reader")]
        yield Place(f"{mbit:g} Mbit/s", endpoint, *made)


def measure(
    place: Place, gib: float, share: float, rounds: int, say: Callable[[str], None]
) -> tuple[list[Sample], dict[str, Any]]:
    """And what the trainer's publications have said. WrongBytes if a reader has others."""
    nbytes = nbytes_of(weights(gib))
    samples: list[Sample] = []
    names = list(TITLES)
    with _sides(place, gib, share, names) as (trainer, reader):
        for number in range(1, rounds + 2):
            say(f"{place.name}, {share:.1%}, round {number - 1} of {rounds}")
            for one in (trainer, reader):
                one.order("step", number=number)
            for one in (trainer, reader):
                one.answer()
            at = number % len(names)
            for name in [*names[at:], *names[:at]]:
                reader.ask("receive", name=name, number=number)
                before = place.trainer.sent_nbytes if place.trainer else 0
                trainer.order("send", name=name, number=number)
                sent, got = trainer.answer(), reader.answer()
                after = place.trainer.sent_nbytes if place.trainer else 0
                peak = trainer.ask("memory")["peak_nbytes"]
                if got["wrong"]:
                    raise WrongBytes(f"{name} has brought {got['wrong']} tensors that are wrong")
                got["noticed_s"] = got.pop("noticed", sent["began"]) - sent["began"]
                sample = Sample(
                    place.name,
                    share,
                    number,
                    name,
                    nbytes,
                    got.pop("ended") - sent["began"],
                    sent["took_s"],
                    sent["memcpy_s"],
                    after - before,
                    peak,
                    os.getloadavg()[0],
                    got,
                )
                if number > 1:  # the first round opens connections, and has no step before it
                    samples.append(sample)
        return samples, trainer.facts[DELTA]


@contextmanager
def _sides(
    place: Place, gib: float, share: float, names: Sequence[str]
) -> Iterator[tuple[Side, Side]]:
    with ExitStack() as stack:
        settings = _settings(stack, place, gib, share) | {"candidates": names}
        trainer = stack.enter_context(_at(place.trainer, train, settings))
        reader = stack.enter_context(_at(place.reader, read, settings | {"facts": trainer.facts}))
        yield trainer, reader


def many(
    place: Place, gib: float, share: float, updates: int, readers: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """So many snapshots one after the other, while readers load deltas: what happened to them. On
    this machine itself.
    """
    with ExitStack() as stack:
        settings = _settings(stack, place, gib, share)
        trainer = stack.enter_context(_at(place.trainer, train, settings | {"candidates": [DELTA]}))
        sides = [stack.enter_context(_at(place.reader, follow, settings)) for _ in range(readers)]
        took = []
        for number in range(1, updates + 1):
            if number % 50 == 1:
                say(f"update {number} of {updates}, with {readers} readers")
            trainer.ask("step", number=number)
            took.append(trainer.ask("send", name=DELTA, number=number)["took_s"])
        with Registry.connect(place.endpoint) as registry:
            ours.wait_for(registry, DELTA, updates)
        for one in sides:
            one.order("end")
        found = [one.answer() for one in sides]
    return {
        "updates": updates,
        "readers": readers,
        "weights_nbytes": nbytes_of(weights(gib)),
        "share": share,
        "longest_send_s": max(took),
        **{name: sum(one[name] for one in found) for name in ("loads", "retries", "wrong")},
        "versions": [one["version"] for one in found],
        "delta_nbytes": sum(one["delta_nbytes"] for one in found),
    }


def _settings(stack: ExitStack, place: Place, gib: float, share: float) -> dict[str, Any]:
    folder = stack.enter_context(
        tempfile.TemporaryDirectory(prefix="engines-updates-", dir=_MEMORY)
    )
    return {"endpoint": place.endpoint, "folder": folder, "gib": gib, "share": share}


@contextmanager
def _at(
    host: Host | None, function: Callable[[str], None], settings: dict[str, Any]
) -> Iterator[Side]:
    address = host.address if host else _LOOPBACK
    within = host.command if host else None
    with side(function, settings | {"host": address}, within) as started:
        yield started
