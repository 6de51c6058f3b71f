"""What gRPC, etcd3 and the operating system raise, as errors of ours: what happened, at which etcd,
and what to do.
"""

from __future__ import annotations

from typing import Any

import grpc

from engine_registry.errors import (
    AnswerTooLarge,
    EtcdError,
    EtcdFull,
    EtcdRefused,
    EtcdUnavailable,
    HistoryLost,
    LeaseNotFound,
)
from engine_registry.etcd.descriptors import explain, is_exhausted

_NO_THREAD = "can't start new thread"
_LEARNER = "not supported for learner"
_TURNED_OFF = "authentication is not enabled"
# Every change of users or roles makes a JWT too old for good: only a new one helps.
_TOKEN_OLD = "revision of auth store is old"  # noqa: S105  what etcd says, not a token

# What of gRPC's account of a TLS handshake that failed says why, and what to do then. The first
# that is found.
_TLS_FAULTS = {
    "certificate has expired": (
        "etcd's certificate, or the CA's in `cacert`, has expired: renew it, or check this "
        "machine's clock"
    ),
    "certificate is not yet valid": (
        "etcd's certificate, or the CA's in `cacert`, is not valid yet: check this machine's clock"
    ),
    "Hostname Verification": (
        "etcd's certificate is for other names than the one in `endpoints`: use one that it has"
    ),
    "CERTIFICATE_VERIFY_FAILED": (
        "its certificate is not one that the CA vouches for: check `cacert`, and that this is "
        "your etcd"
    ),
    "_ALERT_": (
        "it wants a client certificate that it trusts and that has not expired: check `cert` and "
        "`key`"
    ),
    "Failed to create security handshaker": (
        "a file holds no certificate, or another one's key: check `cacert`, `cert` and `key`"
    ),
    "WRONG_VERSION_NUMBER": (
        "it does not speak TLS there: check `endpoints`, or leave out `cacert` and https://"
    ),
    "Handshake read failed": (
        "it does not speak TLS there, or refuses us: check `endpoints`, `cacert`, `cert` and `key`"
    ),
    "handshake": "TLS does not come about: check `cacert`, `cert` and `key`",
}


def translate(endpoints: str, exc: Exception) -> EtcdError:
    """`exc` as one of ours; `endpoints` says where."""
    where = f"etcd at {endpoints}"
    if isinstance(exc, EtcdError):
        return exc
    if isinstance(exc, grpc.RpcError):
        code, text = exc.code(), (exc.details() or "").removeprefix("etcdserver: ")
        return _from_status(where, code, text)
    if isinstance(exc, FileNotFoundError | PermissionError | IsADirectoryError):
        return EtcdRefused(
            f"cannot read {exc.filename}: {exc.strerror}", "check `cacert`, `cert` and `key`"
        )
    if isinstance(exc, RuntimeError) and _NO_THREAD in str(exc):
        return EtcdUnavailable(
            f"{where} cannot be reached: no thread is left",
            "end some, or raise the limit (ulimit -u)",
        )
    if is_exhausted(exc):
        why, remedy = explain(exc)
        return EtcdUnavailable(f"{where} cannot be reached: {why}", remedy)
    return EtcdUnavailable(
        f"{where} cannot be reached: {exc}", "check the address and that etcd is running"
    )


def is_of_grpc(exc: ValueError | RuntimeError) -> bool:
    """Its word for a channel that another thread has dropped meanwhile, or for a thread that it
    cannot start; not a mistake.
    """
    return any(sign in str(exc) for sign in ("invoke RPC", _NO_THREAD))


def is_turned_off(exc: grpc.RpcError) -> bool:
    """There is no authentication, so nobody gets a token."""
    return _TURNED_OFF in (exc.details() or "")


def wants_token(exc: Exception) -> bool:
    """Whether etcd answers that a token is missing."""
    return isinstance(exc, grpc.RpcError) and (
        exc.code() is grpc.StatusCode.PERMISSION_DENIED
        or "user name is empty" in (exc.details() or "")
    )


