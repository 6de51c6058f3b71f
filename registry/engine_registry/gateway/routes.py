"""The gateway's HTTP routes: SGLang's requests in, records and answers out. Used by
`gateway.server`, in its event loop.

Every failure is answered as SGLang's servers answer theirs: `{"detail": …}` by the bootstrap
routes, and by the two of the inference server, whose failures are all 400 there,
`{"error": {"message": …}}`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Lifespan

from engine_registry.errors import (
    EtcdError,
    EtcdUnavailable,
    InstanceMismatch,
    InstanceNotFound,
    InvalidField,
    RankConflict,
    RecordDamaged,
    RegistryError,
)
from engine_registry.gateway.answers import Answers
from engine_registry.gateway.calls import Calls
from engine_registry.gateway.claims import Seeds, Served, seed_record
from engine_registry.gateway.limits import (
    Body,
    Busy,
    ClientDisconnect,
    ConnectionLimiter,
    SlicedResponse,
    TooLarge,
    TooSlow,
)
from engine_registry.gateway.ranks import parse_rank, parse_world_size
from engine_registry.gateway.sglang import instance_of_role, parse_registration
from engine_registry.gateway.token import bears
from engine_registry.schema.keys import check_instance
from engine_registry.schema.record import RankRecord
from engine_registry.telemetry import metrics
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_REGISTER_S = 4.5  # SGLang's seeds wait 5 s for the answer
# what is left of the request's body would be taken for the next one
_CLOSES = {"Connection": "close"}
_NOBODY_REGISTERS = (
    "clients may not register at this gateway, which has no token: start it with a "
    "`seed_url`, so that "
    "it asks the seed's own server, or with a `token`, or, in a network that you trust, with "
    "`allow_anonymous`"
)

Handler = Callable[[Request], Awaitable[Response]]


class Routes:
    def __init__(
        self,
        served: Served,
        answers: Answers,
        seeds: Seeds,
        parsing: Calls,
        limiter: ConnectionLimiter,
        token: str | None = None,
        registers: bool = True,
    ) -> None:
        """`parsing` has one thread, which bounds the memory that parsed bodies take.

        If not `registers`, registrations are refused unread. The answer to one, and later whether
        its rank is still listed, says whether anything listens at an address of the client's
        choice.
        """
        self._served = served
        self._answers = answers
        self._seeds = seeds
        self._parsing = parsing
        self._limiter = limiter
        self._token = token
        self._registers = registers

    def app(self, lifespan: Lifespan[Starlette] | None = None) -> Starlette:
        handlers: dict[Any, Any] = {404: _unknown_path, 405: _wrong_method}
        app = Starlette(routes=self._routes(), exception_handlers=handlers, lifespan=lifespan)
        app.router.redirect_slashes = False
        return app

    def _routes(self) -> list[Route]:
        paths = {
            "/register_transfer_engine_info": ("PUT", self._answered(self._register)),
            "/get_transfer_engine_info": ("GET", self._answered(self._get)),
            "/remote_instance_transfer_engine_info": (
                "GET",
                self._answered(self._get, as_inference_server=True),
            ),
            "/get_remote_instance_transfer_engine_info": (
                "GET",
                self._answered(self._get, as_inference_server=True),
            ),
            "/health": ("GET", _health),
        }
        return [
            Route(prefix + path, handler, methods=[method])
            for path, (method, handler) in paths.items()
            for prefix in ("", "/instances/{instance}")
        ] + [Route("/metrics", self._answered(self._metrics), methods=["GET"])]

    async def _register(self, request: Request) -> Response:
        if not self._registers:
            await self._limiter.discard_body(request)
            return JSONResponse({"detail": _NOBODY_REGISTERS}, 403, _CLOSES)
        async with self._limiter.body(request) as body:
            name = self._instance(request)

            async def register() -> None:
                query_size = parse_world_size(request.query_params.get("world_size"))
                record, parts = await self._parsing(
                    lambda: self._parse(name, query_size, request.query_params.get("role"), body)
                )
                await self._seeds.register(record, parts)

            try:
                await asyncio.wait_for(register(), _REGISTER_S)
            except asyncio.TimeoutError as exc:
                raise EtcdUnavailable(
                    f"no registration within {_REGISTER_S:g} s: etcd is slow or away, or "
                    "much is sent"
                ) from exc
        return PlainTextResponse("OK")

    def _parse(
        self, name: str, query_size: int | None, role: str | None, body: Body
    ) -> tuple[RankRecord, list[bytes]]:
        info = parse_registration(body.read(), self._limiter.limits.tensors)
        own = name == self._served.instance
        world_size = query_size or info.world_size or (self._served.world_size if own else 1)
        model = self._served.model if own else name
        role = info.role or role or ""
        return seed_record(
            instance_of_role(name, role), info, world_size, instance_of_role(model, role)
        )

    async def _get(self, request: Request) -> Response:
        rank = parse_rank(request.query_params.get("rank"))
        instance = check_instance(
            instance_of_role(self._instance(request), request.query_params.get("role", ""))
        )
        return SlicedResponse(await self._answers.of(instance, rank), media_type="application/json")

    async def _metrics(self, request: Request) -> Response:
        if not metrics.enabled():
            return JSONResponse(
                {"detail": "nothing is counted here: pip install 'engine-registry[metrics]'"}, 404
            )
        body, media_type = await self._parsing(
            lambda: metrics.render(request.headers.get("accept", ""))
        )
        return Response(body, media_type=media_type)

    def _instance(self, request: Request) -> str:
        return check_instance(request.path_params.get("instance", self._served.instance))

    def _answered(self, handler: Handler, as_inference_server: bool = False) -> Handler:
        """Failures as answers."""

        async def answered(request: Request) -> Response:
            headers = dict(_CLOSES) if request.method == "PUT" else {}
            try:
                await self._limiter.begin(request)
                if bears(request, self._token):
                    return await handler(request)
                status, reason = 401, "give the gateway's token: Authorization: Bearer TOKEN"
                headers = {"WWW-Authenticate": "Bearer", **_CLOSES}
                await self._limiter.discard_body(request)
            except ClientDisconnect:
                status, reason = 400, "the client has gone"
            except Busy as exc:
                status, reason = 503, str(exc)
                headers["Retry-After"] = "1"
            except Exception as exc:  # what is none of the errors that we know is logged as a bug
                status, reason = _status(exc), str(exc)
                if status == 500:
                    log.exception(
                        "%s %s failed; please report it",
                        request.method,
                        request.url.path,
                        extra=fields(
                            "request_failed", method=request.method, path=request.url.path
                        ),
                    )
                    reason = f"unexpected {type(exc).__name__}: see the gateway's log"
                status = 400 if as_inference_server else status
            body = {"error": {"message": reason}} if as_inference_server else {"detail": reason}
            return JSONResponse(body, status, headers)

        return answered


_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (InvalidField, 400),
    (InstanceNotFound, 404),
    (RecordDamaged, 404),
    (RankConflict, 409),
    (InstanceMismatch, 409),
    (EtcdError, 503),
    (RegistryError, 503),
    (TooLarge, 413),
    (TooSlow, 408),
)


def _status(exc: Exception) -> int:
    return next((status for kind, status in _STATUS if isinstance(exc, kind)), 500)


async def _health(request: Request) -> Response:
    return PlainTextResponse("OK")


async def _unknown_path(request: Request, exc: Exception) -> Response:
    return JSONResponse(
        {
            "detail": (
                f"there is no {request.url.path} here: docs/how-to/sglang-gateway.md has the paths"
            )
        },
        404,
    )


async def _wrong_method(request: Request, exc: Exception) -> Response:
    allowed = getattr(exc, "headers", None) or {}
    return JSONResponse(
        {"detail": f"{request.method} is not for {request.url.path}"}, 405, {**allowed, **_CLOSES}
    )
