"""The token of an HTTP server: is it a good one, and does a request bear it? Used by the gateway
and by the dashboard of the command line.
"""

from __future__ import annotations

import hmac

from starlette.requests import Request

from engine_registry.errors import InvalidField


def check_token(token: str | None) -> str | None:
    """`token` itself, or InvalidField."""
    if token is not None and (
        not token.isascii() or not token.isprintable() or not token or " " in token
    ):
        raise InvalidField(
            "the gateway's token is not valid: it is printable ASCII without spaces",
            field="token",
        )
    return token


def bears(request: Request, token: str | None) -> bool:
    """Without a token every request does."""
    if token is None:
        return True
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(
        given.strip().encode(), token.encode()
    )