def _from_status(where: str, code: Any, text: str) -> EtcdError:
    status = grpc.StatusCode
    if code is status.NOT_FOUND and "lease" in text:
        return LeaseNotFound(f"{where}: {text}")
    if code is status.OUT_OF_RANGE:
        return HistoryLost(f"{where}: {text}")
    if (of_size := _of_size(where, code, text)) is not None:
        return of_size
    if code is status.PERMISSION_DENIED:
        return EtcdRefused(
            f"{where} denies permission: {text}",
            "grant the user's role the keys it needs (docs/how-to/secure-etcd.md), or check `user`",
            reason="denied",
        )
    if code is status.INVALID_ARGUMENT and ("authentication failed" in text or "user name" in text):
        return EtcdRefused(
            f"{where} refuses the credentials: {text}",
            "check `user` and the password",
            reason="credentials",
        )
    if code is status.FAILED_PRECONDITION and _TURNED_OFF in text:
        return EtcdRefused(
            f"{where} has authentication turned off", "leave out `user`", reason="auth_off"
        )
    if code is status.UNAUTHENTICATED or _TOKEN_OLD in text:
        return EtcdUnavailable(f"{where} does not accept the authentication token any more: {text}")
    if _LEARNER in text:
        return EtcdUnavailable(
            f"{where}: the member that was asked is a learner, which neither reads nor "
            "writes for clients",
            "name a voting member in `endpoints`, or promote the learner (etcdctl member promote)",
        )
    if code is status.UNIMPLEMENTED or "http" in text.lower():
        return EtcdUnavailable(
            f"{where}: what answers there is not etcd 3 ({_short(text)})",
            "check the address and port",
        )
    if code is status.DEADLINE_EXCEEDED:
        return EtcdUnavailable(
            f"{where} does not answer in time",
            "check the address, the network and that etcd has a quorum",
            reason="deadline",
        )
    if code in (
        status.UNAVAILABLE,
        status.CANCELLED,
        status.INTERNAL,
        status.RESOURCE_EXHAUSTED,
        status.ABORTED,
        status.UNKNOWN,
    ):
        return EtcdUnavailable(f"{where} cannot be reached: {_short(text)}", _advice(text))
    return EtcdRefused(f"{where} refuses the request: {text}")


def _of_size(where: str, code: Any, text: str) -> EtcdRefused | None:
    """What there is too much of, if that is what etcd says."""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "space exceeded" in text:
        return EtcdFull(
            f"{where} is out of space (NOSPACE)", "compact and defragment it, then disarm the alarm"
        )
    if (
        "Received message larger than max" in text
    ):  # gRPC's word on our side; the server's begins small
        return AnswerTooLarge(
            f"{where} answers more than one message may hold{text.rpartition('larger than max')[2]}"
        )
    if "too large" in text or "larger than max" in text:
        return EtcdRefused(
            f"{where} refuses the request: it is too large ({text})",
            "see etcd's --max-request-bytes",
        )
    return None


def from_cancelled_watch(reason: str) -> EtcdError:
    """A watch may be denied only because its token is old, or because it has none and
    authentication was turned on. That is for the next call to find out: it gets a new one, or says
    what is missing.
    """
    if any(
        sign in reason
        for sign in ("auth token", _TOKEN_OLD, "permission denied", "user name is empty")
    ):
        return EtcdUnavailable(
            f"etcd does not accept the authentication token for a watch: {reason}"
        )
    return EtcdRefused(f"etcd refuses the watch: {reason or 'no reason given'}")


def _advice(text: str) -> str:
    for sign, advice in _TLS_FAULTS.items():
        if sign in text:
            return advice
    if text.endswith("Socket closed"):
        return (
            "check the address, that etcd is running, and whether it speaks TLS (`cacert`, or "
            "https:// in `endpoints`)"
        )
    return "check the address and that etcd is running"


def _short(text: str) -> str:
    """gRPC's account of a failed connection, less the list of every address tried before."""
    text = text.rsplit("last error: ", 1)[-1].rsplit("Failed to connect to remote host: ", 1)[-1]
    text = text.removeprefix("UNAVAILABLE: ").removeprefix("UNKNOWN: ").strip()
    if "SSL_ERROR_SSL: " in text:
        text = "the TLS handshake failed: " + text.rpartition("OPENSSL_internal:")[2].removesuffix(
            ": OK"
        )
    return text or "no connection"
