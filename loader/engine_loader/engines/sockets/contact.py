"""A first contact with a source: a connection over which both ends prove what they are."""

from __future__ import annotations

import secrets
import ssl
from collections.abc import Callable
from contextlib import suppress

from engine_loader.engines.dial import dial, failed
from engine_loader.engines.sockets import wire
from engine_loader.engines.sockets.credentials import SocketCredentials, secured
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
    try:
        token, context = credentials.token(), credentials.context(server=False)
    except (OSError, ValueError) as exc:
        raise failed(session_id, f"our own credentials cannot be used ({exc})") from exc
    connection = dial(session_id, given_up)
    try:
        stream = Stream(secured(connection, context, host_of(session_id)))
    except (OSError, ValueError) as exc:
        connection.close()
        raise failed(session_id, f"there was no handshake ({exc})") from exc
    try:
        opened(stream)
        stream.begin(_LIMIT_S)
        return stream, _prove(stream, session_id, token)
    except (OSError, ValueError, wire.NotOurs) as exc:
        stream.close()
        raise failed(session_id, _why(exc, context is not None)) from exc
    except BaseException:
        stream.close()
        raise


def _prove(stream: Stream, session_id: str, token: bytes) -> Place | None:
    """ReadFailed if one does not trust the other."""
    with suppress(OSError):  # what it has said before it closed the connection says more
        stream.say(wire.MAGIC)
    hello = wire.Hello.read(stream.hear(wire.HELLO_NBYTES))
    if hello.demands_token != bool(token):
        raise failed(
            session_id,
            "it demands a token, and this engine has none"
            if hello.demands_token
            else "it has no token, and this engine reads only from engines that have ours",
        )
    challenge = secrets.token_bytes(wire.CHALLENGE_NBYTES)
    contact = wire.Contact(session_id, hello.challenge, challenge)
    ours = contact.proof(token, b"reader") if token else wire.NO_PROOF
    stream.say(wire.Answer(challenge, ours).packed())
    welcome = wire.Welcome.read(stream.hear(wire.WELCOME_NBYTES))
    proven = not token or contact.proves(token, b"source", welcome.proof)
    if not (welcome.taken and proven):
        raise failed(session_id, "it has another token than this engine")
    return welcome.place


def _why(exc: Exception, tls: bool) -> str:
    """There was no handshake; `tls` says whether this engine speaks TLS."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {exc.verify_message}"
    reason = getattr(exc, "reason", None) or ""
    if reason == "WRONG_VERSION_NUMBER":
        return "it speaks no TLS, and this engine reads only from engines that do"
    if "ALERT" in reason:
        return f"it does not accept the certificate of this engine ({reason})"
    if isinstance(exc, (ConnectionError, ssl.SSLEOFError)):
        return "it has closed the connection: it has just ended, or it " + (
            "does not accept the certificate of this engine"
            if tls
            else "demands a certificate, and this engine has none"
        )
    return f"there was no handshake ({exc})"
