"""SGLang's HTTP interface over the registry: what `engines gateway` runs. Any number of them serve
the same ranks.

It has no state of its own: ranks and manifests are in etcd, and which of them are for gateways to
keep. Starts one thread with an event loop, in which uvicorn answers and the prober of seeds runs,
one that follows etcd, and some for calls to etcd.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import threading
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from ipaddress import ip_address
from types import TracebackType

import uvicorn
from starlette.applications import Starlette

from engine_registry.client import MAX_TTL_S, MIN_TTL_S, Registry
from engine_registry.errors import GatewayFailed, InvalidField
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.follow import Follower
from engine_registry.gateway.answers import Answers
from engine_registry.gateway.calls import Calls
from engine_registry.gateway.claims import Seeds, Served
from engine_registry.gateway.limits import Guard, Limits
from engine_registry.gateway.mirror import Mirror, check_url
from engine_registry.gateway.probe import probe
from engine_registry.gateway.prober import Prober
from engine_registry.gateway.routes import Routes
from engine_registry.schema.keys import ENGINES, check_instance, check_rank
from engine_registry.schema.numbers import seconds
from engine_registry.schema.record import ModelIdentity

log = logging.getLogger(__name__)
PORT = 6789  # of SGLang's own server
# for one call to etcd: a request waits for more than one, and SGLang's clients wait for ever
_ETCD_S = 2.0
_THREADS = 4
_BACKLOG = 512
_ACCEPTS = 16  # at a time; then it reads them, before a head that has come counts as missing
_PROBE_S = 1.0
_GRACE_S = 2  # for requests that are being answered when it closes
_JOIN_S = 10.0


class Gateway:
    """Serves from the end of `__init__` to `close`, or the end of the `with` block."""

    def __init__(
        self,
        registry: Registry,
        instance: str,
        *,
        world_size: int = 1,
        model: str | None = None,
        host: str = "127.0.0.1",
        port: int = PORT,
        ttl_s: float = 60.0,
        probe_interval_s: float = 2.0,
        probe_tolerance: int = 3,
        token: str | None = None,
        allow_anonymous: bool = False,
        seed_url: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        """`instance`, of `world_size` ranks, is what the paths without a name serve. `port` 0 takes
        a free one.

        `ttl_s` is for how long the ranks of seeds stay while no gateway runs. `seed_url` is a
        server of SGLang's whose ranks are to be registered as those of `instance`. Without a
        `token`, clients may register only if `host` is a loopback address, or with
        `allow_anonymous`. Raises InvalidField, or GatewayFailed where the port cannot be had.
        """
        check_instance(instance)
        check_rank(0, world_size)
        served = Served(instance, ModelIdentity(model or instance).name, world_size)
        ttl_s = seconds("ttl_s", ttl_s, MIN_TTL_S, MAX_TTL_S)
        if not 0 < probe_interval_s <= ttl_s / 3 or probe_tolerance < 0:
            raise InvalidField(
                f"probe interval {probe_interval_s:g} s, tolerance {probe_tolerance} are not "
                "valid: the interval is more than 0 "
                f"and at most a third of the TTL ({ttl_s / 3:g} s), the tolerance 0 or more",
                field="probe_interval_s",
            )
        if token is not None and (
            not token.isascii() or not token.isprintable() or not token or " " in token
        ):
            raise InvalidField(
                "the gateway's token is not valid: it is printable ASCII without spaces",
                field="token",
            )
        if seed_url is not None:
            check_url(seed_url)
        self._socket = _listen(host, port)
        self.host, self.port = self._socket.getsockname()[:2]
        config = registry.config
        self._etcd = Etcd(replace(config, timeout_s=min(config.timeout_s, _ETCD_S)))
        self._reading = Calls(_THREADS, "gateway reads")
        self._writing = Calls(
            _THREADS, "gateway writes"
        )  # so that registrations do not keep reads waiting
        self._parsing = Calls(1, "gateway parsing")
        self._guard = Guard(limits or Limits())
        look = partial(probe, timeout_s=_PROBE_S)
        probing = self._etcd.sibling()
        self._prober = Prober(
            probing, Follower(probing, ENGINES), look, probe_interval_s, probe_tolerance
        )
        answers = Answers(self._etcd, self._reading, self._etcd.config.timeout_s)
        seeds = Seeds(self._etcd, self._writing, ttl_s, look)
        self._mirror = (
            Mirror(self._etcd, seeds, look, seed_url, served, probe_interval_s)
            if seed_url
            else None
        )
        registers = token is not None or allow_anonymous or ip_address(self.host).is_loopback
        routes = Routes(served, answers, seeds, self._parsing, self._guard, token, registers)
        app = routes.app(self._lifespan)
        self._server = _Server(
            uvicorn.Config(
                self._guard.watching(app),
                http=self._guard.protocol(),
                ws="none",
                lifespan="on",
                interface="asgi3",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=_ACCEPTS,
                timeout_keep_alive=int(self._guard.limits.head_s),
                timeout_graceful_shutdown=_GRACE_S,
            )
        )
        self._failure: BaseException | None = None
        self._ended = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return (
            f"http://[{self.host}]:{self.port}"
            if ":" in self.host
            else f"http://{self.host}:{self.port}"
        )

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until it has ended by `close`, or by itself, which raises why; False where the time is
        over first.
        """
        if not self._ended.wait(timeout_s):
            return False
        if self._failure is not None:
            raise self._failure
        return True

    def stop(self) -> None:
        """From any thread: `wait` returns when it has ended."""
        self._server.should_exit = True

    def close(self) -> None:
        """Any number of times.

        Answers what it is being asked, for up to 2 s; ranks of seeds stay until their TTL is over.
        """
        if self._closed:
            return
        self._closed = True
        self.stop()
        self._thread.join(_JOIN_S)
        self._etcd.close()
        for calls in (self._reading, self._writing, self._parsing):
            calls.close()
        self._socket.close()

    def __enter__(self) -> Gateway:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(
                f"gateway on port {self.port} was never closed",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )

    def _run(self) -> None:
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(self._serve())
        except BaseException as exc:  # noqa: BLE001  raised again in `wait`: a thread has no caller above it
            self._failure = self._failure or exc
        finally:
            loop.close()
            self._ended.set()

    async def _serve(self) -> None:
        await self._server.serve(sockets=[self._socket])
        self._guard.abort_all()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

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
            self._failure = task.exception()
            self._server.should_exit = True


class _Server(uvicorn.Server):
    """Its `backlog` is how many connections it accepts at a time, not how many may wait for it."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or []:
            each.listen(_BACKLOG)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, number)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
    except (OSError, UnicodeError, OverflowError) as exc:
        raise GatewayFailed(*_why_not(host, port, exc)) from exc
    return sock


def _why_not(host: str, port: int, exc: Exception) -> tuple[str, str]:
    """What has happened, and what to do."""
    number = exc.errno if isinstance(exc, OSError) and not isinstance(exc, socket.gaierror) else 0
    if number == errno.EADDRINUSE:
        what = (
            f"port {port} on {host} is in use, perhaps by SGLang itself, which has the same default"
        )
        return what, "choose another `port`, or end what listens there"
    if number == errno.EACCES:
        return f"port {port} is only for root", "choose a `port` above 1023"
    return (
        f"cannot listen at {host!r}, port {port}: {exc}",
        "give an address of this machine as `host`",
    )
