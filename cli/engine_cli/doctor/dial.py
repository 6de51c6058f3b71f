"""Whether something listens at an address, and if not, in which way not.

Each says something else about what to mend.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from enum import Enum
from typing import Any

from engine_cli.doctor.finding import duration
from engine_cli.doctor.runner import within


class Trouble(str, Enum):
    NAME = "name"  # the host's name leads to no address
    REFUSED = "refused"  # the machine answers that nobody listens
    SILENT = "silent"  # nothing comes back
    NO_WAY = "no way"  # the system says that there is no way there


@dataclass(frozen=True)
class Dialled:
    seconds: float  # until the connection stood, or the trouble showed
    trouble: Trouble | None = None
    detail: str = ""


def dial(host: str, port: int, limit_s: float) -> Dialled:
    """One connection, made and closed in order."""
    began = time.monotonic()
    try:
        addresses = _addresses(host, port, limit_s)
    except OSError as exc:
        return Dialled(time.monotonic() - began, Trouble.NAME, exc.strerror or str(exc))
    trouble, detail = Trouble.SILENT, ""
    for family, kind, number, _, address in addresses:
        left_s = began + limit_s - time.monotonic()
        if left_s <= 0:
            break
        try:
            with socket.socket(family, kind, number) as sock:
                sock.settimeout(left_s)
                sock.connect(address)
                if sock.getsockname() == sock.getpeername():
                    # a free port of our own, at which the connection has met itself
                    raise ConnectionRefusedError
                return Dialled(time.monotonic() - began)
        except ConnectionRefusedError:
            trouble, detail = Trouble.REFUSED, str(address[0])
        except TimeoutError:
            trouble, detail = Trouble.SILENT, str(address[0])
        except OSError as exc:
            trouble, detail = Trouble.NO_WAY, exc.strerror or str(exc)
    return Dialled(time.monotonic() - began, trouble, detail)


def _addresses(host: str, port: int, limit_s: float) -> list[Any]:
    """getaddrinfo itself may take half a minute where no name server answers."""
    try:
        return list(
            within(limit_s, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        )
    except UnicodeError as exc:
        raise OSError(str(exc)) from exc


def problem_of(line: Dialled) -> str:
    """What is wrong with the address of a rank."""
    if line.trouble is Trouble.REFUSED:
        return "nobody listens there"
    if line.trouble is Trouble.SILENT:
        return f"no answer to a connection within {duration(line.seconds)}"
    return line.detail


def mend_of(line: Dialled, process: str) -> str:
    """What to do about it. `process` names the rank's."""
    if line.trouble is Trouble.REFUSED:
        return (
            f"{process} has ended, or its host was registered wrongly: it leaves etcd when its "
            "lease ends; else engines evict it"
        )
    if line.trouble is Trouble.NAME:
        return "register it with an address (--host), not a name"
    return (
        "is that machine up, and is there a way to it? ip route get, ping; a firewall? Peers "
        "need all unprivileged ports"
    )
