"""What gRPC, etcd3 and the operating system raise, as errors of ours: what happened, at which etcd, and what to do."""

from __future__ import annotations

from typing import Any

import grpc

from registry.errors import EtcdError, EtcdFull, EtcdRefused, EtcdUnavailable, HistoryLost, LeaseNotFound

# Every change of users or roles makes a JWT too old for good: only a new one helps.
_TOKEN_OLD = "revision of auth store is old"  # noqa: S105  what etcd says, not a token


def translate(endpoints: str, exc: Exception) -> EtcdError:
    """`exc` as one of ours; `endpoints` says where."""
    where = f"etcd at {endpoints}"
    if isinstance(exc, EtcdError):
        return exc
    if isinstance(exc, grpc.RpcError):
        code, text = exc.code(), (exc.details() or "").removeprefix("etcdserver: ")
        return _from_status(where, code, text)
    if isinstance(exc, FileNotFoundError | PermissionError):
        return EtcdRefused(f"cannot read {exc.filename}: {exc.strerror}: check --cacert, --cert and --key")
    return EtcdUnavailable(f"{where} cannot be reached: {exc}: check the address and that etcd is running")


def _from_status(where: str, code: Any, text: str) -> EtcdError:
    status = grpc.StatusCode
    if code is status.NOT_FOUND and "lease" in text:
        return LeaseNotFound(f"{where}: {text}")
    if code is status.OUT_OF_RANGE:
        return HistoryLost(f"{where}: {text}")
    if code is status.RESOURCE_EXHAUSTED and "space exceeded" in text:
        return EtcdFull(f"{where} is out of space (NOSPACE): compact and defragment it, then disarm the alarm")
    if "too large" in text or "larger than max" in text:
        return EtcdRefused(f"{where} refuses the request: it is too large ({text}): see etcd's --max-request-bytes")
    if code is status.PERMISSION_DENIED:
        return EtcdRefused(
            f"{where} denies permission: {text}: grant the user's role the keys under its namespace", reason="denied"
        )
    if code is status.INVALID_ARGUMENT and ("authentication failed" in text or "user name" in text):
        return EtcdRefused(f"{where} refuses the credentials: {text}: check --user and the password", reason="credentials")
    if code is status.FAILED_PRECONDITION and "authentication is not enabled" in text:
        return EtcdRefused(f"{where} has authentication turned off: leave out --user", reason="auth_off")
    if code is status.UNAUTHENTICATED or _TOKEN_OLD in text:
        return EtcdUnavailable(f"{where} does not accept the authentication token any more: {text}")
    if code is status.UNIMPLEMENTED or "http" in text.lower():
        return EtcdUnavailable(f"{where}: what answers there is not etcd 3 ({_short(text)}): check the address and port")
    if code is status.DEADLINE_EXCEEDED:
        return EtcdUnavailable(f"{where} does not answer in time: check the address, the network and that etcd has a quorum")
    if code in (
        status.UNAVAILABLE,
        status.CANCELLED,
        status.INTERNAL,
        status.RESOURCE_EXHAUSTED,
        status.ABORTED,
        status.UNKNOWN,
    ):
        return EtcdUnavailable(f"{where} cannot be reached: {_short(text)}: {_advice(text)}")
    return EtcdRefused(f"{where} refuses the request: {text}")


def from_cancelled_watch(reason: str) -> EtcdError:
    """A watch may be denied only because its token is old, so that is for the next call to find out: it gets a new one."""
    if "auth token" in reason or _TOKEN_OLD in reason or "permission denied" in reason:
        return EtcdUnavailable(f"etcd does not accept the authentication token for a watch: {reason}")
    return EtcdRefused(f"etcd refuses the watch: {reason or 'no reason given'}")


def _advice(text: str) -> str:
    if "handshake" in text.lower():
        return "TLS does not come about: check --cacert, --cert and --key"
    if text.endswith("Socket closed"):
        return "check the address, that etcd is running, and whether it speaks TLS (--cacert)"
    return "check the address and that etcd is running"


def _short(text: str) -> str:
    """gRPC's account of a failed connection, less the list of every address tried before."""
    text = text.rsplit("last error: ", 1)[-1].rsplit("Failed to connect to remote host: ", 1)[-1]
    return text.removeprefix("UNAVAILABLE: ").strip() or "no connection"
