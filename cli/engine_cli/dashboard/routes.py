"""The dashboard's HTTP routes: the files of the page, a stream of what changes, and on request all
of one rank. Used by `server`, in its event loop. Nothing here changes anything.

The files are for everybody who reaches the port; all else needs the token, if there is one. The
page asks for it, and sends it with its requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.resources import files
from itertools import islice

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine_cli.dashboard.feed import BEAT_S, Feed
from engine_cli.dashboard.journal import Changes
from engine_cli.render.documents import rank_json
from engine_cli.render.texts import TENSOR_COLUMNS, tensor_rows
from engine_registry import RankRecord, Registry
from engine_registry.errors import EtcdError, RecordDamaged
from engine_registry.gateway.calls import Calls
from engine_registry.gateway.limits import Busy, ConnectionLimiter
from engine_registry.gateway.token import bears
from engine_registry.schema.manifest import Manifest
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_AT_ONCE = 500  # entries of one message, so that a browser does not stand still for it
_ALIVE_S = 15.0  # a comment now and then shows that the stream is not dead
_MAX_TENSORS = 5_000
_ETCD_S = 10.0
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

Handler = Callable[[Request], Awaitable[Response]]


class Routes:
    def __init__(
        self,
        registry: Registry,
        feed: Feed,
        calls: Calls,
        limiter: ConnectionLimiter,
        token: str | None,
        names: frozenset[str],
    ) -> None:
        """`names` are what a browser may call this host, lest a page of the web reach it under
        another name; empty where that does not matter.
        """
        self._registry = registry
        self._feed = feed
        self._calls = calls
        self._limiter = limiter
        self._token = token
        self._names = names

    def app(self) -> ASGIApp:
        routes = [
            Route("/" if name == "index.html" else f"/{name}", _file(content, media_type))
            for name, content, media_type in _page()
        ]
        routes += [
            Route("/api/changes", self._guarded(self._changes), methods=["GET"]),
            Route("/api/rank", self._guarded(self._rank), methods=["GET"]),
            Route("/api/tensors", self._guarded(self._tensors), methods=["GET"]),
            Route("/health", _health, methods=["GET"]),
        ]
        app = Starlette(routes=routes)
        app.router.redirect_slashes = False
        return self._named(app)

    def _named(self, app: ASGIApp) -> ASGIApp:
        """With the headers that every answer has, for those who know our name."""

        async def named(scope: Scope, receive: Receive, send: Send) -> None:
            async def answer(message: Message) -> None:
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message).update(_HEADERS)
                await send(message)

            if scope["type"] != "http":
                await app(scope, receive, send)
            elif self._names and _host_of(Request(scope)) not in self._names:
                refusal = PlainTextResponse("this is not the dashboard's host name", 421)
                await refusal(scope, receive, answer)
            else:
                await app(scope, receive, answer)

        return named

    def _guarded(self, handler: Handler) -> Handler:
        """Failures as answers."""

        async def guarded(request: Request) -> Response:
            try:
                await self._limiter.begin(request)
                if bears(request, self._token):
                    return await handler(request)
            except Busy as exc:
                return JSONResponse({"detail": str(exc)}, 503, {"Retry-After": "1"})
            except (EtcdError, RecordDamaged) as exc:
                return JSONResponse({"detail": str(exc)}, 503)
            except Exception as exc:
                log.exception(
                    "%s failed; please report it",
                    request.url.path,
                    extra=fields("request_failed", method=request.method, path=request.url.path),
                )
                return JSONResponse(
                    {"detail": f"unexpected {type(exc).__name__}: see the dashboard's log"}, 500
                )
            return JSONResponse(
                {"detail": "give the gateway's token: Authorization: Bearer TOKEN"},
                401,
                {"WWW-Authenticate": "Bearer"},
            )

        return guarded

    async def _changes(self, request: Request) -> Response:
        return StreamingResponse(self._stream(), media_type="text/event-stream")

    async def _stream(self) -> AsyncIterator[bytes]:
        """All that is shown, and from then on what changes. A browser that does not take it misses
        states between, and no message waits for it.
        """
        revision, loop = None, asyncio.get_running_loop()
        said_at = loop.time()
        while not self._feed.ended:
            changes = self._feed.since(revision)
            if changes.whole or changes.entries:
                said_at = loop.time()
                for message in _messages(changes):
                    yield message
            elif loop.time() - said_at > _ALIVE_S:
                said_at = loop.time()
                yield b": alive\n\n"
            revision = changes.revision
            await asyncio.sleep(BEAT_S)

    async def _rank(self, request: Request) -> Response:
        record = self._record(request)
        if record is None:
            return _no_rank()
        return _json({**rank_json(record), "version": str(record.version), "writer": record.writer})

    async def _tensors(self, request: Request) -> Response:
        record = self._record(request)
        if record is None:
            return _no_rank()
        manifest = await self._calls.within(_ETCD_S, lambda: self._registry.manifest(record))
        some = Manifest(tuple(islice(manifest.tensors, _MAX_TENSORS)), manifest.regions)
        return _json(
            {
                "columns": TENSOR_COLUMNS,
                "rows": tensor_rows(some),
                "tensors": len(manifest.tensors),
            }
        )

    def _record(self, request: Request) -> RankRecord | None:
        rank = request.query_params.get("rank", "")
        if not rank.isdecimal() or len(rank) > 9:
            return None
        return self._feed.record(request.query_params.get("instance", ""), int(rank))


def _messages(changes: Changes) -> list[bytes]:
    """As server-sent events; `more` where another belongs to it."""
    entries = changes.entries
    starts = range(0, max(1, len(entries)), _AT_ONCE)
    return [
        b"data: "
        + msgspec.json.encode(
            {
                "whole": changes.whole and start == 0,
                "more": start + _AT_ONCE < len(entries),
                "entries": [
                    (kind, name, value) for (kind, name), value in entries[start : start + _AT_ONCE]
                ],
            }
        )
        + b"\n\n"
        for start in starts
    ]


def _page() -> list[tuple[str, bytes, str]]:
    return [
        (each.name, each.read_bytes(), _TYPES[suffix])
        for each in files("engine_cli.dashboard").joinpath("page").iterdir()
        if (suffix := f".{each.name.rpartition('.')[2]}") in _TYPES
    ]


def _file(content: bytes, media_type: str) -> Handler:
    async def answer(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return answer


def _json(data: object) -> Response:
    return Response(msgspec.json.encode(data), media_type="application/json")


def _no_rank() -> Response:
    return JSONResponse({"detail": "this rank is not registered"}, 404)


def _host_of(request: Request) -> str:
    host = request.headers.get("host", "").lower()
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


async def _health(request: Request) -> Response:
    return PlainTextResponse("OK")
