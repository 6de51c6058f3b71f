"""Ranks whose memory is held when they are killed, and processes that take or share it:
`python -m tests.support.processes.leaving_memory WHAT …`. What they do is in `main`.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from engine_registry import Hold, Registration, Registry, new_incarnation
from engine_registry.registration.descriptors import DescriptorPlace, Descriptors
from engine_registry.registration.held import share, take
from engine_registry.schema.record import RankState
from tests.support.keepers import pid_of_keeper
from tests.support.ranks import MANIFEST, register

OTHER: dict[str, Any] = {"header_addr": 8192, "content": "c0" * 16, "device": "cpu"}


def some(count: int, name: str, place: DescriptorPlace) -> Descriptors:
    """Of memory, each with its number in it."""
    fds = [os.memfd_create("a test's") for _ in range(count)]
    for number, fd in enumerate(fds):
        os.write(fd, f"{name}{number}".encode())
    return Descriptors(place, fds)


def decode(place: str) -> DescriptorPlace:
    return DescriptorPlace.decode(bytes.fromhex(place))


def connect(endpoint: str, namespace: str) -> Registry:
    return Registry.connect(endpoint, namespace=namespace, timeout_s=60)


def rank(
    endpoint: str, namespace: str, place: str, seconds: str, device: str, instance: str
) -> None:
    """Obeys each line, and says when it has."""
    registry = connect(endpoint, namespace)
    hold = Hold(float(seconds), ("host", device))
    registration = register(registry, instance, descriptors=some(3, "m", decode(place)), hold=hold)
    print(pid_of_keeper(registration), flush=True)
    held: list[Registration] = [registration]
    del registration
    for line in sys.stdin:
        print(obey(held, *line.split()), flush=True)


def obey(held: list[Registration], what: str = "", how: str = "") -> str:
    if what == "update":
        held[0].update(state=RankState(how))
    elif what == "drop":
        held[0].keep_memory_back()
    elif what == "offer":
        other = {**OTHER, "descriptors": some(3, "n", decode(how))}
        held[0].offer(MANIFEST, incarnation=new_incarnation(), version=1, **other)
    elif what == "withdraw":
        held[0].withdraw()
    elif what == "forget":
        held.clear()
    elif what == "exec":
        os.execv(sys.executable, [sys.executable, "-c", "import sys; sys.stdin.read()"])  # noqa: S606  no shell
    elif what == "spawn":  # a child that has all that this process has, and closes nothing
        libc = ctypes.CDLL(None)
        child = libc.fork()
        while not child:
            libc.pause()
        return str(child)
    return "done"


def given() -> dict[str, Any]:
    """Memory of a new incarnation, which is the name and the secret of its place, too."""
    incarnation = new_incarnation()
    place = DescriptorPlace(bytes.fromhex(incarnation), bytes.fromhex(incarnation))
    return {"incarnation": incarnation, "descriptors": some(200, incarnation, place)}


def changing(endpoint: str, namespace: str, how: str) -> None:
    """A rank that changes all the time."""
    registration = register(connect(endpoint, namespace), hold=Hold(600.0), **given())
    print(pid_of_keeper(registration), flush=True)
    for version in range(1, 1_000_000):
        if how == "idle":
            time.sleep(1)
        elif how == "updating":
            registration.update(state=RankState.UPDATING)
            registration.update(state=RankState.READY, version=version)
        else:
            registration.offer(MANIFEST, version=version, **OTHER, **given())


def taker(how: str, place: str) -> None:
    """Has a child by the fork of Python, which lives longer."""
    connection = {"take": take, "share": share}[how](decode(place))
    print(os.getpid(), flush=True)
    sys.stdin.readline()
    if not os.fork():
        time.sleep(100)
    print("forked", flush=True)
    sys.stdin.read()
    connection.close()


def main(what: str, *arguments: str) -> None:
    programs: dict[str, Callable[..., None]] = {
        "rank": rank,
        "changing": changing,
        "taker": taker,
    }
    programs[what](*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
