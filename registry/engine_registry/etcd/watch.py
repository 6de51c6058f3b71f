"""The stream of changes under a prefix, as etcd sends it, until it ends.

Made by `Etcd.watch`; `etcd.follow` resumes it. Runs in the caller's thread; `cancel` may be called
from any other.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import grpc

from engine_registry.errors import AnswerTooLarge, EtcdError, EtcdUnavailable, HistoryLost
from engine_registry.etcd.connection import Connection
from engine_registry.etcd.errors import from_cancelled_watch
from engine_registry.etcd.messages import change_of
from engine_registry.schema.keyvalue import Batch


class WatchStream:
    """Batches of changes, until `cancel` or its time is over (which end the iteration) or an
    EtcdError.
    """

    def __init__(
        self,
        etcd: Connection,
        client: Any,
        call: Any,
        requests: queue.SimpleQueue[Any],
        timed: bool = False,
    ) -> None:
        """`timed`: the call has a deadline."""
        self._timed = timed
        self._etcd = etcd
        self._client = client
        self._call: Any = call  # None once it is cancelled
        self._requests = requests
        self._cancelled = False
        self._numbers: dict[int, int] = {}  # of watches, by the ids that etcd gives them

    def __iter__(self) -> Iterator[Batch]:
        # gRPC raises the call itself. With its traceback, or as the cause of an error that somebody
        # keeps, it would be part of a cycle and so be collected late; at the interpreter's end its
        # __del__ may wait for a lock that one of gRPC's threads holds, stopped for good. So it is
        # let go of here, and the error is raised where it is not being handled.
        error: EtcdError | None = None
        try:
            for response in self._call or ():
                if response.compact_revision:
                    raise HistoryLost(
                        f"etcd has compacted its history up to revision {response.compact_revision}"
                    )
                if response.canceled:
                    raise from_cancelled_watch(response.cancel_reason)
                if response.created:  # in the order in which they were asked for
                    self._numbers[response.watch_id] = len(self._numbers)
                watch = self._numbers.get(response.watch_id, 0)
                if response.events:
                    namespace = self._etcd.config.namespace
                    changes = tuple(change_of(namespace, event) for event in response.events)
                    yield Batch(changes[-1].mod_revision, changes, watch)
                elif not response.created:  # progress: nothing up to this revision is still to come
                    yield Batch(response.header.revision, (), watch)
            raise EtcdUnavailable("etcd ended the watch")
        except (grpc.RpcError, EtcdError) as exc:
            if not self._cancelled and not self._is_late(exc):
                error = self._etcd._failed(self._client, exc)
            exc.__traceback__ = None
        finally:
            self.cancel()
        if isinstance(error, AnswerTooLarge):
            # changes that come at once cannot be had in parts; a snapshot can
            raise HistoryLost(error.what, error.remedy)
        if error is not None:
            raise error

    def _is_late(self, exc: Exception) -> bool:
        """The stream's own deadline, which etcd may notice first and answer with UNKNOWN.

        It is no fault of a connection that others use.
        """
        return (
            self._timed
            and isinstance(exc, grpc.RpcError)
            and "deadline exceeded" in (exc.details() or "").lower()
        )

    @property
    def stands(self) -> bool:
        """It has not ended, as far as its reader knows."""
        return self._call is not None

    def cancel(self) -> None:
        """From any thread, any number of times."""
        self._cancelled = True
        self._requests.put(None)
        call, self._call = self._call, None
        if call is not None:
            call.cancel()
