"""Starts engines of the library, each under the environment that it needs."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from loader.errors import EngineUnavailable
from loader.mooncake_binding import Binding, import_library
from loader.mooncake_sockets import listening_at, look_up_every

# Mooncake ignores the protocol that it is given and looks at these when it starts.
_PROTOCOL_ENV: dict[str, dict[str, str]] = {
    "tcp": {"MC_FORCE_TCP": "1"},
    "nvlink_intra": {"MC_INTRANODE_NVLINK": "1"},
}
# An engine that ends waits for its listening thread to look up, and holds the GIL meanwhile.
_LOOK_UP_S = 0.05
_ENVIRONMENT = threading.Lock()


def start(host: str, protocol: str, device: str) -> Binding:
    """An engine that peers find at `host`; EngineUnavailable says why there is none."""
    env = {"MC_LOG_LEVEL": os.environ.get("MC_LOG_LEVEL", "ERROR")}
    with _environment({**env, **_PROTOCOL_ENV.get(protocol, {})}):
        library = import_library()  # reads some of its settings once, here
        try:
            binding = Binding(library, host, protocol, device)
        except EngineUnavailable as exc:
            raise EngineUnavailable(
                f"the transfer engine cannot start on {host!r} with protocol {protocol!r} and device "
                f"{device!r} ({exc}): check the device, and MC_LOG_LEVEL=INFO for more"
            ) from exc
    with listening_at(binding.port) as listener:
        if listener is not None:  # else it ends later, that is all
            look_up_every(_LOOK_UP_S, listener)
    return binding


@contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """None: not set. For one thread at a time: another that came in between would start under what this one has put back, and put
    back its."""
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
