"""Starts engines of the library under the environment that each needs, or says why one does not."""

from __future__ import annotations

import os
import resource
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from engine_loader.engines.mooncake.binding import Binding, import_library
from engine_loader.engines.mooncake.sockets import listening_at, look_up_every
from engine_loader.errors import EngineUnavailable

# Mooncake ignores the protocol that it is given and looks at these when it starts.
_PROTOCOL_ENV: dict[str, dict[str, str]] = {
    "tcp": {"MC_FORCE_TCP": "1"},
    "nvlink_intra": {"MC_INTRANODE_NVLINK": "1"},
}
# An engine that ends waits for its listening thread to look up, and holds the GIL meanwhile.
_LOOK_UP_S = 0.05
# Descriptors: the library takes 5 and an engine 6, the others are for connections. Where none is
# left, the library's Go runtime does not fail but ends the process.
_FILES = 24
_PORTS = ("MC_MIN_RPC_PORT", "MC_MAX_RPC_PORT")
_DEFAULT_PORTS = (15000, 17000)
_FEW = 0.02  # of 500 ports that are tried at random, so many are hardly found
_ENVIRONMENT = threading.Lock()


def load_library(family: str) -> None:
    """Imports it for engines of that family; EngineUnavailable.

    It reads some of its settings once, when it is imported.
    """
    with _environment(_settings(family)):
        import_library()


def start(host: str, family: str, protocol: str, device: str) -> Binding:
    """An engine that peers find at `host`, of that family; EngineUnavailable says why not."""
    if lack := _no_files():
        raise EngineUnavailable(
            f"the transfer engine cannot work on {host!r}: {lack.problem}", lack.remedy
        )
    with _environment({**_settings(family), **_PROTOCOL_ENV.get(protocol, {})}):
        library = import_library()
        try:
            binding = Binding(library, host, protocol, device)
        except EngineUnavailable as exc:
            problem, remedy = _no_files() or _no_ports() or _NO_REASON
            raise EngineUnavailable(
                f"the transfer engine cannot start on {host!r} with protocol {protocol!r} and "
                f"device {device!r} ({exc}){problem and f': {problem}'}",
                remedy,
            ) from exc
    with listening_at(binding.port) as listener:
        if listener is not None:  # else it ends later, that is all
            spoken = "IPv6" if listener.family == socket.AF_INET6 else "IPv4"
            if spoken != family:
                # A process has engines of one family. They do not read from those of the other.
                binding.end()
                raise EngineUnavailable(
                    f"{host!r} is an address of {family}, but the transfer engine of this process "
                    f"was loaded to speak {spoken}",
                    f"give a `host` of {spoken}, or do this in a separate process",
                )
            look_up_every(_LOOK_UP_S, listener)
    return binding


def _settings(family: str) -> dict[str, str | None]:
    return {
        "MC_LOG_LEVEL": os.environ.get("MC_LOG_LEVEL", "ERROR"),
        "MC_USE_IPV6": "1" if family == "IPv6" else None,
    }


class _Lack(NamedTuple):
    """Why an engine cannot start here, as far as it is known, and what to do."""

    problem: str
    remedy: str


_NO_REASON = _Lack("", "check the `device`, and set MC_LOG_LEVEL=INFO for more")


def _no_files() -> _Lack | None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        left = limit - len(os.listdir("/proc/self/fd"))
    except OSError:
        left = 0
    if limit == resource.RLIM_INFINITY or left >= _FILES:
        return None
    return _Lack(
        f"this process may have {limit} files open and can open {left} more, {_FILES} at least "
        "are needed",
        "raise ulimit -n",
    )


def _no_ports() -> _Lack | None:
    low, high = (_port(name, default) for name, default in zip(_PORTS, _DEFAULT_PORTS, strict=True))
    free = sum(map(_is_free, range(low, high + 1)))
    if free >= max(2, _FEW * (high - low + 1)):
        return None
    return _Lack(
        f"it takes two of the ports {low} to {high}, of which {free} are free",
        f"end what holds them (ss -ltnp), or set {' and '.join(_PORTS)} to others",
    )


def _port(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() and int(text) < 65536 else default


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


@contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """None: not set. For one thread at a time: another that came in between would start under what
    this one has put back, and put back its."""
    with _ENVIRONMENT:
        before = {name: os.environ.get(name) for name in values}
        _set(values)
        try:
            yield
        finally:
            _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
