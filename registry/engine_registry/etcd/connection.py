"""How a call to etcd is made: every call has a deadline, works through all endpoints, and fails
with an error of ours.

The base of `Etcd`; used from any thread. All calls may be repeated safely (writes are guarded by
revisions), so a call that fails in transit is tried again on a fresh connection to the next
endpoint until its deadline: this is what gets a client off a dead, cut off or quorumless member,
and what renews an authentication token that etcd does not accept any more.

A connection that nobody uses is closed: a rank that serves asks nothing for hours, and each
connection costs etcd 60 kB.
"""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from engine_registry.errors import EtcdError, EtcdUnavailable
from engine_registry.etcd import retry
from engine_registry.etcd.authentication import Authentication, is_on_again
from engine_registry.etcd.channel import IDLE_S, open_client
from engine_registry.etcd.config import EtcdConfig
from engine_registry.etcd.errors import is_of_grpc, translate
from engine_registry.etcd.lease_stream import LeaseStream
from engine_registry.etcd.library import etcd3, pb
from engine_registry.telemetry import metrics

T = TypeVar("T")
_CLOSED = "the connection to etcd is closed"


class Connection:
    """To one endpoint at a time. Do not carry it over a fork."""

    def __init__(self, config: EtcdConfig, accepted: bool = False) -> None:
        """`accepted`: etcd has taken the credentials of `config` before."""
        self.config = config
        self._lock = threading.Lock()
        self._authentication = Authentication(config, accepted)
        self._client: Any = None
        # the stream of renewals, and its connection
        self._renewals: tuple[Any, LeaseStream | None] = (None, None)
        self._watches: weakref.WeakSet[Any] = weakref.WeakSet()  # WatchStreams
        self._calls = 0  # that are being made
        self._used_at = 0.0  # by such a call, on the clock of time.monotonic
        # anyone, so that the members of etcd share all clients
        self._next_endpoint = random.randrange(len(config.endpoints))  # noqa: S311  no secret
        self._closed = threading.Event()

    def close(self) -> None:
        """From any thread, any number of times.

        Calls and streams that are under way end at once, with an EtcdError.
        """
        with self._lock:
            self._closed.set()
            client, self._client = self._client, None
            self._renewals = None, None
        if client is not None:
            client.close()

    def _unary(self, service: str, method: str, request: Any, stop: Any = None) -> Any:
        def operation(client: Any, timeout_s: float) -> Any:
            stub = getattr(pb, f"{service}Stub")(client.channel)
            return getattr(stub, method)(request, timeout_s, metadata=client.metadata)

        return self._call(operation, stop)

    def _range(self, request: Any) -> Any:
        return self._unary("KV", "Range", request)

    def _call(self, operation: Callable[[Any, float], T], stop: Any = None) -> T:
        timeout_s = self.config.timeout_s
        attempts = retry.CallAttempts(timeout_s, len(self.config.endpoints))
        retrying = retry.until(timeout_s, self._closed, stop)
        result: T = retrying(self._attempt, operation, attempts)
        return result

    def _attempt(self, operation: Callable[[Any, float], T], attempts: retry.CallAttempts) -> T:
        client = None
        try:
            client = self._begin()
            self._authentication.authenticate(client, attempts.time_s())
            return operation(client, attempts.time_s())
        except (grpc.RpcError, etcd3.Etcd3Exception, ValueError, OSError, RuntimeError) as exc:
            if isinstance(exc, ValueError | RuntimeError) and not is_of_grpc(exc):
                raise
            error = attempts.most_informative(self._failed(client, exc), exc)
            if not self._closed.is_set():  # else we have ended it ourselves
                metrics.etcd_error(error)
            raise error from exc
        finally:
            with self._lock:
                self._calls -= 1
                self._used_at = time.monotonic()

    def _begin(self) -> Any:
        """The client for another call. One that is idle gives way to a fresh one: gRPC has closed
        its connection, and would not close another one of the same channel.
        """
        with self._lock:
            idle = self._client if self._is_idle() else None
            self._calls += 1
            if idle is not None:
                self._client = None
        if idle is not None:
            idle.close()
        return self._connected()

    def _is_idle(self) -> bool:
        _, renewals = self._renewals
        return (
            not self._calls
            and time.monotonic() - self._used_at > IDLE_S
            and (renewals is None or renewals.over)
            and not any(watch.stands for watch in self._watches)
        )

    def _lease_stream(self, client: Any) -> LeaseStream:
        """The connection's. That of a connection that was dropped has ended with it."""
        with self._lock:
            owner, stream = self._renewals
            if stream is None or stream.over or owner is not client:
                stream = LeaseStream(pb.LeaseStub(client.channel), client.metadata or ())
                self._renewals = client, stream
            return stream

    def _failed(self, client: Any, exc: Exception) -> EtcdError:
        """The error to raise; a connection that may be at fault is not used again."""
        if self._closed.is_set():  # so we have ended the call ourselves
            return EtcdError(_CLOSED)
        error = translate(str(self.config), exc)
        if is_on_again(client, exc):
            error = EtcdUnavailable(f"authentication is on again: {error.what}", error.remedy)
        if isinstance(error, EtcdUnavailable):
            self._drop(client)
        return error

    def _connected(self) -> Any:
        with self._lock:
            if self._closed.is_set():
                raise EtcdError(_CLOSED)
            if self._client is None:
                self._client = self._new_client()
            return self._client

    def _new_client(self) -> Any:
        endpoints = self.config.endpoints
        return open_client(self.config, endpoints[self._next_endpoint % len(endpoints)])

    def _drop(self, client: Any) -> None:
        """The next call gets a fresh connection, to the next endpoint.

        `client` None: connecting itself has failed.
        """
        with self._lock:
            if client is not self._client:
                return  # another thread has dropped it already
            self._client = None
            self._renewals = None, None
            self._next_endpoint += 1
        if client is not None:
            client.close()
