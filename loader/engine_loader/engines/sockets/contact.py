"""A first contact with a source: a connection over which both ends prove what they are."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from engine_loader.engines.dial import dial, failed
from engine_loader.engines.sockets import wire
from engine_loader.engines.sockets.credentials import SocketCredentials
from engine_loader.engines.sockets.neighbour import Place
from engine_loader.engines.sockets.stream import Stream
from engine_registry.schema.address import host_of

_LIMIT_S = 60.0


def meet(
    session_id: str,
    credentials: SocketCredentials,
    given_up: Callable[[], bool],
    opened: Callable[[Stream], None],
) -> tuple[Stream, Place | None]:
    """The connection, and where the source is on its host, if it says so; ReadFailed.

    `opened` gets the connection before anything is waited for, so that it can be cut.
    """
    connection = dial(session_id, given_up)
    try:
        secured = credentials.secured(connection, host_of(session_id))
    except (OSError, ValueError) as exc:
        connection.close()
        raise failed(session_id, f"our own credentials cannot be used ({exc})") from exc
    stream = Stream(secured)
    try:
        opened(stream)
        stream.begin(_LIMIT_S)
        return stream, _prove(stream, session_id, credentials.token())
    except (OSError, ValueError, wire.NotOurs) as exc:
        stream.close()
        raise failed(session_id, f"there was no handshake ({exc})") from exc
    except BaseException:
        stream.close()
        raise


def _prove(stream: Stream, session_id: str, token: bytes) -> Place | None:
    """ReadFailed if one does not trust the other."""
    hello = wire.Hello.read(stream.receive_bytes(wire.HELLO_NBYTES))
    if hello.demands_token != bool(token):
        raise failed(
            session_id,
            "it demands a token, and this engine has none"
            if hello.demands_token
            else "it has no token, and this engine reads only from engines that have ours",
        )
    challenges = hello.challenge, secrets.token_bytes(wire.CHALLENGE_NBYTES)
    ours = wire.proof(token, b"reader", *challenges) if token else wire.NO_PROOF
    stream.send_bytes(wire.Answer(challenges[1], ours).packed())
    welcome = wire.Welcome.read(stream.receive_bytes(wire.WELCOME_NBYTES))
    if token and not wire.proves(token, b"source", *challenges, welcome.proof):
        raise failed(session_id, "it has another token than this engine")
    return welcome.place
