"""A running gateway: the event loop in which uvicorn answers and the prober of seeds runs.

Used by `gateway.server`. Starts one thread with the event loop, one that follows etcd, and some for
calls to etcd. None of them holds a reference to the `Gateway`, so one that is forgotten can be
collected.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

from starlette.applications import Starlette

from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig
from engine_registry.etcd.follow import Follower
from engine_registry.gateway.answers import Answers
from engine_registry.gateway.calls import Calls
from engine_registry.gateway.claims import Seeds, Served
from engine_registry.gateway.http import HttpServer
from engine_registry.gateway.limits import ConnectionLimiter, Limits
from engine_registry.gateway.mirror import Mirror
from engine_registry.gateway.probe import probe
from engine_registry.gateway.prober import Prober
from engine_registry.gateway.routes import Routes
from engine_registry.schema.keys import ENGINES

# for one call to etcd: a request waits for more than one, and SGLang's clients wait for ever
_ETCD_S = 2.0
_THREADS = 4
_PROBE_S = 1.0


@dataclass(frozen=True)
class ServiceConfig:
    """What a gateway serves, and how it treats seeds and clients. Checked by `Gateway`."""

    etcd: EtcdConfig
    served: Served
    ttl_s: float
    probe_interval_s: float
    probe_tolerance: int
    token: str | None
    registers: bool  # clients may register
    seed_url: str | None
    limits: Limits


class Service:
    """Serves from the end of `__init__` to `close`."""

    def __init__(self, config: ServiceConfig, listener: socket.socket) -> None:
        """`listener` is for this service alone, which closes it at the end."""
        etcd = config.etcd
        self._etcd = Etcd(replace(etcd, timeout_s=min(etcd.timeout_s, _ETCD_S)))
        self._reading = Calls(_THREADS, "gateway reads")
        # separate threads, so that registrations do not keep reads waiting
        self._writing = Calls(_THREADS, "gateway writes")
        self._parsing = Calls(1, "gateway parsing")
        self._limiter = ConnectionLimiter(config.limits)
        look = partial(probe, timeout_s=_PROBE_S)
        probing = self._etcd.sibling()
        interval_s = config.probe_interval_s
        self._prober = Prober(
            probing, Follower(probing, ENGINES), look, interval_s, config.probe_tolerance
        )
        answers = Answers(self._etcd, self._reading, self._etcd.config.timeout_s)
        seeds = Seeds(self._etcd, self._writing, config.ttl_s, look)
        self._mirror = (
            Mirror(self._etcd, seeds, look, config.seed_url, config.served, interval_s)
            if config.seed_url
            else None
        )
        routes = Routes(
            config.served,
            answers,
            seeds,
            self._parsing,
            self._limiter,
            config.token,
            config.registers,
        )
        app = routes.app(self._lifespan)
        self._server = HttpServer(app, self._limiter, listener, "gateway")
        self._closed = False
        self._server.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until it has ended by `close`, or by itself, which raises why; False where the time is
        over first.
        """
        return self._server.wait(timeout_s)

    def stop(self) -> None:
        """From any thread: `wait` returns when it has ended."""
        self._server.stop()

    def close(self) -> None:
        """Any number of times.

        Answers what it is being asked, for up to 2 s; ranks of seeds stay until their TTL is over.
        """
        if self._closed:
            return
        self._closed = True
        self._server.close()
        self._etcd.close()
        for calls in (self._reading, self._writing, self._parsing):
            calls.close()

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        works: list[Prober | Mirror] = [self._prober, *([self._mirror] if self._mirror else [])]
        tasks = [asyncio.create_task(work.run()) for work in works]
        for task in tasks:
            task.add_done_callback(self._on_end)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for work in works:
                work.close()

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """Of a task that should go on: the gateway ends with what ended it."""
        if not task.cancelled():
            self._server.fail(task.exception())
