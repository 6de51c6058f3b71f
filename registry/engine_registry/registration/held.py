"""Memory that keepers have, as other processes of the same user and host find it, take it, share it
and let it go. `keeper.desk` is the keeper's side; `registration.descriptors` has the descriptors.

A process asks at the keeper's socket, where it gets descriptors, too. Each packet has one in
answer: "+", with what is said below; or "-" and why, in words. Where the secret is wrong, the
connection ends.

    ERQ1                what is kept: JSON, see `Kept`
    ERT1, the secret    the connection takes the memory of a rank whose process has ended. One at a
                        time does, until its end
    ERF1                the connection that takes the memory has it: the keeper lets it go
    ERS1, the secret    the connection shares the memory, until its end
    ERL1                the keeper lets the memory go of a rank whose process has ended

Starts no thread.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from engine_registry.errors import KeeperFailed
from engine_registry.forks import closed_in_child, prevented
from engine_registry.lifetime import Closable
from engine_registry.registration.descriptors import (
    PATIENCE_S,
    REFUSED,
    DescriptorPlace,
    address_of,
    call,
    owner_of,
    peer_of,
    said_as_ours,
)

LOOK, TAKE, FINISH, SHARE, LET_GO = b"ERQ1", b"ERT1", b"ERF1", b"ERS1", b"ERL1"
ANSWER_NBYTES = 65536
_NAMES = re.compile(rb"@engine-registry/([0-9a-f]{32})$", re.MULTILINE)
_LOOK_S = 1.0  # of all keepers that are asked at once; the machine may have too much to do
_AT_ONCE = 64
_RETRY_S = 0.05


@dataclass(frozen=True)
class Kept:
    """The memory of one rank, as its keeper has it.

    Attributes:
        name: 16 bytes, by which the keeper is found.
        key: Of the rank's record in etcd, without the namespace.
        incarnation: Of the registration.
        pid: Of the keeper; 0 where this process does not see it.
        devices: Where the memory lies: `host`, or `GPU-<uuid>`. Empty where the rank is not held.
        nbytes: Of the weights.
        held_until: UTC, ISO 8601: until when it is held; empty while the rank's process lives.
        left_s: How many seconds are left of that.
        sharers: How many processes share the memory.
    """

    name: bytes
    key: str
    incarnation: str
    pid: int
    devices: tuple[str, ...]
    nbytes: int
    held_until: str
    left_s: float
    sharers: int

    @property
    def held(self) -> bool:
        """Whether the rank's process has ended."""
        return bool(self.held_until)

    @classmethod
    def _decode(cls, name: bytes, pid: int, said: bytes) -> Kept:
        """ValueError, LookupError or TypeError where no keeper has said that."""
        given = json.loads(said)
        return cls(
            name,
            str(given["key"]),
            str(given["incarnation"]),
            pid,
            tuple(map(str, given["devices"])),
            int(given["nbytes"]),
            str(given["held_until"]),
            float(given["held_for_s"]),
            int(given["sharers"]),
        )


def keepers_here() -> list[Kept]:
    """What the keepers of this user have that can be reached from this process: those of its
    network namespace. A keeper that ends meanwhile, or does not answer within a second, is left
    out.
    """
    return _look_around()[0]


def _look_around() -> tuple[list[Kept], int]:
    """What keepers have, and how many of them do not answer."""
    try:
        listed = Path("/proc/net/unix").read_bytes()
    except OSError:
        return [], 0
    names = iter(sorted({bytes.fromhex(name.decode()) for name in _NAMES.findall(listed)}))
    found, silent = [], 0
    while some := list(islice(names, _AT_ONCE)):
        kept, unheard = _ask_each(some)
        found += kept
        silent += unheard
    return found, silent


def _ask_each(names: Sequence[bytes]) -> tuple[list[Kept], int]:
    """At once."""
    found: list[Kept] = []
    unasked = 0
    with ExitStack() as stack:
        waiting = stack.enter_context(selectors.PollSelector())  # which takes no descriptor
        keepers: dict[bytes, socket.socket] = {}
        for name in names:
            try:
                keeper = keepers[name] = stack.enter_context(
                    socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                )
                keeper.setblocking(False)
                keeper.connect(address_of(name))
                if owner_of(keeper) == os.geteuid():
                    keeper.send(LOOK, socket.MSG_NOSIGNAL)
                    waiting.register(keeper, selectors.EVENT_READ, name)
            except ConnectionError:  # it has ended
                pass
            except OSError:  # it has too much to do, or this process can open no more
                unasked += 1
        until = time.monotonic() + _LOOK_S
        while waiting.get_map() and (left_s := until - time.monotonic()) > 0:
            for key, _ in waiting.select(left_s):
                waiting.unregister(key.fileobj)
                with suppress(OSError, LookupError, TypeError, ValueError):
                    keeper = keepers[key.data]
                    answer = keeper.recv(ANSWER_NBYTES)
                    if answer[:1] == b"+":
                        found.append(Kept._decode(key.data, peer_of(keeper)[0], answer[1:]))
        return found, unasked + len(waiting.get_map())


