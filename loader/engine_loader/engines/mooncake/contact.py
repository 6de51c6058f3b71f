"""A first contact with a peer: in a separate thread, bounded, and one that can be broken off.

The library waits for a peer for minutes, and longer if that sends a byte now and then. Only its
sockets are in our hands, so they are shut down under it. A thread that came back from the library
while Python ends would abort the process, so contacts that are under way at exit are broken off
and waited for.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet

from engine_loader.engines.machine import addresses_of
from engine_loader.engines.mooncake.binding import Binding
from engine_loader.engines.mooncake.sockets import Way, cut
from engine_loader.errors import EngineFailed, ReadFailed
from engine_loader.tensors.cuda import device_here
from engine_registry.errors import InvalidField
from engine_registry.schema.address import parse_session

_LIMIT_S = 60.0
_CUT_S = 0.2  # how long to go on cutting, as the library may try another address of the peer
_CUT_AT_EXIT_S = 2.0
_NAP_S = 0.005
_LOOK_S = 0.1  # how often a waiting thread looks whether the time is over
_UNDER_WAY: set[Contact] = set()


class Contact:
    """Runs `make`, which meets the peer and returns the engine that can then read from it.

    The peer is reached by addresses of `family`.
    """

    def __init__(self, session_id: str, family: str, make: Callable[[Contact], Binding]) -> None:
        self._session_id = session_id
        self._family = family
        self._make = make
        self._device = device_here()
        self._made: Future[Binding] = Future()
        self.way: Way = ([], 0)  # the peer's addresses and its port, once they are known
        self._until = time.monotonic() + _LIMIT_S
        self._broken_off = False
        _UNDER_WAY.add(self)
        thread = threading.Thread(target=self._run, name=f"contact with {session_id}", daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:
            _UNDER_WAY.discard(self)
            raise EngineFailed(
                f"no thread can be started for a contact with {session_id} ({exc})",
                "raise ulimit -u",
            ) from exc

    def allow(self, seconds: float) -> None:
        """What follows may take so long."""
        self._until = time.monotonic() + seconds

    def result(self) -> Binding:
        """Waits for it; ReadFailed if the peer does not answer in time, or it was broken off."""
        while True:
            try:
                return self._made.result(_LOOK_S)
            except NotYet:
                if self._broken_off:
                    raise self._failed("the contact was broken off") from None
                if time.monotonic() >= self._until:
                    self.break_off()
                    raise self._failed("it does not answer") from None

    def break_off(self, for_s: float = _CUT_S) -> None:
        """Ends it and all waits for it at once; its thread soon."""
        self._broken_off = True
        until = time.monotonic() + for_s
        while not self._made.done() and time.monotonic() < until:
            cut(*self.way)
            time.sleep(_NAP_S)

    def _run(self) -> None:
        try:
            with self._device:
                made = self._meet()
            self._made.set_result(made)
        except BaseException as exc:  # noqa: BLE001  handed on to the caller that asks for the result
            self._made.set_exception(exc)
        finally:
            _UNDER_WAY.discard(self)

    def _meet(self) -> Binding:
        try:
            host, port = parse_session(self._session_id)
        except InvalidField as exc:
            raise self._failed("that is no host:port") from exc
        self.way = addresses_of(host, self._family), port
        if not self.way[0]:
            raise self._failed(f"{host} has no address of {self._family}, which this engine speaks")
        if self._broken_off:
            raise self._failed("the contact was broken off")
        return self._make(self)

    def _failed(self, why: str) -> ReadFailed:
        return ReadFailed(
            f"cannot read from {self._session_id}: {why}", session_id=self._session_id
        )


@atexit.register
def _break_off_all() -> None:
    until = time.monotonic() + _CUT_AT_EXIT_S
    for contact in list(_UNDER_WAY):
        contact.break_off(until - time.monotonic())
