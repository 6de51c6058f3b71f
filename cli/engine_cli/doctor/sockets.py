"""What the protocol `socket` works with: the token, the certificates, and memory of other processes
of this user.
"""

from __future__ import annotations

import ssl
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine_cli.doctor.child import Died, Fact, Late, Probe
from engine_cli.doctor.finding import Finding, described, fail, ok, warn
from engine_cli.doctor.runner import Skip
from engine_cli.doctor.tls import good_for, reason_of, shake_hands
from engine_cli.render.tables import size
from engine_registry.schema.address import is_loopback

if TYPE_CHECKING:
    from engine_loader import SocketCredentials

_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
_TOKEN, _TLS, _SAME_HOST = "socket.token", "socket.tls", "socket.same_host"


def check_credentials(host: Callable[[], str]) -> Iterator[Finding]:
    """`host` says what a rank here would register, or raises Skip."""
    from engine_loader import SocketCredentials

    credentials = SocketCredentials.from_environment()
    yield judge_token(credentials)
    try:
        address = host()
    except Skip:  # network.address says so
        address = ""
    yield judge_tls(credentials, address, time.time())


def judge_token(credentials: SocketCredentials) -> Finding:
    file = credentials.token_file
    if not file:
        if credentials.cert:
            return ok(_TOKEN, "none: whoever has a certificate of the authority may read")
        return warn(
            _TOKEN,
            "none: whoever reaches the port of a rank here may read its weights",
            "write a secret of 32 bytes or more to a file of all engines, and name that in "
            "ENGINES_SOCKET_TOKEN_FILE",
        )
    try:
        token = credentials.token()
        mode = Path(file).stat().st_mode
    except (OSError, ValueError) as exc:
        return fail(_TOKEN, f"the token cannot be used: {exc}", "look at ENGINES_SOCKET_TOKEN_FILE")
    what = f"of {len(token)} bytes, in {file}"
    if mode & stat.S_IROTH:
        return warn(
            _TOKEN,
            f"{what}, which every user of this machine can read",
            f"chmod o-r {file}",
        )
    return ok(_TOKEN, what)


def judge_tls(credentials: SocketCredentials, host: str, now: float) -> Finding:
    """`host` is empty where it is not known."""
    from engine_loader.errors import EngineUnavailable

    if not (credentials.cert or credentials.key or credentials.cacert):
        if is_loopback(host):
            return ok(_TLS, "off, and peers at a loopback address are on this machine")
        return warn(
            _TLS,
            "off: any machine on the way to a reader can read and change the weights",
            "give each machine a certificate: ENGINES_SOCKET_CERT, _KEY and _CACERT",
        )
    try:
        replace(credentials, token_file="").check()
    except EngineUnavailable as exc:
        return fail(_TLS, *described(exc))
    try:
        until = _met_itself(credentials, host)
    except (OSError, ValueError) as exc:
        return fail(
            _TLS,
            f"the certificate {credentials.cert} is not accepted: {reason_of(exc)}",
            "it needs the address of --host among its names, dates that hold now, the usages "
            "serverAuth and clientAuth or none, and an authority in ENGINES_SOCKET_CACERT",
        )
    return good_for(
        _TLS, f"the certificate {credentials.cert}", until - now, "renew it in its file"
    )


def _met_itself(credentials: SocketCredentials, host: str) -> float:
    """When its certificate ends, in seconds since the epoch, if both sides of a connection accept
    it. OSError, ValueError.
    """
    source, reader = credentials.context(server=True), credentials.context(server=False)
    if source is None or reader is None:
        raise ValueError("there is none")
    reader.check_hostname = bool(host)
    shown = shake_hands(source, reader, host.strip("[]") or None)
    return float(ssl.cert_time_to_seconds(str(shown["notAfter"])))


def check_same_host(probe: Probe, limit_s: float) -> Iterator[Finding]:
    """Whether this process can read memory of the probe's."""
    began = time.monotonic()
    for step in ("torch", "library", "engine", "loopback", "neighbour"):
        try:
            fact = probe.fact(step, max(0.1, began + limit_s - time.monotonic()))
        except (Died, Late) as exc:
            raise Skip("needs an engine that reads: see engine.loopback") from exc
        if fact["error"]:
            raise Skip(
                fact["error"]
                if step == "neighbour"
                else "needs an engine that reads: see engine.torch and engine.loopback"
            )
    yield judge_same_host(fact, _why_not(fact), _scope())


def _why_not(fact: Fact) -> str:
    """Its memory cannot be read; empty if it can."""
    import numpy as np

    from engine_loader.engines.sockets.memory import pieces_of, read_process

    wanted = bytes.fromhex(fact["content"])
    found = np.zeros(len(wanted), np.uint8)
    try:
        read_process(fact["pid"], pieces_of(found), np.array([(fact["addr"], len(found))], "u8"))
    except OSError as exc:
        return exc.strerror or str(exc)
    return "" if found.tobytes() == wanted else "other bytes were read"


def _scope() -> int:
    """Of Yama; 0 where the kernel has none of it."""
    try:
        return int(_SCOPE.read_text())
    except (OSError, ValueError):
        return 0


def judge_same_host(fact: Fact, why_not: str, scope: int) -> Finding:
    yama = f" (kernel.yama.ptrace_scope = {scope})" if scope else ""
    if why_not:
        return warn(
            _SAME_HOST,
            f"memory of another process cannot be read: {why_not}{yama}, so reads within this host "
            "go over connections",
            "sysctl kernel.yama.ptrace_scope=1; in a container: one pid namespace for source and "
            "reader, and a seccomp profile with process_vm_readv",
        )
    speed = size(fact["nbytes"] / fact["seconds"])
    return ok(
        _SAME_HOST,
        f"processes of this user read each other's memory without the network, at {speed}/s{yama}",
    )
