"""The fork servers of this run of the tests: each is started when it is first asked for, and ended
with the run.
"""

from __future__ import annotations

import atexit
import functools

from tests.support.forkserver import ForkServer


@functools.cache
def keepers() -> ForkServer:
    server = ForkServer(["engine_registry.registration.keeper.main"], "engine-registry-keeper")
    atexit.register(server.close)
    return server


@functools.cache
def programs() -> ForkServer:
    server = ForkServer(keepers=keepers())
    atexit.register(server.close)
    return server