def _say(keeper: socket.socket, packet: bytes) -> bytes:
    """The answer; nothing where the keeper ends the connection."""
    keeper.send(packet, socket.MSG_NOSIGNAL)
    return keeper.recv(ANSWER_NBYTES)


def _check(answer: bytes) -> None:
    if answer[:1] == b"-":
        raise KeeperFailed(f"the keeper refuses: {answer[1:].decode()}")
    if answer != b"+":
        raise KeeperFailed(REFUSED)


class _Connection(Closable):
    """To a keeper, which counts it until its end. A forked child closes its copy at once."""

    def __init__(self, place: DescriptorPlace, request: bytes) -> None:
        with prevented():
            self._keeper = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            closed_in_child(self._keeper, socket.socket.close)
        try:
            with said_as_ours():
                call(self._keeper, place.name)
                _check(_say(self._keeper, request + place.secret))
        except BaseException:
            self._keeper.close()
            raise
        self._mark_open()

    def close(self) -> None:
        self._mark_closed()
        self._keeper.close()


class Taken(_Connection):
    """The memory of a rank whose process has ended, which nobody else can take until this is
    closed. `fetch` gets its descriptors meanwhile.

    Closed without `finish`, the memory is held on, as if it had never been taken. While it is
    taken, its time may end, or somebody may let it go: then whoever has got the descriptors has the
    memory, and nobody else can get it any more. For one thread.
    """

    def finish(self) -> None:
        """Says that this process has the memory: the keeper closes its descriptors, ends the
        registration, and then itself. Any number of times, also where the keeper has ended.

        Raises:
            KeeperFailed: The keeper does not answer. It may have let go or not.
        """
        if not self._is_open:
            return
        with said_as_ours(), suppress(ConnectionError):  # it has ended, or has let go by itself
            _check(_say(self._keeper, FINISH) or b"+")
        self.close()


class Share(_Connection):
    """That this process shares the memory of a rank, which lives or is held. The keeper counts it
    until this is closed. `fetch` gets the descriptors.
    """


def take(place: DescriptorPlace) -> Taken:
    """Takes the memory that is held there.

    Raises:
        KeeperFailed: The keeper is gone, does not answer, or has no such memory; the rank's process
            lives; or another process is taking it.
    """
    return Taken(place, TAKE)


def share(place: DescriptorPlace) -> Share:
    """Shares the memory that is kept there.

    Raises:
        KeeperFailed: The keeper is gone, does not answer, or has no such memory; another process is
            taking it; or too many share it.
    """
    return Share(place, SHARE)


def let_go(kept: Kept | bytes) -> None:
    """Makes a keeper let go of what it holds, by its name. Returns when it has closed its
    descriptors: the memory is free, unless a process shares or takes it.

    Raises:
        KeeperFailed: The keeper is gone or does not answer; or the rank's process lives.
    """
    name = kept.name if isinstance(kept, Kept) else kept
    with said_as_ours(), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as keeper:
        call(keeper, name)
        _check(_say(keeper, LET_GO))


def let_go_of_device(device: str, *, timeout_s: float = PATIENCE_S) -> int:
    """Makes the keepers of this user let go of all that they hold on a device. Returns when nothing
    is held there any more.

    For whoever needs the device's memory, as a scheduler does before it starts another engine. What
    ranks have whose processes live is left alone.

    Args:
        device: `host`, or `GPU-<uuid>` as nvidia-smi prints it.
        timeout_s: How many seconds that may take.

    Returns:
        The bytes of the weights that were let go.

    Raises:
        KeeperFailed: A keeper does not answer for so long. The others have let go.
    """
    until = time.monotonic() + timeout_s
    gone: dict[bytes, int] = {}
    while True:
        around, silent = _look_around()
        refused = 0
        for kept in around:
            if kept.held and device in kept.devices:
                try:
                    let_go(kept)
                    gone[kept.name] = kept.nbytes
                except KeeperFailed:  # it has ended meanwhile, or is asked again
                    refused += 1
        if not silent and not refused:
            return sum(gone.values())
        if time.monotonic() > until:
            raise KeeperFailed(
                f"{silent + refused} keepers of this user do not answer, and may hold memory on "
                f"{device}",
                "`engines doctor` lists what keepers hold; a keeper that ends lets go",
            )
        time.sleep(_RETRY_S)
