"""When a call to etcd is tried again, and which error it ends with. Pure.

Used by `etcd.connection` and `etcd.client`.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import grpc
import tenacity

from engine_registry.errors import EtcdError, EtcdUnavailable, HistoryLost

BACK_OFF = tenacity.wait_exponential(multiplier=0.02, max=0.5) + tenacity.wait_random(0, 0.05)
_LEAST_S = 0.05  # that an attempt gets

unless_compacted_between_pages = tenacity.retry(
    retry=tenacity.retry_if_exception_type(HistoryLost),
    stop=tenacity.stop_after_attempt(10),
    reraise=True,
)


def until(timeout_s: float, closed: threading.Event, stop: Any = None) -> tenacity.Retrying:
    """Tries again while etcd is unavailable, for `timeout_s`, until `stop`, or until `closed`."""
    late = tenacity.stop_after_delay(timeout_s)
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(EtcdUnavailable),
        stop=tenacity.stop_any(stop, late) if stop else late,
        wait=BACK_OFF,
        sleep=tenacity.sleep_using_event(closed),
        reraise=True,
    )


class CallAttempts:
    """The attempts of one call: how long the next one may take, and which error says most."""

    def __init__(self, timeout_s: float, endpoints: int) -> None:
        """`timeout_s` is for all of them; an attempt gets the share of one endpoint."""
        self._deadline = time.monotonic() + timeout_s
        self._share_s = timeout_s / endpoints
        self._answers: list[EtcdUnavailable] = []  # of etcd itself

    def time_s(self) -> float:
        """How long an attempt that begins now may take."""
        return max(_LEAST_S, min(self._share_s, self._deadline - time.monotonic()))

    def most_informative(self, error: EtcdError, exc: Exception) -> EtcdError:
        """`error`, which came of `exc`, or an earlier answer of etcd.

        The last attempt of a call may be too short for any answer. An earlier answer says more.
        """
        if not (isinstance(exc, grpc.RpcError) and isinstance(error, EtcdUnavailable)):
            return error
        if (exc.details() or "").startswith("etcdserver: "):
            self._answers.append(error)
        late = exc.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        return self._answers[-1] if self._answers and late else error
