"""All renewals of leases over one connection to etcd: one LeaseKeepAlive call that stays open while
leases are renewed.

Used by `etcd.connection` only. Starts one thread, which takes in the answers and ends with the
call. A call for each renewal would cost etcd several times as much, and its grpc-proxy cancels a
renewal whose call is half-closed before it has answered.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc

import engine_registry.etcd.stubs  # noqa: F401  must come before etcd3

import etcd3  # isort: skip

pb = etcd3.etcdrpc
_PATIENCE_S = 0.5  # for a renewal, until the lease is looked at
_IDLE_S = 60.0  # without a renewal, until the call ends: its connection could not be closed else


class StreamEnded(grpc.RpcError):
    """How a call ended, without the call: gRPC raises the call itself, which must not live on."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self._code = code
        self._details = details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


class _Renewal:
    """One that has been asked for."""

    def __init__(self) -> None:
        self._answer: queue.SimpleQueue[int | StreamEnded] = queue.SimpleQueue()

    def set(self, answer: int | StreamEnded) -> None:
        self._answer.put(answer)

    def wait(self, timeout_s: float) -> int | None:
        """The lease's time to live, 0 or less if it is gone; None if there is no answer yet.

        Raises StreamEnded.
        """
        try:
            answer = self._answer.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None
        if isinstance(answer, StreamEnded):
            # another one for each of several threads
            raise StreamEnded(answer.code(), answer.details())
        return answer


class _Asked:
    """What has not been answered, by lease, in the order in which it was asked: etcd answers every
    request once.

    It alone holds the call, and only while that lives: a call that has ended must not hang on an
    error that somebody keeps.
    """

    def __init__(self) -> None:
        self.call: Any = None
        self._lock = threading.Lock()
        self._by_lease: dict[int, deque[_Renewal]] = {}
        self.ended: StreamEnded | None = None

    def add(self, lease_id: int) -> _Renewal:
        renewal = _Renewal()
        with self._lock:
            if self.ended is not None:
                renewal.set(self.ended)
            else:
                self._by_lease.setdefault(lease_id, deque()).append(renewal)
        return renewal

    def answer(self, lease_id: int, ttl_s: int) -> None:
        with self._lock:
            waiting = self._by_lease.get(lease_id)
            if waiting:
                waiting.popleft().set(ttl_s)
                if not waiting:
                    del self._by_lease[lease_id]

    def retire(self) -> bool:
        """Takes nothing from now on, unless something waits."""
        with self._lock:
            if not self._by_lease:
                self.ended = StreamEnded(
                    grpc.StatusCode.UNAVAILABLE, "nothing was renewed for long"
                )
            return self.ended is not None

    def end(self, ended: StreamEnded) -> None:
        self.call = None
        with self._lock:
            self.ended = ended
            for waiting in self._by_lease.values():
                for renewal in waiting:
                    renewal.set(ended)
            self._by_lease.clear()


class LeaseStream:
    """`renew` from any thread.

    Over when its connection is closed, etcd ends the call, or nothing was renewed for long; then
    another one is needed.
    """

    def __init__(self, stub: Any, metadata: Sequence[tuple[str, str]]) -> None:
        """RuntimeError if there is no thread to be had."""
        self._stub = stub
        self._metadata = metadata
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # As with a watch: when the member loses its quorum the call ends, else it would stay
        # silent.
        self._asked = _Asked()
        self._asked.call = stub.LeaseKeepAlive(
            _ask(self._requests, self._asked), metadata=(*metadata, ("hasleader", "true"))
        )
        # The thread keeps neither this nor the connection alive: a connection that is forgotten
        # leaves no thread.
        arguments = (self._requests, self._asked)
        thread = threading.Thread(
            target=_take_in, args=arguments, name="etcd renewals", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            self.end()
            raise

    @property
    def over(self) -> bool:
        return self._asked.ended is not None

    def renew(self, lease_id: int, timeout_s: float) -> int:
        """For how many seconds the lease lives now at least, 0 or less if it is gone. Raises
        grpc.RpcError.

        A grpc-proxy renews by its own clock, each third of the lease's time, and answers only then.
        So where no answer comes soon, the lease is looked at: one that has most of its time left is
        being renewed.
        """
        deadline = time.monotonic() + timeout_s
        renewal = self._asked.add(lease_id)
        self._requests.put(pb.LeaseKeepAliveRequest(ID=lease_id))
        ttl_s = renewal.wait(min(_PATIENCE_S, timeout_s))
        if ttl_s is None and time.monotonic() < deadline:
            ttl_s = self._time_left(lease_id, deadline - time.monotonic())
        if ttl_s is None:
            ttl_s = renewal.wait(deadline - time.monotonic())
        if ttl_s is None:
            raise StreamEnded(grpc.StatusCode.DEADLINE_EXCEEDED, "no renewal in time")
        return ttl_s

    def _time_left(self, lease_id: int, timeout_s: float) -> int | None:
        """How long the lease lives, less than 0 if it is gone; None if it has not been renewed
        lately, or we may not look.
        """
        try:
            found = self._stub.LeaseTimeToLive(
                pb.LeaseTimeToLiveRequest(ID=lease_id), timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as exc:
            if (
                exc.code() is grpc.StatusCode.PERMISSION_DENIED
            ):  # to read a key that hangs on the lease
                return None
            raise
        renewed_lately = found.grantedTTL <= 2 * found.TTL
        # 0 is less than a second
        return int(found.TTL) if renewed_lately or found.TTL < 0 else None

    def end(self) -> None:
        """From any thread, any number of times."""
        call, self._asked.call = self._asked.call, None
        if call is not None:
            self._requests.put(None)
            call.cancel()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # At the interpreter's end all threads are stopped, also one of gRPC's that holds a lock of
        # the call.
        if not is_finalizing() and hasattr(self, "_asked"):
            self.end()


def _ask(requests: queue.SimpleQueue[Any], asked: _Asked) -> Iterator[Any]:
    """What the call sends, until it is to end."""
    while True:
        try:
            request = requests.get(timeout=_IDLE_S)
        except queue.Empty:
            if asked.retire():
                return
        else:
            if request is None:
                return
            yield request


def _take_in(requests: queue.SimpleQueue[Any], asked: _Asked) -> None:
    ended = StreamEnded(grpc.StatusCode.UNAVAILABLE, "etcd ended the renewals")
    try:
        for response in asked.call or ():
            asked.answer(response.ID, response.TTL)
    except grpc.RpcError as exc:
        # This is the call. With its traceback it would be part of a cycle and so be collected late;
        # at the interpreter's end its __del__ may wait for a lock that one of gRPC's threads holds,
        # stopped for good.
        ended = StreamEnded(exc.code(), exc.details() or "")
        exc.__traceback__ = None
    asked.end(ended)
    requests.put(None)  # gRPC's thread waits for the next request
