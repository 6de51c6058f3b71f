"""Certificates: etcd's as it shows it, and the client's as it lies in its file.

Private keys are never shown.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine_cli.doctor.finding import Finding, fail, ok, warn
from engine_registry.schema.address import is_loopback

if TYPE_CHECKING:
    from engine_registry.etcd.config import Endpoint, EtcdConfig

_DAY_S = 86_400
_SOON_S = 21 * _DAY_S


@dataclass(frozen=True)
class Certificate:
    """`error` says why it is not good; then nothing else is known of it."""

    whose: str
    name: str = ""
    expires_at: float = 0.0  # seconds since the epoch
    error: str = ""


def server_certificate(config: EtcdConfig, endpoint: Endpoint, limit_s: float) -> Certificate:
    """What the endpoint shows, if our authority vouches for it."""
    whose = f"etcd's at {endpoint}"
    try:
        context = ssl.create_default_context(cafile=config.cacert)
        load_pair(context, config.cert, config.key)
        context.set_alpn_protocols(["h2"])
        with socket.create_connection((endpoint.host, endpoint.port), limit_s) as plain:
            with context.wrap_socket(plain, server_hostname=endpoint.host) as tls:
                return _described(whose, tls.getpeercert())
    except (OSError, ValueError) as exc:  # SSLError too
        return Certificate(whose, error=reason_of(exc))


def client_certificate(cert: str, key: str) -> Certificate:
    """Of a file that only a handshake reads: one in memory, in which both sides have this
    certificate and trust it.
    """
    whose = f"ours in {cert}"
    try:
        server_side = _context(ssl.PROTOCOL_TLS_SERVER, cert, key)
        client_side = _context(ssl.PROTOCOL_TLS_CLIENT, cert, key)
        server_side.verify_mode = ssl.CERT_REQUIRED
        server_side.load_verify_locations(cert)
        server_side.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        return _described(whose, shake_hands(server_side, client_side))
    except (OSError, ValueError) as exc:
        return Certificate(whose, error=reason_of(exc))


def shake_hands(
    server_side: ssl.SSLContext, client_side: ssl.SSLContext, host: str | None = None
) -> Any:
    """In memory; the certificate of the client. `host` is what the client takes the server for.
    OSError, ValueError.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_side.wrap_bio(to_server, to_client, server_side=True)
    client = client_side.wrap_bio(to_client, to_server, server_hostname=host)
    for _ in range(4):  # the messages of a handshake
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return server.getpeercert()


def _context(protocol: Any, cert: str, key: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # of each other nothing is asked
    load_pair(context, cert, key)
    return context


def load_pair(context: ssl.SSLContext, cert: str | None, key: str | None) -> None:
    """A client certificate, if there is one.

    A key with a passphrase is refused, as by gRPC: OpenSSL would ask for it here.
    """
    if cert is not None:
        context.load_cert_chain(cert, key, password="")


def _described(whose: str, certificate: Any) -> Certificate:
    names = dict(pair for part in certificate["subject"] for pair in part)
    return Certificate(
        whose, str(names.get("commonName", "")), ssl.cert_time_to_seconds(certificate["notAfter"])
    )


def reason_of(exc: Exception) -> str:
    if isinstance(exc, ssl.SSLCertVerificationError):
        return str(exc.verify_message)
    if isinstance(exc, ssl.SSLError):
        return str(exc.reason or exc).replace("_", " ").lower()
    return str(exc.strerror or exc) if isinstance(exc, OSError) else str(exc)


def judge_certificates(
    certificates: Sequence[Certificate], now: float | None = None
) -> list[Finding]:
    return [_judge(each, time.time() if now is None else now) for each in certificates]


def _judge(certificate: Certificate, now: float) -> Finding:
    name, whose = "etcd.tls", certificate.whose
    ours = whose.startswith("ours")
    renew = "renew it: " + (
        "--cert and --key"
        if ours
        else "etcd reads its new files by itself, when a connection is made"
    )
    if "expired" in certificate.error:
        return fail(name, f"the certificate {whose} has expired", renew)
    if certificate.error:
        mend = (
            "check --cert and --key"
            if ours
            else "check --cacert, and that the certificate names this host or address"
        )
        return fail(name, f"the certificate {whose} is not accepted: {certificate.error}", mend)
    left_s = certificate.expires_at - now
    if left_s <= 0:
        return fail(name, f"the certificate {whose} has expired", renew)
    which = f"the certificate {whose} ({certificate.name or 'without a name'})"
    return good_for(name, which, left_s, renew)


def good_for(name: str, which: str, left_s: float, renew: str) -> Finding:
    days = int(left_s // _DAY_S)
    what = f"{which} is good for {days} more day{'' if days == 1 else 's'}"
    return warn(name, what, renew) if left_s < _SOON_S else ok(name, what)


def judge_plaintext(config: EtcdConfig) -> Finding:
    name = "etcd.tls"
    if all(is_loopback(endpoint.host) for endpoint in config.endpoints):
        return ok(name, "off, and etcd is on this machine")
    what = "off: any machine on the way to etcd can read and change what loaders read"
    if config.user is not None:
        what += ", and reads the password"
    return warn(name, what, "give etcd a certificate, and its CA with --cacert")
